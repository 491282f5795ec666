"""What every method must hold on every model, one function a behaviour. Each takes a `Case` and asserts."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from petune.core.attached.load import load
from petune.core.attached.quantized import dequantize
from petune.core.attached.route import route
from petune.core.attached.tuning import Tuning, tunings
from petune.testing.case import Case, forward, logits
from petune.testing.generation import GENERATION as GENERATION
from petune.testing.generation import generates_cached
from petune.testing.merging import merges_or_says_why


def starts_at_base(case: Case) -> None:
    base, model = case.base(), case.base()
    case.attach(model, change=False)
    if case.trains_the_base:
        # its copies are dense: unlike LLM.int8()'s layers they don't round their input
        dequantize(base)
        dequantize(model)
    if case.starts_at_base:
        fresh, plain = logits(model, case.batch), logits(base, case.batch)
        case.close(fresh, plain, "a fresh tuning changes the model")


def trains(case: Case) -> None:
    """Only its own parameters train, in float32, all of them get gradients, and the loss falls."""
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model, change=False)
    _check_what_trains(model, tuning)
    losses = _losses(model, tuning, case.batch)
    assert min(losses) < losses[0], f"the loss does not fall: {losses}"
    with tuning.disabled():
        after = logits(model.eval(), case.batch)
    assert torch.equal(after, before), "training changed the base"
    _check_gradients(case, tuning)


def _check_what_trains(model: Any, tuning: Tuning) -> None:
    own = tuning.parameters()
    assert own, "nothing to train"
    kinds = {parameter.dtype for parameter in own}
    assert kinds == {torch.float32}, "adapters are kept in float32"
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in own}, "base parameters train too"


def _losses(model: Any, tuning: Tuning, batch: dict[str, Tensor]) -> list[float]:
    """The losses of ten steps of Adam on one batch."""
    optimizer = torch.optim.Adam(tuning.parameters(), lr=3e-3)
    losses = []
    model.train()
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def _check_gradients(case: Case, tuning: Tuning) -> None:
    """All that trains got a gradient. A copy of the whole model also holds what the base itself never reads."""
    own = tuning.parameters()
    gradients = [p.grad for p in own if p.grad is not None]
    missing = [n for n, p in tuning.state() if p.requires_grad and p.grad is None]
    complete = len(gradients) == len(own) or case.trains_the_base
    assert complete, f"no gradient for {missing[:3]}"
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert finite, "gradients are not finite"


def off_is_base(case: Case) -> None:
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model)
    on = logits(model, case.batch)
    assert not torch.equal(on, before), "the tuning does nothing"
    try:
        with tuning.disabled():
            off = logits(model, case.batch)
            raise KeyError
    except KeyError:
        assert torch.equal(off, before), "disabled() is not the base"
        assert tuning.enabled, "disabled() stays off after an exception"
    tuning.disable()
    off = logits(model, case.batch)
    assert torch.equal(off, before), "disable() is not the base"
    tuning.enable()
    again = logits(model, case.batch)
    assert torch.equal(again, on), "enable() does not bring it back"


def saves_and_loads(case: Case) -> None:
    model, tuning = case.tuned()
    with tempfile.TemporaryDirectory() as folder:
        tuning.save(folder)
        fresh = case.base()
        one, *more = case.classes
        load(fresh, folder, name="again", method=[one, *more] if more else one)
    assert torch.equal(logits(fresh, case.batch), logits(model, case.batch)), (
        "loaded is not what was saved"
    )


def detaches(case: Case) -> None:
    """The model is the one that it was: what it computes, its keys, classes, flags and attributes."""
    model = case.base()
    before, traits = logits(model, case.batch), _traits(model)
    attributes = _attributes(model)
    case.attach(model).detach()
    after = logits(model, case.batch)
    assert torch.equal(after, before), "other logits after detach"
    for what, trait in _traits(model).items():
        assert trait == traits[what], f"other {what} after detach"
    left = {}
    for name, names in _attributes(model).items():
        more = names - attributes[name] - {"forward"}
        if more:
            left[name] = more
    assert not left, f"left behind: {left}"


def _traits(model: Any) -> dict[str, Any]:
    return {
        "keys": list(model.state_dict()),
        "classes": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {
            name: p.requires_grad for name, p in model.named_parameters()
        },
    }


def _attributes(model: Any) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def checkpoints_gradients(case: Case) -> None:
    model, tuning = case.tuned()
    model.train()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(0)  # for dropout
        model(**case.batch).loss.backward()
        return [p.grad for p in tuning.parameters()]

    plain = gradients()
    _checkpoint_blocks(model)
    for one, other in zip(gradients(), plain, strict=True):
        assert (one is None) == (other is None), "a gradient is lost"
        if one is not None and other is not None:
            case.close(one, other, "gradients differ under checkpointing", factor=10)


def _checkpoint_blocks(model: Any) -> None:
    """Gradient checkpointing goes by another name since transformers 5.23."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def compiles(case: Case) -> None:
    """In one graph, switched on and off. (Without labels: transformers logs inside some losses.)"""
    # tracing takes long, and what is traced in a block is the same in all
    model, tuning = case.tuned(layers=1)
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
    want: dict[str | None, list[Tensor]] = {None: _logits_by_row(model, batch)}
    for name in ("one", "two"):
        tuning = case.attach(model, name)
        want[name] = _logits_by_row(model, batch)
        tuning.disable()
    names: list[str | None] = ["one", None, "two"]
    with route(model, names):
        got = _logits_by_row(model, batch)
    for i, served in enumerate(names):
        what = f"row {i} differs from the single run of {served!r}"
        case.close(got[i], want[served][i], what, factor=10)


