"""What would run, and why: the dispatcher's choice made visible."""

from __future__ import annotations

from torch import Tensor

from survfuse.ops.absorption import absorbs, resolve_absorb
from survfuse.ops.backends import Selection, select_backend
from survfuse.ops.gated_attention_pool import select_gated_backend
from survfuse.ops.gated_attention_weights import select_gated_weights_backend
from survfuse.ops.pool_weights import check_weights_backend
from survfuse.ragged import as_packed

_GATED = ("gated_attention_pool", "gated_attention_weights")
_OPS = ("pool_bag", "pool_weights", "tokens_attend_bag", *_GATED)


def selected_backend(
    op: str,
    tokens: Tensor,
    bag: Tensor,
    *weights: Tensor,
    ragged=None,
    absorb: str = "auto",
    backend: str | None = None,
) -> Selection:
    """The backend that a call would run on.

    Args:
        op: "pool_bag", "pool_weights", "tokens_attend_bag", "gated_attention_pool" or
            "gated_attention_weights".
        tokens, bag, weights, ragged, absorb, backend: as in the call (weights: w_k and w_v of
            `tokens_attend_bag`). The gated operations have no tokens: theirs is the bag, and
            parameters follow.

    Returns:
        The backend's name and the reason.

    Raises:
        ValueError: no op has that name.
        TypeError: `tokens_attend_bag` without its two weights.
        RuntimeError: the named backend cannot serve the call.

    Example:
        >>> import torch
        >>> selected_backend("pool_bag", torch.zeros(1, 6, 8), torch.zeros(9, 8), backend="tiled")
        Selection(backend='tiled', reason='asked for')
    """
    if op not in _OPS:
        raise ValueError(f"op is {op!r}; it must be one of {_OPS}")
    if op in _GATED:
        select = select_gated_backend if op == _GATED[0] else select_gated_weights_backend
        return select(backend, device=tokens.device, dtype=tokens.dtype)
    if op == "pool_weights":
        if backend is None:
            return Selection("tiled", "its only implementation beside the reference")
        check_weights_backend(backend)
    n_rows = tokens.shape[1]
    if op == "tokens_attend_bag":
        if len(weights) != 2:
            raise TypeError(f"weights are {len(weights)} tensors; they must be two, w_k and w_v")
        w_v = weights[1]
        packed, ragged = as_packed(bag, ragged, tokens.shape[0])
        n_heads, head_dim = tokens.shape[2:]
        absorbed = absorbs(
            resolve_absorb(absorb, backend),
            n_queries=tokens.shape[1],
            n_heads=n_heads,
            head_dim=head_dim,
            value_dim=w_v.shape[1],
            dim=packed.shape[1],
            n_bags=tokens.shape[0],
            total=ragged.total,
        )
        if not absorbed and backend != "reference":
            return Selection("tiled", "K and V are formed by plain torch: cheaper here")
        n_rows *= n_heads
    return select_backend(backend, device=bag.device, dtype=bag.dtype, n_rows=n_rows)
