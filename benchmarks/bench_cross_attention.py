"""`cross_attention`, keys and values given: few queries, few keys, and both sides long.

Around one base shape one size is changed at a time: tokens, rows, heads and their size.
"""

from __future__ import annotations

import pytest

from .inputs import CrossAttention
from .problem import FROZEN_MODES, compete, problem_of
from .shapes import CrossShape, cases


def _shapes() -> list:
    """Few queries, few keys, both long."""
    rows = [
        (CrossShape(6, "100k", 1, 256), "core"),
        CrossShape(6, "16 bags", 1, 256),
        (CrossShape(6, "1M", 1, 256), "core"),
        (CrossShape(6, "32 bags", 1, 256), "core both"),
        (CrossShape("100k", 6, 1, 256), "core"),
        (CrossShape("1M", 6, 1, 256), "core both"),
        CrossShape("32 bags", 6, 1, 256),
        (CrossShape("10k", "10k", 1, 64), "core both"),
        CrossShape("10k", "10k", 8, 64),
        CrossShape("100k", "100k", 1, 128),
        CrossShape("32 bags", "32 bags", 1, 64),
        (CrossShape(5, "smoke", 2, 8), "smoke"),
        (CrossShape(5, "smoke batch", 1, 16), "smoke"),
        (CrossShape("smoke batch", 5, 2, 8), "smoke"),
        (CrossShape("smoke batch", "smoke batch", 1, 8), "smoke"),
    ]
    for tokens in (64, 200, 512):
        for bags in ("100k", "32 bags"):
            rows += [CrossShape(tokens, bags, 1, 256), CrossShape(bags, tokens, 1, 256)]
    for heads, head_dim in ((1, 64), (1, 128), (4, 64), (4, 128), (4, 256), (8, 64), (8, 128)):
        rows += [CrossShape(6, "100k", heads, head_dim), CrossShape("100k", 6, heads, head_dim)]
    rows += [CrossShape(6, "10k", 1, 256), CrossShape("10k", 6, 1, 256)]
    return [row if isinstance(row[0], CrossShape) else (row,) for row in rows]


SHAPES = _shapes()


@pytest.mark.parametrize(("shape", "dtype", "mode"), cases(SHAPES, FROZEN_MODES))
def bench_cross_attention(measure, device: str, shape: CrossShape, dtype: str, mode: str) -> None:
    compete(measure, problem_of(CrossAttention, shape, dtype, device), mode)
