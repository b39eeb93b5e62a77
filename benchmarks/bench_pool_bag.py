"""`pool_bag`: rows over bags that are their own keys and values, one long or a ragged batch."""

from __future__ import annotations

import pytest

from .inputs import PoolBag
from .problem import MODES, compete, problem_of
from .shapes import PoolShape, cases

SHAPES = [
    (PoolShape(6, "100k", 1024), "core"),
    (PoolShape(6, "100k", 1024, True), "core both"),
    (PoolShape(6, "16 bags", 768), "core both"),
    (PoolShape(6, "1M", 1024), "core both"),
    (PoolShape(6, "32 bags", 1024), "core both"),
    (PoolShape(200, "100k", 1024, True),),
    (PoolShape(6, "10k", 1024),),
    (PoolShape(16, "100k", 1024),),
    (PoolShape(64, "100k", 1024),),
    (PoolShape(200, "100k", 1029),),
    (PoolShape(512, "100k", 1024),),
    (PoolShape(64, "32 bags", 1024),),
    (PoolShape(200, "32 bags", 1024, True),),
    (PoolShape(6, "16 bags", 768, True),),
    (PoolShape(6, "100k", 384),),
    (PoolShape(6, "100k", 1536),),
    (PoolShape(6, "100k", 2560),),
    (PoolShape(5, "smoke", 24), "smoke"),
    (PoolShape(3, "smoke batch", 40, True), "smoke"),
]


@pytest.mark.parametrize(("shape", "dtype", "mode"), cases(SHAPES, MODES))
def bench_pool_bag(measure, device: str, shape: PoolShape, dtype: str, mode: str) -> None:
    compete(measure, problem_of(PoolBag, shape, dtype, device), mode)
