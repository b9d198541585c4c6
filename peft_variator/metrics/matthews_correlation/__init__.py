"""Metric `matthews_correlation`; load it with `peft_variator.metrics.load("matthews_correlation")`."""