@torch.no_grad()
def _logits_by_row(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of each row the logits at its tokens that are not padding, (tokens, vocabulary); of a classifier (classes,)."""
    out = forward(model, batch)
    if out.dim() == 2 or model.config.is_encoder_decoder:
        return list(out)
    masks = batch["attention_mask"].bool()
    return [row[mask] for row, mask in zip(out, masks, strict=True)]


def stacks(case: Case) -> None:
    """Two of a kind on one model: each can be switched and taken away without the other."""
    model, one = case.tuned()
    alone = logits(model, case.batch)
    two = case.attach(model, "two")
    names = list(tunings(model))
    assert names == ["default", "two"], "tunings are not in their order"
    assert not torch.equal(logits(model, case.batch), alone), "the second does nothing"
    with two.disabled():
        off = logits(model, case.batch)
    assert torch.equal(off, alone), "switching the second off does not leave the first"
    two.detach()
    left = logits(model, case.batch)
    assert torch.equal(left, alone), "detaching the second changes the first"
    one.detach()
    base = logits(case.base(), case.batch)
    assert torch.equal(logits(model, case.batch), base), "the base is not restored"


def copies(case: Case) -> None:
    model, tuning = case.tuned()
    on = logits(model, case.batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, case.batch), on), "a copy computes something else"
    tunings(twin)["default"].disable()
    assert tuning.enabled, "switching the copy switches the original"
    assert not torch.equal(logits(twin, case.batch), on), "the copy can't be switched"
    with torch.no_grad():
        for p in tunings(twin)["default"].parameters():
            p.add_(1)
    assert torch.equal(logits(model, case.batch), on), "the copy is not independent"


def runs_under_trainer(case: Case) -> None:
    """Transformers' own Trainer takes steps of finite loss, saves what was trained and leaves the base as it was."""
    model = case.base()
    before = logits(model, case.batch)
    tuning = case.attach(model, change=False)
    fresh = [p.detach().clone() for p in tuning.parameters()]
    loss, saved = _two_trainer_steps(case, model)
    assert torch.tensor(loss).isfinite(), f"the loss is {loss}"
    unchanged = all(map(torch.equal, tuning.parameters(), fresh))
    assert not unchanged, "nothing was trained"
    trained = {p.data_ptr() for p in tuning.parameters()}
    assert trained <= _saved_storages(model, saved), (
        "the checkpoint lacks what was trained"
    )
    with tuning.disabled():
        after = logits(model.eval(), case.batch)
    assert torch.equal(after, before), "training changed the base"


def _two_trainer_steps(case: Case, model: Any) -> tuple[float, dict[str, Tensor]]:
    """(the loss, the checkpoint's tensors) of two steps of transformers' Trainer."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [_row(case.batch, i) for i in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=2,
            save_steps=2,
            save_only_model=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=case.device == "cpu",
            learning_rate=1e-2,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        saved = load_file(Path(folder, "checkpoint-2", "model.safetensors"))
    return loss, saved


def _row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: rows[i] for key, rows in batch.items()}


def _saved_storages(model: Any, saved: dict[str, Tensor]) -> set[int]:
    """The addresses of the model's tensors that a checkpoint has as they are."""
    found = set()
    for key, tensor in model.state_dict().items():
        if key in saved and torch.equal(tensor.cpu(), saved[key]):
            found.add(tensor.data_ptr())
    return found


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
