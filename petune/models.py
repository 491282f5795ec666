"""Models and tokenizers by name: an alias, a local folder, a GGUF file or a Hub id, at any installed precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from petune.errors import PetuneError, unknown
from petune.fetch import cache_folder, fetch, once
from petune.plugins import registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS: dict[str, Any] = {  # for a checkpoint that doesn't say, the first that its architecture has
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "base": transformers.AutoModel,
}


class Quantizer(Protocol):
    """A precision that a plugin brings."""

    @property
    def bits(self) -> float:
        """What a weight takes, its share of the scales included."""

    def arguments(self, skip: Sequence[str], dtype: torch.dtype) -> Mapping[str, Any]:
        """What transformers' `from_pretrained` must be told; the modules named in `skip` stay in `dtype`.

        Raises:
            PetuneError: a package that this precision needs is missing.
        """

    def prepare(self, model: nn.Module) -> None:
        """Do what is left to be done once the weights are there."""


def from_pretrained(name: str | Path, *, precision: str = "fp32", head: str | None = None, seed: int | None = 0,
                    **kwargs: Any) -> PreTrainedModel:
    """A plain transformers model, in evaluation mode.

    Args:
        name: A local folder, a `.gguf` file, an alias or a Hub id, tried in this order.
        precision: `fp32`, `bf16`, `fp16`, or one of an installed quantizer plugin. A checkpoint that is quantized
            already stays as it is.
        head: One of `HEADS`; by default what the checkpoint was saved with, else causal-lm.
        seed: For the weights that the checkpoint lacks, such as a new classifier's. They stay unquantized, and
            `model.petune_fresh` names their modules. None draws from torch's own random state.
        **kwargs: For transformers: `num_labels`, `device_map`, `attn_implementation`, `revision`, … `dtype` is what
            a quantized model computes in: by default bfloat16 on a GPU that has it, float32 on a CPU, which is slow
            at bfloat16.

    Raises:
        PetuneError: no such model, head or precision, no weights of this architecture, or none but pickled ones.
    """
    quantizers: dict[str, Quantizer] = registry().all("petune_quantizers")
    if precision not in DTYPES and precision not in quantizers:
        raise PetuneError(unknown("precision", precision, {**DTYPES, **quantizers}))
    quantizer = quantizers.get(precision)
    options = {"trust_remote_code": False, "use_safetensors": True, **kwargs, "output_loading_info": True}
    options.setdefault("dtype", DTYPES.get(precision) or _compute_dtype(kwargs.get("device_map")))
    with _plainly(name):
        place = resolve(name, options)
        config = AutoConfig.from_pretrained(place, **options)
        loader = _loader(config, head)
        if quantizer and getattr(config, "quantization_config", None) is None:
            # what to leave out must be known beforehand, and a load without data tells it in a moment
            dry, info = loader.from_pretrained(place, **{**options, "device_map": "meta"})
            options = {**quantizer.arguments([*_outside(dry), *_fresh(dry, info)], options["dtype"]), **options}
        with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model, info = loader.from_pretrained(place, **options)
    fresh = _fresh(model, info)
    if "" in fresh or model.base_model_prefix in fresh:
        raise PetuneError(f"{name}: the checkpoint has no weights of a {type(model.base_model).__name__}.")
    if quantizer:
        quantizer.prepare(model)
    model.petune_fresh = fresh
    return model  # type: ignore[no-any-return]  # the Auto classes are not annotated


def load_tokenizer(name: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with a model's name. Padding falls back on the end-of-text token; none is added.

    Raises:
        PetuneError: no such model, or it has no tokenizer.
    """
    options = {"trust_remote_code": False, **kwargs}
    with _plainly(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(name, options), **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(name: str | Path, options: dict[str, Any]) -> str:
    """The folder of a model on this machine, or its Hub id; `options` then says whether the Hub can be reached.

    Raises:
        PetuneError: there is no such model.
    """
    path, aliases = Path(name).expanduser(), registry().all("petune_models")
    config = str(Path(options.get("subfolder", "")) / "config.json")
    if (path / config).is_file():
        return str(path)
    if path.is_file() or name in aliases:
        found = path if path.is_file() else fetch(aliases[str(name)])
        return str(_unpacked(found) if found.suffix == ".gguf" else found)
    if path.is_dir() or path.suffix == ".gguf" or str(name).startswith(("/", ".", "~")):
        raise PetuneError(f"{name}: {'no config.json in this folder' if path.is_dir() else 'no such file or folder'}.")
    if not options.get("local_files_only") and (trouble := _hub_trouble(str(name), options)):
        options["local_files_only"] = True
        where = {key: options.get(key) for key in ("revision", "cache_dir")}
        if not isinstance(huggingface_hub.try_to_load_from_cache(str(name), config, **where), str):
            raise PetuneError(f"{unknown('model', name, aliases)} It is no local folder, and the Hub says: {trouble}")
    return str(name)


def _hub_trouble(name: str, options: Mapping[str, Any]) -> str | None:
    """One question to the Hub: transformers asks a dead line for most of a minute, file by file."""
    try:
        huggingface_hub.HfApi(token=options.get("token")).model_info(name, revision=options.get("revision"), timeout=10)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        return " ".join(str(error).split())
    except HfHubHTTPError:
        return None  # it is there; transformers waits and tries again
    except Exception as error:  # the client's transport errors share no public class
        return f"{type(error).__name__}: {error}"
    return None


def _unpacked(file: Path) -> Path:
    """A GGUF file as a folder of safetensors, made once: transformers can't quantize one while it reads it.

    In float32, though float16 is half the size: scale * code + minimum takes more than float16's 11 bits, and rounding
    moves 4 weights in 10, some across the border of an nf4 code. So every precision starts from what the file says.
    """
    about, where = file.stat(), {"gguf_file": file.name}
    key = sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        with _plainly(file):
            loader = _loader(AutoConfig.from_pretrained(file.parent, **where), None)
            dense = {"dtype": torch.float32, "quantization_config": transformers.GgufConfig(dequantize=True)}
            loader.from_pretrained(file.parent, **where, **dense).save_pretrained(folder)
            AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)

    return once(cache_folder() / "gguf" / f"{file.stem}-{key}", make, f"unpacking {file.name}")


