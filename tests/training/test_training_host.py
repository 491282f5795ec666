"""Every seam of the training holds, and a change planted in it ends in the error that names it."""

from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch
import torch._inductor.cpp_builder
import transformers.trainer
import transformers.trainer_callback
from datasets.packaged_modules.json.json import Json
from samples import changed
from torch.utils import _python_dispatch
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainingArguments
from transformers.loss import loss_utils
from transformers.quantizers.base import HfQuantizer

from petune.core.host.seam import Seam, Seams, raise_first
from petune.errors import MovedError, UnsupportedError
from petune.training import host_model, labelled_logits, train
from petune.training.bytecode import used_names
from petune.training.host import OVERRIDDEN, SEAMS
from petune.training.host_torch import memory_changes

Patch = pytest.MonkeyPatch


def test_every_seam_holds() -> None:
    assert [seam.trouble() for seam in SEAMS.all if seam.trouble()] == []


def the_loss_has_no_setter(patch: Patch) -> None:
    patch.setattr(PreTrainedModel, "loss_function", property(lambda self: None))


def models_call_their_loss_otherwise(patch: Patch) -> None:
    patch.setattr(
        transformers.LlamaForCausalLM, "forward", lambda self, **_: self.criterion()
    )


def a_loss_has_moved(patch: Patch) -> None:
    patch.delattr(loss_utils, "ForMaskedLMLoss")


def a_loss_is_not_divided(patch: Patch) -> None:
    whole = loss_utils.ForCausalLMLoss
    patch.setattr(
        loss_utils,
        "ForCausalLMLoss",
        lambda *args, num_items_in_batch, **more: whole(*args, **more),
    )


def without(name: str) -> Callable[[Patch], None]:
    """A Trainer that has another name for a method that petune overrides."""

    def plant(patch: Patch) -> None:
        patch.delattr(Trainer, name)

    return plant


def no_longer_called(name: str) -> Callable[[Patch], None]:
    """A Trainer that has a method that petune overrides, and no use for it."""

    def plant(patch: Patch) -> None:
        for caller in users_of(Trainer, name):
            patch.setattr(Trainer, caller, lambda self: None)

    return plant


def users_of(owner: type, name: str) -> list[str]:
    functions = [f for f in vars(owner).values() if isinstance(f, FunctionType)]
    return [
        f.__name__ for f in functions if name in used_names(f.__code__) - {f.__name__}
    ]


def weights_are_loaded_from_elsewhere(patch: Patch) -> None:
    patch.setattr(Trainer, "_load_from_checkpoint", lambda self, source: None)


def the_mean_of_a_loss_is_asked_for_otherwise(patch: Patch) -> None:
    patch.setattr(Trainer, "compute_loss", lambda self, model, inputs: self.loss_kind)


def callbacks_get_other_arguments(patch: Patch) -> None:
    handler = transformers.trainer_callback.CallbackHandler
    patch.setattr(handler, "on_evaluate", lambda self, event: None)


def the_bar_has_another_name(patch: Patch) -> None:
    patch.setattr(ProgressCallback, "__init__", lambda self: None)


def the_state_lies_elsewhere(patch: Patch) -> None:
    patch.setattr(transformers.trainer, "TRAINER_STATE_NAME", "state.json")


def optimizers_lie_elsewhere(patch: Patch) -> None:
    patch.setattr(transformers.trainer, "OPTIMIZER_NAME", "optimizer.bin")


def schedules_are_looked_up_otherwise(patch: Patch) -> None:
    patch.delattr(transformers.optimization, "TYPE_TO_SCHEDULER_FUNCTION")


def the_number_of_devices_is_a_field(patch: Patch) -> None:
    patch.setattr(TrainingArguments, "n_gpu", 1)


def checkpointing_has_a_third_name(patch: Patch) -> None:
    for name in ("activation", "gradient"):
        patch.delattr(PreTrainedModel, f"{name}_checkpointing_enable", raising=False)


def nothing_asks_for_gradients(patch: Patch) -> None:
    for caller in users_of(PreTrainedModel, "enable_input_require_grads"):
        patch.setattr(PreTrainedModel, caller, lambda self: None)


def quantizers_want_to_know_more(patch: Patch) -> None:
    patch.setattr(HfQuantizer, "is_serializable", lambda self, path: True)


