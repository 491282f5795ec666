"""The core's seams: each holds here, and a change planted in one ends in the error that names it."""

from contextlib import nullcontext
from importlib.machinery import ModuleSpec

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, Cache, GenerationMixin, PreTrainedModel

import petune
from petune.core.host import (
    attention,
    cache,
    experts,
    generation,
    parallel,
    torch_modules,
)
from petune.core.host.seam import Seams
from petune.core.host.seams import SEAMS
from petune.errors import MovedError
from petune.testing import tiny_model


def seam(name):
    (found,) = [each for each in SEAMS.all if name in each.name]
    return found


@pytest.mark.parametrize("each", SEAMS.all, ids=lambda each: each.name[:40])
def test_every_seam_holds(each):
    assert each.trouble() is None
    assert each.since[0].isdigit()
    assert each.why


def test_checking_draws_nothing_at_random():
    """A first `attach` must start as any later one does under the same seed."""
    before = torch.get_rng_state()
    assert [each.trouble() for each in SEAMS.all] == [None] * len(SEAMS.all)
    assert torch.equal(torch.get_rng_state(), before)


def renamed(cls, name):
    """A class without one of its methods, which goes by another name."""

    def plant(monkeypatch):
        method = getattr(cls, name)
        monkeypatch.delattr(cls, name)
        monkeypatch.setattr(cls, name + "_v2", method, raising=False)

    return plant


def another_signature(monkeypatch):
    def get_interface(self, name):
        """Without a default."""

    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)


def third_name(monkeypatch):
    def forward(self, input_ids=None, kv_store=None):
        """The cache under a name that nobody knows."""

    monkeypatch.setattr(cache.LlamaForCausalLM, "forward", forward)


def flag_gone(monkeypatch):
    from petune.core.host import trainer

    monkeypatch.setattr(trainer, "FLAG", "_hf_adapters_loaded")


def quantizer_elsewhere(monkeypatch):
    def save_pretrained(self, folder):
        """Asks something else."""

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)


def implementation_elsewhere(monkeypatch):
    monkeypatch.setattr(attention, "LlamaConfig", lambda **_: object())


def views_as_views(monkeypatch):
    monkeypatch.setattr(
        torch_modules, "unsafe_view", lambda tensor, shape: tensor.view(shape)
    )


def parameters_elsewhere(monkeypatch):
    monkeypatch.setattr(torch_modules, "put_parameter", lambda *_: None)


def modules_elsewhere(monkeypatch):
    monkeypatch.setattr(torch_modules, "children_of", lambda module: {})


def memory_after_all(monkeypatch):
    monkeypatch.setattr(torch_modules, "FakeTensorMode", lambda **_: nullcontext())


def replicas_unmarked(monkeypatch):
    monkeypatch.setattr(nn.Module, "_replicate_for_data_parallel", lambda self: self)


def deepspeed_elsewhere(monkeypatch):
    monkeypatch.setattr(
        parallel, "find_spec", lambda name: ModuleSpec(name, None, origin=__file__)
    )


def experts_unstacked(monkeypatch):
    monkeypatch.setattr(experts, "MixtralExperts", lambda config: nn.Linear(2, 1))


def experts_by_themselves(monkeypatch):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        """Asks for no function."""

    monkeypatch.setattr(experts.MixtralExperts, "forward", forward)


PLANTED = {
    "use_experts_implementation": experts_unstacked,
    "ExpertsInterface": experts_by_themselves,
    "_replicate_for_data_parallel": replicas_unmarked,
    "ds_id": deepspeed_elsewhere,
    "AttentionInterface.get_interface": another_signature,
    "PreTrainedConfig._attn_implementation": implementation_elsewhere,
    "of a model's forward": third_name,
    "_set_gradient_checkpointing": renamed(
        PreTrainedModel, "_set_gradient_checkpointing"
    ),
    "_get_logits_processor": renamed(GenerationMixin, "_get_logits_processor"),
    "_get_stopping_criteria": renamed(GenerationMixin, "generate"),
    "encoder_kwargs_for_generation": renamed(GenerationMixin, generation.ENCODE),
    "hf_quantizer": quantizer_elsewhere,
    "nn.Module._parameters": parameters_elsewhere,
    "nn.Module._modules": modules_elsewhere,
    "_unsafe_view": views_as_views,
    "FakeTensorMode": memory_after_all,
    "_hf_peft_config_loaded": flag_gone,
}


def test_every_seam_has_a_planted_change():
    assert len(PLANTED) == len(SEAMS.all)
    assert all(seam(name) for name in PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_named_before_anything_is_attached(name, monkeypatch):
    moved, model = seam(name), tiny_model("llama")
    PLANTED[name](monkeypatch)
    trouble = moved.trouble()
    assert trouble is not None
    assert trouble.startswith(moved.library)
    assert moved.name in trouble
    assert "\n" not in trouble
    monkeypatch.setattr(SEAMS, "checked", False)
    with pytest.raises(MovedError) as error:
        petune.attach(model, "lora")
    assert (
        moved.name in str(error.value) or len([s for s in SEAMS.all if s.trouble()]) > 1
    )
    assert type(model) is transformers.LlamaForCausalLM
    assert not petune.tunings(model)


def test_a_check_that_raises_counts_as_a_no():
    seams = Seams()

    @seams.lean("torch", "a thing", since="1.0", why="do something")
    def check():
        raise AttributeError("no such thing")

    with pytest.raises(
        MovedError, match=r"torch .*a thing has moved \(AttributeError: no such thing\)"
    ):
        seams.require()


def test_a_cache_under_a_third_name_is_no_wrong_value():
    """At run time, whatever the check says: the model's own forward takes any keyword."""
    model = tiny_model("llama")
    petune.attach(model, "loreft")
    with pytest.raises(MovedError, match="given as 'kv_store'"):
        model(
            torch.tensor([[11, 12]]),
            kv_store=transformers.DynamicCache(config=model.config),
        )
    assert isinstance(transformers.DynamicCache(config=model.config), Cache)
