"""Modules that hold the surviving part of a layer and save and load the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def keep_mask(keep: Tensor | None, count: int, what: str) -> Tensor:
    if keep is None:
        return torch.ones(count, dtype=torch.bool)
    if keep.dtype != torch.bool or keep.shape != (count,):
        raise ValueError(f"{what} must be a bool tensor of shape ({count},), not {keep.dtype} {tuple(keep.shape)}")
    return keep


def part_of(parameter: nn.Parameter | None, *index: Tensor | slice) -> nn.Parameter | None:
    """A Parameter of its own with the entries ``index`` of each leading dimension, trained where the whole one is."""
    if parameter is None:
        return None
    part = parameter.detach()
    for dim, one in enumerate(index):
        part = part[(slice(None),) * dim + (one,)]
    return nn.Parameter(part.clone(), requires_grad=parameter.requires_grad)


def copied(source: nn.Module, target: nn.Module) -> nn.Module:
    """The target with copies of the source's state, in its mode."""
    target.load_state_dict(source.state_dict())
    for name, parameter in source.named_parameters():
        target.get_parameter(name).requires_grad_(parameter.requires_grad)
    return target.train(source.training)


class DenseState(nn.Module):
    """Saves and loads compact tensors in the dense module's shapes: ``_dense_slots()`` says where each one lies.

    ``spare`` names channels that were removed and are held all the same, as zeros, since hardware likes their number.
    """

    spare: dict[str, Tensor]  # {name of an index buffer: positions in it}

    def hold_spare(self, **removed: Tensor) -> None:
        """{name of an index buffer: bool over all channels of the dense layer}: those of them that are held are zero
        from now on, also in what is loaded."""
        self.spare = {n: gone[getattr(self, n).to(gone.device)].nonzero().flatten() for n, gone in removed.items()}
        with torch.no_grad():
            for name in self._dense_slots():
                getattr(self, name).copy_(self.compact_like(name, self.expand_like(name, getattr(self, name))))

    def without_spare(self, name: str, compact: Tensor, fill: float) -> Tensor:
        """A copy of a tensor of the parameter's shape with the spare channels filled."""
        for dim, index in enumerate(self._dense_slots()[name][1]):
            for buffer, positions in getattr(self, "spare", {}).items():
                if getattr(self, buffer) is index:
                    compact = compact.index_fill(dim, positions.to(compact.device), fill)
        return compact

    def _dense_slots(self) -> dict[str, tuple[tuple[int, ...], tuple[Tensor, ...], float]]:
        """{name: (dense shape, index of each leading dimension, fill of removed entries)}."""
        raise NotImplementedError

    @property
    def mask(self) -> Tensor:
        """bool, of the dense weight's shape, True where the weight is held."""
        held = torch.ones_like(self.weight, dtype=torch.bool)
        return self.expand_like("weight", self.without_spare("weight", held, False))

    def expand_like(self, name: str, compact: Tensor) -> Tensor:
        """A tensor of the parameter's compact shape in the dense shape, filled where channels were removed."""
        if name not in self._dense_slots():
            return compact
        shape, index, fill = self._dense_slots()[name]
        dense = compact.new_full(shape, fill)
        dense[torch.meshgrid(*index, indexing="ij") if len(index) > 1 else index[0]] = compact
        return dense

    def compact_like(self, name: str, dense: Tensor) -> Tensor:
        """The part of a tensor in the dense parameter's shape that survives: an optimizer's momentum, say."""
        if name not in self._dense_slots():
            return dense
        _, indices, fill = self._dense_slots()[name]
        for dim, index in enumerate(indices):
            dense = dense.index_select(dim, index)
        return self.without_spare(name, dense, fill)

    def fill(self, dense: nn.Module) -> nn.Module:
        """The dense module with copies of this one's state, in its mode."""
        return copied(self, dense)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, (_, _, fill) in self._dense_slots().items():
            if prefix + name in destination:
                held = self.without_spare(name, destination[prefix + name].detach(), fill)
                destination[prefix + name] = self.expand_like(name, held)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        own = dict(state_dict)
        for name, (shape, *_) in self._dense_slots().items():
            key = prefix + name
            if key not in own:
                continue
            if tuple(own[key].shape) != shape:
                errors.append(
                    f"size mismatch for {key}: {tuple(own[key].shape)} in the checkpoint, {shape} in the model"
                )
                return
            own[key] = self.compact_like(name, own[key])
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)
