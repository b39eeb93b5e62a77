"""The public operations. Importing this registers them with torch; it imports no Triton."""

from __future__ import annotations

from survfuse.attention import Attended, BlockAttended, BlockSide
from survfuse.grid import GridIndex
from survfuse.ops.backends import Selection, backend_obstacle, select_backend
from survfuse.ops.bag_attends_tokens import bag_attends_tokens, bag_attends_tokens_with_lse
from survfuse.ops.block_attention import block_attention
from survfuse.ops.cross_attention import cross_attention, cross_attention_with_lse
from survfuse.ops.cross_attention_weights import cross_attention_weights
from survfuse.ops.gated_attention_pool import gated_attention_pool
from survfuse.ops.gated_attention_weights import gated_attention_weights
from survfuse.ops.grid_index import grid_index
from survfuse.ops.merge_attention import merge_attention, merge_over_group
from survfuse.ops.multi_scale_deformable_attention import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_from_offsets,
)
from survfuse.ops.pool_bag import pool_bag
from survfuse.ops.pool_weights import pool_weights
from survfuse.ops.position_biased_attention import (
    position_biased_attention,
    position_biased_attention_with_lse,
)
from survfuse.ops.sample_bag import sample_bag
from survfuse.ops.selection import selected_backend
from survfuse.ops.spread_tokens import spread_tokens
from survfuse.ops.tokens_attend_bag import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.pooling import GatedBag, PooledBag

__all__ = [
    "Attended",
    "BlockAttended",
    "BlockSide",
    "GatedBag",
    "GridIndex",
    "PooledBag",
    "Selection",
    "backend_obstacle",
    "bag_attends_tokens",
    "bag_attends_tokens_with_lse",
    "block_attention",
    "cross_attention",
    "cross_attention_weights",
    "cross_attention_with_lse",
    "gated_attention_pool",
    "gated_attention_weights",
    "grid_index",
    "merge_attention",
    "merge_over_group",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_from_offsets",
    "pool_bag",
    "pool_weights",
    "position_biased_attention",
    "position_biased_attention_with_lse",
    "sample_bag",
    "select_backend",
    "selected_backend",
    "spread_tokens",
    "tokens_attend_bag",
    "tokens_attend_bag_weights",
    "tokens_attend_bag_with_lse",
]
