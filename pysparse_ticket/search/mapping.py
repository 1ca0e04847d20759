"""Which unit of a source network fills which unit of a target, as strings and by rule (Chen et al. 2021, section 3).

A stage has units 0, 1, 2, ...; unit 0 opens the stage (in a ResNet it changes the shape) and is copied as it is, the
others are the normal units that a transfer repeats or drops. ``"0:0;1:1,5;2:2,6"`` sends source unit 1 to the target
units 1 and 5; stages are separated by ``|``, and one stage alone stands for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

ORDERS = ("append", "interpolate")

StageMap = Mapping[int, tuple[int, ...]]


def read_mapping(text: str) -> tuple[dict[int, tuple[int, ...]], ...]:
    """``"src:dst[,dst...];...|..."`` to one {source unit: its target units} a stage.

    Raises ValueError for anything else, for a source unit listed twice and for a target unit assigned twice.
    """
    stages = []
    for number, part in enumerate(text.split("|"), 1):
        stage: dict[int, tuple[int, ...]] = {}
        filled: set[int] = set()
        for entry in part.strip().strip(";").split(";"):
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\s*,\s*\d+)*)\s*", entry)
            if not match:
                raise ValueError(f"mapping entry {entry!r} is not src:dst[,dst...], as in '0:0;1:1,5;2:2,6'")
            source, targets = int(match[1]), tuple(int(unit) for unit in match[2].split(","))
            if source in stage:
                raise ValueError(f"stage {number} of the mapping lists source unit {source} twice; join its targets")
            for unit in targets:
                if unit in filled:
                    raise ValueError(f"stage {number} of the mapping assigns target unit {unit} twice; keep one source")
                filled.add(unit)
            stage[source] = targets
        stages.append(stage)
    return tuple(stages)


def write_mapping(stages: Sequence[StageMap]) -> str:
    """The string of these stages: one stage if all are equal, else each, separated by ``|``."""
    texts = [";".join(f"{s}:{','.join(map(str, stage[s]))}" for s in sorted(stage)) for stage in stages]
    return texts[0] if len(set(texts)) == 1 else "|".join(texts)


def stage_mapping(source: int, target: int, order: str = "append", units: int | None = None) -> dict[int, tuple]:
    """The mapping of one stage of ``source`` units to one of ``target`` units, unit 0 counted in both.

    A stretch repeats the first ``units`` normal units (all of them by default), equally often as far as the numbers
    divide, the earliest once more where they do not: with 2 normal units, 8 are 4 copies of each, 5 are 3 of the first
    and 2 of the second. ``"append"`` runs through the units again and again (1 2 1 2), ``"interpolate"`` puts copies
    side by side (1 1 2 2). A squeeze keeps the earliest units, or with ``"interpolate"`` drops at intervals: the
    inverse of the stretch of that order either way.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
    old, new = source - 1, target - 1
    if new <= old:
        if order == "append":
            kept = list(range(1, new + 1))
        else:
            runs = _shares(old, new)
            kept = [1 + sum(runs[:i]) for i in range(new)]
        return {0: (0,)} | {unit: (place,) for place, unit in enumerate(kept, 1)}
    if not old:
        raise ValueError(f"a stage of one unit has no normal unit to fill {new} more with")
    repeated = old if units is None else units
    if not 1 <= repeated <= old:
        raise ValueError(f"units must be 'all' or 1 to {old}, the normal units of the source's stage, not {units}")
    copies = _shares(new - (old - repeated), repeated) + [1] * (old - repeated)
    if order == "append":
        filled = [u for turn in range(max(copies)) for u in range(1, old + 1) if copies[u - 1] > turn]
    else:
        filled = [u for u in range(1, old + 1) for _ in range(copies[u - 1])]
    return {0: (0,)} | {
        unit: tuple(place for place, u in enumerate(filled, 1) if u == unit) for unit in range(1, old + 1)
    }


def check_stage(stage: StageMap, source: int, target: int, number: int) -> None:
    """ValueError if a stage's mapping names a unit that is not there, or leaves one of the target's empty."""
    if missing := sorted(unit for unit in stage if unit >= source):
        raise ValueError(
            f"stage {number} of the mapping names source unit {missing[0]}, but the source has units 0 to {source - 1}"
        )
    filled = [unit for units in stage.values() for unit in units]
    if beyond := sorted(unit for unit in filled if unit >= target):
        raise ValueError(
            f"stage {number} of the mapping fills target unit {beyond[0]}, but the target has units 0 to {target - 1}"
        )
    if empty := sorted(set(range(target)) - set(filled)):
        raise ValueError(f"stage {number} of the mapping leaves target unit {empty[0]} empty; give it a source unit")


def _shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` shares as equal as can be, the earliest the larger."""
    return [total // parts + (i < total % parts) for i in range(parts)]
