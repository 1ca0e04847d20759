"""What the masked layers share: parameters of the surviving weights, dense state_dicts, formats."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..ops.conv_tiles import ConvTiles
from ..ops.library import CUDA_ERROR, on_cuda, why_missing
from ..ops.mask_gradient import mask_gradient
from ..ops.pattern import Pattern
from ..ops.reordered_tiles import ReorderedTiles
from ..ops.tile_mask import TileMask

FORMATS = ("packed", "dense")
TILED = ("blocks", "reordered")  # formats whose values are tiles
Layout = TileMask | ConvTiles | ReorderedTiles


def _masked(module: weakref.ref[MaskedModule], mask: Tensor, grad: Tensor) -> Tensor:
    """The hook of a dense weight's Parameter, which runs before the gradient reaches anything else."""
    owner = module()  # it may have moved to another device, or be gone before its backward pass
    return mask_gradient(grad, mask if owner is None else owner._buffers["_mask"])


def _stored(format: str) -> str:
    """What of the formats that store the weight alike a format is."""
    return format if format in ("dense", *TILED) else "packed"


def _check_mask(mask: Tensor, shape: torch.Size | tuple[int, ...], name: str) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"the mask of a {name} is a bool tensor, not {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape:
        raise ValueError(f"the mask's shape {tuple(mask.shape)} is not the {name}'s weight shape {tuple(shape)}")


