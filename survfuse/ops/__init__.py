"""The public operations. Importing this registers them with torch; it imports no Triton."""

from __future__ import annotations

from survfuse.ops.backends import Selection, backend_obstacle, select_backend
from survfuse.ops.gated_attention_pool import gated_attention_pool
from survfuse.ops.gated_attention_weights import gated_attention_weights
from survfuse.ops.pool_bag import pool_bag
from survfuse.ops.pool_weights import pool_weights
from survfuse.ops.selection import selected_backend
from survfuse.ops.tokens_attend_bag import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.pooling import GatedBag, PooledBag

__all__ = [
    "GatedBag",
    "PooledBag",
    "Selection",
    "backend_obstacle",
    "gated_attention_pool",
    "gated_attention_weights",
    "pool_bag",
    "pool_weights",
    "select_backend",
    "selected_backend",
    "tokens_attend_bag",
    "tokens_attend_bag_weights",
    "tokens_attend_bag_with_lse",
]
