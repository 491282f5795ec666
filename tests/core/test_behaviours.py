"""Every method holds the conformance kit. By default each at one family and precision, which differ from method to
method; slow, each at every precision and on every family; all pairs of them: `python -m petune_bench.matrix`.
"""

import pytest
import torch

import petune
from petune.testing import check_method
from petune_bench.matrix import ARGUMENTS, FAMILIES, PRECISIONS

METHODS = sorted(name for name in petune.methods() if ":" not in name)
FIRST = ["lora", "prefix-tuning", "prompt-tuning", "houlsby"]
families, precisions = FAMILIES.split(), PRECISIONS.split()
slow = pytest.mark.slow


def check(method, family, precision="fp32", **options):
    if precision == "int8wo":
        pytest.importorskip("torchao")
    check_method(
        method,
        families=[family],
        precisions=[precision],
        **options,
        **ARGUMENTS.get(method, {}),
    )


@pytest.mark.parametrize(
    ("method", "family", "precision"),
    [(m, families[i % 4], precisions[(i + i // 4) % 6]) for i, m in enumerate(METHODS)],
)
def test_each_method_somewhere(method, family, precision):
    check(method, family, precision)


@pytest.mark.parametrize("method", FIRST)
def test_float32(method):
    check(method, "llama")


@slow
@pytest.mark.parametrize("precision", precisions)
@pytest.mark.parametrize("method", METHODS)
def test_every_precision(method, precision):
    check(method, "llama", precision)


@slow
@pytest.mark.parametrize(
    ("method", "family", "precision"),
    [
        (m, f, precisions[(i + j) % 6])
        for i, m in enumerate(METHODS)
        for j, f in enumerate(["gpt2", "bert", "t5"])
    ],
)
def test_every_family(method, family, precision):
    check(method, family, precision)


@slow
@pytest.mark.parametrize("method", FIRST)
def test_half_precision_on_a_cpu(method):
    check(method, "bert", "fp16")


@slow
@pytest.mark.parametrize("family", ["qwen", "roberta"])
@pytest.mark.parametrize("method", FIRST)
def test_more_families(method, family):
    check(method, family)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, family):
    check(method, family, "fp16", device="cuda")
