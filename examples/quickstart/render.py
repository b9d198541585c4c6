"""Write the table of docs/quickstart.md and its picture from the results of a run.

cp outputs/quickstart/results.json examples/quickstart/
python examples/quickstart/render.py           # writes the page and the picture
python examples/quickstart/render.py --check   # only says, by its exit status, whether the page is up to date
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from plot import save_plot
from report import make_markdown
from results import Results

from peft_variator.files import write_text
from peft_variator.markdown import replace_between


__all__ = ["main"]

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"


def main(
    results: Annotated[Path, typer.Option(help="What quickstart.py wrote.")] = HERE / "results.json",
    page: Annotated[Path, typer.Option(help="The page with the markers.")] = DOCS / "quickstart.md",
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = DOCS / "images" / "quickstart.png",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is out of date.")] = False,
) -> None:
    """Write the page's table and the picture."""
    loaded = Results.load(results)
    old = page.read_text(encoding="utf-8")
    new = replace_between(old, "results", make_markdown(loaded))
    if check and new != old:
        typer.echo(f"{page} is out of date. Run: python examples/quickstart/render.py", err=True)
        raise typer.Exit(1)
    if not check:
        write_text(page, new)
        save_plot(loaded, picture)


if __name__ == "__main__":
    typer.run(main)
