"""The savings of `petune train` around any loop: `petune.lean(model)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.core.attached.tuning import tunings
from petune.core.method.batch import SKIP
from petune.errors import PetuneError, UnsupportedError
from petune.training.host import SEAMS
from petune.training.logits import applies, is_routed, labelled_logits
from petune.training.own_loss import DECODED, own_loss
from petune.training.packing import check_packing, flatten, is_padded, packed
from petune.training.recompute.forward import watched
from petune.training.regions import compiled
from petune.training.swap import wearing
from petune.training.tile import tiled
from petune.training.unpadded import can_be_unpadded, reads_no_padding, unpadded


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What a training may spare. None of it changes a loss or a gradient beyond rounding.

    Args:
        recompute: what backward needs and costs next to nothing (norms, activations, gates, copies, dropout, attention
            weights) is computed again from what is kept anyway.
        labelled_logits: logits are computed where there is a label, a few rows at a time.
        packing: rows of a padded batch stand end to end; None where the model can.
        compile: "regions" compiles every block, which recomputes as it is told to by `memory_budget`.
        memory_budget: the share of what compiled blocks would keep that they may keep.
        tile: MLPs work on so many tokens at a time and are computed again as a whole; for long sequences.
        offload: what is kept for backward waits in the CPU's memory; on CUDA alone, in place of `recompute`.
    """

    recompute: bool = True
    labelled_logits: bool = True
    packing: bool | None = None
    compile: Literal["regions"] | None = None
    memory_budget: float | None = None
    tile: int | None = None
    offload: bool = False


@contextmanager
def lean(model: nn.Module, **savings: Any) -> Iterator[None]:
    """Within the context a model trains with the savings of `petune train`, in whatever loop.

    A call of the model with labels, while gradients are on, gives what it gives otherwise but its logits and its cache;
    without labels, or without gradients, it gives everything.

    Args:
        model: an adapted model, or any other; one inside a wrapper (DDP, PEFT, accelerate) is found.
        savings: those of `Savings`, by name.

    Raises:
        TypeError: a saving has no such name.
        UnsupportedError: it stands within `route`.
        PetuneError: one was asked for by name that this model can't have.
        MovedError: torch or transformers have moved something that petune leans on.
    """
    SEAMS.require()
    inner = _inner(model)
    given = Savings(**savings)
    if is_routed(inner):
        raise UnsupportedError("lean() within route(): enter lean() first.")
    with ExitStack() as stack:
        if given.compile:
            stack.enter_context(compiled(inner, given.memory_budget))
        if given.tile:
            stack.enter_context(tiled(inner, given.tile))
        forward = LeanForward(inner, given)
        stack.callback(forward.stop)
        stack.enter_context(wearing(inner, forward))
        yield


