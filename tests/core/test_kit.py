"""The kit sees planted faults: each of these methods breaks one promise, and each behaviour has one that it sees."""

import itertools

import pytest
import torch
from torch import nn

import petune
from petune.testing import BEHAVIOURS, Row, reasons, run_checks


class Shift(petune.Adapter):
    """y = W x + delta, right in all respects."""

    where, mergeable = "q v", True

    def __init__(self, site):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(site.out_features))
        self.base = [site.module]  # in a list, so that it is no part of the adapter

    def forward(self, inner, x):
        return inner(x) + self.delta


class NotTheBase(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta + 1


class Unused(Shift):
    def __init__(self, site):
        super().__init__(site)
        self.more = nn.Parameter(torch.zeros(3))


class Detached(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta.detach() + 0 * self.delta


class WritesTheBase(Shift):
    """What it learns stays when it is switched off."""

    def forward(self, inner, x):
        with torch.no_grad():
            self.base[0].weight[0] += self.delta[0]
        return super().forward(inner, x)


class Forgetful(Shift):
    """Keeps what it learned where no state dict finds it."""

    def __init__(self, site):
        super().__init__(site)
        self.noise = torch.randn(site.out_features)

    def forward(self, inner, x):
        return inner(x) + self.delta * self.noise


class NotAffine(Shift):
    def forward(self, inner, x):
        return inner(x) + self.delta * x.abs().mean(-1, keepdim=True)


class Marks(Shift):
    def __init__(self, site):
        super().__init__(site)
        site.module.was_here = True


class ReadsTheLength(Shift):
    """What a token gets depends on how many come with it: with a cache that is one."""

    def forward(self, inner, x):
        return inner(x) + self.delta * x.shape[1]


class ReadsTheLengthALittle(Shift):
    """Too little to change the most probable token."""

    def forward(self, inner, x):
        return inner(x) + self.delta * (1 + 0.001 * x.shape[1])


class CountsRows(Shift):
    """`generate` runs the same rows with and without a cache; who decodes by hand has another number of them."""

    def forward(self, inner, x):
        return inner(x) + self.delta * x.shape[0]


class Counts(Shift):
    """Computes something else when it is run again."""

    def __init__(self, site):
        super().__init__(site)
        self.calls = itertools.count(1)

    def forward(self, inner, x):
        return inner(x) + self.delta * next(self.calls)


class NoGraph(Shift):
    def forward(self, inner, x):
        return inner(x) + (self.delta if self.delta.sum() > -1e9 else 0)


class MixesRows(Shift):
    mergeable = False

    def forward(self, inner, x):
        y = inner(x)
        return y + self.delta * y.mean(0, keepdim=True)


class OnlyTheLast(Shift):
    """One that is attached later switches it off for good."""

    last = {}

    def __init__(self, site):
        super().__init__(site)
        self.last[site.name] = self.number = self.last.get(site.name, 0) + 1
        self.name = site.name

    def forward(self, inner, x):
        return (
            super().forward(inner, x)
            if self.number == self.last[self.name]
            else inner(x)
        )


class Shared(Shift):
    """Copies of it are the same object."""

    def __deepcopy__(self, memo):
        return self


class Drifts(Shift):
    """Moves the base while it trains."""

    def forward(self, inner, x):
        if torch.is_grad_enabled():
            self.base[0].weight.data.mul_(1.001)
        return super().forward(inner, x)


def failing(method):
    return {
        row.behaviour for row in run_checks(method, families=["llama"]) if row.error
    }


def test_a_right_method_passes_everything():
    assert failing(Shift) == set()


FAULTS = [
    ("starts at the base", NotTheBase),
    ("trains, and nothing else does", Unused),
    ("trains, and nothing else does", Detached),
    ("off equals base", WritesTheBase),
    ("save and load", Forgetful),
    ("merge, or a reason", NotAffine),
    ("detach restores", Marks),
    ("cached generation", ReadsTheLength),
    ("cached generation", ReadsTheLengthALittle),
    ("cached generation", CountsRows),
    ("gradient checkpointing", Counts),
    ("torch.compile", NoGraph),
    ("routing", MixesRows),
    ("stacking", OnlyTheLast),
    ("deepcopy", Shared),
    ("Trainer", Drifts),
]


def test_every_behaviour_has_a_fault():
    assert list(dict.fromkeys(behaviour for behaviour, _ in FAULTS)) == list(BEHAVIOURS)


@pytest.mark.parametrize(
    ("behaviour", "method"), FAULTS, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_fault_is_seen(behaviour, method, monkeypatch):
    monkeypatch.setattr("petune.testing.BEHAVIOURS", {behaviour: BEHAVIOURS[behaviour]})
    (row,) = run_checks(method, families=["llama"])
    assert row.error
    assert not row.error.startswith(("TypeError", "AttributeError", "NameError"))


class Refuses(Shift):
    """y = W x + delta. Models whose queries are odd numbers are refused."""

    def __init__(self, site):
        raise petune.UnsupportedError("refuses: the queries are odd numbers")


class RefusesInSilence(Refuses):
    """y = W x + delta."""


def test_a_refusal_must_be_stated():
    rows = list(run_checks(Refuses, families=["bert"]))
    assert all(row.refused and not row.error for row in rows)
    assert list(reasons(rows)) == [
        "bert: everything: refuses: the queries are odd numbers"
    ]
    assert all(
        "docstring" in row.error
        for row in run_checks(RefusesInSilence, families=["bert"])
    )


def test_reasons_are_said_once():
    rows = [
        Row("a", f, p, refused=why)
        for f, why in (("x", "r"), ("y", "r"), ("z", "s"))
        for p in ("fp32", "nf4")
    ]
    rows.append(Row("b", "x", "fp32"))
    assert {what: len(found) for what, found in reasons(rows).items()} == {"x: a: r": 2, "y: everything: r": 2,
                                                                           "z: everything: s": 2}  # fmt: skip
