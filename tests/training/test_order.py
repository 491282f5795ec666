import random

import pytest

from petune.training.order import EpochSampler

LENGTHS = random.Random(0).choices(range(1, 200), k=1003)


def order(epoch: int = 0, seed: int = 0, grouped: bool = True) -> list[int]:
    sampler = EpochSampler(LENGTHS, 8, seed, grouped)
    sampler.epoch = epoch
    return list(sampler)


@pytest.mark.parametrize("grouped", [True, False])
def test_every_row_once_in_an_order_of_seed_and_epoch(grouped: bool) -> None:
    assert sorted(order(grouped=grouped)) == list(range(1003))
    assert order(1, 2, grouped) == order(1, 2, grouped)
    assert order(1, 2, grouped) != order(2, 2, grouped)
    assert order(1, 2, grouped) != order(1, 3, grouped)


def padded(rows: list[int]) -> int:
    batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)


def test_like_lengths_share_a_batch_and_batches_come_in_any_order() -> None:
    assert padded(order(grouped=True)) < 1.06 * sum(LENGTHS)
    assert padded(order(grouped=False)) > 1.5 * sum(LENGTHS)
    firsts = [LENGTHS[i] for i in order()[::8]][:40]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_fewer_rows_than_a_batch() -> None:
    assert sorted(EpochSampler([3, 1], 8, 0, True)) == [0, 1]
