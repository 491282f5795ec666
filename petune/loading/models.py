"""Models and tokenizers, at any installed precision and with any head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from petune.core.frozen.weights import is_quantized
from petune.core.registry.plugins import registry
from petune.core.registry.quantizer import Quantizer
from petune.errors import PetuneError, unknown
from petune.loading.checkpoint import plainly, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS: dict[
    str, Any
] = {  # for a checkpoint that doesn't say, the first that its architecture has
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "base": transformers.AutoModel,
}


def from_pretrained(
    name: str | Path,
    *,
    precision: str = "fp32",
    head: str | None = None,
    seed: int | None = 0,
    **kwargs: Any,
) -> PreTrainedModel:
    """A plain transformers model, in evaluation mode.

    Args:
        name: A local folder, a `.gguf` file, an alias or a Hub id, tried in this order.
        precision: `fp32`, `bf16`, `fp16`, or a quantizer plugin's. A checkpoint that is quantized stays as it is.
        head: One of `HEADS`; by default what the checkpoint was saved with, else causal-lm.
        seed: For the weights that the checkpoint lacks, such as a new classifier's; None draws others each time. They
            stay unquantized, and `model.petune_fresh` names their modules.
        **kwargs: For transformers: `num_labels`, `device_map`, `attn_implementation`, `revision`, … A quantized model
            computes in `dtype`: by default bfloat16 on a GPU that has it, and float32 on a CPU, faster there.

    Raises:
        PetuneError: no such model, head or precision, no weights of this architecture, or none but pickled ones.
    """
    quantizers: dict[str, Quantizer] = registry().all("petune_quantizers")
    if precision not in DTYPES and precision not in quantizers:
        raise PetuneError(unknown("precision", precision, {**DTYPES, **quantizers}))
    quantizer = quantizers.get(precision)
    options = {
        "trust_remote_code": False,
        "use_safetensors": True,
        **kwargs,
        "output_loading_info": True,
    }
    options.setdefault(
        "dtype", DTYPES.get(precision) or _compute_dtype(kwargs.get("device_map"))
    )
    with plainly(name):
        place = resolve(name, options)
        config = AutoConfig.from_pretrained(place, **options)
        loader = _loader(config, head)
        if quantizer and getattr(config, "quantization_config", None) is None:
            # what to leave out must be known beforehand, and a load without data tells it in a moment
            dry, info = loader.from_pretrained(
                place, **{**options, "device_map": "meta"}
            )
            skip = sorted({*_outside(dry), *_fresh(dry, info)})
            options = {**quantizer.arguments(skip, options["dtype"]), **options}
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(torch.seed() if seed is None else seed)
            model, info = loader.from_pretrained(place, **options)
    fresh = _fresh(model, info)
    if "" in fresh or model.base_model_prefix in fresh:
        raise PetuneError(
            f"{name}: the checkpoint has no weights of a {type(model.base_model).__name__}."
        )
    told = getattr(model.config, "quantization_config", None) is not None
    for each in (
        quantizers.values() if quantizer or told else ()
    ):  # a checkpoint may have been quantized by any
        each.prepare(model)
    if told and not any(is_quantized(module) for module in model.modules()):
        raise PetuneError(
            f"{name}: it has no linear layer that could be stored at {precision}; load it at bf16."
        )
    model.petune_fresh = fresh
    return model


def skeleton(
    name: str | Path, *, head: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model's modules without weights, on the meta device, from its configuration alone.

    Raises:
        PetuneError: no such model or head.
    """
    options = {"trust_remote_code": False, **kwargs}
    with plainly(name):
        config = AutoConfig.from_pretrained(
            resolve(name, options, weights=False), **options
        )
        loader = _loader(config, head)
        with torch.device("meta"):
            build = (
                loader.from_config
                if hasattr(loader, "from_config")
                else loader._from_config
            )
            made: PreTrainedModel = build(config)
    return made


def load_tokenizer(name: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a model's name. Padding falls back on the end-of-text token; none is added.

    Raises:
        PetuneError: no such model, or it has no tokenizer.
    """
    options = {"trust_remote_code": False, **kwargs}
    with plainly(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(name, options), **options
        )
    if (
        len(tokenizer) <= len(tokenizer.all_special_ids) + 2
    ):  # what transformers makes up where there are no files
        raise PetuneError(f"{name}: the checkpoint has no tokenizer.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loader(config: Any, head: str | None) -> Any:
    remote = getattr(config, "auto_map", None) or ()
    has = [
        key
        for key, auto in HEADS.items()
        if type(config) in auto._model_mapping or auto.__name__ in remote
    ]
    if head is not None and head not in has:
        raise PetuneError(unknown(f"{config.model_type} head", head, has))
    saved = [
        getattr(transformers, name, None)
        for name in config.architectures or ()
        if head is None
    ]
    known = (
        found
        for found in saved
        if isinstance(found, type) and issubclass(found, PreTrainedModel)
    )
    return next(known, HEADS[head or (*has, "base")[0]])


def _compute_dtype(device_map: Any) -> torch.dtype:
    if not torch.cuda.is_available() or "cpu" in str(device_map):
        return torch.float32
    return (
        torch.bfloat16
        if torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float16
    )


def _outside(model: Any) -> list[str]:
    """The modules around the base model, and the output embeddings wherever they are."""
    base, out = model.base_model, model.get_output_embeddings()
    around = (
        []
        if base is model
        else [child for child in model.children() if child is not base]
    )
    kept = {
        id(module)
        for module in (*around, out)
        if module is not None and list(module.parameters())
    }
    return [name for name, module in model.named_modules() if id(module) in kept]


def _fresh(model: PreTrainedModel, info: Mapping[str, Any]) -> tuple[str, ...]:
    """The largest modules of which the checkpoint had nothing."""
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    fresh: list[str] = []
    for name, module in model.named_modules() if missing else ():
        keys = {
            f"{name}.{key}".lstrip(".")
            for key, _ in module.named_parameters(remove_duplicate=False)
        }
        if (
            keys
            and keys <= missing
            and not any(not whole or name.startswith(f"{whole}.") for whole in fresh)
        ):
            fresh.append(name)
    return tuple(fresh)
