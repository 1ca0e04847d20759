"""Ways to find a ticket; each composes a score, a granularity, a selection and a schedule."""

from .after_training import after_training
from .at_init import at_init
from .dynamic import Dynamic, dynamic
from .elastic import elastic
from .filter_twin import filter_twin, filters_removed
from .imp import imp

__all__ = [
    "Dynamic",
    "after_training",
    "at_init",
    "dynamic",
    "elastic",
    "filter_twin",
    "filters_removed",
    "imp",
]
