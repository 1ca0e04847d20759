"""Lottery tickets that train faster than the dense network.

ticket = pst.at_init(model, batches, score="grasp", granularity="layer", remove=5)
model = pst.sparsify(model, ticket, sample=batch)
...your own training loop...
pst.densify(model)
"""

from . import analysis, measure, nn
from .nn import densify, sparsify
from .planner import plan
from .search import after_training, at_init, dynamic, elastic, filter_twin, imp
from .ticket import Ticket, TicketError, overlap

__version__ = "0.1.0"

__all__ = [
    "Ticket",
    "TicketError",
    "after_training",
    "analysis",
    "at_init",
    "densify",
    "dynamic",
    "elastic",
    "filter_twin",
    "imp",
    "measure",
    "nn",
    "overlap",
    "plan",
    "sparsify",
]
