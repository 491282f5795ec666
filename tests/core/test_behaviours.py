"""Every built-in method holds the conformance kit."""

import pytest

from petune.testing import check_method

METHODS = ["lora", "ia3", "bitfit", "houlsby", "prompt-tuning", "prefix-tuning", "last-layers", "full"]
slow = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_float32(method, family):
    check_method(method, families=[family])


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=slow) for f in ("gpt2", "bert", "t5", "qwen", "roberta"))]
)
@pytest.mark.parametrize("method", METHODS)
def test_4_bit(method, family):
    check_method(method, families=[family], precisions=["nf4"])


@slow
@pytest.mark.parametrize("family", ["qwen", "roberta"])
@pytest.mark.parametrize("method", METHODS)
def test_more_families(method, family):
    check_method(method, families=[family])
