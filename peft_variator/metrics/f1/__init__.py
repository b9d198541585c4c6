"""Metric `f1`; load it with `peft_variator.metrics.load("f1")`."""
