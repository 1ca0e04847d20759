"""``nn.Linear`` with a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.library import CPU_ERROR
from ..ops.masked_linear import linear_schedule, masked_linear
from ..ops.pattern import Pattern
from .masked import MaskedModule


class MaskedLinear(MaskedModule):
    """Equal to ``F.linear(x, weight * mask, bias)``; x ``[..., in_features]`` to ``[..., out_features]``."""

    def __init__(self, module: nn.Linear, mask: Tensor) -> None:
        super().__init__(module, mask)
        self.in_features, self.out_features = module.in_features, module.out_features
        forward, backward = (None, None) if CPU_ERROR else linear_schedule(self.pattern)
        self.register_buffer("schedule", forward, persistent=False)
        self.register_buffer("t_schedule", backward, persistent=False)
        self._pack_if_possible()

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor) -> MaskedLinear:
        """A packed copy of ``module`` with the weights under the bool ``mask`` ``[out_features, in_features]`` kept.

        ValueError for a mask of another shape or dtype."""
        return cls(module, mask)

    def to_dense(self) -> nn.Linear:
        """A plain copy, zeros where pruned."""
        weight = self.weight
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        return self._to_dense(dense)

    def forward(self, x: Tensor) -> Tensor:
        if self.format == "dense":
            return F.linear(x, self.masked_weight(), self.bias)
        schedules = None if self.schedule is None else (self.schedule, self.t_schedule)
        return masked_linear(x, self.values, self.bias, self.pattern, schedules=schedules)

    def _set_pattern(self, pattern: Pattern) -> None:
        super()._set_pattern(pattern)
        if self.schedule is not None:
            self.schedule, self.t_schedule = (t.to(self.schedule.device) for t in linear_schedule(pattern))

    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.reshape(-1, self.out_features).T @ x.reshape(-1, self.in_features)

    def macs(self, input: Tensor, output: Tensor) -> int:
        """Multiply-adds of the surviving weights for the whole batch."""
        return self.nnz * (output.numel() // self.out_features if self.out_features else 0)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + super().extra_repr()
        )
