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
        elif key == "num_key_value_heads" and _one_for_each_head(plain):
            found[key] = small_size("num_attention_heads")
        elif _is_size(key, value):
            size = small_size(key)
            found |= {} if size is None else {key: size}
    return found | MORE.get(plain.model_type, {})


def _one_for_each_head(plain: PretrainedConfig) -> bool:
    """Whether every head of the queries has keys and values of its own."""
    known = vars(plain)
    count = known["num_key_value_heads"]
    return count is not None and bool(count == known.get("num_attention_heads"))


def _is_size(key: str, value: Any) -> bool:
    """Whether a value may be a size, or a token's id that has to fit the vocabulary."""
    if type(value) is int and value > 2:
        return True
    return re.fullmatch(r"(pad|bos|eos)_token_id", key) is not None


def _layer_kinds(plain: PretrainedConfig) -> tuple[str, list[str]]:
    """The key that lists a kind for each layer, with each kind once, two at least."""
    for key in ("layer_types", "layers_block_type", "block_types"):
        listed = vars(plain).get(key)
        if isinstance(listed, list) and listed:
            kinds = list(dict.fromkeys(listed))
            return key, kinds if len(kinds) > 1 else kinds * 2
    return "", []


def _whole(cls: Any, kind: str, head: str) -> Any:
    """The small configuration that a class of models takes."""
    whole: Any = config(kind)
    if not isinstance(whole, cls.config_class):
        # a text model under the type of a model of several towers
        parts = vars(whole).values()
        inside = [part for part in parts if isinstance(part, cls.config_class)]
        whole = inside[0] if inside else whole.get_text_config()
    if whole.is_encoder_decoder:
        if getattr(whole, "decoder_start_token_id", None) is None:
            whole.decoder_start_token_id = 1
    elif head == "causal-lm" and hasattr(whole, "is_decoder"):
        whole.is_decoder = True
    return whole


def build(kind: str, head: str, name: str) -> PreTrainedModel:
    """A tiny model of a type by its class, in evaluation mode, with weights large enough to matter.

    Raises:
        Exception: whatever stops transformers from building it small and offline.
    """
    cls: Any = getattr(transformers, name)
    whole = _whole(cls, kind, head)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(whole).parameters())
    if count > MOST:
        raise ValueError(
            f"it has {count:,} parameters at the sizes known to the harness"
        )
    torch.manual_seed(0)
    model: PreTrainedModel = cls._from_config(whole).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < float(parameter.std()) < 0.05:
                parameter.mul_(4)
    return model


def batch(
    model: PreTrainedModel, rows: int = 2, length: int = 12
) -> dict[str, torch.Tensor]:
    """Token ids, and what else the model's forward can't do without."""
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(type(model).forward).parameters
    rows *= getattr(model, "num_codebooks", 1)
    found = {
        "input_ids": torch.randint(
            4, VOCABULARY - 8, (rows, length), generator=generator
        )
    }
    found["input_ids"][:, [3, 5, -1]] = (
        2  # where texts end: some read the class there, or the question before it
    )
    more = {
        "bbox": torch.zeros(rows, length, 4, dtype=torch.long),
        "visual_feats": torch.ones(rows, 3, 64),
        "visual_pos": torch.ones(rows, 3, 4),
        "decoder_input_ids": found["input_ids"][:, :7],
    }
    if not model.can_generate():
        del more["decoder_input_ids"]
    return found | {key: value for key, value in more.items() if key in known}
