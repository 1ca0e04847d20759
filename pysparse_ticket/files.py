"""Files that a kill, a crash or a full disk cannot damage."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | Path, blob: bytes) -> None:
    """Replaces the file ``path`` by ``blob`` so that a crash, a kill or a full disk at any moment leaves the old one.

    Raises OSError, with the system's errno, when it cannot; the unfinished file beside ``path`` is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # in the same folder, so that the rename stays on one file system
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        kept = "the previous one is untouched" if path.exists() else "nothing was left behind"
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno or 0)}; {kept}") from error
    if os.name == "posix":  # the rename itself lasts through a power cut once the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