def storages_have_no_number(patch: Patch) -> None:
    patch.setattr(
        torch.UntypedStorage, "_cdata", property(lambda self: self.gone), raising=False
    )


def every_view_has_a_storage_of_its_own(patch: Patch) -> None:
    patch.setattr(torch.UntypedStorage, "_cdata", property(id), raising=False)
    patch.setattr(torch.Tensor, "untyped_storage", lambda self: torch.UntypedStorage(1))


def subclasses_are_taken_apart_otherwise(patch: Patch) -> None:
    other = "is_traceable_wrapper_subclass_type"
    patch.setattr(
        _python_dispatch, other, lambda kind: hasattr(kind, "__tensor_parts__")
    )


def events_have_no_beginning(patch: Patch) -> None:
    patch.delattr(torch._C._autograd._KinetoEvent, "start_ns")


def functorch_has_other_rules(patch: Patch) -> None:
    patch.setattr(torch._functorch, "config", SimpleNamespace(patch=None))


def dynamo_has_another_limit(patch: Patch) -> None:
    patch.setattr(torch._dynamo, "config", SimpleNamespace(patch=None))


def the_compiler_is_looked_for_elsewhere(patch: Patch) -> None:
    patch.delattr(torch._inductor.cpp_builder, "get_cpp_compiler")


def nothing_is_a_view(patch: Patch) -> None:
    patch.delattr(torch.ops.aten.transpose.int, "is_view")


def views_do_not_know_their_base(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "_base", None)


def builders_live_elsewhere(patch: Patch) -> None:
    patch.setattr(Json, "__module__", "datasets.builders")


PLANTED: list[tuple[str, str, Callable[[Patch], None]]] = [
    ("transformers", "PreTrainedModel.loss_function", the_loss_has_no_setter),
    ("transformers", "PreTrainedModel.loss_function", models_call_their_loss_otherwise),
    ("transformers", "ForCausalLMLoss and ForMaskedLMLoss", a_loss_has_moved),
    ("transformers", "ForCausalLMLoss and ForMaskedLMLoss", a_loss_is_not_divided),
    *(("transformers", f"Trainer.{name}", without(name)) for name in OVERRIDDEN),
    *(
        ("transformers", f"Trainer.{name}", no_longer_called(name))
        for name in OVERRIDDEN
    ),
    ("transformers", "Trainer._load_from_checkpoint", without("_load_from_checkpoint")),
    (
        "transformers",
        "Trainer._load_from_checkpoint",
        weights_are_loaded_from_elsewhere,
    ),
    (
        "transformers",
        "model_accepts_loss_kwargs",
        the_mean_of_a_loss_is_asked_for_otherwise,
    ),
    ("transformers", "on_evaluate", callbacks_get_other_arguments),
    ("transformers", "ProgressCallback.training_bar", the_bar_has_another_name),
    ("transformers", "trainer_state.json", the_state_lies_elsewhere),
    ("transformers", "optimizer.pt, scheduler.pt", optimizers_lie_elsewhere),
    ("transformers", "SCHEDULER_FUNCTION", schedules_are_looked_up_otherwise),
    ("transformers", "TrainingArguments.n_gpu", the_number_of_devices_is_a_field),
    ("transformers", "activation_checkpointing", checkpointing_has_a_third_name),
    ("transformers", "enable_input_require_grads", nothing_asks_for_gradients),
    ("transformers", "is_serializable", quantizers_want_to_know_more),
    ("torch", "UntypedStorage._cdata", storages_have_no_number),
    ("torch", "UntypedStorage._cdata", every_view_has_a_storage_of_its_own),
    ("torch", "__tensor_flatten__", subclasses_are_taken_apart_otherwise),
    ("torch", "kineto_results", events_have_no_beginning),
    ("torch", "torch._functorch.config", functorch_has_other_rules),
    ("torch", "torch._dynamo.config", dynamo_has_another_limit),
    ("torch", "get_cpp_compiler", the_compiler_is_looked_for_elsewhere),
    ("torch", "OpOverload.is_view", nothing_is_a_view),
    ("torch", "TorchDispatchMode", views_do_not_know_their_base),
    ("datasets", "packaged_modules", builders_live_elsewhere),
]


