"""What the precision budget lets pass, and what not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ops.tolerance import Compared, assert_draws_within_budget, nearby

EXACT = torch.ones(3, dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def draws(ours: list[float], plain: list[float]):
    """Errors on each input, in units of rounding."""

    def draw(k: int) -> Iterator[Compared]:
        asked.append(k)
        yield "result", EXACT + ours[k] * EPS, EXACT + plain[k] * EPS, EXACT

    asked: list[int] = []
    return draw, asked


def test_within_the_budget_of_one_input_no_other_is_looked_at() -> None:
    draw, asked = draws([9.9], [3.0])
    assert_draws_within_budget(draw, torch.float32)
    assert asked == [0]


def test_a_lucky_yardstick_is_no_verdict() -> None:
    draw, asked = draws([14.0] + [5.0] * 7, [3.0, 6.0] + [4.0] * 6)
    assert_draws_within_budget(draw, torch.float32)
    assert asked == list(range(8))


@pytest.mark.parametrize(
    ("ours", "plain", "word"),
    [
        # beyond what plain torch does on any of them
        ([30.0] + [5.0] * 7, [3.0, 6.0] + [4.0] * 6, "8 draws"),
        # three times as far from the truth on all
        ([15.0] * 8, [5.0] * 8, "8 draws"),
        # one bad input of plain torch does not excuse what is worse on the others
        ([14.0] * 8, [3.0] * 7 + [20.0], "on 7 of 8 inputs"),
    ],
)
def test_what_is_worse_fails(ours: list[float], plain: list[float], word: str) -> None:
    with pytest.raises(AssertionError, match=word):
        assert_draws_within_budget(draws(ours, plain)[0], torch.float32)


def test_nearby_inputs_differ_a_little_and_exclude_the_same() -> None:
    tensors = {"bias": torch.tensor([1.0, -torch.inf, torch.nan, 0.0], dtype=torch.float64)}
    assert nearby(tensors, 0) is tensors
    one, other = (nearby(tensors, k)["bias"] for k in (1, 2))
    assert 0 < abs(float(one[0]) - 1) < 0.01
    assert one[0] != other[0]
    assert one[1] == -torch.inf
    assert one[2].isnan()
    assert one[3] == 0
