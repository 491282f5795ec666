"""One batch, each row its own tuning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from petune.adapter import TrainedParameters
from petune.errors import PetuneError, UnsupportedError, unknown
from petune.graft import Board, Computation, Link, chain, graft_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.attention import Frozen


class Split(NamedTuple):
    """The rows of a batch by what serves them: (links, rows) of each group, the rows left to the base, and the
    permutation that puts the concatenated results back in order.
    """

    groups: list[tuple[list[Link], Tensor]]
    rest: Tensor
    back: Tensor


class Plan:
    """Which tuning serves each row. Rows are grouped once for each set of tunings that meet at a site, not once a
    layer. A batch that holds each row k times over (beams, flattened tokens) repeats the names.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self._rows: dict[Any, tuple[list[Tensor], Tensor, Tensor]] = {}

    def repeated(self, batch: int) -> list[str | None]:
        """A name for each row of a batch of this size.

        Raises:
            PetuneError: the batch is no multiple of the names.
        """
        times, left = divmod(batch, len(self.names))
        if left or not times:
            raise PetuneError(f"route(): {len(self.names)} names for a batch of {batch} rows.")
        return [name for name in self.names for _ in range(times)]

    def split(self, links: list[Link], batch: int, device: torch.device) -> Split:
        by_name: dict[str, list[Link]] = {}
        for link in links:
            by_name.setdefault(link.tuning.name, []).append(link)
        key = (tuple(by_name), batch, device)
        if key not in self._rows:
            names = self.repeated(batch)
            groups = [[i for i, n in enumerate(names) if n == name] for name in by_name]
            rest = [i for i, n in enumerate(names) if n not in by_name]
            order = torch.tensor([i for group in [*groups, rest] for i in group], dtype=torch.long)
            rows = [torch.tensor(group, dtype=torch.long, device=device) for group in groups]
            self._rows[key] = rows, torch.tensor(rest, dtype=torch.long, device=device), order.argsort().to(device)
        rows, rest_rows, back = self._rows[key]
        return Split(list(zip(by_name.values(), rows, strict=True)), rest_rows, back)

    def run(self, links: list[Link], call: Computation) -> Tensor:
        """An adapted module's forward. The base runs once for all rows that do not change its input."""
        serving = [link for link in links if link.tuning.name in self.names]
        for link in serving:
            if isinstance(link.site.module, nn.Embedding) and re.search(r"\.\d+\.", link.site.name):
                raise UnsupportedError(f"route(): {link.site.name} is looked up once for all rows.")
            if isinstance(link.adapter, TrainedParameters):
                raise UnsupportedError(f"route(): {link.site.name} runs once for all rows, with one set of parameters.")
        if serving and call.x.shape[0] == 1:  # positions, say, which the rows share until now
            call.x = call.x.expand(len(self.names), *call.x.shape[1:])
        x = call.x
        groups, rest, back = self.split(serving, x.shape[0], x.device)
        if not groups:
            return call(x)
        if len(groups) == 1 and not len(rest):
            return chain(groups[0][0], call, call)(x)
        whole: list[Tensor] = []
        spans = {g: g.seen for link in links if link.site.entry is not None for g in [graft_of(link.site.entry)]}

        def shared() -> Tensor:
            if not whole:
                whole.append(call(x))
            return whole[0]

        out = []
        for own, index in groups:
            mine = x[index]

            def inner(h: Tensor, mine: Tensor = mine, index: Tensor = index) -> Tensor:
                if h is mine:
                    return shared()[index]
                if not call.alone:
                    raise UnsupportedError("route(): a method that changes the input of a block can't be routed.")
                return call(h)

            for graft, seen in spans.items():
                graft.seen = seen[index] if seen is not None else None
            out.append(chain(own, inner, call)(mine))
            if not isinstance(out[-1], Tensor):
                raise UnsupportedError(f"route(): {own[0].site.name} gives more than one tensor.")
        if len(rest):
            out.append(call(x[rest]) if call.alone and not whole else shared()[rest])
        return torch.cat(out)[back]

    def run_attention(self, links: list[Link], call: Frozen, x: tuple[Any, ...]) -> Tensor:
        """An attention's forward: each group of rows attends on its own."""
        from petune.attention import around, take

        batch = x[0].shape[0]
        serving = [link for link in links if link.tuning.name in self.names]
        groups, rest, back = self.split(serving, batch, x[0].device)
        out = []
        for own, index in [*groups, *([([], rest)] if len(rest) else [])]:
            rows = [take(t, index, batch) for t in x] if batch > 1 else x
            out.append(around(own, call.rows(index, batch))(*rows))
        return torch.cat(out)[back]


def board_of(model: PreTrainedModel) -> Board | None:
    """What petune keeps on a model, None if nothing is attached."""
    graft = vars(model).get("petune_graft")
    return graft.board if graft is not None else None


@contextmanager
def route(model: PreTrainedModel, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context row i of a batch goes through the tuning `names[i]` alone; None is the base.

    Raises:
        PetuneError: a name is not attached, or a batch does not fit the names.
    """
    board = board_of(model)
    known = board.tunings if board else {}
    for name in names:
        if name is not None and name not in known:
            raise PetuneError("route(): " + unknown("tuning", name, known))
    if not names:
        raise PetuneError("route(): no names; give one for each row of the batch, None for the base.")
    if board is None:
        yield
        return
    before, board.plan = board.plan, Plan(names)
    try:
        yield
    finally:
        board.plan = before