def seam_of(name: str) -> Seam:
    (found,) = (seam for seam in SEAMS.all if name in seam.name)
    return found


@pytest.mark.parametrize(
    ("library", "name", "plant"),
    PLANTED,
    ids=[f"{n}-{p.__name__}" for _, n, p in PLANTED],
)
def test_a_planted_change_is_named(
    monkeypatch: Patch, library: str, name: str, plant: Callable[[Patch], None]
) -> None:
    seam = seam_of(name)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(MovedError) as caught:
            raise_first([seam])
    message = str(caught.value)
    assert message.startswith(f"{library} ")
    assert name in message
    assert "install a newer petune" in message
    assert "\n" not in message
    assert seam.trouble() is None, "the change was taken back"


def test_a_change_is_planted_in_every_seam() -> None:
    assert {seam_of(name).name for _, name, _ in PLANTED} == {
        seam.name for seam in SEAMS.all
    }


def test_a_training_does_not_begin_on_what_has_moved(
    recipe: dict[str, Any], monkeypatch: Patch
) -> None:
    run = Path(recipe["output"])
    train(recipe, quiet=True)
    monkeypatch.setattr(SEAMS, "checked", False)
    weights_are_loaded_from_elsewhere(monkeypatch)
    with pytest.raises(MovedError, match=r"Trainer\._load_from_checkpoint"):
        train(recipe, quiet=True, overwrite=True)
    assert (run / "result.json").exists(), "the run in the way is still there"


def test_labelled_logits_check_the_losses_alone(monkeypatch: Patch) -> None:
    losses = Seams(host_model.LOSSES)
    monkeypatch.setattr("petune.training.logits.LOSSES", losses)
    weights_are_loaded_from_elsewhere(monkeypatch)
    with labelled_logits(torch.nn.Linear(1, 1)):
        pass
    losses.checked = False
    a_loss_is_not_divided(monkeypatch)
    with (
        pytest.raises(MovedError, match="ForCausalLMLoss"),
        labelled_logits(torch.nn.Linear(1, 1)),
    ):
        pass


def test_a_profiler_that_reports_no_memory_is_found_out() -> None:
    with pytest.raises(
        MovedError, match=r"torch .*: the profiler reports no event named \[memory\]"
    ):
        memory_changes(lambda: None)


EVERY_THIRD = pytest.param(
    3,
    marks=pytest.mark.skipif(
        not host_model._takes_every(), reason="transformers 5.16 can leave blocks out"
    ),
)


@pytest.mark.parametrize("every", [0, 1, EVERY_THIRD])
def test_checkpointing_by_the_name_that_transformers_has(
    tmp_path: Path, every: int
) -> None:
    told = host_model.checkpointing_arguments(every)
    arguments: Any = TrainingArguments(str(tmp_path), **told)
    word, _ = told
    assert word in ("activation_checkpointing", "gradient_checkpointing")
    assert getattr(arguments, word) is bool(every)
    assert host_model.checkpointing_arguments(0) == {
        word: False,
        f"{word}_kwargs": None,
    }


def test_checkpointing_of_older_versions(
    recipe: dict[str, Any], monkeypatch: Patch
) -> None:
    """5.22 has the older name; 5.15 checkpoints all blocks or none."""
    SEAMS.require()  # while everything is where it was
    monkeypatch.delattr(
        PreTrainedModel, "activation_checkpointing_enable", raising=False
    )
    enabled: list[Any] = []
    monkeypatch.setattr(
        PreTrainedModel,
        "gradient_checkpointing_enable",
        lambda self, gradient_checkpointing_kwargs=None: enabled.append(
            gradient_checkpointing_kwargs
        ),
    )
    told = host_model.checkpointing_arguments(1)
    kept = {"use_reentrant": False}
    assert told == {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": kept,
    }
    host_model.checkpoint_blocks(object.__new__(PreTrainedModel))
    assert enabled == [kept]
    with pytest.raises(
        UnsupportedError,
        match=r"gradient_checkpointing: 2 leaves .* transformers 5\.16",
    ):
        host_model.checkpointing_arguments(2)
    with pytest.raises(UnsupportedError, match="gradient_checkpointing: 2 leaves"):
        train(changed(recipe, gradient_checkpointing=2), quiet=True)
    assert not Path(recipe["output"]).exists()
