"""What a method leaves out is said: experts that are parameters, tied tables, layers without a site."""

import copy
import warnings
from functools import cache

import peft
import pytest
import torch

import petune
from petune_bench.coverage import tiny

STACKED = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2"]
EXPERTS = "*.experts.*"


def built(kind):
    heads = tiny.architectures()[kind]
    head = "causal-lm" if "causal-lm" in heads else "masked-lm"
    model = tiny.build(kind, head, heads[head]).double()
    model.set_experts_implementation("eager")  # others don't take float64
    return model


@cache
def kept(kind):
    return built(kind)


@pytest.fixture
def model(request):
    return copy.deepcopy(kept(getattr(request, "param", "mixtral")))


def adapted(model, method="lora", seed=1, **more):
    tuning = petune.attach(model, method, **more)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tuning


@torch.no_grad()
def logits(model, **more):
    return model(**{**tiny.batch(model), **more}).logits


@torch.no_grad()
def with_deltas(model, tuning, weight=1.0):
    """A copy of the base in which each expert's weight has its scale B A added."""
    for name, adapter in tuning.adapters.items():
        parameter = model.get_parameter(name)
        delta = weight * adapter.scale * adapter.B @ adapter.A  # (experts, out, in)
        turned = delta.shape != parameter.shape or "gpt_oss" in model.config.model_type
        parameter.add_(delta.mT if turned else delta)
    return model


def same_weights(model, wanted, names):
    """Merged weights are read off in float32."""
    for name in names:
        ours, theirs = (each.get_parameter(name).float() for each in (model, wanted))
        torch.testing.assert_close(ours, theirs)


