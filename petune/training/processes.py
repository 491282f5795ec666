"""Several processes that train one run together, as `torchrun` starts them: every step they share a batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from petune.core.method.batch import SKIP
from petune.errors import PetuneError, PetuneWarning
from petune.training.launch import started
from petune.training.remarks import LOG

LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for the others, which may have a long evaluation to do."""


def on_cpu() -> bool:
    """Whether there is nothing but a CPU to train on, which accelerate wants to be told."""
    return not torch.accelerator.is_available()


class Processes:
    """All processes of a run, seen from one of them; the first, of rank 0, writes.

    Args:
        rank: which one this is.
        count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def joined(cls) -> Processes:
        """Meet the others, if a launcher has started several.

        Raises:
            UnsupportedError: the launcher was asked for more than equal processes that each hold the model.
            PetuneError: the launcher has not told this process how to find the others, or they can't meet.
        """
        count = started()
        if count == 1:
            return cls()
        from accelerate import PartialState

        try:
            state = PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT)
        except (ValueError, torch.distributed.DistError) as error:
            said = " ".join(str(error).split())
            raise PetuneError(f"{count} processes can't meet: {said}") from error
        if state.num_processes != count:
            raise PetuneError(
                f"{count} processes were started, and accelerate found {state.num_processes}."
            )
        if state.process_index:
            # the first has said it
            LOG.setLevel(logging.ERROR)
            warnings.simplefilter("ignore", PetuneWarning)
        return cls(state.process_index, count)

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and scores."""
        return self.rank == 0

    def check_share(self, batch_size: int) -> None:
        """See that every process gets rows of a batch.

        Raises:
            PetuneError: a batch has fewer rows than there are processes.
        """
        if batch_size < self.count:
            raise PetuneError(
                f"training.batch_size {batch_size}: {self.count} processes share a batch; it needs a row for each."
            )

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Within the context the first process is alone. The others follow and find what it has cleared or fetched."""
        if not self.writes:
            self.wait()
        yield
        if self.writes:
            self.wait()

    def once(self, write: Callable[[], object]) -> None:
        """Let the first process do something that the others wait for."""
        with self.first_alone():
            if self.writes:
                write()

    def told(self, value: Any) -> Any:
        """What the first process has for a value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def sum(self, value: int) -> int:
        """Over all processes."""
        if self.count == 1:
            return value
        from accelerate import PartialState
        from accelerate.utils import reduce

        mine = torch.tensor(value, device=PartialState().device)
        return int(reduce(mine, "sum"))


class Shares(Sampler[list[int]]):
    """The batches of an order of rows, of each the share of one process: parts whose sizes differ by one at most.

    Args:
        order: the rows of all processes.
        batch_size: how many of them a step takes together.
    """

    def __init__(
        self, order: Sampler[int], batch_size: int, processes: Processes
    ) -> None:
        self.order, self.batch_size, self.processes = order, batch_size, processes

    def __len__(self) -> int:
        rows: Any = self.order
        return -(-len(rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            yield batch[self.processes.rank :: self.processes.count]


ROWS = "petune_rows"
"""The key of a batch under which it says how many rows a process has of it."""


class SharedCollate:
    """A task's `collate` for a share of a batch. A process that gets no row of the last batch runs on a row of another
    one, which counts nothing.

    Args:
        collate: (examples) -> batch.
        other: the example that stands in.
        by_token: the loss is a mean over labelled tokens, so that a row without labels counts nothing.
    """

    def __init__(self, collate: Any, other: Any, *, by_token: bool) -> None:
        self.collate, self.other, self.by_token = collate, other, by_token

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collate(examples or [self.other])
        if self.by_token and not examples:
            batch["labels"] = torch.full_like(batch["labels"], SKIP)
        return {**batch, ROWS: torch.tensor(len(examples))}
