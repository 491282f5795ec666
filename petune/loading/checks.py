"""What a loaded model's weights must be: all there, none left over, of the shapes that the configuration says, and
finite.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.core.frozen.modules import features
from petune.core.frozen.weights import compute_dtype, is_quantized
from petune.errors import PetuneError


def check_complete(
    model: PreTrainedModel, info: Mapping[str, Any], name: str | Path
) -> None:
    """See that the checkpoint has the whole base model. A head may be new, and what lies around the blocks (a pooler);
    a block of which something is missing would compute nonsense. A head of another size may give way to a new one.

    Raises:
        PetuneError: it lacks something of a block, or something of the base has another shape; the message names the
            first tensor.
    """
    block = re.compile(rf"{re.escape(_inside(model))}(.*\.)?\d+\.")
    missing = sorted(filter(block.match, info["missing_keys"]))
    if missing:
        what = f"the checkpoint has no {missing[0]}, which its config.json asks for"
        raise PetuneError(f"{name}: {what}.")
    for found in sorted(info["mismatched_keys"]):
        if not _is_of_head(model, found[0]):
            raise PetuneError(f"{name}: {_sizes(*found)}.")


def remarks(
    model: PreTrainedModel, info: Mapping[str, Any], name: str | Path
) -> Iterator[str]:
    """What a user should know of a checkpoint that fits its configuration, a line each: tensors that it lacks, which
    are drawn anew, and some that the base model has no place for. Poolers come and go, and so does what is around the
    base, unless the model is of the class that was saved.
    """
    what = f"{name}: the checkpoint has"
    if drawn := _drawn(model, info["missing_keys"]):
        yield f"{what} no {_named(drawn)}, which its config.json asks for: drawn anew."
    if left := _left_over(model, info["unexpected_keys"]):
        yield f"{what} {_named(left)}, for which its config.json has no place: left out."


def _drawn(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """The tensors that a checkpoint of this model should have had."""
    needed = [key for key in missing if "pool" not in key]
    is_as_saved = type(model).__name__ in (model.config.architectures or ())
    if not is_as_saved:
        needed = [key for key in needed if not _is_of_head(model, key)]
    return sorted(needed)


def _named(keys: list[str]) -> str:
    return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]


def _inside(model: PreTrainedModel) -> str:
    """What the names of the base model's tensors begin with; "" where the model is the base itself."""
    prefix = model.base_model_prefix
    return f"{prefix}." if hasattr(model, prefix) else ""


def _is_of_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of the model is around the base, or of the one layer that stands for it in a model of its own
    base.
    """
    top = getattr(model, key.partition(".")[0], None)
    return not key.startswith(_inside(model)) or isinstance(top, nn.Linear)


def _left_over(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """A checkpoint's tensors that are of a block which the base model could have, or of a layer that it has."""
    modules = dict(model.base_model.named_modules())
    prefix = f"{model.base_model_prefix}."
    return sorted(
        key for key in unexpected if _is_of_one(modules, key.removeprefix(prefix))
    )


def _is_of_one(modules: Mapping[str, nn.Module], key: str) -> bool:
    numbered = re.match(r"(.+?)\.\d+\.", key)
    module = modules.get(numbered[1] if numbered else key.rpartition(".")[0])
    if numbered:
        return isinstance(module, nn.ModuleList)
    return module is not None and bool(dict(module.named_parameters(recurse=False)))


def mismatch(loader: Any, place: str, options: Mapping[str, Any]) -> str | None:
    """Of a checkpoint that does not fit its configuration: the first tensor that has another shape, and the remedy
    where only a head has. None where all fit.
    """
    dry = {**options, "device_map": "meta", "ignore_mismatched_sizes": True}
    model, info = loader.from_pretrained(place, **dry)
    keys = sorted(info["mismatched_keys"])
    if not keys:
        return None
    what = _sizes(*keys[0])
    inside = f"{model.base_model_prefix}."
    if not any(key.startswith(inside) for key, *_ in keys):
        what += "; its head has another size; give its num_labels, or ignore_mismatched_sizes=True for a new one"
    return what


def _sizes(key: str, stored: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{key} is {tuple(stored)}, its config.json makes it {tuple(wanted)}"


def check_finite(model: PreTrainedModel, name: str | Path, precision: str) -> None:
    """See that no weight is NaN or infinite at the precision at which the model is loaded.

    Raises:
        PetuneError: one is; the message names it.
    """
    for key in _not_finite(model):
        what = f"{key} holds NaN or infinite numbers at {precision}"
        other = "" if precision == "fp32" else ", or load it at fp32"
        raise PetuneError(f"{name}: {what}; get the checkpoint anew{other}.")


def _not_finite(model: nn.Module) -> Iterator[str]:
    """The names of the parameters, and of the buffers that a checkpoint has, that are not finite."""
    saved = model.state_dict(keep_vars=True)
    module: Any
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if is_quantized(module):
            own.pop("weight", None)
            # what accelerate has offloaded comes when the layer runs
            is_here = not module.weight.is_meta
            if is_here and not _is_finite(_outputs(module)):
                yield f"{path}.weight"
        own = {key: value for key, value in own.items() if type(value) is nn.Parameter}
        buffers = dict(module.named_buffers(recurse=False))
        for key, tensor in (own | buffers).items():
            name = f"{path}.{key}".lstrip(".")
            if name in saved and not _is_finite(tensor):
                yield name


@torch.no_grad()
def _outputs(layer: Any) -> Tensor:
    """The sums of the rows of a quantized layer's weight, however it is stored: finite where its numbers are."""
    size = features(layer)
    assert size is not None
    ones = torch.ones(
        1, size[0], dtype=compute_dtype(layer), device=layer.weight.device
    )
    found: Tensor = layer(ones)
    return found


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    # torch can't order 8-bit numbers; by the extremes there is no second tensor of this size
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return all(map(torch.isfinite, torch.aminmax(wide.detach())))
