"""What has to hold for one method on one model: a cell of the coverage table."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import petune

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "ia3": {},
    "prefix-tuning": {"length": 4},
    "prompt-tuning": {"length": 3},
    "houlsby": {"width": 8},
    "last-layers": {},
}
"""The methods of the table, one or two for each hook point, and their arguments."""
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
    base = output(
        model.requires_grad_(False), inputs
    )  # torch takes other kernels for weights that need gradients
    torch.manual_seed(0)
    tuning = petune.attach(model, method, **METHODS[method])
    try:
        _change(tuning)
        idle, ran = _gradients(tuning, model, inputs, reached)
        assert ran, "no adapter ran"
        assert not idle, (
            f"{len(idle)} adapters stay idle though their modules run: {idle[0]}"
        )
        _check_switched(model, tuning, inputs, base)
        _check_generation(model, tuning, inputs)
    finally:
        tuning.detach()
    assert type(model) is cls, "detach leaves another class"
    assert list(model.state_dict()) == keys, "detach leaves other keys"
    assert torch.equal(output(model, inputs), base), "detached it is not the base"


def _check_switched(
    model: PreTrainedModel,
    tuning: petune.Tuning,
    inputs: dict[str, Tensor],
    base: Tensor,
) -> None:
    """On it changes the output, off it gives the base's."""
    assert not _same(output(model, inputs), base), (
        "a changed tuning does not change the output"
    )
    with tuning.disabled():
        assert torch.equal(output(model, inputs), base), (
            "switched off it is not the base"
        )


def _check_generation(
    model: PreTrainedModel, tuning: petune.Tuning, inputs: dict[str, Tensor]
) -> None:
    """The cache changes nothing where it changes nothing for the base."""
    if model.can_generate() and _generates(model, tuning, inputs):
        cached = _generate(model, inputs, True)
        plain = _generate(model, inputs, False)
        assert torch.equal(cached, plain), "cached differs"


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
    torch.manual_seed(0)  # some draw hashes or blocks
    known = inspect.signature(type(model).forward).parameters
    out = model(**inputs, **({"use_cache": False} if "use_cache" in known else {}))
    found = [
        out.get(key)
        for key in (
            "logits",
            "start_logits",
            "start_top_log_probs",
            "prediction_logits",
        )
    ]
    return next(
        value
        for value in [*found, *out.values()]
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _change(tuning: petune.Tuning) -> None:
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(
                torch.randn_like(p)
                * 0.3
                * float(p.std().clamp(min=0.2) if p.numel() > 1 else 1)
            )


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


def _gradients(
    tuning: petune.Tuning,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    reached: set[int],
) -> tuple[list[str], int]:
    """Adapters that did not run though their module did, and how many ran. Those that ran must get gradients, as far
    as the base's own parameters there would.
    """
    out, seen = _watched(tuning, model, inputs)
    _backward(out)
    ran = [link for link in tuning.links if id(link.adapter) in seen]
    _check_due(tuning, ran, reached)
    changed = [p.grad is not None and bool(p.grad.any()) for p in tuning.parameters()]
    assert any(changed), "all gradients are zero"
    idle = [
        link.site.name
        for link in tuning.links
        if id(link.adapter) not in seen and id(link.site.module) in seen
    ]
    for p in tuning.parameters():
        p.grad = None
    return idle, len(ran)


def _watched(
    tuning: petune.Tuning, model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, set[int]]:
    """The output, and the ids of the adapters and of their modules that ran."""
    seen: set[int] = set()
    modules = {m for link in tuning.links for m in (link.site.module, link.adapter)}
    hooks = [m.register_forward_hook(lambda m, *_: seen.add(id(m))) for m in modules]
    try:
        return _forward(model, inputs), seen
    finally:
        for hook in hooks:
            hook.remove()


def _check_due(tuning: petune.Tuning, ran: list[Any], reached: set[int]) -> None:
    """Adapters get gradients where the base's own parameters would."""
    for link in tuning.links:
        whole = link.site.kind == "module"
        # a trained copy has to act even where its module's parameters are read by another
        if link not in ran and not whole:
            continue
        own = link.site.module.parameters(recurse=not whole)
        if any(id(p) in reached for p in own):
            without = all(p.grad is None for p in link.adapter.parameters())
            assert not without, f"no gradient reaches {link.site.name}"


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _generates(
    model: PreTrainedModel, tuning: petune.Tuning, inputs: dict[str, Tensor]
) -> bool:
    """Whether the base itself generates the same with and without a cache."""
    with tuning.disabled():
        try:
            cached, plain = (_generate(model, inputs, cache) for cache in (True, False))
        except Exception:  # it does not generate from ids alone
            return False
    return torch.equal(cached, plain)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: bool) -> Tensor:
    torch.manual_seed(0)
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    out = model.generate(
        **given, use_cache=cache, pad_token_id=0, eos_token_id=None, **GENERATION
    )  # type: ignore[operator]
    assert isinstance(out, Tensor)
    return out
