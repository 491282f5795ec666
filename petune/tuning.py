"""A tuning: the adapters of a method, or of several, on one model under one name."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petune import storage
from petune.adapter import Adapter, TrainedCopy, TrainedParameters, Unfreeze
from petune.attention import install
from petune.discovery import base_class, children, features, find_sites, walk
from petune.errors import PetuneError, UnsupportedError, unknown
from petune.graft import Board, Grafted, Link, add, hold, release, remove
from petune.merge import Merged, merge
from petune.parts import Method, Part, Where, methods, parts, resolve
from petune.prompts import Prompted, Table, is_causal
from petune.routing import board_of
from petune.site import KIND_OF, Site, input_table, select
from petune.weights import dense, is_quantized

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

__all__ = ["Method", "Tuning", "attach", "methods", "resolve", "tunings"]


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
            raise PetuneError(f"weight={weight!r} of tuning {self.name!r}: wanted is a finite number.")
        if self.prompts and weight != 1:
            raise UnsupportedError(f"tuning {self.name!r} puts tokens before the input, which have no weighted form.")
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
        found = {id(p): p for link in self.links for p in link.adapter.parameters() if p.requires_grad}
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
                found |= {f"{link.label}.{k}": b for k, b in link.adapter.named_buffers() if k not in saved}
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


def attach(
    model: PreTrainedModel,
    method: str | Method | Sequence[str | Method],
    *,
    name: str = "default",
    where: Where = None,
    train: Sequence[str] | None = None,
    **arguments: Any,
) -> Tuning:
    """Adapt a model in place: the base is frozen, the method's adapters train.

    Args:
        method: a registered name (`petune.methods()`) or the class itself; a list of them is one tuning, whose
            methods act in that order, and then `where` and `arguments` go by the methods' names.
        name: the tuning's name on this model.
        where: the sites, in place of the method's own choice; see `petune.site.select`.
        train: modules of the base that train along, in a copy of the tuning's own; without it those that
            `from_pretrained` had to make anew (a classifier).
        arguments: the method's hyperparameters.

    Raises:
        PetuneError: an unknown name or argument, a `where` that matches nothing, a name already taken.
        UnsupportedError: the method can't act on this model.
    """
    wanted = parts(method, arguments, where)
    taken = tunings(model)
    if name in taken:
        raise PetuneError(f"a tuning named {name!r} is attached already; give this one another name=…")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise PetuneError(f"name={name!r}: letters, digits, '_' and '-' only.")
    heads = tuple(getattr(model, "petune_fresh", ()) if train is None else train)
    sites = find_sites(model)
    trained = [m for p in wanted if issubclass(p.cls, Unfreeze) for m in p.cls(**p.arguments).modules(sites)]
    links: list[tuple[Adapter, Site, Part | None]] = []
    settled = []
    for part in wanted:
        own, part = _adapters(part, sites) if issubclass(part.cls, Adapter) else ([], part)
        links += [(adapter, site, part) for adapter, site in own]
        settled.append(part)
    copies = [(adapter, site, None) for adapter, site in _copies(model, [*trained, *heads])]
    if not links and not copies:
        raise UnsupportedError(f"method {settled[0].name!r}: this model has no blocks with linear layers.")
    return _install(model, Tuning(model, name, settled, heads, [*copies, *links]))  # what trains itself is innermost


def tunings(model: PreTrainedModel) -> dict[str, Tuning]:
    """The tunings attached to a model, in the order in which they act."""
    board = board_of(model)
    return dict(board.tunings) if board else {}


def _adapters(part: Part, sites: list[Site]) -> tuple[list[tuple[Adapter, Site]], Part]:
    """The adapters of a method at the sites picked, and the method with its arguments settled."""
    name, cls = part.name, part.cls
    assert issubclass(cls, Adapter)
    try:
        picked = select(sites, part.where or cls.where, strict=part.where is not None)
    except PetuneError as none:
        raise type(none)(f"method {name!r}: {none}") from None
    accepted = {KIND_OF[role] for role in cls.where.split() if role in KIND_OF}
    accepted |= {"linear", "block"} if accepted & {"linear", "block"} else set()
    wrong = [s for s in picked if accepted and s.kind not in accepted]
    if wrong:
        kinds = " and ".join(sorted(accepted))
        raise PetuneError(f"method {name!r} acts on {kinds} sites; where={part.where!r} picks {wrong[0].kind} sites.")
    pool: dict[Any, Any] = {}
    own: list[Site] = []
    own += [dataclasses.replace(site, peers=own, _pool=pool) for site in picked]
    part = dataclasses.replace(part, arguments=cls.settle(own, dict(part.arguments)))
    return [(cls(site, **part.arguments), site) for site in own], part


def _copies(model: PreTrainedModel, names: Sequence[str]) -> list[tuple[Adapter, Site]]:
    """Float32 copies, to be trained, of all the modules with parameters in the modules named."""
    everything = dict(walk(model)) if names else {}
    memo: dict[int, Any] = {}  # one for all, so that tied weights stay tied
    found: dict[str, tuple[Adapter, Site]] = {}
    whole: list[str] = []
    for name in names:
        if name not in everything:
            raise PetuneError(unknown("module to train:", name, [n for n, _ in children(model)]))
        for path, module in walk(everything[name], name):
            held = path.startswith(tuple(whole)) and not is_quantized(module)
            if path in found or held or not list(module.parameters(recurse=False)):
                continue
            size = features(module)
            if size is None and list(children(module)):
                whole.append(f"{path}.")
                adapter: TrainedCopy = TrainedParameters({n: m for n, m in walk(module) if not is_quantized(m)})
            else:
                own = dense(module) if is_quantized(module) else _copy(module, memo)
                own = own.to(torch.promote_types(torch.float32, next(own.parameters()).dtype))
                adapter = TrainedCopy(own.requires_grad_(True))
            found[path] = adapter, Site(path, "module", "parameters", None, *(size or (0, 0)), module)
    return list(found.values())


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The module without what petune has put on it."""
    if "petune_graft" not in vars(module):
        return copy.deepcopy(module, memo)
    state = {k: v for k, v in vars(module).items() if k != "petune_graft"}
    own = {k: v for k, v in module._modules.items() if k != "petune"}
    plain: nn.Module = object.__new__(base_class(module))
    plain.__dict__.update(copy.deepcopy(dict(state, _modules=own), memo))
    return plain


