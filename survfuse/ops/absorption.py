"""Whether to absorb the projections of an attention into its few tokens: the cost rules.

Math: docs/math.md, "When to absorb".
"""

from __future__ import annotations

import torch

# floating-point operations that take as long as moving one byte: 180 GFLOP/s over 40 GB/s were
# measured on two CPU cores; GPUs have more, which favours moving less
_OPERATIONS_PER_BYTE = 5
_ABSORB = ("auto", "always", "never")


def check_absorb(absorb: str) -> None:
    """Raise unless `absorb` names a rule."""
    if absorb not in _ABSORB:
        raise ValueError(f"absorb is {absorb!r}; it must be one of {_ABSORB}")


def absorbs(
    absorb: str,
    *,
    n_queries: int,
    n_heads: int,
    head_dim: int,
    value_dim: int,
    dim: int,
    n_bags: int,
    total: int,
) -> bool:
    """Whether `tokens_attend_bag` absorbs its projections.

    Absorbed, a patch costs 4 D R operations for R = queries * heads and is read once. With K and V
    formed it costs 2 D H (d + dv) for the projections and 2 R (d + dv) for the attention, and K, V
    and the R weights go to memory and back. Absorbing itself costs 2 R D (d + dv) per bag, so very
    short bags do not repay it.
    """
    if absorb != "auto":
        return absorb == "always"
    rows, width = n_queries * n_heads, head_dim + value_dim
    absorbed = 4 * dim * rows
    formed = 2 * dim * n_heads * width + 2 * rows * width
    formed += 2 * 4 * (n_heads * width + rows) * _OPERATIONS_PER_BYTE
    return _cheaper(absorbed, formed, 2 * rows * dim * width * n_bags, total)


def absorbs_query(
    absorb: str,
    *,
    n_keys: int,
    n_heads: int,
    head_dim: int,
    value_dim: int,
    dim: int,
    n_bags: int,
    total: int,
) -> bool:
    """Whether `bag_attends_tokens` absorbs W_q into the tokens.

    Absorbed, a patch costs 2 R (D + dv) operations for R = keys * heads. With its queries formed it
    costs 2 D H d for them, 2 R (d + dv) for the attention, and they go to memory and back.
    Absorbing itself costs 2 R D d per bag.
    """
    if absorb != "auto":
        return absorb == "always"
    rows = n_keys * n_heads
    absorbed = 2 * rows * (dim + value_dim)
    formed = 2 * dim * n_heads * head_dim + 2 * rows * (head_dim + value_dim)
    formed += 2 * 4 * n_heads * head_dim * _OPERATIONS_PER_BYTE
    return _cheaper(absorbed, formed, 2 * rows * dim * head_dim * n_bags, total)


def _cheaper(absorbed: int, formed: int, once: int, total: int) -> bool:
    """Whether absorbing costs less over `total` patches, with what it costs once."""
    if torch.compiler.is_compiling():
        # looking at the length would make it part of the compiled graph
        return absorbed <= formed
    return absorbed * total + once <= formed * total
