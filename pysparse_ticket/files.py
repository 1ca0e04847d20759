"""Files that a kill, a crash or a full disk cannot damage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def replace_file(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """``write(temporary)`` beside ``path``, then rename over it: the old file survives a kill or a full disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}; what was there before is unchanged") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
