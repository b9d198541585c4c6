"""The `peft-variator` command line: one file a command."""
