"""What a loaded model's weights must be: all there, of the shapes that the configuration says, and finite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
    a block of which something is missing would compute nonsense.

    Raises:
        PetuneError: it lacks something of a block; the message names the first tensor.
    """
    prefix = model.base_model_prefix
    inside = f"{prefix}." if hasattr(model, prefix) else ""
    block = re.compile(rf"{re.escape(inside)}(.*\.)?\d+\.")
    missing = sorted(filter(block.match, info["missing_keys"]))
    if missing:
        what = f"the checkpoint has no {missing[0]}, which its config.json asks for"
        raise PetuneError(f"{name}: {what}.")


def mismatch(loader: Any, place: str, options: Mapping[str, Any]) -> str | None:
    """Of a checkpoint that does not fit its configuration: the first tensor that has another shape, and the remedy
    where only a head has. None where all fit.
    """
    dry = {**options, "device_map": "meta", "ignore_mismatched_sizes": True}
    model, info = loader.from_pretrained(place, **dry)
    keys = sorted(info["mismatched_keys"])
    if not keys:
        return None
    key, stored, wanted = keys[0]
    what = f"{key} is {tuple(stored)}, its config.json makes it {tuple(wanted)}"
    inside = f"{model.base_model_prefix}."
    if not any(key.startswith(inside) for key, *_ in keys):
        what += "; its head has another size; give its num_labels, or ignore_mismatched_sizes=True for a new one"
    return what


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
    """The names of the parameters that are not finite."""
    module: Any
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if is_quantized(module):
            own.pop("weight", None)
            # what accelerate has offloaded comes when the layer runs
            is_here = not module.weight.is_meta
            if is_here and not _is_finite(_outputs(module)):
                yield f"{path}.weight"
        for key, parameter in own.items():
            if type(parameter) is nn.Parameter and not _is_finite(parameter):
                yield f"{path}.{key}".lstrip(".")


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
