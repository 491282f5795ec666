"""What each method keeps for backward: never more than PEFT's form of it, and what a method needs by itself."""

import copy
import gc
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from peft import get_peft_model
from shaken import shake

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.lean import lean
from petune.training.memory import measure_step
from petune.training.recompute import forward, operations
from petune_bench.peers import configure

OPTIONS = {"trainable-tokens": {"ids": [5, 6, 7]}}
IN_PEFT = [
    name
    for name, method in petune.methods().items()
    if ":" not in name and getattr(vars(method).get("peft"), "kind", "")
]
ROWS, LENGTH = 8, 64


@pytest.fixture(autouse=True)
def _as_in_large_models(monkeypatch):
    """Nothing is too small to be computed again, and no product but the attention's is short."""
    monkeypatch.setattr(forward, "LEAST", 0)
    monkeypatch.setattr(operations, "SHORT", 16)


def batch_of(family):
    told = {"use_cache": False} if family == "llama" else {}
    return tiny_batch(family, rows=ROWS, length=LENGTH) | told


def kept(model, batch):
    """Bytes that a step keeps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    given = [t for t in batch.values() if isinstance(t, torch.Tensor)]

    def loss():
        return model(**batch).loss

    gc.collect()  # what others have left would count as given back
    return measure_step(model, torch.optim.SGD(trained), loss, given)[1]


def ours(family, *methods, precision="fp32", layers=2, **options):
    """What a step keeps within `lean`."""
    model = tiny_model(family, precision, layers=layers).train()
    torch.manual_seed(0)
    for i, method in enumerate(methods):
        shake(petune.attach(model, method, name=f"{i}", **options).parameters())
    batch = batch_of(family)
    with lean(model, labelled_logits=False, packing=False):
        return kept(model, batch)


@cache
def bitfit(family, precision):
    return ours(family, "bitfit", precision=precision)


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("bert", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("method", IN_PEFT)
def test_no_more_than_peft(family, method):
    options = OPTIONS.get(method, {})
    if (family, method) == ("bert", "prefix-tuning"):
        pytest.skip("PEFT has no prefixes for encoders")
    base = tiny_model(family).train()
    config = configure(copy.deepcopy(base), method, None, options)
    config.task_type = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[family]
    config.modules_to_save = None
    theirs = get_peft_model(base, config)
    batch = batch_of(family)
    kept(theirs, batch)
    assert ours(family, method, **options) <= kept(theirs, batch)


WIDTH, INNER, HEADS, KEYS, VOCABULARY = 64, 128, 4, 32, 128
"""The sizes of the tiny Llama; keys and values have half the width."""
TOKENS = ROWS * LENGTH
STREAM = TOKENS * WIDTH * 4
"""The bytes of one tensor as wide as the model, in fp32."""


@pytest.mark.parametrize("layers", [1, 2])
def test_bitfit_by_hand(layers):
    """What the base's own operations need, and nothing of the shifts."""
    gate_and_up = 2 * INNER
    streams = 2 * WIDTH  # before each of the two norms, behind the block's two sums
    attention = WIDTH + KEYS + KEYS + WIDTH  # q, k, v, and the result
    normalizers, mask = HEADS, LENGTH
    block = gate_and_up + streams + attention + normalizers + mask
    logits = VOCABULARY * 4 + 8  # with the labels
    rest = 64 * 8 + 4 + 4  # positions, the loss, and the number of labels
    want = TOKENS * (layers * block * 4 + logits) + rest
    assert ours("llama", "bitfit", layers=layers) == want


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ia3_needs_no_more_than_bitfit(family, precision):
    """The layers' results, which its scales need, are kept in place of the scaled ones."""
    assert ours(family, "ia3", precision=precision) == bitfit(family, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    ("method", "inputs"),
    [("houlsby", 4), ("compacter", 4), ("pfeiffer", 2), ("parallel-adapter", 0)],
)
def test_a_bottleneck_keeps_its_input_alone(family, precision, method, inputs):
    """Behind a sublayer that is its result; beside an MLP, what the MLP computes from something kept anyway."""
    size = STREAM if precision == "fp32" else STREAM // 2
    both = ours(family, "bitfit", method, precision=precision)
    more = both - bitfit(family, precision)
    # compacter makes its matrices of factors, which are cast
    factors = 4 * 8 * 1024 if method == "compacter" else 0
    assert inputs * size <= more <= inputs * size + factors


def test_dora_keeps_no_second_output():
    """The outputs of its layers before they are scaled are all it keeps: scaled ones and sums are computed from them.

    One tensor more than LoRA, the stream before the first block, is where the sums begin; and a norm of each row of W.
    """
    rows = 2 * (WIDTH + KEYS + KEYS + WIDTH + 2 * INNER + WIDTH)
    assert ours("llama", "dora") - ours("llama", "lora") == STREAM + rows * 4


@pytest.mark.parametrize(
    "method", sorted(name for name in petune.methods() if ":" not in name)
)
def test_gradients_are_the_same_to_the_last_bit(method):
    batch, found = batch_of("llama"), []
    for within in (nullcontext, lambda model: lean(model, labelled_logits=False)):
        model = tiny_model("llama", "bf16", layers=2).train()
        torch.manual_seed(0)
        options = OPTIONS.get(method, {})
        shake(petune.attach(model, method, **options).parameters())
        with within(model):
            model(**batch).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in found[0].items():
        other = found[1][name]
        assert (grad is None) == (other is None)
        assert grad is None or torch.equal(grad, other), name
