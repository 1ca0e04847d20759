"""Checkpoints without pickle: a tree of dicts, sequences, numbers and tensors in one safetensors file.

Tensors keep their bits and their strides (a channels_last momentum buffer stays one, so the resumed optimizer runs the
same vector code); the rest of the tree is JSON in the file's header. Nothing in the file is ever executed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from .files import write_whole

FORMAT = "pysparse_ticket checkpoint 1"


def save(path: str | Path, tree: Any) -> None:
    """Writes ``tree`` to ``path``, whole or not at all.

    ``tree`` may hold dicts (keys int or str), lists, tuples, None, bool, int, float, str and dense tensors on any
    device. Raises TypeError for anything else and OSError when the file cannot be written; ``path`` then is as before.
    """
    tensors: dict[str, torch.Tensor] = {}
    spec = _encode(tree, "", tensors)
    write_whole(path, to_safetensors(tensors, {"format": FORMAT, "tree": json.dumps(spec)}))


def load(path: str | Path) -> Any:
    """The tree that ``save`` wrote, its tensors on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is truncated or that ``save`` did not write.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, only keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}): remove it to start afresh") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no {FORMAT!r}: give the path of a checkpoint")
    return _decode(json.loads(metadata["tree"]), tensors)


def check_same_run(path: str | Path, tree: Any, ours: dict) -> None:
    """Raises ValueError naming the first entry of the identity in ``tree``, read from ``path``, that is not ours."""
    if not isinstance(tree, dict) or "identity" not in tree:
        raise ValueError(f"{path} is no checkpoint of a training run: give another file")
    stored = tree["identity"]
    for name in [*ours, *stored]:
        theirs, own = stored.get(name, "absent"), ours.get(name, "absent")
        if theirs != own:
            raise ValueError(
                f"{path} belongs to another run: its {name} is {theirs!r}, this one's {own!r}; "
                "give another file, or resume=False to overwrite it"
            )


def rng_state(device: torch.device) -> dict:
    """The states of Python's, numpy's and torch's global generators, and of the GPU's where ``device`` is one."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    state["numpy"] = numpy_state
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Undoes every draw since ``rng_state`` returned ``state``."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], np.uint32)}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _encode(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        while name in tensors:  # {"a/b": t} and {"a": {"b": t}} side by side
            name += "'"
        # a fresh tensor in default layout: tied weights share no storage, which safetensors refuses
        tensors[name] = torch.empty(node.shape, dtype=node.dtype).copy_(node.detach())
        return {"tensor": name, "stride": torch.empty_like(node, device="meta").stride()}
    if isinstance(node, dict):
        for key in node:
            if type(key) not in (int, str):
                raise TypeError(
                    f"a checkpoint cannot hold the {type(key).__name__} key {key!r} in {name or 'its root'}"
                )
        return {"dict": [[key, _encode(value, f"{name}/{key}".lstrip("/"), tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        items = [_encode(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
        return {"tuple": items} if isinstance(node, tuple) else items
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(
        f"a checkpoint cannot hold the {type(node).__name__} {name}: make it a tensor, a number or a string"
    )


def _decode(spec: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(spec, list):
        return [_decode(item, tensors) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if "dict" in spec:
        return {key: _decode(value, tensors) for key, value in spec["dict"]}
    if "tuple" in spec:
        return tuple(_decode(item, tensors) for item in spec["tuple"])
    stored = tensors[spec["tensor"]]
    return torch.empty_strided(stored.shape, spec["stride"], dtype=stored.dtype).copy_(stored)
