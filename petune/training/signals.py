"""Ctrl-C and SIGTERM while a model trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Interrupted(KeyboardInterrupt):
    """Training was stopped from outside, at the end of a step; a checkpoint holds what was reached."""


class Stoppable(Protocol):
    """What can be told to stop at the end of a step."""

    stopping: bool


@contextmanager
def stop_on_signal(recorder: Stoppable) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the training after the step, with a checkpoint; the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach only that one
        return

    def stop(number: int, frame: Any) -> None:
        if recorder.stopping:
            raise KeyboardInterrupt
        recorder.stopping = True

    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in watched]
    try:
        yield
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)
