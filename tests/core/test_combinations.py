"""Several methods in one tuning, and several tunings by weight."""

import json

import peft
import pytest
import torch
from shaken import close, shaken
from torch import nn

import petune
from petune.testing import check_method, tiny_batch, tiny_model
from petune.testing.behaviours import logits

MAM = ["prefix-tuning", "parallel-adapter"]
UNIPELT = ["gated-lora", "gated-prefix-tuning", "gated-pfeiffer"]
ONE_SITE = ["lora", "ia3"]
OVER_COPIES = ["lora", "last-layers"]


LATER = [
    (MAM, "bert"),
    (MAM, "t5"),
    (UNIPELT, "llama"),
    (ONE_SITE, "gpt2"),
    (OVER_COPIES, "llama"),
]


@pytest.mark.parametrize(
    ("methods", "family"),
    [(MAM, "llama"), *[pytest.param(*case, marks=pytest.mark.slow) for case in LATER]],
)
def test_a_list_of_methods_behaves_as_one(methods, family):
    check_method(methods, families=[family])


@pytest.mark.parametrize("methods", [MAM, ONE_SITE, OVER_COPIES])
def test_one_folder(methods, tmp_path):
    model, again = tiny_model("llama"), tiny_model("llama")
    tuning = shaken(model, methods, **{methods[0]: {}}, where={methods[0]: None})
    tuning.save(tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    assert config["method"] == methods
    assert set(config["arguments"]) == set(methods)
    loaded = petune.load(again, tmp_path)
    assert [part.name for part in loaded.parts] == methods
    assert torch.equal(
        logits(again, tiny_batch("llama")), logits(model, tiny_batch("llama"))
    )
    with pytest.raises(petune.UnsupportedError, match="PEFT's format has no "):
        tuning.save(tmp_path, format="peft")


def test_the_list_is_what_stacking_is():
    """One tuning of two methods computes what two tunings of one compute."""
    one, two, batch = tiny_model("llama"), tiny_model("llama"), tiny_batch("llama")
    together = shaken(
        one, MAM, **{"prefix-tuning": {"length": 3}, "parallel-adapter": {"width": 5}}
    )
    apart = [petune.attach(two, "prefix-tuning", name="p", length=3),
             petune.attach(two, "parallel-adapter", name="a", width=5, where="mlp")]  # fmt: skip
    own = {key.partition(":")[2]: tensor for key, tensor in together.state()}
    with torch.no_grad():
        for tuning in apart:
            for key, tensor in tuning.state():
                tensor.copy_(own[key])
    assert torch.equal(logits(one, batch), logits(two, batch))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (["lora", "lora"], {}, "list each method once"),
        ([], {}, "list each method once, and at least one"),
        (["lora", "ia4"], {}, "unknown method 'ia4'"),
        (
            ["lora", "ia3"],
            {"loar": {}},
            "go by method in a list. 'loar'. Did you mean 'lora'",
        ),
        (["lora", "ia3"], {"rank": 4}, "arguments go by method in a list"),
        (["lora", "ia3"], {"lora": 4}, "arguments go by method"),
        (["lora", "ia3"], {"lora": {"rnak": 4}}, "argument of method 'lora': 'rnak'"),
        (["lora", "ia3"], {"where": "q"}, "with several methods, where="),
        (["lora", "ia3"], {"where": {"lroa": "q"}}, "where goes by method"),
        (
            ["lora", "prefix-tuning"],
            {"where": {"lora": "attention"}},
            "method 'lora' acts on",
        ),
        ("lora", {"where": {"lora": "q"}}, "a string, as there is one method"),
    ],
)
def test_a_mistake_in_a_list(method, arguments, message):
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match=message):
        petune.attach(model, method, **arguments)
    assert petune.tunings(model) == {}


