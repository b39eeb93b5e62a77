"""Whether to absorb the projections of a cross-attention into its few tokens: the cost rule.

Math: docs/math.md, "When to absorb".
"""

from __future__ import annotations

import torch

from survfuse.ops.backends import check_backend

# floating-point operations that take as long as moving one byte: 180 GFLOP/s over 40 GB/s were
# measured on two CPU cores; GPUs have more, which favours moving less
_OPERATIONS_PER_BYTE = 5
_ABSORB = ("auto", "always", "never")


def resolve_absorb(absorb: str, backend: str | None) -> str:
    """The rule to follow, `backend` considered: a backend asked for by name is used or raises.

    Raises:
        ValueError: no rule or backend has that name.
        RuntimeError: K and V are to be formed by a backend that does not.
    """
    if absorb not in _ABSORB:
        raise ValueError(f"absorb is {absorb!r}; it must be one of {_ABSORB}")
    check_backend(backend)
    if backend in ("native", "triton"):
        if absorb == "never":
            raise RuntimeError(
                f'backend={backend!r} cannot serve this call: with absorb="never" K and V are '
                'formed in plain torch; take backend=None, "tiled" or "reference"'
            )
        return "always"
    return absorb


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
    """Whether the projections are absorbed.

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
    if torch.compiler.is_compiling():
        # looking at the length would make it part of the compiled graph
        return absorbed <= formed
    return absorbed * total + 2 * rows * dim * width * n_bags <= formed * total
