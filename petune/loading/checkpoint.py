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
)
from transformers.utils import logging as chatter

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown
from petune.files import at_home
from petune.loading.fetch import cache_folder, fetch, once
from petune.loading.host import dense_gguf, hidden_bars


def resolve(name: str | Path, options: dict[str, Any], *, weights: bool = True) -> str:
    """The folder of a model on this machine, or its Hub id; `options` then says whether the Hub can be reached. Without
    `weights` a GGUF file stays packed, and `options` names it.

    Raises:
        PetuneError: there is no such model.
    """
    path = at_home(name)
    if options.get("cache_dir") is not None:
        options["cache_dir"] = str(at_home(options["cache_dir"]))
    config = str(Path(options.get("subfolder", "")) / "config.json")
    if (path / config).is_file():
        return str(path)
    found = _file_or_alias(path, str(name))
    if found is not None and found.suffix == ".gguf":
        if weights:
            return str(_unpacked(found))
        options["gguf_file"] = found.name
        return str(found.parent)
    if found is not None:
        return str(found)
    _check_not_local(path, str(name))
    if not options.get("local_files_only"):
        _choose_line(str(name), config, options)
    return str(name)


def _file_or_alias(path: Path, name: str) -> Path | None:
    """A GGUF file, or what an alias stands for, fetched; None for anything else."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    aliases = registry().all("petune_models")
    return fetch(aliases[name]) if name in aliases else None


def _check_not_local(path: Path, name: str) -> None:
    """Refuse what can only be meant as a path here, since no model lies there."""
    if path.exists():
        raise PetuneError(f"{name}: no .gguf file, and no config.json in it.")
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")):
        raise PetuneError(f"{name}: no such file.")


def _choose_line(name: str, config: str, options: dict[str, Any]) -> None:
    """Let transformers ask the Hub if it can be reached, else read what was downloaded before.

    Raises:
        PetuneError: neither has the model.
    """
    trouble = _hub_trouble(name, options)
    if not trouble:
        return
    options["local_files_only"] = True
    where = {key: options.get(key) for key in ("revision", "cache_dir")}
    cached = huggingface_hub.try_to_load_from_cache(name, config, **where)
    if not isinstance(cached, str):
        known = unknown("model", name, registry().all("petune_models"))
        raise PetuneError(f"{known} It is no local folder, and the Hub says: {trouble}")


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
            dense = {"dtype": torch.float32, **dense_gguf()}
            loader.from_pretrained(file.parent, **where, **dense).save_pretrained(
                folder
            )
            AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)

    place = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if not place.is_dir():
        _check_gguf(file)
    return once(place, make, f"unpacking {file.name}")


def _check_gguf(file: Path) -> None:
    """See that a GGUF file is whole and of an architecture that transformers reads, before it is said to be unpacked.

    Raises:
        PetuneError: it is not.
    """
    # its import takes a while, and few models are GGUF files
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except (
        Exception
    ) as error:  # whatever a reader meets in a file that is something else
        said = " ".join(str(error).split())
        raise PetuneError(f"{file}: damaged, or no GGUF file ({said}).") from error
    with plainly(file):
        AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


@contextmanager
def plainly(name: str | Path) -> Iterator[None]:
    """Within the context transformers shows no table of missing weights and no bar, and what a user can cause ends in
    one line.

    Raises:
        PetuneError: the files of the model `name` are not what they should be.
    """
    level = chatter.get_verbosity()
    chatter.set_verbosity(logging.ERROR)
    try:
        with hidden_bars():
            yield
    except PetuneError:
        raise
    except Exception as error:
        said = _in_words(error)
        if said is None:
            raise
        raise PetuneError(f"{name}: {said}") from error
    finally:
        chatter.set_verbosity(level)


def _in_words(error: Exception) -> str | None:
    """What is wrong with a checkpoint and what to do, None where it is no mistake of a user's."""
    said = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "one of its JSON files is nested too deeply."
    if isinstance(error, RuntimeError | MemoryError):
        return None
    if "safetensors" in said and "file named" in said:
        return "no .safetensors file, and nothing is ever unpickled; save the weights as safetensors."
    if isinstance(error, OSError | ValueError | ImportError | SafetensorError):
        return said
    # whatever transformers meets in files that say something else than they should
    return f"transformers can't load it ({type(error).__name__}: {said})."
