"""Every built-in method holds the conformance kit."""

import pytest

import petune
from petune.testing import check_method

FIRST = ["lora", "ia3", "bitfit", "houlsby", "prompt-tuning", "prefix-tuning", "last-layers", "full"]
MORE = ["dora", "vera", "loha", "lokr", "oft", "boft", "ln-tuning", "pfeiffer", "parallel-adapter", "compacter"]
MORE += ["p-tuning", "llama-adapter", "loreft", "trainable-tokens", "ladder-side-tuning", "adalora"]
MORE += ["gated-lora", "gated-pfeiffer", "gated-prefix-tuning"]
ARGUMENTS = {"trainable-tokens": {"ids": [81, 10, 20, 59, 102, 93, 41]}}
FAMILIES = ["llama", "gpt2", "bert", "t5"]
slow = pytest.mark.slow


def late(values):
    """The same, to be run with the slow tests."""
    return [pytest.param(value, marks=slow) for value in values]


def check(method, family, precision="fp32"):
    check_method(method, families=[family], precisions=[precision], **ARGUMENTS.get(method, {}))


def test_no_method_is_left_out():
    assert {*FIRST, *MORE} <= set(petune.methods())


@pytest.mark.parametrize("family", ["llama", "bert", *late(["gpt2", "t5"])])
@pytest.mark.parametrize("method", FIRST)
def test_float32(method, family):
    check(method, family)


@pytest.mark.parametrize("family", ["gpt2", *late(["llama", "bert", "t5"])])
@pytest.mark.parametrize("method", FIRST)
def test_4_bit(method, family):
    check(method, family, "nf4")


@slow
@pytest.mark.parametrize("family", ["qwen", "roberta"])
@pytest.mark.parametrize("method", FIRST)
def test_more_families(method, family):
    check(method, family)


@slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", MORE)
def test_more_methods(method, family):
    check(method, family)


@slow
@pytest.mark.parametrize("method", MORE)
def test_more_methods_at_4_bit(method):
    check(method, "llama", "nf4")


@slow
@pytest.mark.parametrize(("family", "precision"), [("bert", "int8"), ("llama", "bf16")])
@pytest.mark.parametrize("method", FIRST)
def test_more_precisions(method, family, precision):
    check(method, family, precision)
