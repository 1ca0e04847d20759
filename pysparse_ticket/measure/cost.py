"""Multiply-adds, parameters and peak memory of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MARK = "pysparse_ticket: measured step"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def macs(model: nn.Module, sample: torch.Tensor) -> int:
    """Multiply-adds of one forward pass, per sample, of the convolutional and linear layers (biases not counted).

    sample: a batch [N, ...] that the model takes. The model runs once, in evaluation mode, and is left as it was.
    A module with a method ``macs(input, output) -> int`` (of the batch) counts itself and all below it; what a module
    computes without submodules (attention, functional calls) is not seen. ValueError for an empty batch.
    """
    if sample.dim() == 0 or len(sample) == 0:
        raise ValueError(f"sample must be a batch of at least one input, got a tensor of shape {tuple(sample.shape)}")
    total = 0

    def count(module, args, output):
        nonlocal total
        total += _module_macs(module, args[0] if args else None, output)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_hook(count) for module in _counted(model)]
    try:
        with ExitStack() as stack:
            for module in model.modules():
                if hasattr(module, "modules_one_by_one"):  # a fused model calls no module that a hook could see
                    stack.enter_context(module.modules_one_by_one())
            model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return total // len(sample)


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters, tied ones once; of a masked layer, packed or not, the surviving weights alone.

    A module that holds zeros in place of pruned weights says how many in ``pruned_zeros``.
    """
    held = sum(parameter.numel() for parameter in model.parameters())
    return held - sum(getattr(module, "pruned_zeros", 0) for module in model.modules())


def peak_bytes(
    step: Callable[[], object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device = "cpu",
) -> int:
    """Peak memory of one training step, in bytes.

    That is: what the model's parameters, buffers and gradients and the optimizer's state take before the step, plus the
    most that torch's allocator held during the step beyond what it held before. Memory of others (the data set, other
    models) is left out, scratch memory that C++ code takes from the system allocator is not seen.

    ``step`` trains for one step; it is called twice, since the first call may create optimizer state, and gradients
    from before are dropped. On a GPU torch.cuda.max_memory_allocated is read, on a CPU the profiler's record.
    """
    device = torch.device(device)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return _cuda_peak(step, model, optimizer, device)
    if device.type == "cpu":
        return _cpu_peak(step, model, optimizer)
    raise ValueError(f"peak memory can be measured on 'cpu' and 'cuda', not on {device.type!r}")


def _counted(module: nn.Module) -> Iterable[nn.Module]:
    if callable(getattr(module, "macs", None)) or isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
        yield module
    else:
        for child in module.children():
            yield from _counted(child)


def _module_macs(module: nn.Module, given: torch.Tensor | None, output: torch.Tensor) -> int:
    if callable(getattr(module, "macs", None)):
        return module.macs(given, output)
    if isinstance(module, CONVOLUTIONS):
        return output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, TRANSPOSED):
        return given.numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    return output.numel() * module.in_features


def _resident(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _cuda_peak(step, model, optimizer, device) -> int:
    step()
    torch.cuda.synchronize(device)
    resident, before = _resident(model, optimizer), torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return resident + torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(step, model, optimizer) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints two lines on stderr at each use
    from torch.profiler import ProfilerActivity, profile, record_function

    # the first call runs under the profiler too: it sees a block's release only if it saw its allocation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
        resident = _resident(model, optimizer)
        with record_function(_MARK):
            step()
    events = record.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    held = most = 0
    for when, _, size in changes:
        if when >= begin:
            held += size
            most = max(most, held)
    return resident + most
