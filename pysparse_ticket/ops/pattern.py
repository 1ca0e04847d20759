"""The positions of the surviving weights, as the packed kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Pattern:
    """Compressed rows of a weight mask ``[O, C, *k]`` and of its transpose; K = prod(k), 1 for a linear layer.

    All index tensors are int32 and contiguous.

    row_ptr  ``[O + 1]``  the values of output o are ``values[row_ptr[o]:row_ptr[o + 1]]``
    col      ``[nnz]``    ``c * K + tap``, ascending in each row: the order of ``weight[mask]``
    t_row_ptr ``[C + 1]`` the same by input channel
    t_col    ``[nnz]``    ``o * K + tap``, ascending in each row
    t_perm   ``[nnz]``    where transposed entry j sits in ``values``
    """

    shape: tuple[int, ...]
    row_ptr: Tensor
    col: Tensor
    t_row_ptr: Tensor
    t_col: Tensor
    t_perm: Tensor

    FIELDS = ("row_ptr", "col", "t_row_ptr", "t_col", "t_perm")

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pattern:
        """mask: bool ``[O, C, *k]``, True where the weight survives."""
        if mask.dtype != torch.bool or mask.dim() < 2:
            raise ValueError(
                f"a mask is a bool tensor of 2 or more dimensions, not {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if mask.numel() > INT32_MAX:
            raise ValueError(f"a mask of {mask.numel()} weights is too large for 32-bit indices: at most {INT32_MAX}")
        rows, channels = mask.shape[:2]
        taps = mask[0, 0].numel() if mask.numel() else 1
        o, c, tap = mask.reshape(rows, channels, taps).nonzero(as_tuple=True)
        transposed = (c * rows + o) * taps + tap
        perm = transposed.argsort()

        def pointers(index: Tensor, count: int) -> Tensor:
            counts = torch.bincount(index, minlength=count)
            return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

        return cls(
            shape=tuple(mask.shape),
            row_ptr=pointers(o, rows),
            col=(c * taps + tap).int(),
            t_row_ptr=pointers(c, channels),
            t_col=(o * taps + tap)[perm].int(),
            t_perm=perm.int(),
        )

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.FIELDS)

    def flat_index(self) -> Tensor:
        """int64 ``[nnz]``: position of each value in the flattened dense weight."""
        rows = self.shape[0]
        width = 1
        for n in self.shape[1:]:
            width *= n
        counts, first = self.row_ptr.diff(), torch.arange(0, rows * width, width or 1, device=self.col.device)
        # output_size: or a GPU is waited for to learn how many there are
        return torch.repeat_interleave(first[:rows], counts, output_size=self.nnz) + self.col

    def mask(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=torch.bool, device=self.col.device)
        out.view(-1)[self.flat_index()] = True
        return out

    def scatter(self, values: Tensor) -> Tensor:
        """``[nnz]`` values to the dense weight, zero elsewhere; differentiable."""
        out = values.new_zeros(self.shape).view(-1)
        return out.index_put((self.flat_index(),), values).view(self.shape)

    def gather(self, weight: Tensor) -> Tensor:
        """Dense weight to its ``[nnz]`` surviving values; differentiable."""
        return weight.reshape(-1)[self.flat_index()]
