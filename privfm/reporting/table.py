"""A table, for a terminal, a log and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@final
@dataclass(frozen=True)
class Column:
    """A column: its title, a shorter one for a terminal, and the field of the summary that it shows."""

    title: str
    short: str
    field: str


@final
@dataclass(frozen=True)
class TableRow:
    """One arm: its group and its cells, the title first."""

    group: str
    cells: tuple[str, ...]


@final
@dataclass(frozen=True)
class ReportTable:
    """A table of an experiment.

    Attributes:
      columns: arm, utility, its spread, the clean score of the same rule, and so on.
      rows: one an arm, in the index's order.
      notes: how to read the numbers.
      guarantees: one paragraph a private arm: the whole record of its epsilon.
      title: for readers.
      words: its cells are phrases, not numbers.
    """

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    guarantees: tuple[str, ...]
    title: str = "All arms"
    words: bool = False

    def groups(self) -> list[tuple[str, list[TableRow]]]:
        """The rows, with neighbours of one group together."""
        return [(group, list(rows)) for group, rows in groupby(self.rows, key=lambda row: row.group)]

    def markdown(self) -> str:
        """The table as aligned Markdown, readable as it is in a log; notes and guarantees below."""
        lines = [tuple(column.title for column in self.columns), *(row.cells for row in self.rows)]
        cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
        widths = [max(len(line[column]) for line in cells) for column in range(len(self.columns))]
        padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        rule = " | ".join("-" * width for width in widths)
        table = "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
        return "\n\n".join([table, *self.notes, *self.guarantees]) + "\n"

    def rich(self) -> Table:
        """The table for a terminal, with a line between groups; the notes are its caption."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            caption=Text("\n".join(self.notes)),
            caption_justify="left",
            pad_edge=False,
        )
        for number, column in enumerate(self.columns):
            table.add_column(Text(column.short), justify="left" if self.words or number == 0 else "right")
        for _, rows in self.groups():
            for row in rows:
                table.add_row(*(Text(cell) for cell in row.cells))
            table.add_section()
        return table


def show(tables: Sequence[ReportTable], console: Console) -> None:
    """Prints tables: with lines on a terminal, as plain Markdown into a pipe or a file."""
    for table in tables:
        if console.is_terminal:
            console.print(table.rich())
            for paragraph in table.guarantees:
                console.print(paragraph, markup=False, highlight=False)
        else:
            console.file.write(f"## {table.title}\n\n{table.markdown()}\n")