def test_refused_as_one():
    tuning = petune.attach(tiny_model("llama"), ["lora", "prefix-tuning"])
    with pytest.raises(petune.UnmergeableError, match=r"lora\+prefix-tuning"):
        tuning.merge()
    assert tuning.links


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_weighted_sum_of_loras_is_pefts(family):
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
    roles = "q down" if family == "llama" else "qkv down"
    shapes, weights = {"a": (4, 8.0), "b": (6, 3.0)}, {"a": 0.7, "b": -1.5}
    configs = {
        n: peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets)
        for n, (r, alpha) in shapes.items()
    }
    theirs = peft.get_peft_model(tiny_model(family), configs["a"], "a")
    theirs.add_adapter("b", configs["b"])
    ours, batch = tiny_model(family), tiny_batch(family)
    for name, (rank, alpha) in shapes.items():
        tuning = petune.attach(
            ours, "lora", name=name, where=roles, rank=rank, alpha=alpha
        )
        for site, adapter in tuning.adapters.items():
            layer = theirs.base_model.model.get_submodule(site)
            adapter.A.copy_(layer.lora_A[name].weight)
            adapter.B.copy_(layer.lora_B[name].weight.normal_(std=0.2))
        tuning.weight = weights[name]
    theirs.add_weighted_adapter(
        ["a", "b"], list(weights.values()), "sum", combination_type="cat"
    )
    theirs.set_adapter("sum")
    want = logits(theirs.eval(), batch)
    assert (logits(tiny_model(family), batch) - want).abs().max() > 0.1
    close(logits(ours, batch), want)
    for tuning in list(petune.tunings(ours).values()):
        tuning.merge()
    close(logits(ours, batch), want)


@pytest.mark.parametrize(
    "method", ["houlsby", "ia3", "prefix-tuning", "full", "trainable-tokens", "dora"]
)
@torch.no_grad()
def test_a_weight_is_its_formula_and_is_saved(method, tmp_path):
    """At one site: weight 0 is the base, 1 the tuning; between them y + w (f(y) - y) of what the site gives."""
    arguments = {"trainable-tokens": {"ids": [81, 10, 20]}}.get(method, {})
    model, batch, seen = tiny_model("llama"), tiny_batch("llama"), {}
    tuning = shaken(model, method, **arguments)
    site = tuning.links[0].site
    attention = site.kind == "attention"

    def watch(module, args, out):
        seen[w] = args[0] if attention else out[0] if isinstance(out, tuple) else out

    hook = (site.module.o_proj if attention else site.module).register_forward_hook(
        watch
    )
    for w in (1.0, 0.25, 0.0):
        tuning.weight = w
        full = logits(model, batch)
    torch.testing.assert_close(
        full, logits(tiny_model("llama"), batch), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        seen[0.25], 0.75 * seen[0.0] + 0.25 * seen[1.0], rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(seen[0.25], seen[0.0])
    hook.remove()
    tuning.weight = 0.25
    tuning.save(tmp_path)
    again = tiny_model("llama")
    assert petune.load(again, tmp_path).weight == 0.25
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(
        petune.UnsupportedError, match=r"no place for a weight of 0\.25"
    ):
        tuning.save(tmp_path, format="peft")


def test_a_weight_under_compile_and_in_half_precision():
    model, batch = tiny_model("llama", "bf16"), tiny_batch("llama")
    tuning = shaken(model, "lora")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    torch.compiler.reset()
    compiled = torch.compile(
        lambda: model(**inputs, use_cache=False).logits, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        for weight in (0.5, 0.0):
            tuning.weight = weight
            torch.testing.assert_close(
                compiled(), model(**inputs).logits, rtol=0, atol=0.1
            )
        base = tiny_model("llama", "bf16")(**inputs).logits
    assert torch.equal(model(**inputs).logits, base)


def test_a_weight_that_can_not_be():
    model = tiny_model("llama")
    prompt = petune.attach(model, "prompt-tuning")
    with pytest.raises(petune.UnsupportedError, match="no weighted form"):
        prompt.weight = 0.5
    lora = petune.attach(model, "lora", name="lora")
    for weight in (float("nan"), float("inf"), "much", None):
        with pytest.raises(petune.PetuneError, match="wanted is a finite number"):
            lora.weight = weight
    assert lora.weight == 1.0


def test_a_weighted_copy_does_not_merge():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    tuning = shaken(model, "lora", train=["classifier"])
    tuning.weight = 0.5
    before = logits(model, batch)
    with pytest.raises(
        petune.UnmergeableError, match="classifier itself, which merges at weight 1"
    ):
        tuning.merge()
    assert torch.equal(logits(model, batch), before)


def test_the_base_is_computed_once_under_a_weight():
    class Twice(petune.Adapter):
        where = "q"

        def __init__(self, site):
            super().__init__()
            self.delta = nn.Parameter(torch.zeros(site.out_features))

        def forward(self, inner, x):
            return inner(x) + self.delta

    model, runs = tiny_model("llama"), []
    layer = model.model.layers[0].self_attn.q_proj
    plain = type(layer).forward
    tuning = petune.attach(model, Twice, where="q@0")
    tuning.weight = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Linear, "forward", lambda self, x: runs.append(self) or plain(self, x)
        )
        model(**tiny_batch("llama"))
    assert sum(module is layer for module in runs) == 1
