"""Metric `nearest_neighbour`; load it with `peft_variator.metrics.load("nearest_neighbour")`."""
