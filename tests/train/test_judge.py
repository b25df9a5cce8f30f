import math

import pytest
import torch

from lrpretrain.train.judge import Judge

CPU = torch.device("cpu")


def judged(judge, losses):
    return [bool(judge(torch.tensor(loss))) for loss in losses]


def test_a_spike_is_told_from_the_last_losses_and_not_counted_among_them():
    judge = Judge(4, 3.0, CPU)
    assert judged(judge, [9.0, 1.0, 50.0]) == [True] * 3  # not enough losses yet
    assert judged(judge, [2.0, 2.1, 2.0, 2.1]) == [True] * 4  # mean 2.05, deviation 0.058: as 0.0615
    assert judged(judge, [2.3, 2.24, 90.0]) == [False, False, False]  # above 2.05 + 3 · 0.0615 = 2.2345
    assert judge.losses() == pytest.approx([2.0, 2.1, 2.0, 2.1])
    assert judged(judge, [2.23, 0.1]) == [True, True]


def test_a_wide_spread_allows_more():
    judge = Judge(3, 2.0, CPU, [1.0, 3.0, 5.0])  # mean 3, deviation 2
    assert judged(judge, [7.1, 6.9]) == [False, True]


@pytest.mark.parametrize("sigmas", [0.0, 3.0])
def test_what_is_not_finite_is_never_fine(sigmas):
    judge = Judge(2, sigmas, CPU, [1.0, 1.0])
    assert judged(judge, [math.nan, math.inf, -math.inf, 1.0]) == [False, False, False, True]
    assert judged(judge, [1e9]) == [sigmas == 0]


def test_goes_on_from_its_losses():
    losses = [2.5, 2.0, 2.2, 2.1, 9.0, 2.0, 2.3, 2.2, 5.0, 2.6]
    whole = Judge(4, 3.0, CPU)
    expected = judged(whole, losses)
    assert not all(expected)
    for at in range(len(losses)):
        first = Judge(4, 3.0, CPU)
        head = judged(first, losses[:at])
        assert head + judged(Judge(4, 3.0, CPU, first.losses()), losses[at:]) == expected
