"""The specification of every op: obvious, eager, differentiable torch, any dtype.

Same names and arguments as `survfuse.ops`. These functions may materialise everything.
"""

from survfuse.reference.bag_attends_tokens import bag_attends_tokens, bag_attends_tokens_with_lse
from survfuse.reference.block_attention import block_attention
from survfuse.reference.cross_attention import (
    cross_attention,
    cross_attention_weights,
    cross_attention_with_lse,
)
from survfuse.reference.gated_attention_pool import (
    gated_attention_pool,
    gated_attention_weights,
)
from survfuse.reference.merge_attention import merge_attention
from survfuse.reference.multi_scale_deformable_attention import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_from_offsets,
)
from survfuse.reference.pool_bag import pool_bag, pool_weights
from survfuse.reference.position_biased_attention import (
    position_biased_attention,
    position_biased_attention_with_lse,
)
from survfuse.reference.sample_bag import sample_bag
from survfuse.reference.spread_tokens import spread_tokens
from survfuse.reference.tokens_attend_bag import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)

__all__ = [
    "bag_attends_tokens",
    "bag_attends_tokens_with_lse",
    "block_attention",
    "cross_attention",
    "cross_attention_weights",
    "cross_attention_with_lse",
    "gated_attention_pool",
    "gated_attention_weights",
    "merge_attention",
    "multi_scale_deformable_attention",
    "multi_scale_deformable_attention_from_offsets",
    "pool_bag",
    "pool_weights",
    "position_biased_attention",
    "position_biased_attention_with_lse",
    "sample_bag",
    "spread_tokens",
    "tokens_attend_bag",
    "tokens_attend_bag_weights",
    "tokens_attend_bag_with_lse",
]
