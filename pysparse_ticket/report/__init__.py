"""Tables, plots and the machine line."""

from .machine import machine, machine_line
from .plot import plot_arms
from .table import cells, markdown_table, rich_table

__all__ = ["cells", "machine", "machine_line", "markdown_table", "plot_arms", "rich_table"]
