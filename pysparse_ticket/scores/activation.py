"""What a block of a trained network is worth: ``(model, batches, blocks, **options) -> {block: score}``.

The lowest goes first. These are the criteria that Jordao et al. 2023 compare (4, Table 1), as their group's programs
define them. A copy is scored, in evaluation mode. Where theirs zero a residual branch, here the block's input takes the
place of its output: the very network that removal leaves, for blocks with batch norm and without.

batches is x, (x, y) or a list of either; two tensors in a list are x and y. Every score takes the blocks' module names,
as ``structure.find_blocks`` lists them, and raises ValueError for unknown ones and for NaN or infinite activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Pairs, pairs_of
from .magnitude import PRUNABLE, prunable
from .similarity import linear_cka, pls_vip


@contextmanager
def bypassed(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Within it each named block returns its first argument, as if it had been removed; after it the model is whole."""
    modules = [model.get_submodule(name) for name in blocks]
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = lambda x, *_, **__: x
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


def hrank(model: nn.Module, batches, blocks: Sequence[str]) -> dict[str, float]:
    """Mean over samples and channels of the rank of a feature map of the block's output after ReLU, over max(h, w).

    HRank (Lin et al. 2020) as Jordao et al. 2023 use it. A singular value counts if it exceeds max(h, w) eps times the
    largest, eps that of the network's own precision. Outputs [N, C, h, w]; of [N, h, w] each sample is a map.
    """

    def rank(name: str, out: Tensor) -> tuple[Tensor, int]:
        if out.dim() not in (3, 4):
            raise ValueError(f"hrank needs feature maps, block {name} returns {list(out.shape)}; use expectabs or kl")
        height, width = out.shape[-2:]
        maps = F.relu(out).reshape(-1, height, width)
        ranks = torch.linalg.matrix_rank(maps.double(), rtol=max(height, width) * torch.finfo(out.dtype).eps)
        return ranks.double().sum() / max(height, width), len(maps)

    return _means(model, batches, blocks, rank)


def expectabs(model: nn.Module, batches, blocks: Sequence[str]) -> dict[str, float]:
    """Mean over samples, channels and positions of |activation| of the block's output after ReLU (DropNet, Tan and
    Motani 2020, as Jordao et al. 2023 use it)."""
    return _means(model, batches, blocks, lambda _, out: (F.relu(out).double().sum(), out.numel()))


def kl(model: nn.Module, batches, blocks: Sequence[str], *, double_softmax: bool = False) -> dict[str, float]:
    """Mean over samples of ``sum q (log q - log p)``, p = softmax(output) of the network, q that of the network whose
    residual branch contributes nothing (CURL, Luo and Wu 2020, as Jordao et al. 2023 use it). Outputs [N, classes].

    The group's program took the softmax of outputs that were softmaxed already, which flattens both distributions and
    shrinks every score; ours takes it once. ``double_softmax=True`` reproduces theirs.
    """
    twin, pairs = _trained_copy(model, batches, blocks)

    def log_probabilities() -> list[Tensor]:
        found = []
        for x, _ in pairs:
            logits = _finite(twin(x), "the network").double()
            if logits.dim() != 2:
                raise ValueError(f"kl needs outputs [samples, classes], the network returns {list(logits.shape)}")
            found.append(F.log_softmax(logits.softmax(1) if double_softmax else logits, 1))
        return found

    with torch.no_grad():
        whole, scores = log_probabilities(), {}
        for block in blocks:
            with bypassed(twin, [block]):
                total = sum((q.exp() * (q - p)).sum() for p, q in zip(whole, log_probabilities(), strict=True))
            scores[block] = float(total) / sum(len(p) for p in whole)
    return scores


def pls(model: nn.Module, batches, blocks: Sequence[str], *, components: int = 2, pool: int = 8) -> dict[str, float]:
    """Mean VIP of the block's output, average-pooled in windows of ``pool`` (smaller maps whole) and flattened, in a
    partial least squares regression to the one-hot labels, one regression a block (Jordao et al. 2023, 4).

    The squares of a block's VIPs average to 1, so the mean says how evenly the features of a block share what it knows
    of the labels, not how much that is. The group's programs use 2 components by default and 4 in their runs.
    """
    labels = [y for _, y in pairs_of(batches)]
    if any(y is None for y in labels):
        raise ValueError("pls-vip needs labels: pass batches=(x, y) or a list of such pairs")

    def pooled(out: Tensor) -> Tensor:
        if out.dim() == 4:
            out = F.avg_pool2d(out.double(), (min(pool, out.shape[2]), min(pool, out.shape[3])))
        return out.flatten(1)

    features = outputs_of(model, batches, blocks, pooled)
    return {block: float(pls_vip(features[block], torch.cat(labels), components).mean()) for block in blocks}


def cka(model: nn.Module, batches, blocks: Sequence[str], *, features: str | None = None) -> dict[str, float]:
    """1 - linear CKA between the penultimate features of the network and those of the network without the block's
    residual branch (Jordao et al. 2023, 4). 0 for a block that the classifier would not miss.

    ``features`` names the module whose input they are; by default the last Linear or Conv2d outside the blocks, if it
    runs after them, else the network's output is compared.
    """
    twin, pairs = _trained_copy(model, batches, blocks)
    with torch.no_grad():
        if features is not None and features not in dict(twin.named_modules()):
            raise ValueError(f"the model has no module {features!r} whose input could be compared")
        where = features or _head(twin, pairs[0][0], blocks)
        whole, scores = _features(twin, pairs, where), {}
        for block in blocks:
            with bypassed(twin, [block]):
                scores[block] = 1 - linear_cka(whole, _features(twin, pairs, where))
    return scores


