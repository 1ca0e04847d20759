"""Scores from gradients on a few batches. The model is scored on a copy: its buffers and gradients do not move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, labelled
from .magnitude import prunable

Loss = Callable[[Tensor, Tensor], Tensor]
BN_MODES = ("train", "eval")


def _scoring_copy(model: nn.Module, bn_mode: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    if bn_mode not in BN_MODES:
        raise ValueError(f"unknown bn_mode {bn_mode!r}; known: {', '.join(BN_MODES)}")
    twin = copy.deepcopy(model)
    twin.train(bn_mode == "train")
    return twin, prunable(twin)


def _gradients(output: Tensor, weights: dict[str, nn.Parameter], **options) -> list[Tensor]:
    """Gradients by weight; zeros where the loss does not depend on one."""
    grads = torch.autograd.grad(output, list(weights.values()), allow_unused=True, **options)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights.values(), strict=True)]


def _mean_gradient(twin: nn.Module, weights: dict[str, nn.Parameter], batches: list[Batch], loss: Loss) -> list[Tensor]:
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights.values()]
    for x, y in batches:
        for t, g in zip(total, _gradients(loss(twin(x), y), weights), strict=True):
            t += g.double() / len(batches)
    return total


def snip(
    model: nn.Module, batches=None, *, loss: Loss = F.cross_entropy, bn_mode: str = "train", **_
) -> dict[str, Tensor]:
    """|theta dL/dtheta|, on the model's own weights: connection sensitivity (SNIP, Lee et al. 2019, section 4.1).

    ``bn_mode`` says whether batch norm uses batch or running statistics: it moved 13% of a 10% mask. The gradient is
    the mean over the batches; the paper's division by the sum of all scores changes no order and is left out.
    """
    return _magnitudes(_signed(*_scoring_copy(model, bn_mode), batches, loss))


def snip_scaled(
    model: nn.Module,
    batches=None,
    *,
    loss: Loss = F.cross_entropy,
    bn_mode: str = "train",
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    **_,
) -> dict[str, Tensor]:
    """SNIP of a copy whose prunable weights are drawn anew at scaled variance (Lee et al. 2019, section 4.2).

    The draw is Xavier normal, from its own generator seeded with ``seed``, so the scores do not depend on the model's
    own weights: the ticket trains other weights than those that were judged. Where ``masks`` are False it is zero.
    """
    twin, weights = _scoring_copy(model, bn_mode)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in weights.items():
            drawn = nn.init.xavier_normal_(torch.empty(weight.shape), generator=generator).to(weight)
            weight.copy_(drawn * masks[name].to(weight) if masks else drawn)
    return _magnitudes(_signed(twin, weights, batches, loss))


def _signed(twin: nn.Module, weights: dict[str, nn.Parameter], batches, loss: Loss) -> dict[str, Tensor]:
    grads = _mean_gradient(twin, weights, labelled(batches), loss)
    return {name: (w.detach() * g).double() for (name, w), g in zip(weights.items(), grads, strict=True)}


def _magnitudes(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.abs() for name, score in scores.items()}


def grasp_signed(
    model: nn.Module, batches=None, *, loss: Loss = F.cross_entropy, bn_mode: str = "train", **_
) -> dict[str, Tensor]:
    """theta dL/dtheta with its sign: reading (b) of GraSP as Jordao et al. 2023 describe it."""
    return _signed(*_scoring_copy(model, bn_mode), batches, loss)


def grasp(
    model: nn.Module,
    batches=None,
    *,
    loss: Loss = F.cross_entropy,
    bn_mode: str = "train",
    temperature: float = 200.0,
    **_,
) -> dict[str, Tensor]:
    """theta (.) Hg, signed (Wang et al. 2020; reading (a) of Jordao et al. 2023, 4), logits divided by ``temperature``.

    GraSP scores -theta Hg and removes the highest; the worth here is its negative, so the lowest go first. g is the
    gradient over all batches, and Hg is summed batch by batch against that g held constant. Double backward: the
    model must consist of twice differentiable operations.
    """
    twin, weights = _scoring_copy(model, bn_mode)
    found = labelled(batches)

    def cooled(x: Tensor, y: Tensor) -> Tensor:
        return loss(twin(x) / temperature, y)

    mean = _mean_gradient(twin, weights, found, lambda logits, y: loss(logits / temperature, y))
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights.values()]
    for x, y in found:
        grads = _gradients(cooled(x, y), weights, create_graph=True)
        product = sum((g * m.to(g.dtype)).sum() for g, m in zip(grads, mean, strict=True))
        if not product.requires_grad:  # a loss that is linear in the weights has no curvature
            continue
        for t, h in zip(total, _gradients(product, weights), strict=True):
            t += h.double() / len(found)
    return {name: w.detach().double() * t for (name, w), t in zip(weights.items(), total, strict=True)}


def grasp_magnitude(model: nn.Module, batches=None, **options) -> dict[str, Tensor]:
    """|theta (.) Hg|, the sign thrown away: how Chen et al. 2021 ran GraSP as a baseline, not GraSP's own rule.

    Takes the options of :func:`grasp`. It moved 6 to 10% of the bits of a mask against the signed score.
    """
    return _magnitudes(grasp(model, batches, **options))
