"""Whether two trained networks lie in one valley: the straight line between their states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Connectivity:
    """``values[i]`` is what ``evaluate`` returned at ``(1 - alphas[i]) a + alphas[i] b``."""

    alphas: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def ends(self) -> float:
        """Mean of the two end values, against which Frankle et al. 2020 (2) measure a barrier."""
        return (self.values[0] + self.values[-1]) / 2

    @property
    def max_drop(self) -> float:
        """The mean of the ends minus the lowest value: the barrier of an accuracy, never below 0."""
        return self.ends - min(self.values)

    @property
    def max_rise(self) -> float:
        """The highest value minus the mean of the ends: the barrier of an error or a loss, never below 0."""
        return max(self.values) - self.ends


def linear_connectivity(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    points: int = 21,
    recalibrate=None,
) -> Connectivity:
    """Evaluate the model along the straight line between two states (Frankle et al. 2020, 2; 21 points as Chen et al.
    2021 take them).

    The whole state is averaged, in float64, running statistics of batch norm included; counts are rounded, and the ends
    are the given states bit for bit. Averaged statistics fit no averaged weights: ``recalibrate``, x or a list of
    x or (x, y), measures them anew at every point, ends too, as a plain mean over the batches. ``evaluate`` gets a copy
    of the model in evaluation mode, without gradients. Raises ValueError for states that are not of this model, or
    fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"a line has two points or more, not {points}")
    own = model.state_dict()
    for which, state in (("first", state_a), ("second", state_b)):
        for name in (*own, *state):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise ValueError(f"the {which} state is not of this model: they differ in {name}")
    batches = None
    if recalibrate is not None:
        batches = [recalibrate] if isinstance(recalibrate, Tensor) else list(recalibrate)
    twin = copy.deepcopy(model)
    alphas = tuple(i / (points - 1) for i in range(points))
    values = []
    for alpha in alphas:
        twin.load_state_dict({name: _between(state_a[name], state_b[name], alpha) for name in own})
        twin.eval()
        if batches is not None:
            _measure_statistics(twin, batches)
        with torch.no_grad():
            values.append(float(evaluate(twin)))
    return Connectivity(alphas, tuple(values))


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha in (0.0, 1.0):
        return a if alpha == 0.0 else b
    mixed = a.double() * (1 - alpha) + b.double().to(a.device) * alpha
    return mixed.to(a.dtype) if a.is_floating_point() else mixed.round().to(a.dtype)


def _measure_statistics(model: nn.Module, batches: list) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch if isinstance(batch, Tensor) else batch[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