def cka_intra(model: nn.Module, batches, blocks: Sequence[str]) -> dict[str, float]:
    """1 - linear CKA between a block's input and its output: 0 for a block that changes nothing (Jordao et al. 2023, 4,
    in their group's variant without removal). The features of one block are held at a time, and each takes a pass."""
    twin, pairs = _trained_copy(model, batches, blocks)
    scores = {}
    for block in blocks:
        given: list[Tensor] = []
        returned: list[Tensor] = []

        def hook(_, args, output, given=given, returned=returned, block=block):
            given.append(_finite(args[0], f"the input of block {block}").flatten(1))
            returned.append(_finite(output, f"block {block}").flatten(1))

        _run(twin, pairs, {block: hook})
        scores[block] = 1 - linear_cka(torch.cat(given), torch.cat(returned))
    return scores


def random_block(model: nn.Module, batches, blocks: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """U(0, 1) a block from its own generator: the control that ties most criteria (Jordao et al. 2023, Table 1)."""
    draws = torch.rand(len(blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(blocks, draws.tolist(), strict=True))


def filter_l1(model: nn.Module, batches, blocks: Sequence[str]) -> dict[str, float]:
    """Sum over the block's convolutions of the mean L1 norm of a filter. Jordao et al. 2023 (A.2) leave it out of their
    tables: magnitudes follow the stage, so the same stages would always lose."""
    weights = {name: w.detach().double() for name, w in prunable(model).items()}
    return {
        block: sum(float(w.abs().flatten(1).sum(1).mean()) for n, w in weights.items() if n.startswith(f"{block}."))
        for block in blocks
    }


BLOCK_SCORES = {
    "hrank": hrank,
    "expectabs": expectabs,
    "kl": kl,
    "pls-vip": pls,
    "cka": cka,
    "cka-intra": cka_intra,
    "filter-l1": filter_l1,
    "random": random_block,
}


def _trained_copy(model: nn.Module, batches, blocks: Sequence[str]) -> tuple[nn.Module, Pairs]:
    known = dict(model.named_modules())
    for block in blocks:
        if block not in known:
            raise ValueError(f"the model has no block {block!r}; structure.find_blocks lists its blocks")
    return copy.deepcopy(model).eval(), pairs_of(batches)


def _finite(output: Tensor, what: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"{what} gives {type(output).__name__}, not a tensor, so it cannot be scored")
    if not torch.isfinite(output).all():
        raise ValueError(f"{what} gives NaN or infinity; look for it in the weights or the data")
    return output


def _run(model: nn.Module, pairs: Pairs, hooks: dict[str, Callable]) -> None:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with torch.no_grad():
            for x, _ in pairs:
                model(x)
    finally:
        for handle in handles:
            handle.remove()


def _means(model: nn.Module, batches, blocks: Sequence[str], of: Callable) -> dict[str, float]:
    """Sum and count of each block's output, batch by batch, so that nothing but two numbers is held."""
    twin, pairs = _trained_copy(model, batches, blocks)
    sums = dict.fromkeys(blocks, 0.0)
    counts = dict.fromkeys(blocks, 0)

    def hook_of(name: str):
        def hook(_, __, output):
            value, count = of(name, _finite(output, f"block {name}"))
            sums[name] += float(value)
            counts[name] += count

        return hook

    _run(twin, pairs, {name: hook_of(name) for name in blocks})
    for name, count in counts.items():
        if not count:
            raise ValueError(f"block {name} did not run, so it has no activations to score")
    return {name: sums[name] / counts[name] for name in blocks}


def outputs_of(model: nn.Module, batches, blocks: Sequence[str], reduce: Callable) -> dict[str, Tensor]:
    """{module name: ``reduce`` of its output, over all samples}, in evaluation mode, from one pass over a copy."""
    twin, pairs = _trained_copy(model, batches, blocks)
    found: dict[str, list[Tensor]] = {name: [] for name in blocks}
    hooks = {
        name: lambda _, __, out, name=name: found[name].append(reduce(_finite(out, f"block {name}"))) for name in blocks
    }
    _run(twin, pairs, hooks)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _head(model: nn.Module, x: Tensor, blocks: Sequence[str]) -> str | None:
    """The last weighted leaf that runs, if it lies outside the blocks and runs after them."""
    calls: list[str] = []
    inside = tuple(f"{b}." for b in blocks)
    leaves = [n for n, m in model.named_modules() if isinstance(m, PRUNABLE) and not n.startswith(inside)]
    _run(model, [(x, None)], {n: lambda *_, n=n: calls.append(n) for n in (*leaves, *blocks)})
    return calls[-1] if calls and calls[-1] in leaves else None


def _features(model: nn.Module, pairs: Pairs, where: str | None) -> Tensor:
    """The input of module ``where``, or the model's output, of every sample, [samples, features]."""
    found: list[Tensor] = []
    if where is None:
        found = [_finite(model(x), "the network").flatten(1) for x, _ in pairs]
    else:
        _run(model, pairs, {where: lambda _, args, __: found.append(_finite(args[0], f"the input of {where}"))})
    return torch.cat([f.flatten(1) for f in found])
