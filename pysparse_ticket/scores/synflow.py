"""SynFlow: what flows through a weight in the network of absolute values, without any data (Tanaka et al. 2020)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .batches import first_input
from .magnitude import prunable


def synflow(model: nn.Module, batches=None, *, in_shape: Sequence[int] | None = None, **_) -> dict[str, Tensor]:
    """|theta dR/dtheta| with R the sum of the outputs for an input of ones (SynFlow, Tanaka et al. 2020, eq. 6).

    Data-free: of ``batches`` only the shape of the first x is used (less its first dimension); ``in_shape``, without
    the batch dimension, replaces it. Labels, losses and modes have no say. R is computed in float64 on a copy whose
    parameters and buffers are replaced by their absolute values, because the scores of a ResNet-32 overflow float32.
    In a network of bias-free linear and ReLU layers the scores of each layer sum to R (Tanaka et al. 2020, theorem 2).
    Weights that are zero score zero. The paper prunes in 100 steps and scores again before each
    (:func:`pysparse_ticket.at_init`); in one shot a small layer may lose all its weights.

    Batch norm runs on its running statistics whatever the model's mode: with the statistics of the batch itself every
    gradient of R would be zero. So that nothing negative enters, and no ReLU stops the flow,
    - the running mean, which is subtracted, becomes minus its absolute value (as in the paper while it is still 0);
    - norms that keep no running statistics (group, layer, instance norm) are reduced to their weight and bias;
    - a norm whose weights are all zero, as at the end of zero-initialised residual branches, counts as ones.

    Raises ValueError when there is no shape to be had, for integer inputs, and when float64 overflows.
    """
    prunable(model)  # refuses NaN before anything is copied
    twin = copy.deepcopy(model).double().eval()
    weights = prunable(twin)
    x = _ones(first_input(batches), in_shape).to(next(iter(weights.values())).device)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
        for module in twin.modules():
            _keep_flow_positive(module)
    with torch.enable_grad():
        output = twin(x)
        if not isinstance(output, Tensor):
            raise ValueError(f"synflow sums the model's output, which must be a tensor, not {type(output).__name__}")
        grads = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
    scores = {}
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        scores[name] = torch.zeros_like(weight) if grad is None else (weight * grad).detach().abs()
        if not torch.isfinite(scores[name]).all():
            raise ValueError(f"the synflow scores of {name} overflow float64; scale the model's weights down")
    return scores


def _ones(sample: Tensor | None, in_shape: Sequence[int] | None) -> Tensor:
    if in_shape is None:
        if sample is None:
            raise ValueError(
                "synflow needs the shape of an input: pass batches=x, or in_shape=(channels, height, width)"
            )
        if not sample.is_floating_point():
            raise ValueError(f"synflow feeds an input of ones, which a model of {sample.dtype} inputs does not take")
        in_shape = sample.shape[1:]
    return torch.ones(1, *in_shape, dtype=torch.float64)


def _keep_flow_positive(module: nn.Module) -> None:
    """Let no normalisation of the copy subtract anything or shut a branch off."""
    if not isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm):
        return
    if module.weight is not None and not module.weight.any():
        module.weight.fill_(1.0)
    if getattr(module, "running_mean", None) is None or isinstance(module, _InstanceNorm):
        module.register_forward_hook(_affine)
    else:
        module.running_mean.neg_()


def _affine(norm: nn.Module, args: tuple, _) -> Tensor:
    x = args[0]
    if norm.weight is None:
        return x
    shape = norm.weight.shape if isinstance(norm, nn.LayerNorm) else (-1,) + (1,) * (x.dim() - 2)
    y = x * norm.weight.view(shape)
    return y if norm.bias is None else y + norm.bias.view(shape)
