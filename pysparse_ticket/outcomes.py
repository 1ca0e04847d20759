"""What was timed on this machine once, for later processes: JSON files in the user's cache folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .files import write_whole

try:
    import fcntl
except ImportError:  # not on Windows, where two processes that write at the same moment may lose an outcome
    fcntl = None


class Outcomes:
    """``known``: {key: outcome} of the file ``name`` in the folder ``PYSPARSE_TICKET_CACHE``, and what is kept here."""

    def __init__(self, name: str) -> None:
        folder = os.environ.get("PYSPARSE_TICKET_CACHE") or Path.home() / ".cache" / "pysparse_ticket"
        self.path = Path(folder) / name
        self.known = self._stored()

    def keep(self, key: str, outcome: Any) -> None:
        """Writes it at once, beside what other processes kept meanwhile. A folder that cannot be written costs the next
        process the timing, nothing else."""
        self.known[key] = outcome
        with suppress(OSError), self._alone():
            self.known = self._stored() | self.known
            write_whole(self.path, json.dumps(self.known).encode())

    def _stored(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other writer, in this process or another, between reading the file and replacing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "a") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
