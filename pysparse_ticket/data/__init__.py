"""Image sets, by name: each a whole set in memory as uint8 tensors. CIFAR-10-C and CIFAR-10.2 are test sets alone."""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import Any

from . import cifar, digits, mnist, procedural, svhn, tiny_imagenet
from .images import ImageData
from .shifted import Corrupted, cifar10_2, cifar10_c

__all__ = ["Corrupted", "ImageData", "cifar10_2", "cifar10_c", "load", "names"]

_LOADERS = {
    "digits": digits.load,
    "procedural": procedural.load,
    "cifar10": partial(cifar.load, "cifar10"),
    "cifar100": partial(cifar.load, "cifar100"),
    "tinyimagenet": tiny_imagenet.load,
    "mnist": mnist.load,
    "svhn": svhn.load,
}
_DOWNLOADABLE = ("cifar10", "cifar100")
_IN_A_FOLDER = (*_DOWNLOADABLE, "tinyimagenet", "mnist", "svhn")


def names() -> tuple[str, ...]:
    """The names that `load` takes."""
    return tuple(_LOADERS)


def load(name: str, root: str | os.PathLike | None = None, download: bool = False, **options: Any) -> ImageData:
    """The image set of a name: digits, procedural, cifar10, cifar100, tinyimagenet, mnist or svhn.

    ``root`` serves the sets that lie in a folder (all but the first two), ``download`` CIFAR alone, and they do nothing
    for the others; ``options`` go to the set's own loader: ``size`` and ``seed`` of the digits; ``train``, ``test``,
    ``size``, ``difficulty`` and ``seed`` of the procedural set. Raises ValueError for an unknown name or option (the
    message lists the known ones), else what the loader raises.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(_LOADERS)}")
    loader = _LOADERS[name]
    known = set(inspect.signature(loader).parameters) - {"root", "download"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; known: {', '.join(sorted(known)) or 'none'}")
    if name in _IN_A_FOLDER:
        options["root"] = root
    if name in _DOWNLOADABLE:
        options["download"] = download
    return loader(**options)
