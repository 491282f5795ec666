"""What a model's name means: a local folder, a GGUF file, an alias or a Hub id."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
)
from transformers.utils import logging as chatter

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown
from petune.loading.fetch import cache_folder, fetch, once


def resolve(name: str | Path, options: dict[str, Any], *, weights: bool = True) -> str:
    """The folder of a model on this machine, or its Hub id; `options` then says whether the Hub can be reached. Without
    `weights` a GGUF file stays packed, and `options` names it.

    Raises:
        PetuneError: there is no such model.
    """
    path, aliases = Path(name).expanduser(), registry().all("petune_models")
    config = str(Path(options.get("subfolder", "")) / "config.json")
    if (path / config).is_file():
        return str(path)
    gguf = path if path.is_file() and path.suffix == ".gguf" else None
    if gguf or str(name) in aliases:
        found = gguf or fetch(aliases[str(name)])
        if found.suffix == ".gguf" and not weights:
            options["gguf_file"] = found.name
            return str(found.parent)
        return str(_unpacked(found) if found.suffix == ".gguf" else found)
    if path.exists() or path.suffix == ".gguf" or str(name).startswith(("/", ".", "~")):
        raise PetuneError(
            f"{name}: {'no .gguf file, and no config.json in it' if path.exists() else 'no such file'}."
        )
    if not options.get("local_files_only") and (
        trouble := _hub_trouble(str(name), options)
    ):
        options["local_files_only"] = True
        where = {key: options.get(key) for key in ("revision", "cache_dir")}
        if not isinstance(
            huggingface_hub.try_to_load_from_cache(str(name), config, **where), str
        ):
            raise PetuneError(
                f"{unknown('model', str(name), aliases)} It is no local folder, and the Hub says: {trouble}"
            )
    return str(name)


def _hub_trouble(name: str, options: Mapping[str, Any]) -> str | None:
    """One question to the Hub: transformers asks a dead line for most of a minute, file by file."""
    try:
        huggingface_hub.HfApi(token=options.get("token")).model_info(
            name, revision=options.get("revision"), timeout=10
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        return " ".join(str(error).split())
    except HfHubHTTPError:
        return None  # it is busy; transformers waits and tries again
    except Exception as error:  # the client's transport errors share no public class
        return f"{type(error).__name__}: {error}"
    return None


def _unpacked(file: Path) -> Path:
    """A GGUF file as a folder of safetensors, made once: transformers can't quantize one while it reads it.

    In float32, though float16 is half the size: scale * code + minimum takes more than float16's 11 bits, and rounding
    moves 4 weights in 10, some across the border of a quantized code. So every precision starts from the file's values.
    """
    about, where = file.stat(), {"gguf_file": file.name}
    key = sha256(
        f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()
    ).hexdigest()[:12]

    def make(folder: Path) -> None:
        with plainly(file):
            config = AutoConfig.from_pretrained(file.parent, **where)
            loader = (
                AutoModelForSeq2SeqLM
                if config.is_encoder_decoder
                else AutoModelForCausalLM
            )
            dense = {
                "dtype": torch.float32,
                "quantization_config": GgufConfig(dequantize=True),
            }
            loader.from_pretrained(file.parent, **where, **dense).save_pretrained(
                folder
            )
            AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)

    return once(
        cache_folder() / "gguf" / f"{file.stem}-{key}", make, f"unpacking {file.name}"
    )


@contextmanager
def plainly(name: str | Path) -> Iterator[None]:
    """Without transformers' table of missing weights and bar of a second; what a user can cause, in one line."""
    hook = chatter.set_tqdm_hook(
        lambda bar, args, options: bar(*args, **{**options, "disable": True})
    )
    level = chatter.get_verbosity()
    chatter.set_verbosity(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, PetuneError) or (
            isinstance(error, RuntimeError) and "ignore_mismatched" not in said
        ):
            raise
        if isinstance(error, RuntimeError):
            said = "its head has another size; give its num_labels, or ignore_mismatched_sizes=True for a new one."
        elif "safetensors" in said and "file named" in said:
            said = "no .safetensors file, and nothing is ever unpickled; save the weights as safetensors."
        raise PetuneError(f"{name}: {said}") from error
    finally:
        chatter.set_verbosity(level)
        chatter.set_tqdm_hook(hook)
