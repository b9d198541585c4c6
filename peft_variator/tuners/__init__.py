"""The adapter methods, one folder each."""
