"""What every method must hold on every model, one function a behaviour. Each takes a `Case` and asserts."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import petune
from petune.adapter import Unfreeze
from petune.merge import dequantize
from petune.testing.models import FAMILIES, tiny_batch, tiny_model
from petune.tuning import Method, Tuning, resolve

# how far apart, of the largest value, two ways to compute the same may be
ROUNDING = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
GENERATION: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@dataclass
class Case:
    """One method on one family of models at one precision."""

    method: str | Method
    family: str
    precision: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> Method:
        return resolve(self.method)[1]

    @property
    def generates(self) -> bool:
        return FAMILIES[self.family][2] != "sequence-classification"

    @property
    def batch(self) -> dict[str, Tensor]:
        return tiny_batch(self.family)

    def base(self) -> Any:
        return tiny_model(self.family, self.precision)

    def attach(self, model: Any, name: str = "default", *, change: bool = True) -> Tuning:
        """The method on a model, its parameters moved off their start, so that it acts."""
        with torch.random.fork_rng():
            torch.manual_seed(len(petune.tunings(model)))
            tuning = petune.attach(model, self.method, name=name, **self.arguments)
            with torch.no_grad():
                for p in tuning.parameters() if change else []:
                    p.add_(torch.randn_like(p) * 0.1 * (1 if p.dim() < 2 else p.std().clamp(min=0.2)))
        return tuning

    def tuned(self) -> tuple[Any, Tuning]:
        model = self.base()
        return model, self.attach(model)

    def close(self, one: Tensor, other: Tensor, what: str, factor: float = 1.0, more: float = 0.0) -> None:
        worst = float((one.float() - other.float()).abs().max())
        rounding = ROUNDING.get(self.precision, ROUNDING["fp32"]) * factor
        limit = rounding * max(1.0, float(other.float().abs().max())) + more
        assert worst <= limit, f"{what}: {worst:.1e} apart, at most {limit:.1e} allowed"


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits at the tokens that are not padding."""
    decoder = model.config.is_encoder_decoder
    out: Tensor = model(**{k: v for k, v in batch.items() if k != "labels" or decoder}).logits
    return out[batch["attention_mask"].bool()] if out.dim() == 3 and not decoder else out


def starts_at_base(case: Case) -> None:
    model = case.base()
    before = logits(model, case.batch)
    case.attach(model, change=False)
    if getattr(case.cls, "starts_at_base", True):
        more = 5 * _cost_of_dense(case) if issubclass(case.cls, Unfreeze) else 0.0  # its copies are dense
        case.close(logits(model, case.batch), before, "a fresh tuning changes the model", more=more)


def trains(case: Case) -> None:
    """Only its own parameters train, in float32, all of them get gradients, and the loss falls."""
    model = case.base()
    tuning = case.attach(model, change=False)
    own = tuning.parameters()
    assert own, "nothing to train"
    assert {p.dtype for p in own} == {torch.float32}, "adapters are kept in float32"
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}, "base parameters train too"
    optimizer = torch.optim.Adam(own, lr=3e-3)
    losses = []
    model.train()
    for _ in range(10):
        loss = model(**case.batch).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert min(losses) < losses[0], f"the loss does not fall: {losses}"
    reached = sum(p.grad is not None for p in own)
    missing = [n for n, p in tuning.state() if p.requires_grad and p.grad is None]
    # a copy of the whole model also holds what the base itself never reads
    assert reached == len(own) or issubclass(case.cls, Unfreeze), f"no gradient for {missing[:3]}"
    assert all(bool(p.grad.isfinite().all()) for p in own if p.grad is not None), "gradients are not finite"


def off_is_base(case: Case) -> None:
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model)
    on = logits(model, case.batch)
    assert not torch.equal(on, before), "the tuning does nothing"
    try:
        with tuning.disabled():
            assert torch.equal(logits(model, case.batch), before), "disabled() is not the base"
            raise KeyError
    except KeyError:
        assert tuning.enabled, "disabled() stays off after an exception"
    tuning.disable()
    assert torch.equal(logits(model, case.batch), before), "disable() is not the base"
    tuning.enable()
    assert torch.equal(logits(model, case.batch), on), "enable() does not bring it back"


def saves_and_loads(case: Case) -> None:
    model, tuning = case.tuned()
    with tempfile.TemporaryDirectory() as folder:
        tuning.save(folder)
        fresh = case.base()
        petune.load(fresh, folder, name="again", method=case.cls)
    assert torch.equal(logits(fresh, case.batch), logits(model, case.batch)), "loaded is not what was saved"


def merges_or_says_why(case: Case) -> None:
    model, tuning = case.tuned()
    before = logits(model, case.batch)
    why = _refusal(tuning)
    if not case.cls.mergeable:
        assert why is not None, "merge() of a method that is not mergeable must raise TypeError"
        assert tuning.method in str(why), "the error does not name the method"
        assert torch.equal(logits(model, case.batch), before), "a refused merge changed the model"
        return
    assert why is None, f"not merged: {why}"
    cost = _cost_of_dense(case)
    case.close(logits(model, case.batch), before, "merged is not what was tuned", factor=10, more=5 * cost)
    assert not petune.tunings(model), "the tuning is still there"
    assert not [k for k in model.state_dict() if "petune" in k], "adapters are left in the model"


