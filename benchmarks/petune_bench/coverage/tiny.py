"""A tiny random model of any architecture that transformers maps, from its configuration class alone."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from petune_bench.coverage.sizes import MORE, VOCABULARY, small_size

HEADS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
MOST = 5_000_000
"""Parameters of a model that counts as small."""


def architectures() -> dict[str, dict[str, str]]:
    """{model type: {head: the model's class}} of every text architecture in transformers."""
    found: dict[str, dict[str, str]] = {}
    for head, mapping in HEADS.items():
        for kind, name in getattr(modeling_auto, mapping).items():
            found.setdefault(kind, {})[head] = (
                name if isinstance(name, str) else name[0]
            )
    return dict(sorted(found.items()))


def config(kind: str) -> PretrainedConfig:
    """The small configuration of a model type."""
    plain: Any = AutoConfig.for_model(kind)
    if kind == "encoder-decoder":
        return type(plain).from_encoder_decoder_configs(
            config("bert"), config("bert"), decoder_start_token_id=1
        )
    return type(plain)(**small(plain))


def small(plain: PretrainedConfig) -> dict[str, Any]:
    """The arguments that make a configuration small: all its sizes, those of the configurations inside it too."""
    found: dict[str, Any] = {}
    listing, kinds = _layer_kinds(plain)
    for key, value in vars(plain).items():
        if isinstance(value, PretrainedConfig):
            found[key] = {"model_type": value.model_type, **small(value)}
        elif key == listing:
            found[key] = kinds
        elif kinds and re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", key):
            found[key] = len(kinds)
        elif _has_a_key_for_each_head(plain, key):
            found[key] = small_size("num_attention_heads")
        elif _is_size_or_id(key, value):
            size = small_size(key)
            if size is not None:
                found[key] = size
    return found | MORE.get(plain.model_type, {})


def _has_a_key_for_each_head(plain: PretrainedConfig, key: str) -> bool:
    """Whether this is a number of key heads that equals that of the attention's heads, which must stay so."""
    own = vars(plain)
    if key != "num_key_value_heads" or own[key] is None:
        return False
    return own[key] == own.get("num_attention_heads")


def _is_size_or_id(key: str, value: Any) -> bool:
    if re.fullmatch(r"(pad|bos|eos)_token_id", key):
        return True
    return type(value) is int and value > 2


def _layer_kinds(plain: PretrainedConfig) -> tuple[str, list[str]]:
    """The key that lists a kind for each layer, with each kind once, two at least."""
    for key in ("layer_types", "layers_block_type", "block_types"):
        listed = vars(plain).get(key)
        if isinstance(listed, list) and listed:
            kinds = list(dict.fromkeys(listed))
            return key, kinds if len(kinds) > 1 else kinds * 2
    return "", []


def build(kind: str, head: str, name: str) -> PreTrainedModel:
    """A tiny model of a type by its class, in evaluation mode, with weights large enough to matter.

    Raises:
        Exception: whatever stops transformers from building it small and offline.
    """
    cls: Any = getattr(transformers, name)
    whole = _text_config(cls, kind)
    if head == "causal-lm" and _has_a_decoder_switch(whole):
        whole.is_decoder = True
    if whole.is_encoder_decoder and not _has_a_start_token(whole):
        whole.decoder_start_token_id = 1
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(whole).parameters())
    if count > MOST:
        raise ValueError(
            f"it has {count:,} parameters at the sizes known to the harness"
        )
    torch.manual_seed(0)
    model: PreTrainedModel = cls._from_config(whole).eval()
    _enlarge(model)
    return model


def _text_config(cls: Any, kind: str) -> PretrainedConfig:
    """The small configuration that a class takes. A text model may go by the type of a model of several towers, whose
    configuration holds that of the text model.
    """
    whole = config(kind)
    if isinstance(whole, cls.config_class):
        return whole
    for value in vars(whole).values():
        if isinstance(value, cls.config_class):
            return value
    return whole.get_text_config()


def _has_a_decoder_switch(whole: PretrainedConfig) -> bool:
    return not whole.is_encoder_decoder and hasattr(whole, "is_decoder")


def _has_a_start_token(whole: PretrainedConfig) -> bool:
    return getattr(whole, "decoder_start_token_id", None) is not None


@torch.no_grad()
def _enlarge(model: PreTrainedModel) -> None:
    """Matrices four times as large where they are as small as fresh ones mostly are."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and 0 < float(parameter.std()) < 0.05:
            parameter.mul_(4)


def batch(
    model: PreTrainedModel, rows: int = 2, length: int = 12
) -> dict[str, torch.Tensor]:
    """Token ids, and what else the model's forward can't do without."""
    generator = torch.Generator().manual_seed(0)
    rows *= getattr(model, "num_codebooks", 1)
    ids = torch.randint(4, VOCABULARY - 8, (rows, length), generator=generator)
    # where texts end: some read the class there, or the question before it
    ids[:, [3, 5, -1]] = 2
    more = {
        "bbox": torch.zeros(rows, length, 4, dtype=torch.long),
        "visual_feats": torch.ones(rows, 3, 64),
        "visual_pos": torch.ones(rows, 3, 4),
    }
    if model.can_generate():
        more["decoder_input_ids"] = ids[:, :7]
    known = inspect.signature(type(model).forward).parameters
    return {"input_ids": ids, **{key: t for key, t in more.items() if key in known}}