def of_peft(model, tuning):
    """The model adapted by PEFT's `target_parameters`, and the adapted layers by the names of their parameters."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=names
    )
    theirs = peft.get_peft_model(model, config)
    layers = {}
    for name, layer in theirs.named_modules():
        if hasattr(layer, "parameter_name"):
            module = name.removeprefix("base_model.model.").replace(".base_layer", "")
            layers[f"{module}.{layer.parameter_name}"] = layer
    assert layers.keys() == tuning.adapters.keys()
    for name, adapter in tuning.adapters.items():
        a, b = adapter.A.detach(), adapter.B.detach()  # (E, r, in), (E, out, r)
        layers[name].lora_A["default"].weight.data.copy_(a.flatten(0, 1))
        layers[name].lora_B["default"].weight.data.copy_(b.permute(1, 2, 0).flatten(1))
    return theirs, layers


@pytest.mark.parametrize("model", STACKED, indirect=True)
def test_lora_on_stacked_experts_is_pefts(model):
    base, plain = copy.deepcopy(model), logits(model)
    tuning = petune.attach(model, "lora", where=EXPERTS, rank=4, alpha=8)
    torch.testing.assert_close(logits(model), plain)
    tuning.detach()
    tuning = adapted(model, where=EXPERTS, rank=4, alpha=8)
    theirs, layers = of_peft(base, tuning)
    assert (logits(model) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(theirs))
    for each in (model, theirs):
        each(**tiny.batch(model)).logits.square().mean().backward()
    for name, adapter in tuning.adapters.items():
        a, b = (getattr(layers[name], f"lora_{x}")["default"].weight for x in "AB")
        torch.testing.assert_close(adapter.A.grad, a.grad.view_as(adapter.A))
        by_expert = b.grad.view(*adapter.B.shape[1:], -1).permute(2, 0, 1)
        torch.testing.assert_close(adapter.B.grad, by_expert)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_any_implementation_of_the_experts(model, implementation):
    model.float().set_experts_implementation(implementation)
    base, plain = copy.deepcopy(model), logits(model)
    tuning = adapted(model, where=EXPERTS)
    torch.testing.assert_close(logits(model), logits(with_deltas(base, tuning)))
    with tuning.disabled():
        assert torch.equal(logits(model), plain)
    tuning.detach()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("model", STACKED, indirect=True)
def test_stacked_experts_merge_as_layers_do(model, tmp_path):
    base, tuning = copy.deepcopy(model), adapted(model, where=EXPERTS)
    dense = with_deltas(copy.deepcopy(base), tuning)
    tuning.save(tmp_path)
    adapted_logits = logits(model)
    loaded = copy.deepcopy(base)
    petune.load(loaded, tmp_path)
    assert torch.equal(logits(loaded), adapted_logits)
    names = list(tuning.adapters)
    assert list(tuning.merge().errors) == names
    assert type(model) is type(base)
    assert list(model.state_dict()) == list(base.state_dict())
    same_weights(model, dense, names)


def test_a_merge_refuses_what_is_not_finite_and_changes_nothing(model):
    plain, tuning = logits(model), adapted(model, where=EXPERTS)
    with torch.no_grad():
        tuning.parameters()[0][0, 0, 0] = float("nan")
    with pytest.raises(petune.PetuneError, match=r"experts: .* not finite"):
        tuning.merge()
    with tuning.disabled():
        assert torch.equal(logits(model), plain)


def test_weights_stacks_and_routes_of_stacked_experts(model):
    base = copy.deepcopy(model)
    one = adapted(model, name="one", where=EXPERTS)
    other = adapted(model, name="other", seed=2, where=EXPERTS)
    alone = {
        "one": logits(with_deltas(copy.deepcopy(base), one)),
        "other": logits(with_deltas(copy.deepcopy(base), other)),
        None: logits(base),
    }
    for names in (["one", "other"], [None, "one"], ["other", None]):
        with petune.route(model, names):
            routed = logits(model)
        for row, name in enumerate(names):
            torch.testing.assert_close(routed[row], alone[name][row])
    one.weight = 0.5
    both = with_deltas(with_deltas(copy.deepcopy(base), one, 0.5), other)
    torch.testing.assert_close(logits(model), logits(both))
    names, dense = list(other.adapters), with_deltas(base, other)
    other.merge()
    same_weights(model, dense, names)


def test_stacked_experts_under_checkpointing_and_dropout(model):
    tuning, inputs = adapted(model, dropout=0.2), tiny.batch(model)
    gradients = []
    for kind in (None, False, True):
        if kind is not None:
            options = {"use_reentrant": kind}
            model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)
        with petune.route(model, ["default", None]):
            loss = model(**inputs).logits.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in tuning.parameters()])
        model.zero_grad()
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"], indirect=True)
def test_half_of_a_stacked_projection(model):
    """Gate and up, which stand one after the other in Mixtral and take turns in GPT-OSS."""
    plain = copy.deepcopy(model)
    tuning = adapted(model, where="up@0")
    (link,) = tuning.links
    assert link.site.name == "model.layers.0.mlp.experts.gate_up_proj[up]"
    delta = link.adapter.scale * link.adapter.B @ link.adapter.A
    tuning.merge()
    before, after = (
        each.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
        for each in (plain, model)
    )
    changed = (after - before).detach()
    if "gpt_oss" in model.config.model_type:
        gate, up = changed[..., ::2], changed[..., 1::2].mT
    else:
        gate, up = changed.chunk(2, 1)
    assert gate.abs().max() < 1e-6
    torch.testing.assert_close(up, delta.detach(), rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_stacked_experts_start_at_the_base(model, init):
    plain = logits(model)
    tuning = petune.attach(model, "lora", where=EXPERTS, init=init)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj").detach()
    adapter = tuning.adapters["model.layers.0.mlp.experts.down_proj"]
    product = adapter.scale * adapter.B @ adapter.A
    if init == "pissa":  # the best of its rank, expert by expert
        s = torch.linalg.svdvals(weight)[:, 8:].norm(dim=1)
        left = (weight - product.detach()).flatten(1).norm(dim=1)
        torch.testing.assert_close(left, s, rtol=1e-4, atol=0)


def test_generating_with_stacked_experts(model):
    adapted(model)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = tiny.batch(model)["input_ids"]
    cached, plain = (model.generate(ids, **options, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def said(model, method, **more):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        petune.attach(model, method, **more)
    lines = [str(w.message) for w in caught if w.filename == __file__]
    assert all("\n" not in line for line in lines)
    return lines


@pytest.mark.parametrize(
    ("method", "count", "share"), [("dora", 4, "89%"), ("ia3", 2, "30%")]
)
def test_methods_say_that_they_leave_stacked_experts_out(model, method, count, share):
    (line,) = said(model, method)
    assert line.startswith(f"{method!r} leaves out {count} of 14 weights, {share}")
    assert "one parameter for all experts" in line


def test_a_method_says_that_it_leaves_out_what_the_user_named(model):
    (line,) = said(model, "dora", where="q down")
    assert "leaves out 2 of 14" in line
    assert said(copy.deepcopy(kept("mixtral")), "dora", where="q") == []
    with pytest.raises(petune.UnsupportedError, match="no form for stacked experts"):
        petune.attach(model, "dora", name="other", where="down")


@pytest.mark.parametrize("model", ["dbrx", "xlnet"], indirect=True)
def test_weights_that_are_no_layers_are_said(model):
    (line,) = said(model, "lora")
    assert "no linear layer of a known role" in line
    assert said(copy.deepcopy(kept("llama")), "lora") == []


@pytest.mark.parametrize("model", ["jamba"], indirect=True)
def test_layers_without_a_site_are_said(model):
    (line,) = said(model, "prefix-tuning")
    assert line.startswith("'prefix-tuning' acts in 1 of 2 layers: layer 0")
    assert said(copy.deepcopy(kept("jamba")), "lora") == []


def test_a_serving_engine_has_no_place_for_stacked_experts(model, tmp_path):
    tuning = adapted(model)
    with pytest.raises(petune.UnsupportedError, match="not of stacked experts"):
        tuning.save(tmp_path / "out", format="serving")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["petune", "peft"])
@pytest.mark.parametrize(
    ("method", "more"), [("dora", {}), ("lora", {"where": "q", "train": ["lm_head"]})]
)
def test_a_load_does_not_say_again_what_the_folder_decides(
    method, more, format, tmp_path
):
    config = copy.deepcopy(kept("mixtral").config)
    config.tie_word_embeddings = "train" in more
    models = [type(kept("mixtral"))(config) for _ in range(2)]
    with pytest.warns(petune.errors.PetuneWarning):
        tuning = petune.attach(models[0], method, **more)
    tuning.save(tmp_path, format=format)
    with warnings.catch_warnings():
        warnings.simplefilter("error", petune.errors.PetuneWarning)
        loaded = petune.load(models[1], tmp_path)
    assert loaded.adapters.keys() == tuning.adapters.keys()
    loaded.detach()
    with pytest.warns(petune.errors.PetuneWarning):
        petune.attach(models[1], method, **more)
