"""A tuning: the adapters of a method, or of several, on one model under one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from petune.core.attached import folder
from petune.core.attached.cost import Merged
from petune.core.attached.install import attached_board, uninstall
from petune.core.attached.merge import merge
from petune.core.attached.parts import Part, Where
from petune.core.attached.sharded import at_rest
from petune.core.forward.link import Acting, Link
from petune.core.forward.settings import setting, settings_of
from petune.core.frozen.config import declare
from petune.core.graft.board import board_of
from petune.core.method.adapter import Adapter

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel


class Tuning(Acting):
    """What `attach` returns.

    Attributes:
        model: the model that it is attached to.
        name: its name there.
        parts: its methods, each with its arguments and the sites that the user picked.
        heads: the modules of the base that train along.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        parts: Sequence[Part],
        heads: tuple[str, ...],
    ) -> None:
        super().__init__(name, "+".join(part.name for part in parts))
        self.model, self.parts, self.heads = model, tuple(parts), heads

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments given; of several methods, those of each by its name."""
        if len(self.parts) == 1:
            return self.parts[0].arguments
        return {part.name: part.arguments for part in self.parts}

    @property
    def where(self) -> Where:
        """The sites that the user picked, None for the method's own; of several methods, by name."""
        if len(self.parts) == 1:
            return self.parts[0].where
        return {part.name: part.where for part in self.parts}

    @property
    def enabled(self) -> bool:
        """Whether it acts, in this context, where nothing is routed."""
        board = board_of(self.model)
        return self.switched_on if board is None else board.is_on(self)

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self.switched_on = on

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        state = "" if self.switched_on else ", disabled"
        sites = len(self.links)
        return f"Tuning({self.name!r}, {self.method!r}, {sites} sites, {count:,} parameters{state})"

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by the name of their site; of several methods, `<method>:<site>`."""
        return {link.label: link.adapter for link in self.links}

    def parameters(self) -> list[nn.Parameter]:
        """What trains, each tensor once."""
        at_rest(self.model)
        found: dict[int, nn.Parameter] = {}
        for link in self.links:
            found |= {id(p): p for p in link.adapter.parameters() if p.requires_grad}
        return list(found.values())

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What trains as an optimizer takes it: a group for each learning rate that the method asks for."""
        at_rest(self.model)
        factors: dict[int, float] = {}
        for link in self.links:
            for name, factor in link.adapter.learning_rates().items():
                factors[id(getattr(link.adapter, name))] = factor
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in self.parameters():
            groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        return [
            {"params": own, "lr": learning_rate * factor}
            for factor, own in groups.items()
            if own
        ]

    @contextmanager
    def step(self, step: int, total: int) -> Iterator[None]:
        """Around each `optimizer.step()`, number `step` of `total` from 0: what methods with a schedule ask for."""
        with ExitStack() as stack:
            for part in self.parts:
                own = [link.adapter for link in self.links if link.method == part.name]
                if own and issubclass(part.cls, Adapter):
                    stack.enter_context(part.cls.step(own, step, total))
            yield

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What is saved, `<site>.<tensor>`, each tensor once; of several methods, `<method>:<site>.<tensor>`."""
        at_rest(self.model)
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
            if _has_schedule(link):
                saved = link.adapter.state_dict()
                buffers = link.adapter.named_buffers()
                found |= {
                    f"{link.label}.{name}": b
                    for name, b in buffers
                    if name not in saved
                }
        return found

    def enable(self) -> None:
        """Switch the tuning on for everybody: one flag, whatever the size of the model."""
        self.switched_on = True

    def disable(self) -> None:
        """Switch the tuning off for everybody: without others the model is the base, exactly."""
        self.switched_on = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Off within the context, and for no other thread or asyncio task."""
        board = attached_board(self.model, self)
        off = settings_of(board).off | {self.name}
        with setting(board, off=off):
            yield

    @contextmanager
    def weighted(self, weight: float) -> Iterator[None]:
        """At another weight within the context, and for no other thread or asyncio task."""
        board = attached_board(self.model, self)
        weights = {**settings_of(board).weights, self.name: self.checked_weight(weight)}
        with setting(board, weights=weights):
            yield

    def save(self, path: str | PathLike[str], format: str = "petune") -> None:
        """Write `adapter.safetensors` and `adapter.json` into the folder `path`; with "peft" what PEFT reads, with
        "serving" the form of it that vLLM and llama.cpp's converter take.

        Raises:
            PetuneError: no such format, or it has no such method; nothing is written then.
        """
        folder.save(self, path, format)

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
        board = attached_board(self.model, self)
        with board.gate.change(f"merge {self.name!r}"):
            merged = merge(self.model, self, quantize)
            self.detach()
            declare(self.model)
        return merged

    def detach(self) -> None:
        """Take the adapters away. After the last one the model is what it was: same class, keys and logits."""
        uninstall(self.model, self)


def _has_schedule(link: Link) -> bool:
    step: Any = type(link.adapter).step
    own: Any = Adapter.step
    return step.__func__ is not own.__func__


def tunings(model: PreTrainedModel) -> Mapping[str, Tuning]:
    """The tunings attached to a model, in the order in which they act."""
    board = board_of(model)
    found: dict[str, Any] = dict(board.tunings) if board else {}
    return found
