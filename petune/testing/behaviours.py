"""What every method must hold on every model, one function a behaviour. Each takes a `Case` and asserts."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import petune
from petune.core.attached.quantized import dequantize
from petune.core.attached.tuning import Tuning
from petune.core.frozen.weights import is_quantized
from petune.testing.case import Case, logits

GENERATION: dict[str, Any] = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
}


def starts_at_base(case: Case) -> None:
    base, model = case.base(), case.base()
    case.attach(model, change=False)
    if (
        case.trains_the_base
    ):  # its copies are dense: unlike LLM.int8()'s layers they don't round their input
        for each in (base, model):
            dequantize(each)
    if case.starts_at_base:
        case.close(
            logits(model, case.batch),
            logits(base, case.batch),
            "a fresh tuning changes the model",
        )


def trains(case: Case) -> None:
    """Only its own parameters train, in float32, all of them get gradients, and the loss falls."""
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model, change=False)
    own = tuning.parameters()
    assert own, "nothing to train"
    assert {p.dtype for p in own} == {torch.float32}, "adapters are kept in float32"
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in own
    }, "base parameters train too"
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
    with tuning.disabled():
        assert torch.equal(logits(model.eval(), case.batch), before), (
            "training changed the base"
        )
    reached = sum(p.grad is not None for p in own)
    missing = [n for n, p in tuning.state() if p.requires_grad and p.grad is None]
    # a copy of the whole model also holds what the base itself never reads
    assert reached == len(own) or case.trains_the_base, f"no gradient for {missing[:3]}"
    assert all(bool(p.grad.isfinite().all()) for p in own if p.grad is not None), (
        "gradients are not finite"
    )


def off_is_base(case: Case) -> None:
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model)
    on = logits(model, case.batch)
    assert not torch.equal(on, before), "the tuning does nothing"
    try:
        with tuning.disabled():
            assert torch.equal(logits(model, case.batch), before), (
                "disabled() is not the base"
            )
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
        one, *more = case.classes
        petune.load(fresh, folder, name="again", method=[one, *more] if more else one)
    assert torch.equal(logits(fresh, case.batch), logits(model, case.batch)), (
        "loaded is not what was saved"
    )


def merges_or_says_why(case: Case) -> None:
    """Into dense weights, as exactly as rounding allows, and back into quantized ones at a stated cost."""
    model, tuning = case.tuned()
    before = logits(model, case.batch)
    why = _refusal(tuning)
    if not case.mergeable:
        assert why is not None, (
            "merge() of a method that is not mergeable must raise TypeError"
        )
        assert tuning.method in str(why), "the error does not name the method"
        assert torch.equal(logits(model, case.batch), before), (
            "a refused merge changed the model"
        )
        return
    assert why is None, f"not merged: {why}"
    assert not petune.tunings(model), "the tuning is still there"
    assert not [k for k in model.state_dict() if "petune" in k], (
        "adapters are left in the model"
    )
    dequantize(
        model
    )  # both must be dense, since some quantized layers round their input too
    unmerged, tuning = case.tuned()
    dequantize(unmerged)
    case.close(
        logits(model, case.batch),
        logits(unmerged, case.batch),
        "merged is not what was tuned",
        factor=10,
    )
    if case.quantized:
        model, tuning = case.tuned()
        count = sum(map(is_quantized, model.modules()))
        with warnings.catch_warnings(action="ignore"):
            merged = tuning.merge(quantize=True)
        assert sum(map(is_quantized, model.modules())) == count, "layers are left dense"
        assert max(merged.errors.values(), default=0) < 0.3, (
            f"quantized again: {merged}"
        )


def _refusal(tuning: Tuning) -> TypeError | None:
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of biases that a saved model has no place for
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
    assert {n: type(m) for n, m in model.named_modules()} == kinds, (
        "other classes after detach"
    )
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags, (
        "other requires_grad after detach"
    )
    left = {
        n: set(vars(m)) - own[n]
        for n, m in model.named_modules()
        if set(vars(m)) - own[n] - {"forward"}
    }
    assert not left, f"left behind: {left}"


def generates_cached(case: Case) -> None:
    """With and without a cache, from a batch padded on the left, and the prompt comes back as it was."""
    model, _ = case.tuned()
    inputs = {k: v for k, v in case.batch.items() if k != "labels"}
    if not model.config.is_encoder_decoder:
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    cached = model.generate(**inputs, use_cache=True, **GENERATION)
    assert torch.equal(
        cached, model.generate(**inputs, use_cache=False, **GENERATION)
    ), "cached differs from uncached"
    if not model.config.is_encoder_decoder:
        assert torch.equal(
            cached[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]
        ), "the prompt was changed"
    full = model.generate(
        **inputs,
        return_dict_in_generate=True,
        num_beams=2,
        repetition_penalty=1.2,
        **GENERATION,
    )
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
    model, tuning = case.tuned(
        layers=1
    )  # tracing takes long, and what is traced in a block is the same in all
    batch = {k: v for k, v in case.batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = case.batch["labels"]

    def forward() -> Tensor:
        return (
            model(**batch, use_cache=False).logits
            if case.generates
            else model(**batch).logits
        )

    torch.compiler.reset()
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        case.close(compiled(), forward(), "compiled differs")
        tuning.disable()
        case.close(compiled(), forward(), "compiled does not see the switch")


def routes(case: Case) -> None:
    """A batch with a row of its own, one of the base and one of another tuning of the same method."""
    model = case.base()
    batch = case.rows(3)
    want: dict[str | None, list[Tensor]] = {None: _rows(model, batch)}
    for name in ("one", "two"):
        tuning = case.attach(model, name)
        want[name] = _rows(model, batch)
        tuning.disable()
    names: list[str | None] = ["one", None, "two"]
    with petune.route(model, names):
        got = _rows(model, batch)
    for i, served in enumerate(names):
        case.close(
            got[i],
            want[served][i],
            f"row {i} differs from the single run of {served!r}",
            factor=10,
        )


@torch.no_grad()
def _rows(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    decoder = model.config.is_encoder_decoder
    out = model(**{k: v for k, v in batch.items() if k != "labels" or decoder}).logits
    if out.dim() == 2 or decoder:
        return list(out)
    return [
        row[mask.bool()] for row, mask in zip(out, batch["attention_mask"], strict=True)
    ]


def stacks(case: Case) -> None:
    """Two of a kind on one model: each can be switched and taken away without the other."""
    model, one = case.tuned()
    alone = logits(model, case.batch)
    two = case.attach(model, "two")
    assert list(petune.tunings(model)) == ["default", "two"], (
        "tunings are not in their order"
    )
    assert not torch.equal(logits(model, case.batch), alone), "the second does nothing"
    with two.disabled():
        assert torch.equal(logits(model, case.batch), alone), (
            "switching the second off does not leave the first"
        )
    two.detach()
    assert torch.equal(logits(model, case.batch), alone), (
        "detaching the second changes the first"
    )
    one.detach()
    assert torch.equal(logits(model, case.batch), logits(case.base(), case.batch)), (
        "the base is not restored"
    )


def copies(case: Case) -> None:
    model, tuning = case.tuned()
    on = logits(model, case.batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, case.batch), on), "a copy computes something else"
    petune.tunings(twin)["default"].disable()
    assert tuning.enabled, "switching the copy switches the original"
    assert not torch.equal(logits(twin, case.batch), on), "the copy can't be switched"
    with torch.no_grad():
        for p in petune.tunings(twin)["default"].parameters():
            p.add_(1)
    assert torch.equal(logits(model, case.batch), on), "the copy is not independent"


def runs_under_trainer(case: Case) -> None:
    """Transformers' own Trainer takes steps of finite loss, saves what was trained and leaves the base as it was."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model, change=False)
    fresh = [p.detach().clone() for p in tuning.parameters()]
    rows = [{key: rows[i] for key, rows in case.batch.items()} for i in range(2)]
    options: dict[str, Any] = {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": case.device == "cpu",
        "learning_rate": 1e-2,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, save_steps=2, save_only_model=True, **options
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        saved = load_file(Path(folder, "checkpoint-2", "model.safetensors"))
    assert torch.tensor(loss).isfinite(), f"the loss is {loss}"
    assert not all(map(torch.equal, tuning.parameters(), fresh)), "nothing was trained"
    kept = {
        t.data_ptr()
        for k, t in model.state_dict().items()
        if k in saved and torch.equal(t.cpu(), saved[k])
    }
    assert {p.data_ptr() for p in tuning.parameters()} <= kept, (
        "the checkpoint lacks what was trained"
    )
    with tuning.disabled():
        assert torch.equal(logits(model.eval(), case.batch), before), (
            "training changed the base"
        )


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
    "Trainer": runs_under_trainer,
}
