"""Against figures that can be worked out by hand; everything is float32, 4 bytes."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from petune.training.memory import measure_step

BATCH, WIDE, NARROW = 64, 1000, 500
WEIGHTS = 4 * (WIDE * NARROW + NARROW * WIDE)
X, H = 4 * BATCH * WIDE, 4 * BATCH * NARROW
LOSS = 4


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDE, NARROW, bias=False),
        nn.ReLU(),
        nn.Linear(NARROW, WIDE, bias=False),
    )


def test_plain_gradient_descent() -> None:
    net, x = model(), torch.randn(BATCH, WIDE)
    peak, saved = measure_step(
        net, torch.optim.SGD(net.parameters(), lr=0.1), lambda: net(x).sum(), [x]
    )
    assert saved == H + LOSS  # the ReLU's result; the input was there before
    assert (
        peak == 2 * WEIGHTS + X + H + 8
    )  # weights, gradients, what backward still needs, the loss and its gradient


def test_adam_keeps_two_moments_and_its_temporaries_are_seen() -> None:
    net, x = model(), torch.randn(BATCH, WIDE)
    peak, saved = measure_step(
        net, torch.optim.AdamW(net.parameters(), lr=0.1), lambda: net(x).sum(), [x]
    )
    assert saved == H + LOSS
    assert 4 * WEIGHTS < peak < 6 * WEIGHTS  # up to four of one layer's size on top


def test_frozen_weights_need_no_gradient_and_save_no_input() -> None:
    net, x = model(), torch.randn(BATCH, WIDE)
    net[0].requires_grad_(False)
    peak, saved = measure_step(
        net, torch.optim.SGD(net[2].parameters(), lr=0.1), lambda: net(x).sum(), [x]
    )
    assert saved == H + LOSS  # the second layer's input
    assert (
        peak < 1.5 * WEIGHTS + 2 * X + H + 100
    )  # the sum's gradient is written out for the matrix product


def test_a_storage_saved_twice_counts_once() -> None:
    weight = nn.Linear(WIDE, WIDE, bias=False)
    x = torch.randn(BATCH, WIDE)

    def loss() -> torch.Tensor:
        h = weight(x)
        return (h * h.view(-1).view_as(h)).sum()

    _, saved = measure_step(
        weight, torch.optim.SGD(weight.parameters(), lr=0.1), loss, [x]
    )
    assert saved == X + LOSS  # h, once


def test_checkpointing_saves_only_the_inputs_of_its_part() -> None:
    net, x = model(), torch.randn(BATCH, WIDE)

    def loss() -> torch.Tensor:
        return torch.as_tensor(checkpoint(net, x, use_reentrant=False)).sum()

    _, saved = measure_step(net, torch.optim.SGD(net.parameters(), lr=0.1), loss, [x])
    assert saved < X / 10  # the state of the random generator


def test_what_a_quantized_weight_carries_along_is_counted() -> None:
    class State:
        def __init__(self) -> None:
            self.scales = torch.zeros(1000)

    net, x = model(), torch.randn(BATCH, WIDE)
    plain, _ = measure_step(
        net, torch.optim.SGD(net.parameters(), lr=0.1), lambda: net(x).sum(), [x]
    )
    net[0].weight.quant_state = State()
    carrying, _ = measure_step(
        net, torch.optim.SGD(net.parameters(), lr=0.1), lambda: net(x).sum(), [x]
    )
    assert carrying - plain == 4 * 1000


def test_parameters_learning_rate_and_gradients_are_as_before() -> None:
    net, x = model(), torch.randn(BATCH, WIDE)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    first = measure_step(net, optimizer, lambda: net(x).sum(), [x])
    assert measure_step(net, optimizer, lambda: net(x).sum(), [x]) == first
    assert all(
        torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)
    )
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in net.parameters())
