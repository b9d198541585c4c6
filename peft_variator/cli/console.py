"""What every command shares when it talks to people and to other programs: tables, lines, JSON, errors, bars."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import _register
from ..files import check_new_file, is_of_full_disk, write_text


if TYPE_CHECKING:  # rich is imported when something is shown: help needs none of it
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table


__all__ = [
    "Reporter",
    "default_device",
    "errors_told",
    "next_commands",
    "option_words",
    "parse_ratios",
    "parse_shares",
    "parse_spans",
    "reported",
]

# A pipe has no width of its own, and rich would fold tables at 80 columns.
PIPE_WIDTH = 160
PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Interrupted(typer.Exit):
    """The end of a command by Ctrl-C, once that was said."""

    told = True


class FiguresError(OSError):
    """Figures were not written, after all else was."""


@dataclass(frozen=True)
class Reporter:
    """Where a command tells what it did.

    Args:
        json: file for the figures, `"-"` for standard output, whose place the text then leaves; `None`: nowhere.
        png: file for a picture, or `None`.
        quiet: whether only errors, warnings and JSON are written.
    """

    json: str | None = None
    png: Path | None = None
    quiet: bool = False

    def check(self) -> None:
        """Raise unless what `--json` and `--png` name can be written: before the work, not after it.

        With `--quiet` no bars of other libraries are drawn from here on.

        Raises:
            ImportError: `png` is given and matplotlib is not installed.
            OSError: a folder is there, or no file can be made there.
            ValueError: the name of a picture does not end in `.png`.
        """
        if self.quiet:
            _hide_other_bars()
        if self.json not in (None, "-"):
            _check_file("--json", Path(str(self.json)))
        if self.png is not None:
            _check_file("--png", self.png)
            if self.png.suffix.lower() != ".png":
                raise ValueError(f"--png is {str(self.png)!r}; the name has to end in .png, as the picture is one.")
            from ..profiling import check_plotting  # only now: the command's help needs no torch

            check_plotting()

    @property
    def console(self) -> Console:
        """The console for text; a table of figures is not folded in a pipe."""
        console = _console(quiet=self.quiet, stderr=self.json == "-")
        if not console.is_terminal:
            console.width = max(console.width, PIPE_WIDTH)
        return console

    def say(self, *lines: str) -> None:
        """Print lines as they are, paths and brackets included."""
        for line in lines:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print what the user has to know although it went well, on the error stream."""
        _console(stderr=True).print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def show_table(self, table: Table) -> None:
        """Print a table as wide as the terminal; what has no room in a row stands in parts below each other."""
        from .tables import fit_table

        console = self.console
        for part in fit_table(table, console):
            console.print(part)

    def show_figures(self, title: str, rows: Sequence[Sequence[str]], lines: Iterable[str]) -> None:
        """Print a table of figures, whose first row is its head, and plain lines below it."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        head, *body = ([escape(cell) for cell in row] for row in rows)
        table = Table(title=escape(title), box=box.SIMPLE_HEAD)
        for index, name in enumerate(head):
            table.add_column(name, justify="right" if index else "left")
        for row in body:
            table.add_row(*row)
        self.show_table(table)
        self.say(*lines)

    def write_json(self, text: str) -> None:
        """Write figures to where `--json` says, if it does, and name the file.

        Raises:
            FiguresError: the file can't be written. The figures, which took a whole run, are on standard output then.
        """
        text = text.rstrip("\n") + "\n"
        if self.json == "-":
            sys.stdout.write(text)
        elif self.json is not None:
            try:
                write_text(self.json, text)
            except OSError as error:
                sys.stdout.write(text)
                raise FiguresError(
                    f"--json: {self.json!r} was not written ({error.strerror or error}). The figures are on standard "
                    "output instead, and all else that the command makes is whole."
                ) from error
            self.say(f"Wrote {self.json}.")

    def progress(self, *columns: ProgressColumn) -> Progress:
        """A bar on the error stream that goes away, also above an error; none in a pipe."""
        from rich.progress import Progress

        console = _console(stderr=True)
        is_shown = console.is_terminal and not self.quiet
        if is_shown:
            _hide_other_bars()  # they would be drawn into this one
        return Progress(*columns, console=console, transient=True, disable=not is_shown)


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn the errors that bad input raises into their message on the error stream and exit status 1.

    Ctrl-C ends with a word and status 130. Anything else is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        _tell("Interrupted:", "stopped as asked. A file or folder that was being written is not under its name.")
        raise Interrupted(INTERRUPTED) from error
    except (ImportError, OSError, ValueError) as error:
        _tell("Error:", f"{error}{_advice(error)}")
        raise typer.Exit(1) from error
    except Exception as error:
        if not _is_failed_write(error):
            raise
        _tell("Error:", f"{error}{_advice(error) or ' Nothing was written under the name of the output.'}")
        raise typer.Exit(1) from error


@contextmanager
def reported() -> Iterator[None]:
    """Have the methods known, errors told as by `errors_told`, and warnings of ours as their words."""
    with errors_told():
        _register()
        if not sys.stderr.isatty():
            _hide_other_bars()  # nobody sees them move
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name; who types a command can do nothing about it.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            yield


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], filename: str, *place: Any
) -> None:
    """Print a warning of ours as its words: where in the code it was raised tells nothing to who types a command."""
    if Path(filename).is_relative_to(PACKAGE):
        Reporter().warn(str(message))
    else:
        otherwise(message, category, filename, *place)


def _hide_other_bars() -> None:
    """Have transformers and its Trainer, the Hub's client and datasets draw no bars."""
    from transformers.utils import logging  # only now: the command's help needs no transformers

    logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # datasets is imported when a data set is read, if at all
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _close_other_bars() -> None:
    """Take away the bars of other libraries that an error has cut off, which would be drawn once more, below it."""
    if "tqdm.std" in sys.modules:
        # tqdm has no public way to them, and itself asks for them so; not in compat, which takes seconds to import.
        for bar in list(getattr(sys.modules["tqdm.std"].tqdm, "_instances", ())):
            bar.leave = False
            bar.close()


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet)


