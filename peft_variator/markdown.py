"""Markdown that programs write: tables, and the part of a page between two markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


__all__ = ["make_table", "replace_between"]


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table whose first columns are text, aligned left, and whose others are numbers, aligned right.

    Args:
        head: titles of the columns.
        rows: cells of each row.
        text_columns: how many columns are text.
    """
    lines = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(page: str, name: str, body: str) -> str:
    """`page` with `body` between its markers `<!-- name -->` and `<!-- /name -->`, a blank line on either side.

    Raises:
        ValueError: the page does not have each marker once, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found or page.count(begin) + page.count(end) != 2:
        raise ValueError(f"The page must have the lines {begin!r} and {end!r} once each, in this order.")
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"
