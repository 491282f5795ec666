"""Whether a tuning merges into the base's weights, or says why it can't."""

from __future__ import annotations

import warnings

import torch

from petune.core.attached.quantized import dequantize
from petune.core.attached.tuning import Tuning, tunings
from petune.core.frozen.weights import is_quantized
from petune.testing.case import Case, logits


def merges_or_says_why(case: Case) -> None:
    """Into dense weights, as exactly as rounding allows, and back into quantized ones at a stated cost."""
    if not case.mergeable:
        _refuses(case)
        return
    _merges_into_dense(case)
    if case.quantized:
        _merges_into_quantized(case)


def _refuses(case: Case) -> None:
    model, tuning = case.tuned()
    before = logits(model, case.batch)
    why = _refusal(tuning)
    assert why is not None, (
        "merge() of a method that is not mergeable must raise TypeError"
    )
    assert tuning.method in str(why), "the error does not name the method"
    after = logits(model, case.batch)
    assert torch.equal(after, before), "a refused merge changed the model"


def _refusal(tuning: Tuning) -> TypeError | None:
    """What a merge into dense weights raises. Its warnings are of biases that a saved model has no place for."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tuning.merge()
    except TypeError as why:
        return why
    return None


def _merges_into_dense(case: Case) -> None:
    model, tuning = case.tuned()
    why = _refusal(tuning)
    assert why is None, f"not merged: {why}"
    assert not tunings(model), "the tuning is still there"
    left = [key for key in model.state_dict() if "petune" in key]
    assert not left, "adapters are left in the model"
    unmerged, _ = case.tuned()
    for each in (model, unmerged):  # some quantized layers round their input too
        dequantize(each)
    merged, tuned = logits(model, case.batch), logits(unmerged, case.batch)
    case.close(merged, tuned, "merged is not what was tuned", factor=10)


def _merges_into_quantized(case: Case) -> None:
    model, tuning = case.tuned()
    count = sum(map(is_quantized, model.modules()))
    with warnings.catch_warnings(action="ignore"):
        merged = tuning.merge(quantize=True)
    assert sum(map(is_quantized, model.modules())) == count, "layers are left dense"
    worst = max(merged.errors.values(), default=0)
    assert worst < 0.3, f"quantized again: {merged}"
