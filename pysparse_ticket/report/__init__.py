"""Tables, plots and the machine line."""

from .machine import machine, machine_line
from .plot import plot_arms
from .table import STEP_COLUMNS, cells, markdown_table, rich_table

__all__ = ["STEP_COLUMNS", "cells", "machine", "machine_line", "markdown_table", "plot_arms", "rich_table"]
