"""Tables as they fit a terminal: figures are never broken, names and heads may be folded."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Column, Table


__all__ = ["fit_table"]

# What a name is not folded below.
NARROWEST_NAME = 16
UNBOUNDED = 10_000


def fit_table(table: Table, console: Console) -> list[Table]:
    """A table as it fits a console.

    Where it is too wide, its heads are folded between words; then the air between its columns goes; then its names are
    folded; then it is cut into tables that each have the names.

    Args:
        table: its first column has names, the others have figures; its box draws no lines between columns.
        console: where it is to be printed.
    """
    if console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum <= console.width:
        return [table]
    names, *figures = table.columns
    name = _widths(names, console)[0]
    least, whole = zip(*(_widths(column, console) for column in figures), strict=True)
    for is_tight in (False, True):
        room = console.width - _air(1 + len(figures), is_tight) - name
        if sum(least) <= room:
            return [_part(table, [name, *_unfolded(least, whole, room)], range(len(figures)), is_tight)]
    name = min(name, max(name + room - sum(least), NARROWEST_NAME))
    parts: list[list[int]] = [[]]
    for index in range(len(figures)):
        wanted = [*parts[-1], index]
        if parts[-1] and name + sum(least[each] for each in wanted) + _air(1 + len(wanted), True) > console.width:
            parts.append([index])
        else:
            parts[-1] = wanted
    made = [_part(table, [name, *(least[each] for each in part)], part, True) for part in parts]
    for each in made[1:]:
        each.title = None
    for each in made[:-1]:
        each.caption = None
    return made


def _widths(column: Column, console: Console) -> tuple[int, int]:
    """The least width at which no cell and no word of the head is broken, and that at which the head is not folded."""
    options = console.options.update(max_width=UNBOUNDED)

    def measure(cell: RenderableType) -> tuple[int, int]:
        found = console.measure(cell, options=options)
        return found.minimum, found.maximum

    word, head = measure(column.header)
    cells = max((measure(cell)[1] for cell in column.cells), default=1)
    return max(word, cells), max(head, cells)


def _unfolded(least: Sequence[int], whole: Sequence[int], room: int) -> list[int]:
    """Widths in which as many heads as there is room for are not folded, those that want little of it first."""
    widths = list(least)
    for index in sorted(range(len(widths)), key=lambda index: whole[index] - least[index]):
        if sum(widths) + whole[index] - least[index] <= room:
            widths[index] = whole[index]
    return widths


def _air(columns: int, is_tight: bool) -> int:
    """What a table of so many columns takes beside its cells: one between columns, else one on each side too."""
    return columns - 1 if is_tight else 3 * columns + 1


def _part(table: Table, widths: Sequence[int], figures: Sequence[int], is_tight: bool) -> Table:
    """A table with the names and some of the figures, by their places, in columns of these widths."""
    made = Table(
        title=table.title,
        caption=table.caption,
        caption_justify=table.caption_justify,
        box=table.box,
        padding=(0, 0) if is_tight else (0, 1),
        show_edge=not is_tight,
    )
    columns = [table.columns[0], *(table.columns[1 + each] for each in figures)]
    for column, width in zip(columns, widths, strict=True):
        made.add_column(column.header, width=width, justify=column.justify, style=column.style, overflow="fold")
    for row, *cells in zip(table.rows, *(column.cells for column in columns), strict=True):
        made.add_row(*cells, style=row.style, end_section=row.end_section)
    return made
