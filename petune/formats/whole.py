"""Methods of which PEFT keeps one tensor for the whole model: prompts and prefixes, as `PeftTwin.whole` says."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from petune.core.frozen.modules import base_class
from petune.core.frozen.tables import is_causal
from petune.errors import PetuneWarning, UnsupportedError
from petune.formats.names import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin
    from petune.formats.layouts import TensorsBySite


class Whole(NamedTuple):
    """The tensors of all sites to the one of PEFT's, and back to tensors by our names, for so many virtual tokens."""

    write: Callable[[PreTrainedModel, TensorsBySite, list[Site]], Tensor]
    read: Callable[[PreTrainedModel, Tensor, list[Site], int], dict[str, Tensor]]


def _write_prompt(
    model: PreTrainedModel, tensors: TensorsBySite, sites: list[Site]
) -> Tensor:
    _check_prompt(model)
    if not model.can_generate():
        what = "PEFT reads the class of a row padded on the right at its padding"
        warnings.warn(f"{what}: pad on the left there.", PetuneWarning, stacklevel=6)
    return tensors[sites[0].name]["rows"]


def _read_prompt(
    model: PreTrainedModel, theirs: Tensor, sites: list[Site], length: int
) -> dict[str, Tensor]:
    """PEFT keeps as many rows again for the decoder of an encoder-decoder, and reads the first alone."""
    _check_prompt(model)
    two = model.config.is_encoder_decoder and len(theirs) == 2 * length
    return {f"{sites[0].name}.rows": theirs[:length] if two else theirs}


def _check_prompt(model: PreTrainedModel) -> None:
    if not is_causal(model) and not model.config.is_encoder_decoder:
        raise UnsupportedError(
            "PEFT's prompts (PROMPT_TUNING, P_TUNING) stand before the first token of an encoder, from which its class "
            "is read, and petune's behind it: tune it anew, and save in petune's own."
        )


def check_submodules(model: PreTrainedModel, twin: PeftTwin, stacks: Any) -> None:
    """See that a model has as many stacks as a prompt was made for.

    Args:
        stacks: what PEFT's configuration says of them.

    Raises:
        UnsupportedError: the prompt has rows for a decoder besides, and the model is one stack.
    """
    if twin.whole and stacks == 2 and not model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{CONFIG}: this model is no encoder-decoder, as one with num_transformer_submodules=2 is; load it on "
            "the model that it was tuned on."
        )


def _write_prefix(
    model: PreTrainedModel, tensors: TensorsBySite, sites: list[Site]
) -> Tensor:
    """(length, layers · 2 · kv_heads · head_dim), from keys and values of (kv_heads, length, head_dim) a layer."""
    _check_prefix(model, sites)
    columns = []
    for site in sites:
        keys, values = tensors[site.name]["keys"], tensors[site.name]["values"]
        length = keys.shape[1]
        for tensor in (_moved(model, site, keys, length), values):
            rows = tensor.transpose(0, 1)  # (length, kv_heads, head_dim)
            columns.append(rows.flatten(1))
    return torch.cat(columns, 1)


def _read_prefix(
    model: PreTrainedModel, theirs: Tensor, sites: list[Site], length: int
) -> dict[str, Tensor]:
    """Keys and values of (kv_heads, length, head_dim) a layer, from (length, layers · 2 · kv_heads · head_dim)."""
    _check_prefix(model, sites)
    found = {}
    for site, pair in zip(sites, theirs.chunk(len(sites), 1), strict=True):
        split = pair.reshape(length, 2, site.kv_heads, site.head_dim)
        keys, values = split.permute(1, 2, 0, 3)
        found[f"{site.name}.keys"] = _moved(model, site, keys, -length)
        found[f"{site.name}.values"] = values
    return found


def _check_prefix(model: PreTrainedModel, sites: list[Site]) -> None:
    wanted = [("attention", layer) for layer in range(model.config.num_hidden_layers)]
    if [(site.role, site.layer) for site in sites] != wanted:
        raise UnsupportedError(
            "PEFT's prefixes stand in the self-attention of every layer of a decoder alone: save in petune's own."
        )


def _moved(model: PreTrainedModel, site: Site, keys: Tensor, by: int) -> Tensor:
    """Keys as they are some positions later, where positions are rotations.

    PEFT's prefix takes the first positions, and its tokens begin behind it; petune's prefix takes none. Turning the
    prefix's keys by its length makes up for that, since rotary attention sees differences of positions alone.
    """
    rotate = getattr(
        sys.modules[base_class(site.module).__module__], "apply_rotary_pos_emb", None
    )
    tables = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if rotate is None or len(tables) != 1 or not getattr(site.module, "use_rope", True):
        raise UnsupportedError(
            "PEFT's PREFIX_TUNING takes the first positions and moves the tokens' positions, which can be undone where "
            "positions are rotations alone: tune it anew, and save in petune's own."
        )
    rotary: Any = tables[0]
    device = rotary.inv_freq.device
    positions = torch.full((1, keys.shape[1]), by, device=device)
    row = keys[None].detach().to(device, torch.float32)  # a batch of one
    _, turned = rotate(row, row, *rotary(row, positions))
    return (turned[0] / rotary.attention_scaling).to(keys.device)


WHOLES = {
    "prompt": Whole(_write_prompt, _read_prompt),
    "prefix": Whole(_write_prefix, _read_prefix),
}
