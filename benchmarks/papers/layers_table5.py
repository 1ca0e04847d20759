"""Jordao et al. 2023, Table 5: layer tickets against the dense network on images that are not CIFAR-10's own.

Trained on CIFAR-10 alone. CIFAR-C is read as CIFAR-10-C and its mean accuracy over fifteen corruptions and five
severities. The paper's differences on CIFAR-10.2 are whole multiples of 0.05 points, one image in 2,000: its test part,
and single runs; ours are three, paired by seed. The table does not name its criterion: blocks are those that GraSP
removes at initialisation, as in Table 4. ResNet-32's row "p=4" is probably p=5, which the same rows of Table 4 are by
arithmetic: the figures stand at p=5, and p=4 is run beside it. A test set that is not in the folder is left out.

``--quick`` evaluates on digits under noise, low contrast and blur, and on digits that no run has seen.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from layers_setup import FULL, quick
from recipe import Recipe, main
from torch import Tensor, nn

import pysparse_ticket as pst
from pysparse_ticket import data as datasets
from pysparse_ticket.data import Corrupted, cifar10_2, cifar10_c
from pysparse_ticket.data.shifted import SEVERITIES
from pysparse_ticket.files import write_whole
from pysparse_ticket.train import evaluate

C, SECOND = COLUMNS = ("CIFAR-10-C", "CIFAR-10.2")
PAPER = {
    "ResNet-32 p=1": {C: 1.13, SECOND: 0.00},
    "ResNet-32 p=3": {C: -0.05, SECOND: -1.15},
    "ResNet-32 p=5": {C: 1.61, SECOND: -0.65},
    "ResNet-56 p=3": {C: 0.59, SECOND: 0.70},
    "ResNet-56 p=4": {C: 3.73, SECOND: 1.75},
    "ResNet-56 p=5": {C: -0.16, SECOND: 0.70},
    "ResNet-56 p=12": {C: 1.98, SECOND: -1.95},
}
Sets = Mapping[str, Mapping[str, Callable[[], tuple[Tensor, Tensor]]]]  # {column: {part: () -> images, labels}}


def measure(runs, part, seed):
    settings, sets = runs.settings, shifted_sets(runs)
    dense, _ = runs.dense(f"dense-{seed}", seed)
    whole = accuracies(runs, f"dense-{seed}", sets, lambda: loaded(runs.network(seed), dense["model"]))
    batch = runs.batch(seed, settings.samples)
    for remove in settings.remove:
        find = partial(
            pst.at_init, runs.network(seed), batch, score="grasp", granularity="layer", remove=remove,
            aggregate=settings.aggregate, seed=seed,
        )  # fmt: skip
        name = f"grasp-{remove}-{seed}"
        state = runs.ticket(name, seed, find, weights=True)["model"]

        def smaller(find=find, state=state) -> nn.Module:
            return loaded(pst.densify(pst.sparsify(runs.network(seed), find())), state)

        for column, accuracy in accuracies(runs, name, sets, smaller).items():
            yield f"ResNet-{part} p={remove}", column, accuracy - whole[column]


def shifted_sets(runs) -> Sets:
    """The sets of the user's folder, or those computed from the embedded data; FileNotFoundError if all are missing."""
    if runs.settings.data == "cifar10":
        makers = {C: lambda: cifar10_c(runs.root), SECOND: lambda: cifar10_2(runs.root)}
    else:
        unseen = datasets.load(runs.settings.data, **runs.settings.load)
        first = len(runs.data.test_labels)
        makers = {
            C: lambda: corrupted(runs.data.test_images.cpu(), runs.data.test_labels.cpu()),
            SECOND: lambda: (unseen.test_images[first:], unseen.test_labels[first:]),
        }
    sets, missing = {}, None
    for column, make in makers.items():
        try:
            found = make()
        except FileNotFoundError as error:
            print(f"{column} is not run: {error}", file=sys.stderr)
            missing = error
            continue
        if column == C:
            levels = range(1, SEVERITIES + 1)
            sets[column] = {f"{c.name} {level}": partial(c.severity, level) for c in found for level in levels}
        else:
            sets[column] = {"test": lambda pair=found: pair}
    if not sets:
        raise missing
    return sets


def accuracies(runs, name: str, sets: Sets, build: Callable[[], nn.Module]) -> dict[str, float]:
    """Mean accuracy in % of a network over the parts of each set. Every part's is kept in a file, and not repeated."""
    path = runs.folder / f"{name}.shifted.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    model = None
    for column in sets:
        if column in known:
            continue
        model = model or build()
        known[column] = {}
        for part, read in sets[column].items():
            images, labels = (tensor.to(runs.settings.train.device) for tensor in read())
            known[column][part] = 100 * evaluate(model, replace(runs.data, test_images=images, test_labels=labels))
        write_whole(path, json.dumps(known).encode())
    return {column: statistics.fmean(known[column].values()) for column in sets}


def loaded(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


def corrupted(images: Tensor, labels: Tensor, seed: int = 0) -> list[Corrupted]:
    """Gaussian noise, low contrast and a box blur of uint8 ``[N, C, H, W]``, each at five severities."""
    draws = torch.Generator().manual_seed(seed)
    pixels = images.float() / 255
    mean = pixels.mean((1, 2, 3), keepdim=True)
    # 0.06 to 0.3 of noise; 85% to 25% of the contrast; from severity to severity one more blur of 3x3 pixels
    noise = [pixels + 0.06 * s * torch.randn(pixels.shape, generator=draws) for s in range(1, SEVERITIES + 1)]
    contrast = [mean + (1 - 0.15 * s) * (pixels - mean) for s in range(1, SEVERITIES + 1)]
    blur = [pixels]
    for _ in range(SEVERITIES):
        blur.append(F.avg_pool2d(blur[-1], 3, stride=1, padding=1, count_include_pad=False))
    found = []
    for name, parts in (("gaussian_noise", noise), ("contrast", contrast), ("box_blur", blur[1:])):
        whole = (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)
        found.append(Corrupted(name, whole.permute(0, 2, 3, 1).numpy(), labels.repeat(SEVERITIES)))
    return found


full = {
    "32": replace(FULL, network="resnet32", remove=(1, 3, 4, 5)),
    "56": replace(FULL, network="resnet56", remove=(3, 4, 5, 12)),
}
RECIPE = Recipe(
    "layers_table5",
    "Jordao et al. 2023, Table 5: robustness of layer tickets trained on CIFAR-10, points over dense",
    PAPER,
    full,
    {part: quick(settings) for part, settings in full.items()},
    measure,
    "{:+.2f}",
)

if __name__ == "__main__":
    main(RECIPE)