def _tell(head: str, message: str) -> None:
    from rich.markup import escape

    _close_other_bars()
    _console(stderr=True).print(f"[bold red]{head}[/] {escape(message)}", highlight=False, soft_wrap=True)


def _is_failed_write(error: Exception) -> bool:
    """Whether a full disk, or a file that is none, raised what is no OSError: safetensors' and torch's own errors."""
    from safetensors import SafetensorError

    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and is_of_full_disk(error))


def _advice(error: Exception) -> str:
    """What to do about an error that came of a full disk, a quota or a limit of sizes; else nothing."""
    if isinstance(error, FiguresError) or not is_of_full_disk(error):
        return ""
    return (
        ". Nothing was written under the name of the output: free space there, or name an output on another disk, and "
        "run the command again."
    )


def next_commands(*commands: Sequence[object]) -> list[str]:
    """Lines that say which commands of ours to run next, to be pasted as they are."""
    lines = [shlex.join(["peft-variator", *map(str, words)]) for words in commands]
    return [f"{'      ' if index else 'Next: '}{line}" for index, line in enumerate(lines)]


def _check_file(name: str, path: Path) -> None:
    try:
        check_new_file(path)
    except OSError as error:
        raise type(error)(f"{name}: {error}") from error


def default_device(device: str | None) -> str:
    """The name of a device that was given; without one a GPU, if there is one."""
    import torch  # only now: the command's help needs no torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def option_words(
    job: Any,
    always: Container[str] = (),
    never: Container[str] = (),
    names: Mapping[str, str] = {},  # noqa: B006
) -> list[str]:
    """The options of a command line that say what the fields of a dataclass are, where that is not their default.

    Args:
        job: what a command does, a dataclass.
        always: fields that are named with their default, too.
        never: fields that are no options.
        names: what a field's option is called, where it is not by the field's name.
    """
    words: list[str] = []
    for item in fields(job):
        value, name = getattr(job, item.name), names.get(item.name, item.name).replace("_", "-")
        if item.name in never or (item.name not in always and value == item.default):
            continue
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list) and value and isinstance(value[0], str):
            words += [word for each in value for word in (f"--{name}", each)]
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def parse_shares(texts: Sequence[str] | None) -> list[float] | None:
    """`["0.3,0.45"]` as numbers; `None` if no option was given.

    Raises:
        ValueError: a part is no share.
    """
    if texts is None:
        return None
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        shares = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"--flops-saved is {','.join(parts)!r}; give shares of the FLOPs, e.g. 0.3,0.45.") from error
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"--flops-saved is {','.join(parts)}; a share lies between 0 and 1, e.g. 0.45.")
    return shares


def parse_spans(texts: Sequence[str] | None) -> list[list[int]] | None:
    """`["0-3,5-11"]` as pairs of numbers; `None` if no option was given.

    Raises:
        ValueError: a part is no span.
    """
    if texts is None:
        return None
    parts = [part.strip() for text in texts for part in text.split(",")]
    spans = [part.split("-") for part in parts]
    if not all(len(span) == 2 and all(number.isdecimal() for number in span) for span in spans):
        raise ValueError(f"--layer-spans is {','.join(parts)!r}; give first and last layers from 0, e.g. 0-3,5-11.")
    return [[int(number) for number in span] for span in spans]


def parse_ratios(texts: Sequence[str] | None) -> list[int] | None:
    """`["2,4", "8"]` as numbers, each of them once; `None` if no option was given.

    Raises:
        ValueError: a part is no whole number.
    """
    if texts is None:
        return None
    ratios: list[int] = []
    for text in texts:
        parts = text.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"--ratio is {text!r}; give whole numbers, with commas between them, e.g. 2,4,8.")
        ratios += [int(part) for part in parts]
    return list(dict.fromkeys(ratios))
