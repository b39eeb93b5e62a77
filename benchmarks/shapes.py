"""Shapes of the four problems: names, labels, the work they are, and what a CPU is spared."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from . import work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# rows of all bags; beyond, one race takes minutes on two cores
MOST_CPU_ROWS = 250_000
# pairs of query and key, over all heads
MOST_CPU_PAIRS = 1_000_000_000
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


def skip_if_too_long(rows: int, device: str, pairs: int = 0) -> None:
    """Skip a benchmark of bags that only a GPU gets through."""
    if device == "cpu" and rows > MOST_CPU_ROWS:
        pytest.skip(f"{rows} rows are for GPUs; a CPU is given {MOST_CPU_ROWS} at most")
    if device == "cpu" and pairs > MOST_CPU_PAIRS:
        pytest.skip(f"{pairs:.0e} pairs are for GPUs; a CPU is given {MOST_CPU_PAIRS:.0e} at most")


def cases(rows: list[tuple], modes: tuple[str, ...]) -> list:
    """Parameters (shape, dtype, mode) of a benchmark, all modes of a shape and type together.

    Args:
        rows: (shape, mark ...): "smoke" for shapes of that set alone, "core" for all modes of a
            shape in the core set but the trained backward by itself, "core both" for forward and
            backward together over a frozen bag alone.
        modes: those of the benchmark.
    """
    return [
        pytest.param(shape, dtype, mode, marks=_marks(names, mode), id=f"{shape}-{dtype}-{mode}")
        for shape, *names in rows
        for dtype in DTYPES
        for mode in modes
    ]


def _marks(names: list[str], mode: str) -> list[pytest.MarkDecorator]:
    if "smoke" in names:
        return [pytest.mark.smoke]
    core = mode != work.TRAINED if "core" in names else "core both" in names and mode == "both"
    return [pytest.mark.core] if core else []


def _rows_of(lengths: tuple[int, ...]) -> str:
    """How many rows, for a label."""
    return f"B={len(lengths)} T={sum(lengths)}" if len(lengths) > 1 else f"N={lengths[0]}"


class PoolShape(NamedTuple):
    """R query rows over bags that are their own keys and values."""

    rows: int
    bags: str  # a name in LENGTHS
    dim: int
    normalize: bool = False

    def __str__(self) -> str:
        return f"{self.rows} - {self.bags} x {self.dim}{' normalised' * self.normalize}"

    @property
    def lengths(self) -> tuple[int, ...]:
        return LENGTHS[self.bags]

    @property
    def op(self) -> str:
        return "pool_bag" + ", normalised" * self.normalize

    @property
    def label(self) -> str:
        return f"R={self.rows} B={len(self.lengths)} T={sum(self.lengths)} D={self.dim}"

    def minimum(self, e: int) -> work.Passes:
        return work.pooling(sum(self.lengths), self.rows, len(self.lengths), self.dim, e)


class CrossShape(NamedTuple):
    """Queries and keys, each a number of tokens of every bag or the name of bags."""

    queries: int | str
    keys: int | str
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} to {self.keys} - {self.heads}x{self.head_dim}"

    @property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the queries and of the keys of each bag."""
        named = self.keys if isinstance(self.keys, str) else self.queries
        n_bags = len(LENGTHS[named])
        return tuple(
            LENGTHS[side] if isinstance(side, str) else (side,) * n_bags
            for side in (self.queries, self.keys)
        )

    @property
    def op(self) -> str:
        if isinstance(self.queries, int):
            return "cross_attention, few queries"
        return f"cross_attention, {'few keys' if isinstance(self.keys, int) else 'both long'}"

    @property
    def label(self) -> str:
        few = "".join(
            f"{letter}={side} "
            for letter, side in (("q", self.queries), ("k", self.keys))
            if isinstance(side, int)
        )
        rows = _rows_of(self.lengths[1 if isinstance(self.keys, str) else 0])
        return f"{few}{rows} h={self.heads} d={self.head_dim}"

    @property
    def pairs(self) -> int:
        return sum(q * k for q, k in zip(*self.lengths, strict=True))

    def minimum(self, e: int) -> work.Passes:
        tq, tk = map(sum, self.lengths)
        return work.attention(self.pairs, tq, tk, self.heads, self.head_dim, self.head_dim, e)


class TokensShape(NamedTuple):
    """Few tokens and a bag, projections included."""

    tokens: int
    heads: int
    head_dim: int
    bags: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.heads}x{self.head_dim} - {self.bags} x {self.dim}"

    @property
    def lengths(self) -> tuple[int, ...]:
        return LENGTHS[self.bags]

    def label(self, letter: str) -> str:
        tokens = f"{letter}={self.tokens} h={self.heads} d={self.head_dim}"
        return f"{tokens} {_rows_of(self.lengths)} D={self.dim}"

    def attending(self, e: int) -> tuple[work.Passes, work.Passes]:
        """`tokens_attend_bag` absorbed, and with K and V formed."""
        tokens, heads, d, _, dim = self
        total, n_bags = sum(self.lengths), len(self.lengths)
        around = work.absorbing(tokens * heads, n_bags, dim, 2 * d)
        absorbed = work.added(work.pooling(total, tokens * heads, n_bags, dim, e), around)
        formed = work.linear(total, dim, heads * d, e)
        attended = work.attention(tokens * total, n_bags * tokens, total, heads, d, d, e)
        return absorbed, work.added(formed, formed, attended)

    def spreading(self, e: int) -> tuple[work.Passes, work.Passes]:
        """`bag_attends_tokens` absorbed, and with its queries formed."""
        tokens, heads, d, _, dim = self
        total, n_bags = sum(self.lengths), len(self.lengths)
        around = work.absorbing(tokens * heads, n_bags, dim, d)
        absorbed = work.added(work.spreading(total, tokens, heads, dim, d, e), around)
        formed = work.linear(total, dim, heads * d, e)
        attended = work.attention(tokens * total, total, n_bags * tokens, heads, d, d, e)
        return absorbed, work.added(formed, attended)