def _cost_of_dense(case: Case) -> float:
    """What it changes to make the base dense: nothing, unless its layers also quantize their input (LLM.int8)."""
    model = case.base()
    before = logits(model, case.batch)
    dequantize(model)
    return float((logits(model, case.batch) - before).abs().max())


def _refusal(tuning: Tuning) -> TypeError | None:
    try:
        tuning.merge()
    except TypeError as why:
        return why
    return None


def detaches(case: Case) -> None:
    model = case.base()
    before, keys = logits(model, case.batch), list(model.state_dict())
    kinds = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    own = {n: set(vars(m)) for n, m in model.named_modules()}
    case.attach(model).detach()
    assert torch.equal(logits(model, case.batch), before), "other logits after detach"
    assert list(model.state_dict()) == keys, "other keys after detach"
    assert {n: type(m) for n, m in model.named_modules()} == kinds, "other classes after detach"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags, "other requires_grad after detach"
    left = {n: set(vars(m)) - own[n] for n, m in model.named_modules() if set(vars(m)) - own[n] - {"forward"}}
    assert not left, f"left behind: {left}"


def generates_cached(case: Case) -> None:
    """With and without a cache, from a batch padded on the left, and the prompt comes back as it was."""
    model, _ = case.tuned()
    inputs = {k: v for k, v in case.batch.items() if k != "labels"}
    if not model.config.is_encoder_decoder:
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    cached = model.generate(**inputs, use_cache=True, **GENERATION)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **GENERATION)), "cached differs from uncached"
    if not model.config.is_encoder_decoder:
        assert torch.equal(cached[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]), "the prompt was changed"
    full = model.generate(**inputs, return_dict_in_generate=True, num_beams=2, repetition_penalty=1.2, **GENERATION)
    assert full.sequences.shape == cached.shape, "beams have another shape"


def checkpoints_gradients(case: Case) -> None:
    model, tuning = case.tuned()
    model.train()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(0)  # for dropout
        model(**case.batch).loss.backward()
        return [p.grad for p in tuning.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable()
    for one, other in zip(gradients(), plain, strict=True):
        assert (one is None) == (other is None), "a gradient is lost"
        if one is not None and other is not None:
            case.close(one, other, "gradients differ under checkpointing", factor=10)


def compiles(case: Case) -> None:
    """In one graph, switched on and off. (Without labels: transformers logs inside some losses.)"""
    model, tuning = case.tuned()
    batch = {k: v for k, v in case.batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = case.batch["labels"]

    def forward() -> Tensor:
        return model(**batch, use_cache=False).logits if case.generates else model(**batch).logits

    torch.compiler.reset()
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        case.close(compiled(), forward(), "compiled differs")
        tuning.disable()
        case.close(compiled(), forward(), "compiled does not see the switch")


def routes(case: Case) -> None:
    """A batch with a row of its own, one of the base and one of another tuning of the same method."""
    model = case.base()
    batch = tiny_batch(case.family, rows=3)
    want: dict[str | None, list[Tensor]] = {None: _rows(model, batch)}
    for name in ("one", "two"):
        tuning = case.attach(model, name)
        want[name] = _rows(model, batch)
        tuning.disable()
    names: list[str | None] = ["one", None, "two"]
    with petune.route(model, names):
        got = _rows(model, batch)
    for i, served in enumerate(names):
        case.close(got[i], want[served][i], f"row {i} differs from the single run of {served!r}", factor=10)


@torch.no_grad()
def _rows(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    decoder = model.config.is_encoder_decoder
    out = model(**{k: v for k, v in batch.items() if k != "labels" or decoder}).logits
    if out.dim() == 2 or decoder:
        return list(out)
    return [row[mask.bool()] for row, mask in zip(out, batch["attention_mask"], strict=True)]


def stacks(case: Case) -> None:
    """Two of a kind on one model: each can be switched and taken away without the other."""
    model, one = case.tuned()
    alone = logits(model, case.batch)
    two = case.attach(model, "two")
    assert list(petune.tunings(model)) == ["default", "two"], "tunings are not in their order"
    assert not torch.equal(logits(model, case.batch), alone), "the second does nothing"
    with two.disabled():
        assert torch.equal(logits(model, case.batch), alone), "switching the second off does not leave the first"
    two.detach()
    assert torch.equal(logits(model, case.batch), alone), "detaching the second changes the first"
    one.detach()
    assert torch.equal(logits(model, case.batch), logits(case.base(), case.batch)), "the base is not restored"


def copies(case: Case) -> None:
    model, tuning = case.tuned()
    on = logits(model, case.batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, case.batch), on), "a copy computes something else"
    petune.tunings(twin)["default"].disable()
    assert tuning.enabled, "switching the copy switches the original"
    assert torch.equal(logits(model, case.batch), on), "the copy is not independent"
    assert not torch.equal(logits(twin, case.batch), on), "the copy can't be switched"


BEHAVIOURS: dict[str, Callable[[Case], None]] = {
    "starts at the base": starts_at_base,
    "trains, and nothing else does": trains,
    "off equals base": off_is_base,
    "save and load": saves_and_loads,
    "merge, or a reason": merges_or_says_why,
    "detach restores": detaches,
    "cached generation": generates_cached,
    "gradient checkpointing": checkpoints_gradients,
    "torch.compile": compiles,
    "routing": routes,
    "stacking": stacks,
    "deepcopy": copies,
}
