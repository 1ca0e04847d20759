"""What a weight is worth: a model (and data) to ``{parameter name: float64 tensor}``, where the lowest goes first."""

from __future__ import annotations

from .activation import BLOCK_SCORES
from .gradient import grasp, grasp_magnitude, grasp_signed, snip, snip_scaled
from .importance import IMPORTANCES, as_score, layerwise
from .magnitude import magnitude, prunable, random
from .synflow import synflow

SCORES = {
    "magnitude": magnitude,
    "random": random,
    "snip": snip,
    "grasp": grasp,
    "grasp-signed": grasp_signed,
    "snip-scaled": snip_scaled,
    "grasp-magnitude": grasp_magnitude,
    "synflow": synflow,
}
SCORES |= {name: as_score(name) for name in IMPORTANCES if name not in SCORES}

__all__ = [
    "BLOCK_SCORES",
    "IMPORTANCES",
    "SCORES",
    "grasp",
    "grasp_magnitude",
    "grasp_signed",
    "layerwise",
    "lookup",
    "magnitude",
    "prunable",
    "random",
    "snip",
    "snip_scaled",
    "synflow",
]


def lookup(name: str):
    """The score of that name; ValueError lists the known ones."""
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}; known: {', '.join(SCORES)}")
    return SCORES[name]
