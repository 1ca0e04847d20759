"""What every masked linear op refuses of its arguments' shapes."""

from __future__ import annotations

from torch import Tensor

from .pattern import Pattern


def check_features(x: Tensor | None, bias: Tensor | None, shape: tuple[int, int], what: str) -> None:
    """ValueError unless x (or None) ends in, and bias has, the features of a mask of shape [out, in]."""
    out_features, in_features = shape
    if x is not None and (x.dim() == 0 or x.shape[-1] != in_features):
        raise ValueError(f"x of shape {tuple(x.shape)} does not end in the {what}'s {in_features} input features")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} does not match the {what}'s {out_features} output features"
        )


def check_packed(op: str, x: Tensor | None, values: Tensor, bias: Tensor | None, pattern: Pattern) -> None:
    """The same of a pattern, and of its values ``[nnz]``."""
    if len(pattern.shape) != 2:
        raise ValueError(f"{op} takes the pattern of a 2-D mask, not of shape {tuple(pattern.shape)}")
    check_features(x, bias, pattern.shape, "pattern")
    if values.shape != (pattern.nnz,):
        raise ValueError(f"values of shape {tuple(values.shape)} do not match the pattern's {pattern.nnz} nonzeros")
