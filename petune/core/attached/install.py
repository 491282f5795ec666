"""Adapters are put into a model, and taken out: the two halves side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from petune.core.attached.sharded import mesh_of, shard
from petune.core.forward.link import Acting, Link
from petune.core.frozen.computes import calls_attention_interface
from petune.core.frozen.modules import base_class, walk
from petune.core.frozen.tables import input_table, is_causal, tables
from petune.core.frozen.weights import is_quantized
from petune.core.graft import observed
from petune.core.graft.attend import install as install_attention
from petune.core.graft.board import Board, board_of
from petune.core.graft.experts import install as install_experts
from petune.core.graft.module import Alone, Grafted, graft_of
from petune.core.graft.placing import add, hold, release, remove
from petune.core.graft.remembering import check_checkpointing, forget, remember
from petune.core.host.seams import SEAMS
from petune.core.host.trainer import say_adapted, say_plain
from petune.core.method.copies import TrainedParameters
from petune.core.tokens.model import AdaptedModel
from petune.core.tokens.table import PromptTable
from petune.errors import PetuneError


def install(model: Any, tuning: Acting) -> None:
    """Put a tuning's adapters in and freeze the base. Nothing of the tuning can fail from here on.

    Raises:
        MovedError: a library has changed something that petune leans on.
        UnsupportedError: the model's gradient checkpointing is of a kind that the method can't take.
        PetuneError: another thread runs a forward of the model.
    """
    SEAMS.require()
    board = board_of(model) or Board()
    check_checkpointing(model, [tuning])
    with board.gate.change(f"attach {tuning.name!r}"):
        if not board.tunings:
            _begin(model, board)
        hold(model, board, AdaptedModel)
        place_stacks(model, tuning)
        mesh = mesh_of(model.parameters())
        for link in tuning.links:
            _put(model, link, board)
        if mesh is not None:
            shard(tuning.links, mesh)
        board.tunings[tuning.name] = tuning
        remember(model)


def uninstall(model: Any, tuning: Acting) -> None:
    """Take a tuning's adapters out. After the last one the model is what it was: same class, keys and logits.

    Raises:
        PetuneError: the tuning is not attached, or another thread runs a forward of the model.
    """
    board = attached_board(model, tuning)
    with board.gate.change(f"detach {tuning.name!r}"):
        del board.tunings[tuning.name]
        for link in tuning.links:
            _take(model, link)
        release(model)
        if not board.tunings:
            _end(model, board)


def attached_board(model: Any, tuning: Acting) -> Board:
    """The board on which a tuning stands.

    Raises:
        PetuneError: it is not attached any more.
    """
    board = board_of(model) or Board()
    if board.tunings.get(tuning.name) is not tuning:
        raise PetuneError(f"tuning {tuning.name!r} is not attached any more.")
    return board


def _begin(model: Any, board: Board) -> None:
    """Note what the base is before the first tuning, and freeze it."""
    board.asked_gradients = {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    board.causal = is_causal(model)
    board.vocabulary = getattr(input_table(model), "num_embeddings", 0)
    model.requires_grad_(False)
    if any(map(is_quantized, dict(walk(model)).values())):
        say_adapted(model)


def _end(model: Any, board: Board) -> None:
    """The counterpart of `_begin`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            board.asked_gradients.get(name, parameter.requires_grad)
        )
    say_plain(model)
    forget(model)


def place_stacks(model: Any, tuning: Acting) -> None:
    """Tell each link which of an encoder-decoder's stacks holds its site: its batch is that one's."""
    if not tuning.reads_batch or not model.config.is_encoder_decoder:
        return
    decoder = set(model.get_decoder().modules())
    for link in tuning.links:
        link.stack = "decoder" if link.site.module in decoder else "encoder"


def _put(model: Any, link: Link, board: Board) -> None:
    module = link.site.module
    anchor: Any = next(module.parameters(), None)
    least = torch.promote_types(torch.float32, model.dtype)
    link.adapter.to(device=getattr(anchor, "device", None), dtype=least)
    link.adapter.train(model.training)
    if link.site.kind == "attention":
        install_attention()
        link.methods = _methods(link)
    if link.site.kind == "experts":
        install_experts()
    add(link, board, PromptTable if isinstance(module, nn.Embedding) else Grafted)
    if isinstance(link.adapter, TrainedParameters):
        here = graft_of(module)
        here.alone = here.alone or Alone()
    for table in _tables_of(model, link):
        hold(table, board, PromptTable)


def _take(model: Any, link: Link) -> None:
    remove(link)
    for table in _tables_of(model, link):
        release(table)


def _tables_of(model: Any, link: Link) -> list[nn.Module]:
    """The tables that answer for the rows of a prompt."""
    return tables(model) if link.site.kind == "prompt" else []


def _methods(link: Link) -> Any:
    """What takes the place of an attention's own methods: what its site says, else it is observed if it does not ask
    transformers for its function.
    """
    asks = calls_attention_interface(base_class(link.site.module))
    return link.site.methods or ({} if asks else {"forward": observed.forward})
