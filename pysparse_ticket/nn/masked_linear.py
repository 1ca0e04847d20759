"""``nn.Linear`` with a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.library import CPU_ERROR
from ..ops.masked_linear import linear_schedule, masked_linear
from ..ops.masked_linear_tiles import masked_linear_tiles
from ..ops.pattern import Pattern
from ..ops.reordered_tiles import ReorderedTiles, reordered_linear_tiles
from ..ops.semi_structured import is_transposable
from ..ops.semi_structured_linear import (
    CompressedWeight,
    keep_out_of_graphs,
    semi_structured_linear,
    why_unfit,
    why_wrong,
)
from ..ops.tile_mask import TileMask
from ..ops.tile_order import LEAST_GAIN
from .masked import Layout, MaskedModule


class MaskedLinear(MaskedModule):
    """Equal to ``F.linear(x, weight * mask, bias)``; x ``[..., in_features]`` to ``[..., out_features]``.

    format "2:4"     as "packed", run by torch's semi-structured operators: a transposable 2:4 mask, float16 or bfloat16
    format "blocks"  the Parameter ``values`` ``[tiles, bn, bk]`` holds the tiles of the weight with a survivor, zeros
                     where pruned; GPU kernels
    format "reordered"  as "blocks", of the weight without dead rows and columns and with the others in an order that
                     empties tiles; x is gathered and y spread for it. The order is searched for once a mask
    """

    FORMATS = ("packed", "2:4", "blocks", "reordered", "dense")
    OP = "masked_linear"

    def __init__(self, module: nn.Linear, mask: Tensor) -> None:
        super().__init__(module, mask)
        self._compressed = CompressedWeight()
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
        if self.format == "2:4":
            return semi_structured_linear(x, self.values, self.bias, self.pattern, self._compressed)
        if self.format == "blocks":
            return masked_linear_tiles(x, self.values, self.bias, self.layout, clean=True)
        if self.format == "reordered":
            return reordered_linear_tiles(x, self.values, self.bias, self.layout, clean=True)
        schedules = None if self.schedule is None else (self.schedule, self.t_schedule)
        return masked_linear(x, self.values, self.bias, self.pattern, schedules=schedules)

    def why_not(self, format: str) -> str | None:
        if format == "2:4" and (reason := why_unfit(self.pattern, self.weight_parameter)):
            return reason
        if format == "reordered" and self.tiles_of("reordered").order.identity:
            return f"no order of its rows and columns empties {LEAST_GAIN:.0%} of the tiles that hold a weight"
        return super().why_not(format)

    def set_format(self, format: str) -> None:
        super().set_format(format)
        if format == "2:4":
            keep_out_of_graphs()

    def set_mask(self, mask: Tensor, carried: Tensor | None = None) -> tuple:
        if self.format == "2:4" and not is_transposable(mask):
            raise ValueError("a layer of format '2:4' takes only transposable 2:4 masks; set_format('packed') first")
        return super().set_mask(mask, carried)

    def _set_pattern(self, pattern: Pattern) -> None:
        super()._set_pattern(pattern)
        if self.schedule is not None:
            self.schedule, self.t_schedule = (t.to(self.schedule.device) for t in linear_schedule(pattern))

    def _apply(self, fn, recurse=True):
        before = self.col.device
        super()._apply(fn, recurse)
        # a schedule is its device's own
        if self.schedule is not None and self.col.device != before and not self.col.is_meta:
            self.schedule, self.t_schedule = linear_schedule(self.pattern)
        return self

    def _cut(self, format: str) -> Layout:
        """Seconds for "reordered", which searches for an order."""
        return (ReorderedTiles if format == "reordered" else TileMask).from_mask(self.mask, self.tile)

    def rival_formats(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Those of "2:4", "blocks" and "reordered" that this mask fits, on a GPU."""
        return (*self._two_of_four(shape), *self.tiled_formats())

    def _two_of_four(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """ "2:4" where its output and gradients for such an input are those of the masked layer."""
        self.left_out.pop("2:4", None)
        if not is_transposable(self.mask):
            return ()
        values = self.packed_values()
        if reason := self.why_not("2:4") or why_wrong(values, self.bias, self.pattern, shape):
            self.left_out["2:4"] = reason
            return ()
        return ("2:4",)

    def _tilings(self) -> tuple[str, ...]:
        """ "reordered" where its tiles take less time by the arithmetic than those of "blocks"."""
        reordered = self.tiles_of("reordered")
        worth = not reordered.order.identity and reordered.time < self.tiles_of("blocks").time
        return ("blocks", "reordered") if worth else ("blocks",)

    def _tiles_note(self) -> str:
        note, tiles, reordered = super()._tiles_note(), self.tiles_of("blocks"), self.tiles_of("reordered")
        if reordered.order.identity:
            return note
        order, (bn, bk) = reordered.order, reordered.tile
        if reordered.tile != tiles.tile:
            note += f", {reordered.empty_before:.0%} of the {bn} x {bk} ones"
        dead = f"{order.dead_rows} rows, {order.dead_cols} columns dead"
        return f"{note}, {reordered.empty:.0%} reordered ({order.how}; {dead})"

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
