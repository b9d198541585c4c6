"""`python -m peft_variator`, and what the `peft-variator` script calls."""

import sys


__all__ = ["main"]


def main() -> None:
    """Run the command; Ctrl-C while it is still being imported ends it like any other, with a word and status 130."""
    try:
        from .cli.main import app

        app(prog_name="peft-variator")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
