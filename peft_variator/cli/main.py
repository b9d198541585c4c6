"""Entry point of the `peft-variator` command; every command lives in a file of its own beside this one."""

from __future__ import annotations

import typer

from .bench import bench
from .inspect import inspect_command
from .merge import merge_command
from .pack import pack_command
from .prune import prune_command
from .restore import restore_command
from .train import train_command
from .unpack import unpack_command


__all__ = ["app"]

app = typer.Typer(help="Make the models you already have cheaper to run.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Make the models you already have cheaper to run."""


app.command()(bench)
app.command("inspect")(inspect_command)
app.command("merge")(merge_command)
app.command("pack")(pack_command)
app.command("prune")(prune_command)
app.command("restore")(restore_command)
app.command("train")(train_command)
app.command("unpack")(unpack_command)

if __name__ == "__main__":
    app()
