"""`bag_attends_tokens`: every patch of a long bag attends to a few tokens."""

from __future__ import annotations

import pytest

from .inputs import BagAttendsTokens
from .problem import MODES, compete, problem_of
from .shapes import TokensShape, cases

SHAPES = [
    (TokensShape(6, 1, 256, "100k", 1024), "core"),
    # SurvPath's pathways
    (TokensShape(331, 1, 256, "100k", 1024), "core both"),
    (TokensShape(6, 1, 256, "1M", 1024), "core both"),
    (TokensShape(6, 1, 256, "32 bags", 1024), "core both"),
    (TokensShape(6, 1, 256, "10k", 1024),),
    (TokensShape(6, 1, 256, "16 bags", 768),),
    (TokensShape(64, 1, 256, "100k", 1024),),
    (TokensShape(200, 1, 256, "100k", 1024),),
    (TokensShape(512, 1, 256, "100k", 1024),),
    (TokensShape(331, 1, 256, "32 bags", 1024),),
    (TokensShape(6, 4, 64, "100k", 1024),),
    (TokensShape(6, 8, 64, "100k", 1024),),
    (TokensShape(64, 8, 128, "100k", 1024),),
    (TokensShape(6, 1, 256, "100k", 384),),
    (TokensShape(6, 1, 256, "100k", 768),),
    (TokensShape(6, 1, 256, "100k", 1536),),
    (TokensShape(6, 1, 256, "100k", 2560),),
    (TokensShape(5, 2, 8, "smoke", 24), "smoke"),
    (TokensShape(3, 1, 16, "smoke batch", 40), "smoke"),
]


@pytest.mark.parametrize(("shape", "dtype", "mode"), cases(SHAPES, MODES))
def bench_bag_attends_tokens(
    measure, device: str, shape: TokensShape, dtype: str, mode: str
) -> None:
    compete(measure, problem_of(BagAttendsTokens, shape, dtype, device), mode)
