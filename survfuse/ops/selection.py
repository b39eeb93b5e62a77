"""What would run, and why: the dispatcher's choice made visible."""

from __future__ import annotations

from torch import Tensor

from survfuse.ops.absorption import absorbs, absorbs_query, check_absorb
from survfuse.ops.backends import Selection, select_backend
from survfuse.ops.cross_attention import choose_for_heads
from survfuse.ops.gated_attention_pool import select_gated_backend
from survfuse.ops.gated_attention_weights import select_gated_weights_backend
from survfuse.ops.multi_scale_deformable_attention import select_deformable_backend
from survfuse.ops.pool_weights import check_weights_backend
from survfuse.ops.position_biased_attention import choose_for_bias
from survfuse.ops.sample_bag import check_sampling_backend
from survfuse.ragged import Ragged, as_packed

_FORMED = "torch forms {} tile by tile, which is cheaper here; then attention: {}"


def selected_backend(
    op: str,
    *tensors: Tensor,
    ragged: Ragged | None = None,
    absorb: str = "auto",
    backend: str | None = None,
) -> Selection:
    """The backend that a call would run on.

    Args:
        op: "pool_bag", "pool_weights", "tokens_attend_bag", "bag_attends_tokens",
            "spread_tokens", "cross_attention", "gated_attention_pool",
            "gated_attention_weights", "multi_scale_deformable_attention" (also under the name of
            its `..._from_offsets`), "position_biased_attention" (with an MLP that kernels serve,
            or a table: any other MLP runs on "tiled") or "sample_bag".
        tensors: the op's tensors in the order of the call, as far as they decide: rows, bag; query,
            bag, w_k, w_v; bag, w_q, key, value; keys, values, bag; query, key, value; bag; bag;
            value; query, key, value; bag.
        ragged, absorb, backend: as in the call.

    Returns:
        The backend's name and the reason.

    Raises:
        ValueError: no op has that name.
        TypeError: fewer tensors than decide, or something else; what follows them in the call may
            be left out.
        RuntimeError: the named backend cannot serve the call.

    Example:
        >>> import torch
        >>> selected_backend("pool_bag", torch.zeros(1, 6, 8), torch.zeros(9, 8), backend="tiled")
        Selection(backend='tiled', reason='asked for')
    """
    if op not in _OPS:
        raise ValueError(f"op is {op!r}; it must be one of {tuple(_OPS)}")
    names, select = _OPS[op]
    if len(tensors) < len(names):
        raise TypeError(
            f"tensors are {len(tensors)}; {op} takes {len(names)} of them: {', '.join(names)}"
        )
    for name, tensor in zip(names, tensors, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
    return select(*tensors[: len(names)], ragged=ragged, absorb=absorb, backend=backend)


def _pool_bag(rows: Tensor, bag: Tensor, *, backend: str | None, **_) -> Selection:
    return _select(bag, rows.shape[1], backend)


def _pool_weights(rows: Tensor, bag: Tensor, *, backend: str | None, **_) -> Selection:
    if backend is None:
        return Selection("tiled", "its only implementation beside the reference")
    check_weights_backend(backend)
    return _pool_bag(rows, bag, backend=backend)


def _tokens_attend_bag(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    ragged: Ragged | None,
    absorb: str,
    backend: str | None,
) -> Selection:
    check_absorb(absorb)
    packed, ragged = as_packed(bag, ragged, query.shape[0])
    n_queries, heads, head_dim = query.shape[1:]
    absorbed = absorbs(
        absorb,
        n_queries=n_queries,
        n_heads=heads,
        head_dim=head_dim,
        value_dim=w_v.shape[1],
        dim=packed.shape[1],
        n_bags=query.shape[0],
        total=ragged.total,
    )
    if absorbed or backend == "reference":
        return _select(bag, n_queries * heads, backend)
    return _formed("K and V", bag, head_dim, w_v.shape[1], backend)


def _bag_attends_tokens(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ragged: Ragged | None,
    absorb: str,
    backend: str | None,
) -> Selection:
    check_absorb(absorb)
    packed, ragged = as_packed(bag, ragged, key.shape[0])
    n_bags, n_keys, heads, head_dim = key.shape
    absorbed = absorbs_query(
        absorb,
        n_keys=n_keys,
        n_heads=heads,
        head_dim=head_dim,
        value_dim=value.shape[3],
        dim=packed.shape[1],
        n_bags=n_bags,
        total=ragged.total,
    )
    if absorbed or backend == "reference":
        return _select(bag, n_keys * heads, backend)
    return _formed("the queries", bag, head_dim, value.shape[3], backend)


def _spread_tokens(
    keys: Tensor, values: Tensor, bag: Tensor, *, backend: str | None, **_
) -> Selection:
    return _select(bag, keys.shape[1] * keys.shape[2], backend)


def _cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, backend: str | None, **_
) -> Selection:
    return choose_for_heads(key, key.shape[-1], value.shape[-1], backend)


def _gated_attention_pool(bag: Tensor, *, backend: str | None, **_) -> Selection:
    return select_gated_backend(backend, device=bag.device, dtype=bag.dtype)


def _gated_attention_weights(bag: Tensor, *, backend: str | None, **_) -> Selection:
    return select_gated_weights_backend(backend, device=bag.device, dtype=bag.dtype)


def _deformable(value: Tensor, *, backend: str | None, **_) -> Selection:
    return select_deformable_backend(backend, device=value.device, dtype=value.dtype)


def _position_biased_attention(
    query: Tensor, key: Tensor, value: Tensor, *, backend: str | None, **_
) -> Selection:
    return choose_for_bias(key, value, 0, 0, True, backend)


def _sample_bag(bag: Tensor, *, backend: str | None, **_) -> Selection:
    return check_sampling_backend(backend)


def _select(bag: Tensor, n_rows: int, backend: str | None) -> Selection:
    return select_backend(backend, device=bag.device, dtype=bag.dtype, n_rows=n_rows)


def _formed(
    what: str, bag: Tensor, head_dim: int, value_dim: int, backend: str | None
) -> Selection:
    chosen = choose_for_heads(bag, head_dim, value_dim, backend)
    return Selection(chosen.backend, _FORMED.format(what, chosen.reason))


_OPS = {
    "pool_bag": (("rows", "bag"), _pool_bag),
    "pool_weights": (("rows", "bag"), _pool_weights),
    "tokens_attend_bag": (("query", "bag", "w_k", "w_v"), _tokens_attend_bag),
    "bag_attends_tokens": (("bag", "w_q", "key", "value"), _bag_attends_tokens),
    "spread_tokens": (("keys", "values", "bag"), _spread_tokens),
    "cross_attention": (("query", "key", "value"), _cross_attention),
    "gated_attention_pool": (("bag",), _gated_attention_pool),
    "gated_attention_weights": (("bag",), _gated_attention_weights),
    "multi_scale_deformable_attention": (("value",), _deformable),
    "multi_scale_deformable_attention_from_offsets": (("value",), _deformable),
    "position_biased_attention": (("query", "key", "value"), _position_biased_attention),
    "sample_bag": (("bag",), _sample_bag),
}
