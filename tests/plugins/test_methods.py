"""The same numbers as PEFT from the same adapter weights, or as the formula in float64 where PEFT lacks the method."""

import peft
import pytest
import torch
import torch.nn.functional as F
from shaken import close, shake, shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

TARGETS = {
    "llama": r".*\.(q|k|v|o|gate|up|down)_proj",
    "bert": r".*encoder\..*\.(query|key|value|dense)",
}


def dora(ours, layer):
    ours.A.copy_(layer.lora_A["default"].weight)
    ours.B.copy_(layer.lora_B["default"].weight)
    ours.m.copy_(layer.lora_magnitude_vector["default"].weight)


def vera(ours, layer):
    ours.A = layer.vera_A["default"][:, : ours.A.shape[1]].clone()
    ours.B = layer.vera_B["default"][: ours.B.shape[0]].clone()
    ours.d.copy_(layer.vera_lambda_d["default"])
    ours.b.copy_(layer.vera_lambda_b["default"])


def loha(ours, layer):
    for mine, theirs in (
        ("B1", "w1_a"),
        ("A1", "w1_b"),
        ("B2", "w2_a"),
        ("A2", "w2_b"),
    ):
        getattr(ours, mine).copy_(getattr(layer, f"hada_{theirs}")["default"])


def lokr(ours, layer):
    ours.C.copy_(layer.lokr_w1["default"])
    ours.B.copy_(layer.lokr_w2_a["default"])
    ours.A.copy_(layer.lokr_w2_b["default"])


def oft(ours, layer):
    ours.free.copy_(layer.oft_R["default"].weight)


def boft(ours, layer):
    raw = layer.boft_R["default"]  # (factors, blocks, block, block)
    row, column = torch.triu_indices(*raw.shape[-2:], 1)
    ours.free.copy_((raw - raw.mT)[..., row, column] / 2)
    ours.scale.copy_(layer.boft_s["default"].flatten())


PEERS = {
    "dora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16, "use_dora": True}, {}, dora),
    "vera": (peft.VeraConfig, {"r": 16}, {"rank": 16}, vera),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 8}, {"rank": 4, "alpha": 8}, loha),
    "lokr": (
        peft.LoKrConfig,
        {"r": 2, "alpha": 4, "decompose_factor": 4},
        {"rank": 2, "alpha": 4, "factor": 4},
        lokr,
    ),
    "oft": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 8, "use_cayley_neumann": False},
        {"block": 8},
        oft,
    ),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}, {"block": 4, "factors": 1}, boft),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", PEERS)
@torch.no_grad()
def test_equals_peft(method, family):
    torch.manual_seed(0)
    config, theirs_args, ours_args, copy = PEERS[method]
    made = config(target_modules=TARGETS[family], **theirs_args)
    theirs, ours = (
        peft.get_peft_model(tiny_model(family), made).eval(),
        tiny_model(family),
    )
    before = logits(ours, tiny_batch(family))
    shake(p for p in theirs.parameters() if p.requires_grad)
    for name, adapter in petune.attach(ours, method, **ours_args).adapters.items():
        copy(adapter, theirs.base_model.model.get_submodule(name))
    want = logits(theirs, tiny_batch(family))
    assert (want - before).abs().max() > 1e-3
    close(logits(ours, tiny_batch(family)), want)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm", "norm"]),
        ("bert", ["LayerNorm"]),
    ],
)
@torch.no_grad()
def test_ln_tuning_equals_peft(family, targets):
    torch.manual_seed(0)
    made = peft.LNTuningConfig(target_modules=targets, exclude_modules=".*embeddings.*")
    theirs, ours = (
        peft.get_peft_model(tiny_model(family), made).eval(),
        tiny_model(family),
    )
    shake(p for p in theirs.parameters() if p.requires_grad)
    for name, adapter in petune.attach(ours, "ln-tuning").adapters.items():
        base, tuned = (
            ours.get_submodule(name),
            theirs.base_model.model.get_submodule(name).ln_tuning_layers["default"],
        )
        adapter.scale.copy_(tuned.weight / base.weight)
        if adapter.shift is not None:
            adapter.shift.copy_(tuned.bias - base.bias * adapter.scale)
    close(logits(ours, tiny_batch(family)), logits(theirs, tiny_batch(family)))


def at(method, role, **arguments):
    """A shaken adapter of a tiny Llama at its first site of a role, in float64."""
    model = tiny_model("llama").double()
    torch.manual_seed(0)
    found = petune.attach(model, method, **arguments)
    link = next(link for link in found.links if link.site.role == role)
    shake(link.adapter.parameters())
    return link.adapter, torch.randn(2, 5, link.site.in_features, dtype=torch.float64)


@torch.no_grad()
def test_bottlenecks():
    for method in ("houlsby", "pfeiffer", "parallel-adapter", "compacter"):
        adapter, x = at(method, "mlp")
        h = 2 * x
        if method in ("houlsby", "pfeiffer"):
            want = (
                h
                + F.gelu(x * 2 @ adapter.down.weight.T + adapter.down.bias)
                @ adapter.up.weight.T
                + adapter.up.bias
            )
        elif method == "parallel-adapter":
            low = (x @ adapter.down.weight.T + adapter.down.bias).relu()
            want = h + 4 * (low @ adapter.up.weight.T + adapter.up.bias)
        else:
            down, up = (
                sum(
                    torch.kron(a, torch.outer(s, t))
                    for a, s, t in zip(net.rules, net.s, net.t, strict=True)
                )
                for net in (adapter.down, adapter.up)
            )
            want = h + F.gelu(h @ down + adapter.down.bias) @ up + adapter.up.bias
        torch.testing.assert_close(adapter(lambda x: 2 * x, x), want)


