"""Models and tokenizers, at any installed precision and with any head."""

from __future__ import annotations

import warnings
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
from petune.errors import PetuneError, PetuneWarning, unknown
from petune.loading.checkpoint import plainly, resolve
from petune.loading.checks import check_complete, check_finite, mismatch, remarks
from petune.loading.host import SEAMS, built

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
_MODELS: dict[
    str, Any
] = {  # by the head: which classes of configurations have a model with it
    "causal-lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "seq2seq-lm": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "masked-lm": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "sequence-classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token-classification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "question-answering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "base": transformers.MODEL_MAPPING,
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
        PetuneError: no such model, head or precision, no weights of this architecture, some missing, of another shape
            or not finite, or none but pickled ones.
        MovedError: the installed transformers has changed something that loading leans on.
    """
    SEAMS.require()
    quantizer = _quantizer(precision)
    options = _options(precision, kwargs)
    with plainly(name):
        place = resolve(name, options)
        config = AutoConfig.from_pretrained(place, **options)
        loader = _loader(config, head)
        if quantizer and getattr(config, "quantization_config", None) is None:
            kept = _kept_dense(loader, place, options)
            options = {**quantizer.arguments(kept, options["dtype"]), **options}
        model, info = _loaded(loader, place, options, seed)
    model.petune_fresh = _fresh(model, info)
    _check_has_weights(model, info, name)
    _prepare(model, name, precision)
    check_finite(model, name, precision)
    return model


def _options(precision: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told for a load, `told` by the user included."""
    options = {"trust_remote_code": False, "use_safetensors": True, **told}
    if not options["use_safetensors"]:
        remedy = "nothing is ever unpickled; save the weights as safetensors"
        raise PetuneError(f"use_safetensors={told['use_safetensors']}: {remedy}.")
    options["output_loading_info"] = True
    dtype = DTYPES.get(precision) or _compute_dtype(told.get("device_map"))
    options.setdefault("dtype", dtype)
    return options


def _quantizer(precision: str) -> Quantizer | None:
    """The plugin that brings a precision, None for a plain one.

    Raises:
        PetuneError: no such precision.
    """
    quantizers: dict[str, Quantizer] = registry().all("petune_quantizers")
    if precision not in DTYPES and precision not in quantizers:
        raise PetuneError(unknown("precision", precision, {**DTYPES, **quantizers}))
    return quantizers.get(precision)


def _kept_dense(loader: Any, place: str, options: Mapping[str, Any]) -> list[str]:
    """The modules that a quantizer must leave as they are: it has to know them beforehand, and a load without data
    tells them in a moment.
    """
    dry, info = loader.from_pretrained(place, **{**options, "device_map": "meta"})
    return sorted({*_outside(dry), *_fresh(dry, info)})


def _loaded(
    loader: Any, place: str, options: Mapping[str, Any], seed: int | None
) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers tells of its weights.

    Raises:
        PetuneError: a weight has another shape than its configuration says.
    """
    try:
        return _seeded(loader, place, options, seed)
    except RuntimeError as error:
        if "ignore_mismatched" not in str(error):
            raise
        found = mismatch(loader, place, options)
        if found is None:
            raise
        raise PetuneError(f"{place}: {found}.") from error


def _seeded(
    loader: Any, place: str, options: Mapping[str, Any], seed: int | None
) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers tells of its weights; those that it lacks are drawn by `seed`."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(torch.seed() if seed is None else seed)
        model, info = loader.from_pretrained(place, **options)
    return model, info


def _check_has_weights(model: Any, info: Mapping[str, Any], name: str | Path) -> None:
    """Refuse a checkpoint of another architecture, which leaves the base model as it was drawn, or a part of it; of
    one that is whole say what else does not fit.
    """
    fresh = model.petune_fresh
    if "" in fresh or model.base_model_prefix in fresh:
        kind = type(model.base_model).__name__
        raise PetuneError(f"{name}: the checkpoint has no weights of a {kind}.")
    check_complete(model, info, name)
    for line in remarks(model, info, name):
        warnings.warn(line, PetuneWarning, stacklevel=3)


def _prepare(model: PreTrainedModel, name: str | Path, precision: str) -> None:
    """Let the quantizers' plugins see to a quantized model: its checkpoint may have been quantized by any.

    Raises:
        PetuneError: the model is meant to be quantized, and no layer of it could be.
    """
    quantizers: dict[str, Quantizer] = registry().all("petune_quantizers")
    told = getattr(model.config, "quantization_config", None) is not None
    if told or precision in quantizers:
        for quantizer in quantizers.values():
            quantizer.prepare(model)
    if told and not any(is_quantized(module) for module in model.modules()):
        raise PetuneError(
            f"{name}: it has no linear layer that could be stored at {precision}; load it at bf16."
        )


def skeleton(
    name: str | Path, *, head: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model's modules without weights, on the meta device, from its configuration alone.

    Raises:
        PetuneError: no such model or head.
    """
    SEAMS.require()
    options = {"trust_remote_code": False, **kwargs}
    with plainly(name):
        config = AutoConfig.from_pretrained(
            resolve(name, options, weights=False), **options
        )
        loader = _loader(config, head)
        with torch.device("meta"):
            return built(loader, config)


def heads(name: str | Path, **kwargs: Any) -> tuple[str, list[str]]:
    """The type of a model, such as `t5`, and which of `HEADS` its architecture has.

    Raises:
        PetuneError: no such model.
    """
    options = {"trust_remote_code": False, **kwargs}
    with plainly(name):
        place = resolve(name, options, weights=False)
        config = AutoConfig.from_pretrained(place, **options)
    return config.model_type, [key for key in HEADS if _has_head(config, key)]


def load_tokenizer(name: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a model's name. Padding falls back on the end-of-text token; none is added.

    Raises:
        PetuneError: no such model, or it has no tokenizer.
    """
    options = {"trust_remote_code": False, **kwargs}
    with plainly(name):
        place = resolve(name, options)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                place, **options
            )
        except (AttributeError, LookupError, TypeError) as error:
            what = f"its tokenizer can't be read: {type(error).__name__}: {error}"
            raise PetuneError(f"{name}: {what}.") from error
    # where there are no files, transformers makes up one with hardly a token
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
        raise PetuneError(f"{name}: the checkpoint has no tokenizer.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _loader(config: Any, head: str | None) -> Any:
    """What loads a model: the auto class of the head, else the class that the checkpoint was saved with.

    Raises:
        PetuneError: the architecture has no such head.
    """
    has = [key for key in HEADS if _has_head(config, key)]
    if head is not None:
        if head not in has:
            raise PetuneError(unknown(f"{config.model_type} head", head, has))
        return HEADS[head]
    named = config.architectures if isinstance(config.architectures, list) else ()
    for name in named:
        saved = getattr(transformers, str(name), None)
        if isinstance(saved, type) and issubclass(saved, PreTrainedModel):
            return saved
    return HEADS[(*has, "base")[0]]


def _has_head(config: Any, head: str) -> bool:
    """Whether transformers, or the code that comes with the checkpoint, has a model with that head."""
    remote = getattr(config, "auto_map", None) or ()
    return type(config) in _MODELS[head] or HEADS[head].__name__ in remote


def _compute_dtype(device_map: Any) -> torch.dtype:
    """What a quantized model computes in unless told: what is fast on the device."""
    if not torch.cuda.is_available() or "cpu" in str(device_map):
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def _outside(model: Any) -> list[str]:
    """The modules around the base model, and the output embeddings wherever they are."""
    base, out = model.base_model, model.get_output_embeddings()
    around = (
        []
        if base is model
        else [child for child in model.children() if child is not base]
    )
    if out is not None:
        around.append(out)
    kept = {id(module) for module in around if list(module.parameters())}
    return [name for name, module in model.named_modules() if id(module) in kept]


def _fresh(model: PreTrainedModel, info: Mapping[str, Any]) -> tuple[str, ...]:
    """The largest modules of which the checkpoint had nothing."""
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if not missing:
        return ()
    fresh: list[str] = []
    for name, module in model.named_modules():
        inside = any(_is_inside(name, whole) for whole in fresh)
        keys = _parameter_names(module, name)
        if keys and keys <= missing and not inside:
            fresh.append(name)
    return tuple(fresh)


def _is_inside(name: str, whole: str) -> bool:
    """Whether a module's name is that of a part of the module `whole`; "" is the model."""
    return not whole or name.startswith(f"{whole}.")


def _parameter_names(module: torch.nn.Module, name: str) -> set[str]:
    """The names that a module's parameters have in the model, those of tied ones too."""
    own = module.named_parameters(remove_duplicate=False)
    return {f"{name}.{key}".lstrip(".") for key, _ in own}
