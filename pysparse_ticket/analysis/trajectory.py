"""How weights moved over the steps of a search (Vandersmissen et al. 2023, the experiment on what tickets share).

A trajectory is a sequence of ``{parameter name: tensor}``, the weights at each pruning step, earliest first; state
dictionaries do, and only the names that all of them hold are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def sign_flips(trajectory: Sequence[State]) -> dict[str, Tensor]:
    """How often each weight changed its sign from one step to the next, int64 of the weight's shape.

    A zero has no sign: a pruned weight, or one on its way through zero, keeps the last sign that it had. The paper's
    flipped weights, those with a sign at any step unlike the others', are the ones above 0.
    """
    flips = {}
    for name, steps in _stacked(trajectory).items():
        last = torch.zeros_like(steps[0])
        count = torch.zeros(steps[0].shape, dtype=torch.int64, device=steps.device)
        for sign in steps.sign():
            count += sign * last < 0
            last = torch.where(sign == 0, last, sign)
        flips[name] = count
    return flips


def weight_spread(trajectory: Sequence[State]) -> dict[str, Tensor]:
    """Standard deviation of each weight over the steps (divisor: their number), float64 of the weight's shape."""
    return {name: steps.std(0, correction=0) for name, steps in _stacked(trajectory).items()}


def weight_travel(trajectory: Sequence[State]) -> dict[str, Tensor]:
    """|last - first| of each weight, float64 of the weight's shape."""
    return {name: (steps[-1] - steps[0]).abs() for name, steps in _stacked(trajectory).items()}


def _stacked(trajectory: Sequence[State]) -> dict[str, Tensor]:
    """{name: float64 [steps, ...]} of the floating-point tensors."""
    if len(trajectory) < 2:
        raise ValueError(f"a trajectory needs the weights of two steps or more, not of {len(trajectory)}")
    shared = [n for n, t in trajectory[0].items() if t.is_floating_point() and all(n in state for state in trajectory)]
    if not shared:
        raise ValueError("no weight is in every step of the trajectory")
    for name in shared:
        if len(shapes := {tuple(state[name].shape) for state in trajectory}) > 1:
            raise ValueError(f"{name} changes its shape along the trajectory: {sorted(shapes)}; collect dense weights")
    return {name: torch.stack([state[name].detach().double() for state in trajectory]) for name in shared}
