"""What most results look like on the terminal: a name and a text in each line."""

from __future__ import annotations

from rich.table import Table


def two_columns() -> Table:
    """Without frame or heading; long texts fold."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
