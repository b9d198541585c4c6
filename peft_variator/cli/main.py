"""Entry point of the `peft-variator` command; every command lives in a file of its own beside this one."""

from __future__ import annotations

import typer

from .bench import bench


__all__ = ["app"]

app = typer.Typer(help="Make the models you already have cheaper to run.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Make the models you already have cheaper to run."""


app.command()(bench)

if __name__ == "__main__":
    app()
