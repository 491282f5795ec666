"""One batch, each row its own tuning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.forward.attention import Frozen, around, take
from petune.core.forward.chain import Computation, chain
from petune.core.forward.link import Link

graft_of = lambda module: vars(module)["petune_graft"]  # noqa: E731
from petune.core.method.copies import TrainedParameters
from petune.errors import PetuneError, UnsupportedError

Rows = Tensor | slice
"""Some rows of a batch; a slice where they follow each other, so that taking them copies nothing."""


class Plan:
    """Which tuning serves each row. Rows are grouped once for each set of tunings that meet at a site, not once a
    layer. A batch that holds each row k times over (beams, flattened tokens) repeats the names.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self._rows: dict[Any, tuple[list[tuple[str | None, Rows]], Tensor | None]] = {}

    def repeated(self, batch: int) -> list[str | None]:
        """A name for each row of a batch of this size.

        Raises:
            PetuneError: the batch is no multiple of the names.
        """
        times, left = divmod(batch, len(self.names))
        if left or not times:
            raise PetuneError(f"route(): {len(self.names)} names for a batch of {batch} rows.")
        return [name for name in self.names for _ in range(times)]

    def split(
        self, links: list[Link], batch: int, device: torch.device
    ) -> tuple[list[tuple[list[Link], Rows]], Tensor | None]:
        """The rows of a batch by what serves them: (links, rows) of each group, without links for those left to the
        base, and the permutation that puts the concatenated results back in order, None if they are.
        """
        by_name: dict[str, list[Link]] = {}
        for link in links:
            by_name.setdefault(link.tuning.name, []).append(link)
        key = (tuple(by_name), batch, device)
        if key not in self._rows:
            groups: dict[str | None, list[int]] = {}
            for i, name in enumerate(self.repeated(batch)):
                groups.setdefault(name if name in by_name else None, []).append(i)
            order = torch.tensor([i for group in groups.values() for i in group], dtype=torch.long)
            back = None if bool((order.diff() == 1).all()) else order.argsort().to(device)
            self._rows[key] = [(name, _rows(group, device)) for name, group in groups.items()], back
        rows, back = self._rows[key]
        return [(by_name[name] if name else [], index) for name, index in rows], back

    def run(self, links: list[Link], call: Computation) -> Tensor:
        """An adapted module's forward. The base runs once for all rows that do not change its input."""
        serving = [link for link in links if link.tuning.name in self.names]
        for link in serving:
            if isinstance(link.site.module, nn.Embedding) and re.search(r"\.\d+\.", link.site.name):
                raise UnsupportedError(f"route(): {link.site.name} is looked up once for all rows.")
            if isinstance(link.adapter, TrainedParameters):
                raise UnsupportedError(
                    f"route(): {link.site.name} runs once for all rows, with one set of parameters."
                )
        if serving and call.x.shape[0] == 1:  # positions, say, which the rows share until now
            call.x = call.x.expand(len(self.names), *call.x.shape[1:])
        x = call.x
        groups, back = self.split(serving, x.shape[0], x.device)
        if len(groups) == 1:
            return chain(groups[0][0], call, call)(x)
        whole: list[Tensor] = []
        spans = {
            g: g.seen
            for link in links
            if link.site.entry is not None
            for g in [graft_of(link.site.entry)]
        }

        def shared() -> Tensor:
            if not whole:
                whole.append(call(x))
            return whole[0]

        out: dict[int, Tensor] = {}
        for i, (own, index) in sorted(
            enumerate(groups), key=lambda item: not item[1][0]
        ):  # the base's own rows last
            mine = x[index]

            def inner(h: Tensor, mine: Tensor = mine, index: Rows = index) -> Tensor:
                if h is mine:
                    return shared()[index]
                if not call.alone:
                    raise UnsupportedError(
                        "route(): a method that changes the input of a block can't be routed."
                    )
                return call(h)

            for graft, seen in spans.items():
                graft.seen = seen[index] if seen is not None else None
            acting = call if not own and call.alone and not whole else inner
            out[i] = chain(own, acting, call, index)(mine)
            if not isinstance(out[i], Tensor):
                raise UnsupportedError(f"route(): {own[0].site.name} gives more than one tensor.")
        return _joined([out[i] for i in range(len(groups))], back)

    def run_attention(self, links: list[Link], call: Frozen, x: tuple[Any, ...]) -> Tensor:
        """An attention's forward: each group of rows attends on its own."""
        batch = x[0].shape[0]
        groups, back = self.split(links, batch, x[0].device)
        out = []
        for own, index in groups:
            out.append(
                around(own, call.rows(index, batch), index)(*(take(t, index, batch) for t in x))
            )
        return _joined(out, back)


def _rows(group: list[int], device: torch.device) -> Rows:
    if group == list(range(group[0], group[-1] + 1)):
        return slice(group[0], group[-1] + 1)
    return torch.tensor(group, dtype=torch.long, device=device)


def _joined(parts: list[Tensor], back: Tensor | None) -> Tensor:
    out = torch.cat(parts)
    return out if back is None else out[back]
