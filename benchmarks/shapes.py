"""What the tables of shapes share: marks, the ragged batches, and what is too long for a CPU."""

from __future__ import annotations

import pytest

# rows of all bags; beyond, one race takes minutes on two cores
MOST_CPU_ROWS = 250_000
# 32 bags of 2 to 60 thousand rows, many short and few long as in a cohort: 620,300 rows in all
RAGGED = (
    *(2_000, 51_300, 8_700, 23_900, 3_400, 14_600, 60_000, 5_900, 31_700, 2_800, 11_200),
    *(42_500, 7_100, 18_300, 4_200, 26_800, 9_600, 55_400, 2_300, 37_900, 12_900, 6_500),
    *(20_700, 3_900, 46_100, 10_400, 28_600, 5_100, 34_200, 15_800, 8_000, 8_500),
)
# a batch that a CPU gets through
BATCH_16 = (2_000, 9_000, 31_000, 15_000) * 4
SMOKE_BATCH = (70, 1, 33)
LENGTHS = {
    "10k": (10_000,),
    "100k": (100_000,),
    "1M": (1_000_000,),
    "32 bags": RAGGED,
    "16 bags": BATCH_16,
    "smoke": (97,),
    "smoke batch": SMOKE_BATCH,
}


def skip_if_too_long(rows: int, device: str) -> None:
    """Skip a benchmark of bags that only a GPU gets through."""
    if device == "cpu" and rows > MOST_CPU_ROWS:
        pytest.skip(f"{rows} rows are for GPUs; a CPU is given {MOST_CPU_ROWS} at most")


def table(*rows: tuple) -> list:
    """Parameters of a benchmark: (shape, marks ...), the shape's own text as name."""
    return [
        pytest.param(shape, marks=[getattr(pytest.mark, name) for name in names], id=str(shape))
        for shape, *names in rows
    ]
