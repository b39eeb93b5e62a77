"""The public operations. Importing this registers them with torch; it imports no Triton."""

from __future__ import annotations

from survfuse.attention import Attended
from survfuse.ops.backends import Selection, backend_obstacle, select_backend
from survfuse.ops.bag_attends_tokens import bag_attends_tokens, bag_attends_tokens_with_lse
from survfuse.ops.cross_attention import cross_attention, cross_attention_with_lse
from survfuse.ops.pool_bag import pool_bag
from survfuse.ops.pool_weights import pool_weights
from survfuse.ops.selection import selected_backend
from survfuse.ops.spread_tokens import spread_tokens
from survfuse.ops.tokens_attend_bag import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.pooling import PooledBag

__all__ = [
    "Attended",
    "PooledBag",
    "Selection",
    "backend_obstacle",
    "bag_attends_tokens",
    "bag_attends_tokens_with_lse",
    "cross_attention",
    "cross_attention_with_lse",
    "pool_bag",
    "pool_weights",
    "select_backend",
    "selected_backend",
    "spread_tokens",
    "tokens_attend_bag",
    "tokens_attend_bag_weights",
    "tokens_attend_bag_with_lse",
]
