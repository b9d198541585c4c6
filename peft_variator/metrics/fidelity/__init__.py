"""Metric `fidelity`; load it with `peft_variator.metrics.load("fidelity")`."""
