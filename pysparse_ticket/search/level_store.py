"""The folder of an iterated search: settings, states and levels, each file whole or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from .. import checkpoint as checkpoints
from ..files import write_whole
from ..ticket import Ticket


class LevelStore:
    """``folder/<hash of the settings>/`` with ``settings.json``, ``start`` and ``rewind`` states, and for each level
    its ticket, its record (sparsity, plan, and seconds once it is done) and the trained state.

    Nothing is written before the first state is kept. ValueError naming the first difference when the folder holds a
    search with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict, rounds: int) -> None:
        blob = json.dumps(settings, indent=2)
        self.settings = json.loads(blob)
        self.path = Path(folder) / hashlib.sha256(blob.encode()).hexdigest()[:12]
        for other in sorted(Path(folder).glob("*/settings.json")):
            self._check_same(Path(folder), json.loads(other.read_text()))
        self.done = 0
        while self.done <= rounds and (self.record(self.done) or {}).get("seconds") is not None:
            self.done += 1

    def _check_same(self, folder: Path, theirs: dict) -> None:
        for name in [*self.settings, *theirs]:
            a, b = theirs.get(name, "absent"), self.settings.get(name, "absent")
            if a != b:
                raise ValueError(
                    f"{folder} holds another search: its {name} is {a!r}, this one's {b!r}; give another folder"
                )

    def folder(self, index: int) -> Path:
        return self.path / f"level-{index:02d}"

    def state(self, name: str) -> dict | None:
        path = self.path / f"{name}.safetensors"
        return checkpoints.load(path) if path.exists() else None

    def keep_state(self, name: str, state: dict) -> None:
        if not (settings := self.path / "settings.json").exists():
            write_whole(settings, json.dumps(self.settings, indent=2).encode())
        checkpoints.save(self.path / f"{name}.safetensors", state)

    def record(self, index: int) -> dict | None:
        path = self.folder(index) / "level.json"
        return json.loads(path.read_text()) if path.exists() else None

    def begin(self, index: int, ticket: Ticket, plan: dict[str, str]) -> None:
        """Ticket and plan of a level that starts; a level that starts again has them already."""
        if self.record(index) is None:
            ticket.save(self.folder(index) / "ticket.safetensors")
            self._write(index, {"level": index, "sparsity": ticket.sparsity, "plan": plan, "seconds": None})

    def finish(self, index: int, trained: dict[str, Tensor], seconds: float) -> None:
        checkpoints.save(self.folder(index) / "trained.safetensors", trained)
        self._write(index, self.record(index) | {"seconds": seconds})

    def ticket(self, index: int) -> Ticket:
        return Ticket.load(self.folder(index) / "ticket.safetensors")

    def trained(self, index: int) -> dict[str, Tensor]:
        return checkpoints.load(self.folder(index) / "trained.safetensors")

    def _write(self, index: int, record: dict) -> None:
        write_whole(self.folder(index) / "level.json", json.dumps(record, indent=2).encode())
