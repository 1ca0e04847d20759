"""Accuracy against training seconds, one curve an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_arms(arms: Sequence[Mapping], path: str | Path) -> None:
    """Each arm's mean accuracy over its seeds after each epoch, against its mean training seconds so far."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'pysparse-ticket[demo]'") from None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm in arms:
        curves = arm["curves"]
        count = min(len(c["seconds"]) for c in curves)
        seconds = [sum(c["seconds"][i] for c in curves) / len(curves) for i in range(count)]
        accuracy = [100 * sum(c["accuracy"][i] for c in curves) / len(curves) for i in range(count)]
        axes.plot(seconds, accuracy, marker="o", markersize=3, linewidth=1.5, label=arm["name"])
    axes.set_xlabel("training seconds (mean over seeds)")
    axes.set_ylabel("test accuracy %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
