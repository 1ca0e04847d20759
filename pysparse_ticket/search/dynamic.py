"""Dynamic sparse training: SET (Mocanu et al. 2018) and RigL (Evci et al. 2020) on the sparse kernels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn import sparsify
from ..nn.dense_gradient import DenseGradients
from ..nn.masked import MaskedModule
from ..nn.swaps import carry
from ..scores import prunable
from ..select import budget, erk_budgets
from ..ticket import Ticket, clone_state, fingerprint
from .drop_and_grow import REGROW, drop_and_grow, drop_fraction

METHODS = ("rigl", "set")
DISTRIBUTIONS = ("erk", "uniform")
DECAYS = ("cosine", "constant")


def dynamic(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    method: str = "rigl",
    sparsity: float = 0.9,
    distribution: str = "erk",
    every: int = 100,
    until: int | None = None,
    drop: float = 0.3,
    decay: str = "cosine",
    regrow: str = "keep",
    dense: Sequence[str] = (),
    seed: int = 0,
    sample: Tensor | tuple | list | None = None,
    plan: str | Mapping[str, str] = "auto",
    group: Any = None,
) -> Dynamic:
    """Make the model sparse, in place, by a random mask of exact size, and return the schedule that moves its weights.

        schedule = pst.dynamic(model, optimizer, until=3 * steps // 4)
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            schedule.step()

    After the optimizer's steps ``every``, 2 ``every``, ... below ``until`` each layer drops a share of its active
    weights, those of the smallest magnitude, and grows as many: those with the largest gradient ("rigl") or random ones
    ("set"). New weights are zero, and so are their momentum and moments. The gradient of absent weights is computed in
    the passes before an update and in no others. It is the one that the step took, so it precedes the weights of which
    the smallest go; the authors' RigL leaves the step out and updates in its place.

    optimizer     holds the model's parameters; they are replaced by the surviving ones, state included
    sparsity      share of the weights removed, over all layers that are not named in ``dense``
    distribution  "erk" (:func:`~pysparse_ticket.select.erk_budgets`; may leave small layers whole) or "uniform"
    until         the step that ends the updates, None for never; decay "cosine" needs it (RigL: 3/4 of all steps)
    drop, decay   share of a layer's active weights that go, rounded to whole weights: see :func:`drop_fraction`
    regrow        "keep", "zero" or "never": see :func:`drop_and_grow`
    dense         names of layers left dense, such as the first one (RigL's uniform distribution leaves it so)
    seed          of the first mask and of random growth
    sample, plan  as for :func:`~pysparse_ticket.sparsify`
    group         the process group of the ranks that train this model together; None for all. Wrap the model in DDP
                  after this call. Ranks take the same masks: gradients are summed over them, and a checksum compares

    Raises ValueError for settings that make no sense, a layer left without a weight, a model that is sparse already or
    wrapped, and an optimizer of other parameters; model and optimizer are then unchanged.
    """
    _check(method in METHODS, f"unknown method {method!r}; known: {', '.join(METHODS)}")
    _check(distribution in DISTRIBUTIONS, f"unknown distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    _check(decay in DECAYS, f"unknown decay {decay!r}; known: {', '.join(DECAYS)}")
    _check(regrow in REGROW, f"unknown regrow {regrow!r}; known: {', '.join(REGROW)}")
    _check(every >= 1, f"every must be 1 step or more, not {every}")
    _check(0 <= drop <= 1, f"drop is a share of the active weights in [0, 1], not {drop}")
    _check(until is None or until >= 1, f"until must be 1 step or more, not {until}")
    _check(
        decay == "constant" or until is not None,
        "decay='cosine' needs until=, the step that ends the updates (3/4 of all steps, say), or take decay='constant'",
    )
    weights = _scheduled(model, optimizer, dense)
    if distribution == "erk":
        counts = erk_budgets({name: w.shape for name, w in weights.items()}, sparsity)
    else:
        counts = {name: budget(sparsity, w.numel()) for name, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in weights.items():
        _check(counts[name] > 0, f"a sparsity of {sparsity} leaves {name} no weight; lower it or name it in dense=")
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel(), generator=generator)[: counts[name]]] = True
        masks[name] = mask.reshape(weight.shape)
    settings = {
        "method": method,
        "sparsity": sparsity,
        "distribution": distribution,
        "every": every,
        "until": until,
        "drop": drop,
        "decay": decay,
        "regrow": regrow,
        "seed": seed,
        "layers": {name: list(mask.shape) for name, mask in masks.items()},
    }
    architecture = fingerprint(model)
    model = sparsify(model, Ticket(masks=masks, architecture=architecture), sample, optimizer, plan=plan)
    return Dynamic(model, optimizer, masks, settings, architecture, generator, group)


class Dynamic:
    """The schedule that :func:`dynamic` returns. Call :meth:`step` after each step of the optimizer.

    model    the sparse model
    steps    how many steps of the optimizer it has seen
    history  one dict an update: its step, the drop fraction, how many weights came that were absent before, and the
             exploration rate after it

    To resume, build everything as at first, load the schedule's state, and only then the model's and the optimizer's:
    their tensors are in the order of the schedule's masks.
    """

    def __init__(self, model, optimizer, masks, settings, architecture, generator, group) -> None:
        self.model, self.steps, self.history = model, 0, []
        self._optimizer, self._settings, self._architecture = optimizer, settings, architecture
        self._generator, self._group = generator, group
        self._whole = {name: mask for name, mask in masks.items() if mask.all()}
        self._layers = {name: _owner(model, name) for name in masks if name not in self._whole}
        self._ever = {name: mask.clone() for name, mask in masks.items()}
        self._gradients = DenseGradients(model, self._layers)
        self._prepare()

    def masks(self) -> dict[str, Tensor]:
        """{parameter name: bool mask on the CPU}, the layers that the distribution left whole included."""
        return {
            name: self._whole[name].clone() if name in self._whole else self._layers[name].mask.cpu()
            for name in self._ever
        }

    @property
    def exploration(self) -> float:
        """R_s, the share of the weights that were ever active (Liu et al. 2021, in-time over-parameterisation)."""
        return sum(int(ever.sum()) for ever in self._ever.values()) / sum(ever.numel() for ever in self._ever.values())

    def ticket(self) -> Ticket:
        """The present masks as a ticket, its rewind state the present weights."""
        provenance = {"search": "dynamic", **self._settings, "step": self.steps, "exploration": self.exploration}
        return Ticket(self.masks(), {}, {}, clone_state(self.model), self._architecture, provenance)

    def step(self) -> bool:
        """Count a step of the optimizer; True where weights moved after it.

        Raises RuntimeError when no layer was reached by a gradient, as in a compiled model, or ranks disagree, and
        ValueError for a gradient or a weight that is not finite; the masks are then as before.
        """
        self.steps += 1
        due = self._due(self.steps)
        try:
            if due:
                self._update(drop_fraction(self.steps, *(self._settings[k] for k in ("drop", "decay", "until"))))
        finally:
            self._prepare()
        return due

    def close(self) -> None:
        """Take the hooks off the model: before ``densify`` when training ends ahead of ``until``."""
        self._gradients.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed schedule needs: settings, step, random state, masks, weights ever active, history."""
        return {
            "settings": dict(self._settings),
            "step": self.steps,
            "generator": self._generator.get_state(),
            "masks": self.masks(),
            "ever": {name: ever.clone() for name, ever in self._ever.items()},
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the model's and the optimizer's are to be loaded after it. ValueError naming the first
        setting that differs; nothing is changed then."""
        _check("settings" in state and "masks" in state, "this is no state of a dynamic() schedule")
        for name, own in self._settings.items():
            theirs = state["settings"].get(name, "absent")
            _check(theirs == own, f"the schedule's {name} was {theirs!r} and is {own!r} here; build it with the same")
        self._move({name: (state["masks"][name],) for name in self._layers})
        self.steps = state["step"]
        self._generator.set_state(state["generator"].cpu())
        self._ever = {name: state["ever"][name].clone() for name in self._ever}
        self.history = [dict(row) for row in state["history"]]
        self._prepare()

    def _due(self, step: int) -> bool:
        until = self._settings["until"]
        return step % self._settings["every"] == 0 and (until is None or step < until)

    def _prepare(self) -> None:
        """Have the next step's passes watched where an update by gradient follows it."""
        self._gradients.close()
        if self._settings["method"] == "rigl" and self._due(self.steps + 1):
            self._gradients.open()

    @torch.no_grad()
    def _update(self, fraction: float) -> None:
        growth = self._growth()
        decided = {}
        for name, layer in self._layers.items():
            if name not in growth:
                continue
            weight, mask = layer.weight, layer.mask
            _check(bool(weight.isfinite().all()), f"{name} is not finite after step {self.steps}; lower the rate")
            count = round(fraction * layer.nnz)
            decided[name] = (mask, *drop_and_grow(weight, mask, growth[name], count, self._settings["regrow"]))
        self._agree([new for _, new, _ in decided.values()])
        self._move({name: (new, stays) for name, (_, new, stays) in decided.items()})
        for name, (_, new, _) in decided.items():
            self._ever[name] |= new.cpu()
        moved = sum(int((new & ~mask).sum()) for mask, new, _ in decided.values())
        row = {"step": self.steps, "drop": fraction, "moved": moved, "exploration": self.exploration}
        self.history.append(row)

    def _move(self, masks: Mapping[str, tuple[Tensor, ...]]) -> None:
        """``MaskedModule.set_mask`` with the arguments of each layer, and the optimizer's state with it."""
        moves = {}
        for name, arguments in masks.items():
            old = self._layers[name].weight_parameter
            moves[old] = self._layers[name].set_mask(*arguments)
        carry(self._optimizer, moves)

    def _growth(self) -> dict[str, Tensor]:
        """{layer: what each weight would be worth}; a layer whose gradient is zero everywhere is left out."""
        if self._settings["method"] == "set":
            return {
                name: torch.rand(layer.mask.shape, generator=self._generator, dtype=torch.float64).to(layer.col.device)
                for name, layer in self._layers.items()
            }
        gradients = self._gradients.close()
        if not gradients and self._layers:
            raise RuntimeError(
                f"no gradient reached a sparse layer in the passes before step {self.steps}; call the model itself, "
                "not a compiled one, and schedule.step() once after each optimizer step"
            )
        growth = {}
        for name, layer in self._layers.items():
            gradient = gradients.get(name)
            if gradient is None:
                gradient = torch.zeros(layer.mask.shape, device=layer.col.device, dtype=layer.weight_parameter.dtype)
            if self._ranks() > 1:
                dist.all_reduce(gradient, group=self._group)  # the sum: only the order matters
            _check(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite at step {self.steps}")
            if gradient.any():
                growth[name] = gradient.abs()
        return growth

    def _ranks(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _agree(self, masks: list[Tensor]) -> None:
        if self._ranks() == 1:
            return
        check = 0
        for mask in masks:
            check = zlib.crc32(mask.cpu().numpy().tobytes(), check)
        device = masks[0].device if masks else "cpu"
        both = torch.tensor([check, -check], device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        if both[0] != -both[1]:
            raise RuntimeError(
                f"the ranks chose different masks at step {self.steps}: give every rank the same seed, and wrap the "
                "model in DDP after dynamic()"
            )


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _scheduled(model: nn.Module, optimizer: torch.optim.Optimizer, dense: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights to make sparse, in model order; ValueError for what stands in the way."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    _check(not wrapped, f"{type(model).__name__} wraps the model: call dynamic() on the model inside, then wrap it")
    sparse = next((name for name, module in model.named_modules() if isinstance(module, MaskedModule)), None)
    _check(sparse is None, f"{sparse or 'the model'} is masked already; densify the model first")
    _check(not isinstance(dense, str), f"dense is a list of names: ({dense!r},)")
    weights = prunable(model)
    for name in dense:
        _check(f"{name}.weight" in weights, f"dense= names {name}, which is no Linear or Conv2d that could be sparse")
        del weights[f"{name}.weight"]
    _check(bool(weights), "dense= names every layer, so none is left to be sparse")
    held = {id(p) for groups in optimizer.param_groups for p in groups["params"]}
    for name, weight in weights.items():
        _check(weight.requires_grad, f"{name} is frozen; name its layer in dense=")
        _check(id(weight) in held, f"the optimizer does not hold {name}; build it of this model's parameters")
    return weights
