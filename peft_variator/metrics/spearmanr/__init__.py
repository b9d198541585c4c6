"""Metric `spearmanr`; load it with `peft_variator.metrics.load("spearmanr")`."""
