"""The specification of every op: obvious, eager, differentiable torch, any dtype.

Same names and arguments as `survfuse.ops`. These functions may materialise everything.
"""

from survfuse.reference.gated_attention_pool import (
    gated_attention_pool,
    gated_attention_weights,
)
from survfuse.reference.pool_bag import pool_bag, pool_weights
from survfuse.reference.tokens_attend_bag import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)

__all__ = [
    "gated_attention_pool",
    "gated_attention_weights",
    "pool_bag",
    "pool_weights",
    "tokens_attend_bag",
    "tokens_attend_bag_weights",
    "tokens_attend_bag_with_lse",
]
