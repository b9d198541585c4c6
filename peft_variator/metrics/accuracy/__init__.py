"""Metric `accuracy`; load it with `peft_variator.metrics.load("accuracy")`."""