def _loader(config: Any, head: str | None) -> Any:
    if head is not None and head not in HEADS:
        raise PetuneError(unknown("head", head, HEADS))
    if head is not None:
        return HEADS[head]
    for saved in config.architectures or ():
        found = getattr(transformers, saved, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    remote = getattr(config, "auto_map", None) or ()
    has = (auto for auto in HEADS.values() if type(config) in auto._model_mapping or auto.__name__ in remote)
    return next(has, transformers.AutoModel)


def _compute_dtype(device_map: Any) -> torch.dtype:
    if not torch.cuda.is_available() or "cpu" in str(device_map):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _outside(model: PreTrainedModel) -> list[str]:
    """The modules around the base model, and the output embeddings wherever they are."""
    base, out = model.base_model, model.get_output_embeddings()
    around = [] if base is model else [child for child in model.children() if child is not base]
    kept = {id(module) for module in (*around, out) if module is not None and list(module.parameters())}
    return [name for name, module in model.named_modules() if id(module) in kept]


def _fresh(model: PreTrainedModel, info: Mapping[str, Any]) -> tuple[str, ...]:
    """The largest modules of which the checkpoint had nothing."""
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    fresh: list[str] = []
    for name, module in model.named_modules() if missing else ():
        keys = {f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(remove_duplicate=False)}
        if keys and keys <= missing and not any(not whole or name.startswith(f"{whole}.") for whole in fresh):
            fresh.append(name)
    return tuple(fresh)


@contextmanager
def _plainly(name: str | Path) -> Iterator[None]:
    """Without transformers' table of missing weights and bar of a second; what a user can cause, in one line."""
    level, hook = logging.get_verbosity(), logging.set_tqdm_hook(lambda bar, args, kw: bar(*args, **{**kw, "disable": True}))
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, PetuneError) or (isinstance(error, RuntimeError) and "ignore_mismatched" not in said):
            raise
        if isinstance(error, RuntimeError):
            said = "its head has another size; give its num_labels, or ignore_mismatched_sizes=True for a new one."
        elif "safetensors" in said and "file named" in said:
            said = "no .safetensors file, and nothing is ever unpickled; save the weights as safetensors."
        raise PetuneError(f"{name}: {said}") from error
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)