class MaskedModule(nn.Module):
    """A layer whose weight is ``weight * mask``; pruned weights stay exactly zero.

    format "packed"  the Parameter ``values`` ``[nnz]`` holds the surviving weights in the order of ``weight[mask]``
    format "dense"   the Parameter ``weight`` has the dense shape and zeros where pruned; its gradient is masked

    A class may have further formats (``FORMATS``), which are packed too and differ in the kernel, and "blocks" and
    "reordered" also in ``values``: ``layout`` says where each of them sits in the dense weight. ``tile`` is the size of
    their tiles, None leaves it to the mask.

    ``weight`` is the dense weight in both. A ``state_dict`` has the dense module's keys and shapes in both; loading one
    keeps what lies under the mask. ``why_dense`` says why a layer cannot be packed, None when it can; ``left_out`` why
    a format that its mask fits stayed out of the race.
    """

    FORMATS = FORMATS
    OP: str  # whose kernels run format "packed"
    tile: tuple[int, int] | None = None

    def __init__(self, module: nn.Module, mask: Tensor) -> None:
        super().__init__()
        _check_mask(mask, module.weight.shape, type(module).__name__)
        weight = module.weight
        self.why_dense: str | None = None
        self.left_out: dict[str, str] = {}
        self.format = "dense"
        self._shape = tuple(mask.shape)
        self._layouts: dict[tuple, Layout] = {}  # of this mask, by format and size of tiles; cutting one takes time
        self._layout: tuple | None = None  # which of them the values have: formats "blocks" and "reordered" alone
        mask = mask.to(weight.device)
        for field, tensor in zip(Pattern.FIELDS, Pattern.from_mask(mask).tensors, strict=True):
            self.register_buffer(field, tensor, persistent=False)
        self.register_buffer("_mask", mask.clone(), persistent=False)
        self._channels_last = weight.dim() == 4 and not weight.is_contiguous()
        self._mask = self._laid_out(self._mask)
        dense = self._laid_out(torch.where(mask, weight.detach(), 0))
        self._parameters["weight"] = nn.Parameter(dense, requires_grad=weight.requires_grad)
        bias = None if module.bias is None else module.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=module.bias.requires_grad)
        self._hook_gradient(self.weight)
        self.train(module.training)

    @property
    def pattern(self) -> Pattern:
        return Pattern(self._shape, self.row_ptr, self.col, self.t_row_ptr, self.t_col, self.t_perm)

    @property
    def layout(self) -> Pattern | Layout:
        """Where the surviving weights lie in the Parameter ``values``; a Pattern in format "dense" too."""
        return self.pattern if self._layout is None else self._layouts[self._layout]

    @property
    def mask(self) -> Tensor:
        """bool, of the dense weight's shape."""
        return self.pattern.mask()

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        total = 1
        for n in self._shape:
            total *= n
        return 1 - self.nnz / total if total else 0.0

    @property
    def pruned_zeros(self) -> int:
        """How many zeros the weight's Parameter holds in place of pruned weights."""
        return self.weight_parameter.numel() - self.nnz

    @property
    def packed(self) -> bool:
        """Whether the Parameter is ``values``: every format but "dense"."""
        return self.format != "dense"

    @property
    def weight_parameter(self) -> nn.Parameter:
        """``values`` or ``weight``, whichever the format has."""
        return self.values if self.packed else self.weight

    def __getattr__(self, name: str):
        # a property would hide the Parameter of that name from nn.Module and from replicas, which hold plain tensors
        if name == "weight" and self.__dict__.get("format", "dense") != "dense":
            return self.layout.scatter(self.values)
        return super().__getattr__(name)

    def packed_values(self) -> Tensor:
        """``[nnz]`` surviving weights in either format; differentiable."""
        own = self.packed and self._layout is None
        return self.values if own else self.pattern.gather(self.weight)

    def masked_weight(self) -> Tensor:
        """Format "dense": the weight, which is zero where pruned, and so is its gradient."""
        weight = self._parameters.get("weight")
        weight = self.weight if weight is None else weight  # replicas hold plain tensors
        if not torch.compiler.is_compiling():
            self._hook_gradient(weight)
        return weight

    def _hook_gradient(self, weight: Tensor) -> None:
        # hooks belong to one tensor: copies, replicas and Parameters loaded with assign=True come without
        hooked = self.__dict__.get("_hooked")
        if weight.requires_grad and (hooked is None or hooked() is not weight):
            weight.register_hook(functools.partial(_masked, weakref.ref(self), self._mask))
            self.__dict__["_hooked"] = weakref.ref(weight)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_hooked"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not self.packed:
            self._hook_gradient(self.weight)

    def compact_like(self, tensor: Tensor) -> Tensor:
        """A tensor of the dense weight's shape to one of ``weight_parameter``'s, as for an optimizer's state."""
        return self.layout.gather(tensor) if self.packed else torch.where(self.mask, tensor, 0)

    def dense_like(self, tensor: Tensor) -> Tensor:
        """A tensor of ``weight_parameter``'s shape to one of the dense weight's."""
        return self.layout.scatter(tensor) if self.packed else tensor

    @property
    def on_gpu(self) -> bool:
        return self.col.is_cuda

    @property
    def why_not_raced(self) -> str | None:
        """Why format "packed" stays out of a race: a GPU without a kernel for it runs the dense layer and more."""
        if self.on_gpu and not on_cuda(self.OP):
            return f"no GPU kernel of {self.OP}" if CUDA_ERROR is None else f"no cuda backend: {CUDA_ERROR}"
        return None

    def rival_formats(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Packed formats that may be faster than "packed" for an input of that shape."""
        return ()

    def why_not(self, format: str) -> str | None:
        """Why the layer cannot take a packed format of its class; None when it can."""
        return self.why_dense

    def tiles_of(self, format: str) -> Layout:
        """The layout of a format whose values are tiles, cut once a mask."""
        key = format, self.tile
        if key not in self._layouts:
            self._layouts[key] = self._cut(format)
        return self._layouts[key]

    def _cut(self, format: str) -> Layout:
        raise NotImplementedError

    def tiled_formats(self) -> tuple[str, ...]:
        """Formats of tiles, on a GPU where the kernels run, unless by the arithmetic too few tiles are empty to win."""
        if not self.on_gpu or why_missing("triton"):
            return ()
        found = {name: self.tiles_of(name) for name in self._tilings()}
        return tuple(name for name, tiles in found.items() if tiles.empty > 0.05 and tiles.time < 1.25)

    def _tilings(self) -> tuple[str, ...]:
        """The formats of tiles to be considered."""
        return ("blocks",)

    def race_note(self) -> str:
        """What a plan should say of the mask beside the times; on a GPU also why it has no rival to dense."""
        if not self.on_gpu:
            return ""
        if reason := why_missing("triton"):
            return f"no triton backend: {reason}"
        return self._tiles_note()

    def _tiles_note(self) -> str:
        tiles = self.tiles_of("blocks")
        return f"{tiles.empty:.0%} of the {tiles.tile[0]} x {tiles.tile[1]} tiles are empty"

    def random_mask(self, density: float) -> Tensor:
        """Another mask of the kind that decides this layer's time: a second point of the line to the break-even."""
        tiles = self.tiles_of("blocks") if self.on_gpu else None
        kept = torch.rand(tiles.grid if tiles else self._shape, generator=torch.Generator().manual_seed(0)) < density
        return tiles.expand(kept) if tiles else kept

    @torch.no_grad()
    def set_format(self, format: str) -> None:
        """Change how the layer runs. To or from "dense", "blocks" and "reordered" the weight's Parameter is a new one;
        its gradient comes along.

        ValueError for an unknown format, or for a packed one where ``why_dense`` gives the reason against it.
        """
        if format not in self.FORMATS:
            raise ValueError(f"unknown format {format!r}; known: {', '.join(self.FORMATS)}")
        if format != "dense" and self.why_dense:
            raise ValueError(f"this layer cannot be packed: {self.why_dense}")
        if format != "dense" and (reason := self.why_not(format)):
            raise ValueError(f"this layer cannot take format {format!r}: {reason}")
        if _stored(format) == _stored(self.format):
            self.format = format
            return
        old = self.weight_parameter
        weight, grad = self.dense_like(old), None if old.grad is None else self.dense_like(old.grad)
        self._parameters.pop("values" if self.packed else "weight")
        self.format = format
        self._layout = None
        if format in TILED:
            self.tiles_of(format)
            self._layout = format, self.tile
        if format == "dense":
            self._mask = self._laid_out(self.pattern.mask())
        else:
            self._mask = None
        new = self.compact_like(weight)
        new = nn.Parameter(new if self.packed else self._laid_out(new), requires_grad=old.requires_grad)
        new.grad = None if grad is None else self.compact_like(grad)
        self._parameters = {"values" if self.packed else "weight": new, **self._parameters}
        if not self.packed:
            self._hook_gradient(self.weight)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """In the memory format of the dense module's weight, which its rival's step has too."""
        return tensor.contiguous(memory_format=torch.channels_last) if self._channels_last else tensor

    @torch.no_grad()
    def set_mask(self, mask: Tensor, carried: Tensor | None = None) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
        """Run under another mask from now on, in the same format: how dynamic sparse training moves weights.

        mask     bool, of the dense weight's shape
        carried  bool, of that shape: which weights under both masks keep their value, None for all of them; every other
                 weight under ``mask`` starts at zero

        Returns the weight's Parameter and how a tensor of its old shape becomes one of the new, as
        ``swaps.carry(optimizer, {old parameter: those})`` takes for momentum and moments. The Parameter stays the same
        object, its values and gradient rearranged in place, unless a packed one gets another number of weights.
        ValueError for a tensor of another shape or dtype.
        """
        for tensor in (mask, carried):
            if tensor is not None:
                _check_mask(tensor, self._shape, type(self).__name__)
        old, pattern = self.layout, Pattern.from_mask(mask.to(self.col.device))
        new = pattern if self._layout is None else old.cut(pattern.mask())
        fresh = ~(self.mask & mask.to(self.col.device))
        if carried is not None:
            fresh |= ~carried.to(fresh.device)
        packed = self.packed

        def convert(tensor: Tensor) -> Tensor:
            dense = (old.scatter(tensor) if packed else tensor).masked_fill(fresh, 0)
            return new.gather(dense) if packed else dense

        parameter = self.weight_parameter
        value, grad = convert(parameter), None if parameter.grad is None else convert(parameter.grad)
        if value.shape == parameter.shape:  # whoever holds the Parameter, DDP for one, keeps the right one
            parameter.copy_(value)
            if grad is not None:
                parameter.grad.copy_(grad)
        else:
            parameter = nn.Parameter(value, requires_grad=parameter.requires_grad)
            parameter.grad = grad
            self._parameters["values"] = parameter
        if not packed:
            self._mask.copy_(pattern.mask())
        self._set_pattern(pattern)
        self._layouts = {} if self._layout is None else {self._layout: new}
        return parameter, convert

    def _set_pattern(self, pattern: Pattern) -> None:
        for field, tensor in zip(Pattern.FIELDS, pattern.tensors, strict=True):
            setattr(self, field, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedModule:
        super()._apply(fn, recurse)
        self._layouts = {key: layout.to(self.col.device) for key, layout in self._layouts.items()}
        return self

    def dense_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient that the weights of the dense layer would have, those under the mask and the absent ones alike,
        from the layer's input and the gradient of its output."""
        raise NotImplementedError

    def _pack_if_possible(self) -> None:
        if not self.why_dense:
            self.set_format("packed")

    def _to_dense(self, dense: nn.Module) -> nn.Module:
        """Fill a dense module made for it with copies of the weights."""
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        dense.weight.requires_grad_(self.weight_parameter.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        metadata: Mapping,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is not None and tuple(weight.shape) != self._shape:
            errors.append(f"{key} has the shape {tuple(weight.shape)}; the masked layer's is {self._shape}")
            return
        own = dict(state_dict)
        if weight is not None:
            kept = self.compact_like(weight.detach().to(self.col.device))
            own[key] = kept
            if self.packed:
                own[prefix + "values"] = own.pop(key)
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        if not self.packed:
            self._hook_gradient(self.weight)
        missing[:] = [key if name == prefix + "values" else name for name in missing]

    def extra_repr(self) -> str:
        why = f" ({self.why_dense})" if self.why_dense else ""
        return f"sparsity={self.sparsity:.4f}, format={self.format}{why}"
