"""Metric `squad`; load it with `peft_variator.metrics.load("squad")`."""