def lean_trainer(trainer: Any, **savings: Any) -> Any:
    """A Trainer (transformers' own, or one of TRL's) whose `train` runs within `lean`.

    Args:
        savings: those of `Savings`, by name.

    Returns:
        The same trainer.
    """
    train = trainer.train

    @wraps(train)
    def leanly(*args: Any, **kwargs: Any) -> Any:
        with lean(trainer.model, **savings):
            return train(*args, **kwargs)

    trainer.train = leanly
    return trainer


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model in a module, or the module itself."""
    found = (inner for inner in model.modules() if isinstance(inner, PreTrainedModel))
    return next(found, model)


class LeanForward:
    """A model's forward with savings.

    Args:
        model: whose forward is called.
        savings: what is spared.
    """

    def __init__(self, model: Any, savings: Savings) -> None:
        self.model, self.savings = model, savings
        self.inner: Callable[..., Any] = model.forward
        self.active = True
        self.labels = savings.labelled_logits and applies(model)
        self.own_loss = own_loss(model) if savings.labelled_logits else None
        self.packed_with: dict[tuple[str, ...], bool] = {}
        self.unpadded_with: dict[tuple[str, ...], bool] = {}
        if savings.packing and applies(model) and not self.labels:
            raise PetuneError("training.packing: it needs training.labelled_logits.")
        if not self.packs():  # trials are made before anything is trained
            self.unpads()

    def stop(self) -> None:
        """Be the plain forward from now on, for whoever has put something around this one."""
        self.active = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()  # the compiler chooses what it keeps
        if not self.active or compiling or not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        with self._keeping():
            if args or not _is_plain(kwargs) or self._gives_more():
                return self.inner(*args, **kwargs)
            if self.labels or self.own_loss is not None:
                return self._with_labels(kwargs)
            with self._without_padding(kwargs):
                return self.inner(**kwargs)

    @contextmanager
    def _without_padding(self, call: Mapping[str, Any]) -> Iterator[None]:
        """The blocks compute no padding, where the model can and the loss reads none."""
        mask, decoded = call.get("attention_mask"), self.own_loss is not None
        if not self.unpads() or not reads_no_padding(mask, call["labels"], decoded):
            yield
            return
        with unpadded(self.model, mask, self._decoded(call)):
            yield

    def _gives_more(self) -> bool:
        """Whether somebody may read more of the model than its loss, or its rows go to tunings of their own."""
        config = getattr(self.model, "config", None)
        is_tuple = getattr(config, "return_dict", True) is False
        asked = any(getattr(config, key, False) for key in INNER)
        return is_tuple or asked or is_routed(self.model)

    def _decoded(self, call: Mapping[str, Any]) -> Tensor | None:
        """Where an encoder-decoder's decoder has tokens, if its labels alone tell it."""
        if self.own_loss is None or call.keys() & DECODED:
            return None
        labelled = call["labels"] != SKIP
        until_last = labelled.flip(1).cumsum(1).flip(1) > 0
        return until_last.long()

    def _with_labels(self, batch: dict[str, Any]) -> Any:
        """A call with labels for tokens, whose logits nobody reads."""
        if self.own_loss is not None:
            with self._without_padding(batch):
                return self.own_loss(batch)
        with ExitStack() as stack:
            if self.packs():
                batch = stack.enter_context(self._laid_out(batch))
            else:
                stack.enter_context(self._without_padding(batch))
            stack.enter_context(labelled_logits(self.model))
            out = self.inner(**{**batch, "use_cache": False})
        return type(out)(**{k: v for k, v in out.items() if k != "logits"})

    @contextmanager
    def _laid_out(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch whose rows stand end to end if it is padded."""
        tokens = {k: v for k, v in batch.items() if k not in ASIDE}
        if not is_padded(tokens):
            yield batch
            return
        flat, rows = flatten(tokens)
        with packed(rows, self.model):
            yield {**batch, "attention_mask": None, **flat}

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """What autograd keeps within the context is as little as the savings say."""
        with ExitStack() as stack:
            if self.savings.offload:
                offload = torch.autograd.graph.save_on_cpu(pin_memory=True)
                stack.enter_context(offload)
            elif self.savings.recompute and not self.savings.compile:
                stack.enter_context(watched())
            yield

    def unpads(self) -> bool:
        """Whether the blocks compute the tokens of a padded batch alone, with the tunings that the model has."""
        attached = tuple(tunings(self.model))
        if attached not in self.unpadded_with:
            wanted = self.savings.packing is not False
            can = wanted and isinstance(self.model, PreTrainedModel)
            self.unpadded_with[attached] = can and can_be_unpadded(self.model)
        return self.unpadded_with[attached]

    def packs(self) -> bool:
        """Whether padded batches are laid end to end, with the tunings that the model has.

        Raises:
            PetuneError: it is asked for, and this model or method can't.
        """
        attached = tuple(tunings(self.model)) if self.labels else ()
        if attached not in self.packed_with:
            self.packed_with[attached] = check_packing(self.model, self.savings.packing)
        return self.packed_with[attached]


INNER = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a configuration may ask for of what blocks find."""

ASIDE = frozenset({"num_items_in_batch", "use_cache", "return_dict"})
"""What a call with labels may say besides its batch."""


def _is_plain(call: Mapping[str, Any]) -> bool:
    """Whether a call says no more than a batch of tokens with their labels, so that nobody reads its logits."""
    if call.get("labels") is None or call.get("return_dict") is False:
        return False
    if "shift_labels" in call:  # the loss reads them in place of the labels
        return False
    rest = (value for key, value in call.items() if key not in ASIDE)
    return all(isinstance(value, Tensor) for value in rest)
