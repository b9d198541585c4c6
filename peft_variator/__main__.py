"""`python -m peft_variator`, and what the `peft-variator` script calls."""

import sys


__all__ = ["main"]


def main() -> None:
    """Run the command; Ctrl-C before it has begun ends it like any other, with a word and status 130."""
    try:
        from .cli.main import app

        app(prog_name="peft-variator")
    except (KeyboardInterrupt, SystemExit) as end:
        # While options are read, typer makes the status of Ctrl-C and says nothing; see `cli.console.Interrupted`.
        if isinstance(end, SystemExit) and (end.code != 130 or getattr(end.__context__, "told", False)):
            raise
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
