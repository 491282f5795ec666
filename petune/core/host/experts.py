"""How a mixture keeps the weights of its experts: as one parameter for all of them, and a function that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from petune.core.host.seam import Seams

SEAMS = Seams()
Run = Callable[..., Tensor]
Wrap = Callable[[Run], Run]
"""Makes of the function that experts would have got the one that they get."""
UP = ("gate_up_proj", "up_proj")
"""What the projection of an expert's input is called, with a gate and without."""
DOWN = "down_proj"


class Stack(NamedTuple):
    """The weights of one projection for all experts of a module.

    Attributes:
        weight: (experts, out, in), or (experts, in, out) if `transposed`.
        bias: (experts, out), None without one.
        interleaved: gate and up take turns among the outputs, in place of one after the other.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    interleaved: bool


def _tiny() -> nn.Module:
    """The smallest experts, without values."""
    make: Any = MixtralConfig
    config = make(hidden_size=2, intermediate_size=1, num_local_experts=1)
    with torch.device("meta"):
        return MixtralExperts(config)


@SEAMS.lean(
    "transformers",
    "use_experts_implementation, with gate_up_proj, down_proj, is_transposed and _apply_gate",
    since="5.0",
    why="put adapters around the projections of a mixture's experts",
)
def _experts_are_stacked() -> bool:
    module = _tiny()
    return list(stacks(module)) == [UP[0], DOWN] and hasattr(module, "_apply_gate")


@SEAMS.lean(
    "transformers",
    "ExpertsInterface.get_interface(experts_implementation, default)",
    since="5.0",
    why="compute a mixture's experts with their adapters, whichever implementation it uses",
)
def _experts_ask_for_their_function() -> bool:
    return "get_interface" in MixtralExperts.forward.__code__.co_names


def stacks(module: Any) -> dict[str, Stack]:
    """The projections of a module of experts, by the names of their parameters; none of any other module, and of
    weights that are stored in codes.
    """
    own = vars(module)
    found = dict(module.named_parameters(recurse=False))
    names = [name for name in (*UP, DOWN) if name in found]
    weights = [found[name] for name in names]
    if "is_transposed" not in own or len(names) != 2:
        return {}
    if not all(w.dim() == 3 and w.is_floating_point() for w in weights):
        return {}
    interleaved = not own.get("is_concatenated", True)
    return {
        name: Stack(
            found[name], found.get(f"{name}_bias"), own["is_transposed"], interleaved
        )
        for name in names
    }


def between(module: Any, projected: Tensor) -> Tensor:
    """What stands between an expert's two projections."""
    if UP[0] in dict(module.named_parameters(recurse=False)):
        gated: Tensor = module._apply_gate(projected)
        return gated
    activated: Tensor = module.act_fn(projected)
    return activated


def behind(module: Any, out: Tensor) -> Tensor:
    """What stands behind an expert's last projection."""
    if getattr(module, "has_post_expert_norm", False):
        normed: Tensor = module.post_expert_norm(out)
        return normed
    return out


def wrap_interface(wrap: Wrap) -> None:
    """Make the interface answer with what `wrap` makes of its answer, once."""
    ask: Any = ExpertsInterface.get_interface
    if getattr(ask, "petune", False):
        return

    @wraps(ask)
    def get_interface(self: ExpertsInterface, name: str, default: Run) -> Run:
        return wrap(ask(self, name, default))

    get_interface.petune = True  # type: ignore[attr-defined]
    ExpertsInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
