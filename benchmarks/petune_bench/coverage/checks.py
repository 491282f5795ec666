"""What has to hold for one method on one model: a cell of the coverage table."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import petune
from petune.core.forward.link import Link

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "ia3": {},
    "prefix-tuning": {"length": 4},
    "prompt-tuning": {"length": 3},
    "houlsby": {"width": 8},
    "last-layers": {},
}
"""The methods of the table, one or two for each hook point, and their arguments."""
OUTPUTS = ("logits", "start_logits", "start_top_log_probs", "prediction_logits")
"""What heads call what they give."""
GENERATION: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "num_beams": 1,
}


def cell(model: PreTrainedModel, inputs: dict[str, Tensor], method: str) -> None:
    """Attach, change, differentiate, switch off, generate and detach.

    Raises:
        petune.UnsupportedError: the method can't act here.
        AssertionError: what does not hold.
    """
    reached, keys, cls = _reached(model, inputs), list(model.state_dict()), type(model)
    # torch takes other kernels for weights that need gradients
    base = output(model.requires_grad_(False), inputs)
    torch.manual_seed(0)
    tuning = petune.attach(model, method, **METHODS[method])
    try:
        _change(tuning)
        _check_acting(tuning, model, inputs, reached, base)
        if model.can_generate() and _generates(model, tuning, inputs):
            cached = _generate(model, inputs, True)
            plain = _generate(model, inputs, False)
            assert torch.equal(cached, plain), "cached differs"
    finally:
        tuning.detach()
    assert type(model) is cls, "detach leaves another class"
    assert list(model.state_dict()) == keys, "detach leaves other keys"
    assert torch.equal(output(model, inputs), base), "detached it is not the base"


def _check_acting(
    tuning: petune.Tuning,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    reached: set[int],
    base: Tensor,
) -> None:
    """Its adapters run and get gradients, it changes the output, and switched off it does not."""
    _check_gradients(tuning, model, inputs, reached)
    on = output(model, inputs)
    assert not _same(on, base), "a changed tuning does not change the output"
    with tuning.disabled():
        off = output(model, inputs)
    assert torch.equal(off, base), "switched off it is not the base"


def repeatable(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """The base itself has to run, forward and backward, and to give the same twice.

    Raises:
        AssertionError: it does not.
    """
    out = output(model, inputs)
    assert bool(out.isfinite().all()), "the base's output is not finite"
    assert torch.equal(output(model, inputs), out), (
        "the base gives something else each time"
    )
    assert _reached(model, inputs), "no gradient reaches the base"


@torch.no_grad()
def output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the model's head gives."""
    return _forward(model, inputs)


def _forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the model's head gives; else the first tensor of numbers that the model gives."""
    torch.manual_seed(0)  # some draw hashes or blocks
    known = inspect.signature(type(model).forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    out = model(**inputs, **options)
    for value in [*(out.get(key) for key in OUTPUTS), *out.values()]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError("the model gives no tensor of numbers")


@torch.no_grad()
def _change(tuning: petune.Tuning) -> None:
    """Add noise to all that trains, in the size of what is there."""
    for p in tuning.parameters():
        size = float(p.std().clamp(min=0.2)) if p.numel() > 1 else 1.0
        p.add_(torch.randn_like(p) * 0.3 * size)


def _reached(model: PreTrainedModel, inputs: dict[str, Tensor]) -> set[int]:
    """The parameters of the base that a gradient reaches."""
    model.requires_grad_(True)
    _backward(_forward(model, inputs))
    found = {id(p) for p in model.parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _backward(out: Tensor) -> None:
    assert bool(out.isfinite().all()), "the output is not finite"
    torch.manual_seed(1)
    (out * torch.randn(out.shape)).sum().backward()  # type: ignore[no-untyped-call]


def _check_gradients(
    tuning: petune.Tuning,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    reached: set[int],
) -> None:
    """Adapters run where their modules do. Those that ran get gradients, as far as the base's own parameters there do.

    Args:
        reached: the parameters of the base that a gradient reaches.
    """
    out, seen = _watched_forward(tuning, model, inputs)
    _backward(out)
    for link in tuning.links:
        if _acts(link, seen) and _is_due(link, reached):
            assert _has_gradient(link), f"no gradient reaches {link.site.name}"
    assert _take_gradients(tuning), "all gradients are zero"
    ran = [link for link in tuning.links if id(link.adapter) in seen]
    assert ran, "no adapter ran"
    idle = _idle(tuning.links, seen)
    assert not idle, (
        f"{len(idle)} adapters stay idle though their modules run: {idle[0]}"
    )


def _watched_forward(
    tuning: petune.Tuning, model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, set[int]]:
    """(the output, the modules and adapters that ran)."""
    seen: set[int] = set()
    modules = {m for link in tuning.links for m in (link.site.module, link.adapter)}
    hooks = [m.register_forward_hook(lambda m, *_: seen.add(id(m))) for m in modules]
    try:
        return _forward(model, inputs), seen
    finally:
        for hook in hooks:
            hook.remove()


def _take_gradients(tuning: petune.Tuning) -> bool:
    """Clear all gradients, and say whether one of them was anything but zeros."""
    found = False
    for p in tuning.parameters():
        if p.grad is not None:
            found = found or bool(p.grad.any())
            p.grad = None
    return found


def _acts(link: Link, seen: set[int]) -> bool:
    """A trained copy has to act even where its module's parameters are read by another module."""
    return id(link.adapter) in seen or link.site.kind == "module"


def _has_gradient(link: Link) -> bool:
    return any(p.grad is not None for p in link.adapter.parameters())


def _is_due(link: Link, reached: set[int]) -> bool:
    """Whether a gradient reaches the base where the adapter acts."""
    own = link.site.module.parameters(recurse=link.site.kind != "module")
    return any(id(parameter) in reached for parameter in own)


def _idle(links: Iterable[Link], seen: set[int]) -> list[str]:
    """The sites whose adapters did not run though their modules did."""
    found = []
    for link in links:
        if id(link.site.module) in seen and id(link.adapter) not in seen:
            found.append(link.site.name)
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _generates(
    model: PreTrainedModel, tuning: petune.Tuning, inputs: dict[str, Tensor]
) -> bool:
    """Whether the base itself generates the same with and without a cache."""
    with tuning.disabled():
        try:
            cached = _generate(model, inputs, True)
            plain = _generate(model, inputs, False)
        except Exception:  # it does not generate from ids alone
            return False
    return torch.equal(cached, plain)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: bool) -> Tensor:
    torch.manual_seed(0)
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {**GENERATION, "pad_token_id": 0, "eos_token_id": None}
    generate: Any = model.generate
    out = generate(**given, use_cache=cache, **options)
    assert isinstance(out, Tensor)
    return out
