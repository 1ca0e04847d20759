"""Stages of repeated units, found from the names and shapes of a network's parameters.

A unit is one child of a Sequential or ModuleList: a residual block, a convolution with its batch norm, a linear layer
(Chen et al. 2021, section 3), a transformer layer. Names say enough, so that a ticket's own record of its network will
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
Unit = tuple[str, ...]  # the modules that make it up
Stage = tuple[Unit, ...]


def find_stages(shapes: Mapping[str, Shape]) -> tuple[Stage, ...]:
    """The stages of the network whose parameters are ``{name: shape}``, in model order.

    Numbered modules that have modules below them are units; a numbered module that holds such units is none itself,
    and what lies inside a unit is not one. In a network without any, the numbered layers are. A stage is a run of units
    of one container: the first one, then those with the shapes of the unit before, or that take what it returns and
    return the same. A network that ends in a numbered layer has that classifier as a stage of its own.
    """
    inside: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if part.isdigit():
                inside.setdefault(".".join(parts[: i + 1]), {})[".".join(parts[i + 1 :])] = shape
    composite = [unit for unit, entries in inside.items() if any("." in entry for entry in entries)]
    found = composite or list(inside)
    containers = {_parent(unit) for unit in found}
    blocks = [unit for unit in found if unit not in containers]
    blocks = [unit for unit in blocks if not any(unit.startswith(f"{other}.") for other in blocks)]
    homes = {_parent(unit) for unit in blocks}
    units = [
        unit for unit in inside if _parent(unit) in homes and not any(block.startswith(f"{unit}.") for block in blocks)
    ]
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    classifier = matrices[-1].rpartition(".")[0] if matrices and not composite else None

    stages: list[list[str]] = []
    for unit in units:
        before = stages[-1][-1] if stages else None
        if before is None or unit == classifier or _parent(before) != _parent(unit):
            stages.append([unit])
        elif inside[before] == inside[unit] or (len(stages[-1]) == 1 and _goes_on(inside[before], inside[unit])):
            stages[-1].append(unit)
        else:
            stages.append([unit])
    return tuple(tuple((unit,) for unit in stage) for stage in stages)


def named_stages(names: Sequence, shapes: Mapping[str, Shape]) -> tuple[Stage, ...]:
    """Stages by the user's own names: containers whose numbered children are the units, or lists of units, each a
    module's name or a tuple of several. ValueError for a name without parameters and for a module used twice."""
    stages = []
    for stage in names:
        if isinstance(stage, str):
            depth = stage.count(".") + 1 if stage else 0
            below = {
                ".".join(name.split(".")[: depth + 1])
                for name in shapes
                if (not stage or name.startswith(f"{stage}.")) and name.split(".")[depth].isdigit()
            }
            if not below:
                raise ValueError(
                    f"{stage!r} holds no numbered modules with parameters; name a Sequential or ModuleList"
                )
            stages.append(tuple((unit,) for unit in sorted(below, key=lambda unit: int(unit.split(".")[-1]))))
        else:
            stages.append(tuple((unit,) if isinstance(unit, str) else tuple(unit) for unit in stage))
    seen: set[str] = set()
    for module in (module for stage in stages for unit in stage for module in unit):
        if module in seen:
            raise ValueError(f"{module!r} is named as two units; name it once")
        if not any(name.startswith(f"{module}.") for name in shapes):
            raise ValueError(f"{module!r} is no module with parameters; known: {', '.join(_modules(shapes))}")
        seen.add(module)
    return tuple(stages)


def _goes_on(before: Mapping[str, Shape], unit: Mapping[str, Shape]) -> bool:
    """Whether the unit takes what the one before returns, and returns the same, judged by its weights' channels."""
    ours = [shape for shape in unit.values() if len(shape) > 1]
    theirs = [shape for shape in before.values() if len(shape) > 1]
    return bool(ours and theirs) and ours[0][1] == ours[-1][0] == theirs[-1][0]


def _parent(unit: str) -> str:
    return unit.rpartition(".")[0]


def _modules(shapes: Mapping[str, Shape]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in shapes))
