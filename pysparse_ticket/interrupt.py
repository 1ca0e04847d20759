"""Ctrl-C that waits for a change of state to be whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run that can be gone on with; the message says where its checkpoint is and how."""


@contextmanager
def sigint_held() -> Iterator[None]:
    """Ctrl-C takes effect when the body is done, a second one at once. Outside the main thread this does nothing."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    waiting = []

    def hold(number, frame):
        if waiting:
            usual(number, frame)
        waiting.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if waiting:
        usual(*waiting[0])