def _install(model: PreTrainedModel, tuning: Tuning) -> Tuning:
    """Nothing can fail from here on: the adapters are put in, the base is frozen."""
    board = board_of(model) or Board()
    if not board.tunings:
        board.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        board.causal, table = is_causal(model), input_table(model)
        board.vocabulary = len(table.weight) if table is not None else 0
        model.requires_grad_(False)
        if any(is_quantized(m) for _, m in walk(model)):
            model._hf_peft_config_loaded = True  # Trainer refuses a quantized model without it
    hold(model, board, Prompted)
    board.tunings[tuning.name] = tuning
    least = torch.float64 if model.dtype == torch.float64 else torch.float32
    encoder_decoder = tuning.reads and model.config.is_encoder_decoder
    decoder = set(model.get_decoder().modules()) if encoder_decoder else None  # type: ignore[no-untyped-call]
    for link in tuning.links:
        link.stack = "decoder" if decoder is None or link.site.module in decoder else "encoder"
        anchor = next(link.site.module.parameters(), None)
        link.adapter.to(device=anchor.device if anchor is not None else None, dtype=least)
        link.adapter.train(model.training)
        add(link, board, Table if isinstance(link.site.module, nn.Embedding) else Grafted)
        if link.site.kind == "prompt":
            for embedding in _tables(model):
                hold(embedding, board, Table)
        elif link.site.kind == "attention":
            install()
    return tuning


def _tables(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that embed input ids: T5's stacks each have one of their own, and Gemma 3n looks ids up once
    more for each layer.
    """
    table, text = model.get_input_embeddings(), getattr(model.config, "text_config", model.config)
    size = getattr(text, "vocab_size_per_layer_input", None)
    same = [m for m in model.modules() if isinstance(m, nn.Embedding) and base_class(m) is base_class(table)]
    return [m for m in same if m.weight.shape == table.weight.shape or m.num_embeddings == size]
