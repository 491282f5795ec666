"""A tuning: the adapters of a method, or of several, on one model under one name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from petune.core.attached import folder as storage
from petune.core.attached.merge import Merged, merge
from petune.core.attached.parts import Part, Where
from petune.core.forward.link import Link
from petune.core.frozen.modules import tables as _tables
from petune.core.frozen.site import Site
from petune.core.graft.board import Board, board_of
from petune.core.graft.module import release, remove
from petune.core.method.adapter import Adapter
from petune.errors import PetuneError, UnsupportedError

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel


class Tuning:
    """What `attach` returns. Attributes: `model`, `name`, `parts` (its methods), `enabled`."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        parts: Sequence[Part],
        heads: tuple[str, ...],
        links: list[tuple[Adapter, Site, Part | None]],
    ) -> None:
        self.model, self.name, self.parts, self.heads = model, name, tuple(parts), heads
        self.links = [Link(adapter, site, self, part) for adapter, site, part in links]
        self.prompts = [link for link in self.links if link.site.kind == "prompt"]
        self.reads = any(link.reads for link in self.links)
        self.enabled = True
        self._weight = 1.0

    @property
    def method(self) -> str:
        """The registered name of its method; of several, all with `+` between them."""
        return "+".join(part.name for part in self.parts)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments given; of several methods, those of each by its name."""
        one, *more = self.parts
        return {part.name: part.arguments for part in self.parts} if more else one.arguments

    @property
    def where(self) -> Where:
        """The sites that the user picked, None for the method's own; of several methods, by name."""
        one, *more = self.parts
        return {part.name: part.where for part in self.parts} if more else one.where

    @property
    def weight(self) -> float:
        """How much of the tuning acts: at each site y = inner(x) + weight (adapter(inner, x) - inner(x)). So tunings
        that add something, stacked, are their weighted sum.
        """
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise PetuneError(
                f"weight={weight!r} of tuning {self.name!r}: wanted is a finite number."
            )
        if self.prompts and weight != 1:
            raise UnsupportedError(
                f"tuning {self.name!r} puts tokens before the input, which have no weighted form."
            )
        self._weight = float(weight)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        state = "" if self.enabled else ", disabled"
        return f"Tuning({self.name!r}, {self.method!r}, {len(self.links)} sites, {count:,} parameters{state})"

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the name of their site; of several methods, `<method>:<site>`."""
        return {link.label: link.adapter for link in self.links}

    def parameters(self) -> list[nn.Parameter]:
        """What trains, each tensor once."""
        found = {
            id(p): p for link in self.links for p in link.adapter.parameters() if p.requires_grad
        }
        return list(found.values())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What trains as an optimizer takes it: a group for each learning rate that the method asks for."""
        rates = {
            id(p): rate
            for link in self.links
            for name, rate in link.adapter.learning_rates().items()
            if isinstance(p := getattr(link.adapter, name), nn.Parameter)
        }
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for p in self.parameters():
            groups.setdefault(rates.get(id(p), 1.0), []).append(p)
        return [{"params": own, "lr": learning_rate * rate} for rate, own in groups.items() if own]

    @contextmanager
    def step(self, step: int, total: int) -> Iterator[None]:
        """Around each `optimizer.step()`, number `step` of `total` from 0: what methods with a schedule ask for."""
        with ExitStack() as stack:
            for part in self.parts:
                if issubclass(part.cls, Adapter):
                    own = [link.adapter for link in self.links if link.part is part]
                    stack.enter_context(part.cls.step(own, step, total))
            yield

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What is saved, `<site>.<tensor>`, each tensor once; of several methods, `<method>:<site>.<tensor>`."""
        seen: set[int] = set()
        for link in self.links:
            for key, tensor in link.adapter.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{link.label}.{key}", tensor

    def progress(self) -> dict[str, Tensor]:
        """Where the schedules of its methods stand, which a checkpoint of the training needs and a saved tuning not:
        the buffers that are not saved.
        """
        found: dict[str, Tensor] = {}
        for link in self.links:
            if type(link.adapter).step.__func__ is not Adapter.step.__func__:  # type: ignore[attr-defined]
                saved = link.adapter.state_dict()
                found |= {
                    f"{link.label}.{k}": b
                    for k, b in link.adapter.named_buffers()
                    if k not in saved
                }
        return found

    def enable(self) -> None:
        """Switch the tuning on: one flag, whatever the size of the model."""
        self.enabled = True

    def disable(self) -> None:
        """Switch the tuning off: without others the model is the base, exactly."""
        self.enabled = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Off within the context, and afterwards what it was before."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def save(self, path: str | PathLike[str], format: str = "petune") -> None:
        """Write `adapter.safetensors` and `adapter.json` into the folder `path`; with "peft" what PEFT reads, with
        "serving" the form of it that vLLM and llama.cpp's converter take.

        Raises:
            PetuneError: no such format, or it has no such method; nothing is written then.
        """
        storage.save(self, path, format)

    def merge(self, quantize: bool = False) -> Merged:
        """Fold the tuning into the base's weights; it is gone then.

        Args:
            quantize: store layers that are quantized as they were; otherwise they become dense.

        Returns:
            What that cost: the relative error of each layer's weights.

        Raises:
            UnmergeableError: a TypeError: the method has no merged form.
            PetuneError: the result would not be finite; nothing is changed.
        """
        self._here()
        return merge(self, quantize)

    def detach(self) -> None:
        """Take the adapters away. After the last one the model is what it was: same class, keys and logits."""
        board = self._here()
        for link in self.links:
            remove(link)
            for table in _tables(self.model) if link.site.kind == "prompt" else []:
                release(table)
        del board.tunings[self.name]
        release(self.model)
        if not board.tunings:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(board.flags.get(name, parameter.requires_grad))
            vars(self.model).pop("_hf_peft_config_loaded", None)

    def _here(self) -> Board:
        board = board_of(self.model)
        if board is None or board.tunings.get(self.name) is not self:
            raise PetuneError(f"tuning {self.name!r} is not attached any more.")
        return board
