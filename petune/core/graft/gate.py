"""Who may change a model while its forwards run: nobody."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from petune.errors import PetuneError


class Gate:
    """Lets any number of threads run forwards of a model, or one thread change what is attached to it.

    A forward that begins while something is attached or detached waits. A change that begins while another thread
    runs a forward is refused.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running: Counter[int] = Counter()

    def __deepcopy__(self, memo: Any) -> Gate:
        return Gate()

    def __reduce__(self) -> Any:
        return Gate, ()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within the context this thread runs a forward of the model."""
        thread = threading.get_ident()
        with self.lock:
            self.running[thread] += 1
        try:
            yield
        finally:
            with self.lock:
                self.running[thread] -= 1
                if not self.running[thread]:
                    del self.running[thread]

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Within the context no forward of the model begins.

        Args:
            what: what is to be done, for the error.

        Raises:
            PetuneError: another thread runs a forward.
        """
        with self.lock:
            if self.running.keys() - {threading.get_ident()}:
                raise PetuneError(
                    f"{what} while another thread runs a forward of the model: wait for it, and try again."
                )
            yield
