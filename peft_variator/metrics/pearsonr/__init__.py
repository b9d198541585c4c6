"""Metric `pearsonr`; load it with `peft_variator.metrics.load("pearsonr")`."""