def test_where_the_bottlenecks_stand():
    for method, roles in {
        "houlsby": {"attn", "mlp"},
        "pfeiffer": {"mlp"},
        "parallel-adapter": {"mlp"},
    }.items():
        tuning = petune.attach(tiny_model("bert"), method)
        assert {link.site.role for link in tuning.links} == roles
        assert all(link.site.entry is not None for link in tuning.links), (
            "before the sum and the norm"
        )


@torch.no_grad()
def test_bitfit_is_the_base_with_other_biases():
    ours, plain = tiny_model("bert"), tiny_model("bert")
    for name, adapter in shaken(ours, "bitfit").adapters.items():
        plain.get_submodule(name).bias.add_(adapter.shift)
    close(logits(ours, tiny_batch("bert")), logits(plain, tiny_batch("bert")))


@torch.no_grad()
def test_llama_adapter():
    adapter, _ = at("llama-adapter", "attention")
    q, k = (
        torch.randn(2, 4, 5, 16, dtype=torch.float64),
        torch.randn(2, 2, 5, 16, dtype=torch.float64),
    )
    got = adapter(
        lambda q, k, v, mask: torch.zeros_like(q).transpose(1, 2), q, k, k, None
    )  # (2, 5, 4, 16)
    for head in range(4):
        weights = (q[:, head] @ adapter.keys[head // 2].T / 4).softmax(-1)
        want = adapter.gate[head].tanh() * (weights @ adapter.values[head // 2])
        torch.testing.assert_close(got[:, :, head], want)


@torch.no_grad()
def test_butterfly_is_orthogonal_and_mixes():
    adapter, _ = at("boft", "q", block=8, factors=3)
    adapter.scale.fill_(1)
    matrix = adapter(lambda x: x, torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    assert int((matrix[0].abs() > 1e-12).sum()) == 8 * 2**2


def test_widths_that_blocks_do_not_divide():
    for method, arguments in {
        "oft": {"block": 7},
        "boft": {"block": 7},
        "lokr": {"factor": 7},
    }.items():
        petune.attach(tiny_model("llama"), method, **arguments)
    with pytest.raises(petune.UnsupportedError, match="butterfly"):
        petune.attach(tiny_model("llama"), "boft", factors=9)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_lora_starts_at_the_base(init):
    model = tiny_model("llama")
    before = logits(model, tiny_batch("llama"))
    tuning = petune.attach(
        model,
        "lora",
        init=init,
        rslora=True,
        rank_pattern={"v": 4},
        alpha_pattern={"*.0.*": 2.0},
    )
    close(logits(model, tiny_batch("llama")), before)
    adapter = tuning.adapters["model.layers.0.self_attn.v_proj"]
    assert adapter.A.shape == (4, 64)
    assert adapter.scale == 1.0
    if init == "pissa":
        values = torch.linalg.svdvals(
            next(link for link in tuning.links if link.adapter is adapter).site.weight()
        )
        torch.testing.assert_close(
            torch.linalg.svdvals(adapter.B @ adapter.A)[:4],
            values[:4],
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_named(argument):
    model = tiny_model("llama")
    for key in ("v_prj", "gate"):  # no site at all, and one that `where` leaves out
        with pytest.raises(
            petune.PetuneError,
            match=rf"{argument}: '{key}' matches none of the sites adapted",
        ):
            petune.attach(model, "lora", where="q v", **{argument: {"q": 4, key: 2}})
    assert petune.tunings(model) == {}


def test_lora_plus():
    """The second matrix has a rate of its own; by Adam's first step it moves that many times as far."""
    model = tiny_model("llama")
    tuning = petune.attach(model, "lora", lr_ratio=16.0)
    groups = tuning.parameter_groups(1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]
    assert {id(p) for p in groups[1]["params"]} == {
        id(a.B) for a in tuning.adapters.values()
    }
    before = [
        (a, a.A.detach().clone(), a.B.detach().clone())
        for a in tuning.adapters.values()
    ]
    with torch.no_grad():
        for adapter, _, b in before:
            b.copy_(adapter.B.normal_(std=0.1))
    optimizer = torch.optim.Adam(groups)
    model(**tiny_batch("llama")).loss.backward()
    optimizer.step()
    moved = [
        ((adapter.A - a).abs().median(), (adapter.B - b).abs().median())
        for adapter, a, b in before
    ]
    for a, b in moved:
        torch.testing.assert_close(b / a, torch.tensor(16.0), rtol=1e-2, atol=0)
    assert len(petune.attach(tiny_model("llama"), "dora").parameter_groups(1e-3)) == 1


def test_prefix_reparametrisation_is_shared():
    tuning = petune.attach(tiny_model("t5"), "prefix-tuning", hidden=8)
    assert len({id(link.adapter.trunk) for link in tuning.links}) == 1


def test_tied_head_scores_trainable_tokens_by_their_rows():
    model = tiny_model("gpt2")
    tuning = petune.attach(model, "trainable-tokens", ids=[5, 9])
    rows = tuning.parameters()[0]
    with torch.no_grad():
        rows.add_(1)
        got = logits(model, tiny_batch("gpt2"))
        plain = tiny_model("gpt2")
        plain.get_input_embeddings().weight[[5, 9]] = rows
    close(got, logits(plain, tiny_batch("gpt2")))
