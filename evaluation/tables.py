"""Tables as Markdown, which a terminal shows in columns too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers, right-aligned.

    Args:
        titles: of the columns.
        rows: a text for each column.
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (titles, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(titles))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |\n"

    return "".join(row(cells) for cells in (lines[0], rule, *lines[1:]))
