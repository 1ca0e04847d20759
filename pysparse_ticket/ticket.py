"""A ticket: which weights, filters and blocks of a network survive, and the state to start from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .files import write_whole

FORMAT = "pysparse_ticket"
VERSION = "1"

Architecture = tuple[tuple[str, tuple[int, ...]], ...]


class TicketError(ValueError):
    """A ticket that is damaged, foreign, or for another architecture."""


def fingerprint(model: nn.Module) -> Architecture:
    """Names and shapes of the model's parameters, in order."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


@dataclass
class Ticket:
    """Masks, dropped blocks, kept filters, rewind state and provenance of one lottery ticket.

    masks         {parameter name: bool tensor of the parameter's shape}, True where the weight survives
    layers        {block's module name: kept?}, candidates only
    filters       {convolution's module name: bool [out channels]}, True where the filter survives
    rewind        a state_dict of the dense network to start training from, or None
    architecture  the dense network's parameter names and shapes; :meth:`check` compares them
    provenance    how it was found: anything that JSON can hold
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, bool] = field(default_factory=dict)
    filters: dict[str, Tensor] = field(default_factory=dict)
    rewind: dict[str, Tensor] | None = None
    architecture: Architecture = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, tensors in (("mask", self.masks), ("filter mask", self.filters)):
            for name, tensor in tensors.items():
                if tensor.dtype != torch.bool:
                    raise TicketError(f"the {kind} of {name} must be bool, not {tensor.dtype}")
        shapes = dict(self.architecture)
        for name, mask in self.masks.items():
            if shapes and shapes.get(name) != tuple(mask.shape):
                raise TicketError(f"the mask of {name} has shape {tuple(mask.shape)}, its parameter {shapes.get(name)}")

    @property
    def removed_blocks(self) -> list[str]:
        return [name for name, kept in self.layers.items() if not kept]

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights removed, in [0, 1]; what counts as such says :meth:`counts`."""
        counts = self.counts().values()
        total = sum(size for _, size in counts)
        return (total - sum(kept for kept, _ in counts)) / total if total else 0.0

    def counts(self) -> dict[str, tuple[int, int]]:
        """{prunable tensor: (weights that survive, weights)}, in model order.

        Prunable are the masked tensors or, in a ticket without masks, every parameter of 2 or more dimensions. A
        removed filter counts its own weights, not those of its consumers' input channels.
        """
        gone = tuple(f"{name}." for name in self.removed_blocks)
        found = {}
        for name, shape in self.architecture or ((n, tuple(m.shape)) for n, m in self.masks.items()):
            mask = self.masks.get(name)
            if (mask is None) if self.masks else len(shape) < 2:
                continue
            kept = size = math.prod(shape)
            filters = self.filters.get(name.removesuffix(".weight"))
            if name.startswith(gone):
                kept = 0
            elif mask is not None:
                kept = int(mask.sum())
            elif filters is not None:
                kept = size // shape[0] * int(filters.sum())
            found[name] = kept, size
        return found

    def check(self, model: nn.Module) -> None:
        """Raise :class:`TicketError` naming the first difference if the model is not the ticket's architecture."""
        if not self.architecture:
            known = dict(fingerprint(model))
            for name, mask in self.masks.items():
                if known.get(name) != tuple(mask.shape):
                    raise TicketError(
                        f"the ticket masks {name} {list(mask.shape)}, the model has "
                        f"{list(known[name]) if name in known else 'no such parameter'}"
                    )
            return
        theirs, ours = self.architecture, fingerprint(model)
        for i in range(max(len(theirs), len(ours))):
            a = f"{theirs[i][0]} {list(theirs[i][1])}" if i < len(theirs) else "nothing more"
            b = f"{ours[i][0]} {list(ours[i][1])}" if i < len(ours) else "nothing more"
            if a != b:
                raise TicketError(
                    f"the ticket is for another architecture: parameter {i} is {a} in the ticket and {b} in the model"
                )

    def restore(self, model: nn.Module) -> nn.Module:
        """Load the rewind state into the dense model, by copy, and return the model."""
        if self.rewind is None:
            raise TicketError("this ticket has no rewind state; find it with rewind=True")
        self.check(model)
        model.load_state_dict(self.rewind)
        return model

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, masks bit-packed; an existing file is replaced only once the new one is whole."""
        tensors = {f"mask/{n}": _pack_bits(m) for n, m in self.masks.items()}
        tensors |= {f"filter/{n}": _pack_bits(m) for n, m in self.filters.items()}
        tensors |= {f"rewind/{n}": t.detach().cpu().contiguous().clone() for n, t in (self.rewind or {}).items()}
        header = {
            "masks": {n: list(m.shape) for n, m in self.masks.items()},
            "filters": {n: list(m.shape) for n, m in self.filters.items()},
            "layers": self.layers,
            "rewind": list(self.rewind) if self.rewind is not None else None,
            "architecture": self.architecture,
            "provenance": self.provenance,
        }
        metadata = {"format": FORMAT, "version": VERSION, "ticket": json.dumps(header)}
        write_whole(path, to_safetensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module | None = None) -> Ticket:
        """Read a ticket; with ``model``, refuse it unless it is of that architecture."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TicketError(f"{path} is a safetensors file but not a ticket")
                if metadata.get("version") != VERSION:
                    raise TicketError(f"{path} is a ticket of version {metadata.get('version')}; this reads {VERSION}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise TicketError(f"no ticket at {path}") from None
        except (SafetensorError, OSError) as error:
            raise TicketError(f"{path} is truncated or not a ticket: {error}") from None
        try:
            header = json.loads(metadata["ticket"])
            ticket = cls(
                masks={n: _unpack_bits(tensors[f"mask/{n}"], s) for n, s in header["masks"].items()},
                filters={n: _unpack_bits(tensors[f"filter/{n}"], s) for n, s in header["filters"].items()},
                layers=header["layers"],
                rewind=None if header["rewind"] is None else {n: tensors[f"rewind/{n}"] for n in header["rewind"]},
                architecture=tuple((n, tuple(s)) for n, s in header["architecture"]),
                provenance=header["provenance"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise TicketError(f"{path} is a damaged ticket: {error!r}") from None
        if model is not None:
            ticket.check(model)
        return ticket


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict by copy: rewinding by reference would rewind to the trained weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def odd_entry(model: nn.Module, state: Mapping[str, Tensor], missing: str) -> tuple[str, str, str] | None:
    """The first entry in which a state of another network differs: its name, its shape in ``state`` and in the model,
    ``missing`` where there is none. None for a state of this network."""
    own = model.state_dict()
    for name in (*own, *state):
        theirs, ours = (str(list(entries[name].shape)) if name in entries else missing for entries in (state, own))
        if ours != theirs:
            return name, theirs, ours
    return None


def overlap(*tickets: Ticket | Mapping[str, Tensor]) -> dict[str, float]:
    """How much two or more tickets share: ``overlap``, ``iou`` and ``chance``.

    ``overlap`` = |intersection of all| / |first|, after Vandersmissen et al. 2023; ``iou`` divides by the
    union; ``chance`` is the overlap that independent random masks with the same density in each tensor would have.
    """
    if len(tickets) < 2:
        raise TicketError("an overlap needs two tickets or more")
    all_masks = [t.masks if isinstance(t, Ticket) else t for t in tickets]
    first = all_masks[0]
    for masks in all_masks[1:]:
        if odd := sorted(masks.keys() ^ first.keys()):
            raise TicketError(f"the tickets mask different tensors: {odd[0]} is not in all of them")
    shared = union = kept = expected = 0.0
    for name, mask in first.items():
        stack = [masks[name] for masks in all_masks]
        if any(m.shape != mask.shape for m in stack):
            raise TicketError(f"the masks of {name} differ in shape: {[tuple(m.shape) for m in stack]}")
        shared += int(torch.stack(stack).all(0).sum())
        union += int(torch.stack(stack).any(0).sum())
        kept += int(mask.sum())
        expected += int(mask.sum()) * math.prod(int(m.sum()) / max(m.numel(), 1) for m in stack[1:])
    if not kept:
        raise TicketError("the first ticket keeps no weight, so no overlap is defined")
    return {"overlap": shared / kept, "iou": shared / union, "chance": expected / kept}


def _pack_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def _unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if packed.numel() != (count + 7) // 8:
        raise TicketError(f"a mask of shape {shape} needs {(count + 7) // 8} bytes, the file has {packed.numel()}")
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(shape)
