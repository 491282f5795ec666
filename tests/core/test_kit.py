"""The kit sees planted faults: each of these methods breaks one promise."""

import pytest
import torch
from torch import nn

import petune
from petune.testing import BEHAVIOURS, run_checks


class Shift(petune.Adapter):
    """y = W x + delta, right in all respects."""

    where, mergeable = "q v", True

    def __init__(self, site):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, inner, x):
        return inner(x) + self.delta


class NotTheBase(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta + 1


class NotAffine(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta * x.abs().mean(-1, keepdim=True)


class Unused(Shift):
    def __init__(self, site):
        super().__init__(site)
        self.more = nn.Parameter(torch.zeros(3))


class Forgetful(Shift):
    """Keeps what it learned where no state dict finds it."""

    def __init__(self, site):
        super().__init__(site)
        self.noise = torch.randn(site.out_features)

    def forward(self, inner, x):
        return inner(x) + self.delta * self.noise


class MixesRows(Shift):
    mergeable = False

    def forward(self, inner, x):
        y = inner(x)
        return y + self.delta * y.mean(0, keepdim=True)


class Detached(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta.detach() + 0 * self.delta


class NoGraph(Shift):
    def forward(self, inner, x):
        return inner(x) + (self.delta if self.delta.sum() > -1e9 else 0)


def failing(method):
    return {row.behaviour for row in run_checks(method, families=["llama"]) if row.error}


def test_a_right_method_passes_everything():
    assert failing(Shift) == set()


@pytest.mark.parametrize(
    ("method", "behaviour"),
    [
        (NotTheBase, "starts at the base"),
        (NotAffine, "merge, or a reason"),
        (Unused, "trains, and nothing else does"),
        (Detached, "trains, and nothing else does"),
        (Forgetful, "save and load"),
        (MixesRows, "routing"),
        (NoGraph, "torch.compile"),
    ],
)
def test_a_fault_is_seen(method, behaviour):
    assert behaviour in BEHAVIOURS
    assert behaviour in failing(method)
