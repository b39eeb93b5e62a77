"""The entries of the contract suite with keys and values given, or with long queries."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import Ragged, ops
from tests.ops.plain import (
    plain_bag_attends_tokens,
    plain_cross_attention,
    plain_spread_tokens,
)


def make_few(case) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """A few queries per bag over ragged keys."""
    g, starts, lengths = _start(case, 5)
    tensors = {"query": _random(g, len(lengths), case.queries, case.heads, _dim(case))}
    tensors |= _keys(g, case)
    return tensors, {"key_ragged": Ragged.from_ranges(starts, lengths)}, ("key", "value")


def make_many(case) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """Ragged queries over a few keys per bag, some of them excluded where the case has such."""
    g, starts, lengths = _start(case, 6)
    query = _random(g, case.n_stored, case.heads, _dim(case))
    query[~case.covered_by_bags] = torch.nan
    shape = (len(lengths), case.queries + 2)
    tensors = {
        "query": query,
        "key": _random(g, *shape, case.heads, _dim(case)) + _offset(case),
        "value": _random(g, *shape, case.heads, _dim(case) + 3) + _offset(case),
    }
    if case.bias:
        bias = _random(g, *shape)
        if case.excluded:
            bias[:, 1] = -torch.inf
            bias[-1] = -torch.inf
            for name in ("key", "value"):
                tensors[name][bias == -torch.inf] = torch.nan
        tensors["bias"] = bias
    return tensors, {"query_ragged": Ragged.from_ranges(starts, lengths)}, ("query",)


def make_both(case) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """Ragged on either side, with the bags of the queries in another order."""
    g, starts, lengths = _start(case, 7)
    query = _random(g, case.n_stored, case.heads, _dim(case))
    query[~case.covered_by_bags] = torch.nan
    tensors = {"query": query} | _keys(g, case)
    turn = slice(None, None, -1 if len(starts) > 2 else 1)
    ranges = {
        "query_ragged": Ragged.from_ranges(starts[turn], lengths[turn]),
        "key_ragged": Ragged.from_ranges(starts, lengths),
    }
    return tensors, ranges, ("query", "key", "value")


def make_spread(case) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """A ragged bag over a few keys as wide as its rows."""
    g, starts, lengths = _start(case, 8)
    shape = (len(lengths), case.heads, case.queries + 2)
    bag = _random(g, case.n_stored, case.dim) + case.mean
    bag[~case.covered_by_bags] = torch.nan
    tensors = {
        "keys": _random(g, *shape, case.dim) * case.dim**-0.5,
        "values": _random(g, *shape, 7),
        "bag": bag,
    }
    if case.bias:
        bias = _random(g, *shape)
        if case.excluded:
            bias[:, :, 1] = -torch.inf
            bias[-1] = -torch.inf
            for name in ("keys", "values"):
                tensors[name][bias == -torch.inf] = torch.nan
        tensors["key_bias"] = bias
    options = {
        "ragged": Ragged.from_ranges(starts, lengths),
        "normalize_eps": 1e-5 if case.norm else None,
    }
    return tensors, options, ("bag",)


def make_bag_attends(case) -> tuple[dict[str, Tensor], dict, tuple[str, ...]]:
    """A ragged bag, projected, over a few tokens."""
    g, starts, lengths = _start(case, 9)
    heads, d, shape = case.heads, 5, (len(lengths), case.queries + 2)
    bag = _random(g, case.n_stored, case.dim) + case.mean
    bag[~case.covered_by_bags] = torch.nan
    tensors = {
        "bag": bag,
        "w_q": _random(g, heads, d, case.dim) * case.dim**-0.5,
        "key": _random(g, *shape, heads, d),
        "value": _random(g, *shape, heads, 6),
        "b_q": _random(g, heads, d),
    }
    if case.norm:
        tensors["norm_weight"] = 1.0 + 0.3 * _random(g, case.dim)
        tensors["norm_bias"] = 0.3 * _random(g, case.dim)
    if case.bias:
        bias = _random(g, *shape)
        if case.excluded:
            bias[:, 1] = -torch.inf
            bias[-1] = -torch.inf
            for name in ("key", "value"):
                tensors[name][bias == -torch.inf] = torch.nan
        tensors["key_bias"] = bias
    return tensors, {"ragged": Ragged.from_ranges(starts, lengths)}, ("bag",)


def run_bag_attends(call, backend: str | None, **options) -> tuple[Tensor, ...]:
    return ops.bag_attends_tokens_with_lse(
        **call.tensors, **(call.options | options), backend=backend
    )


def plain_of_bag_attends(call) -> tuple[Tensor, ...]:
    optional = ("norm_weight", "norm_bias", "key_bias")
    return plain_bag_attends_tokens(
        **(dict.fromkeys(optional) | call.tensors | call.options), norm_eps=1e-5
    )


def run_spread(call, backend: str | None, **options) -> tuple[Tensor, ...]:
    return tuple(ops.spread_tokens(**call.tensors, **(call.options | options), backend=backend))


def plain_of_spread(call) -> tuple[Tensor, ...]:
    return plain_spread_tokens(**({"key_bias": None} | call.tensors | call.options))


def run_cross_attention(call, backend: str | None, **options) -> tuple[Tensor, ...]:
    return ops.cross_attention_with_lse(**call.tensors, **(call.options | options), backend=backend)


def plain_of_cross_attention(call) -> tuple[Tensor, ...]:
    options = {"bias": None, "query_ragged": None, "key_ragged": None}
    return plain_cross_attention(**(options | call.tensors | call.options))


def with_lse(make):
    """The call of the weights: without values, with the lse of the attention."""

    def make_weights(case, scale: float):
        tensors, options, stored = make(case)
        tensors = {k: v for k, v in tensors.items() if k != "value"}
        with torch.no_grad():
            lse = ops.cross_attention_with_lse(
                **(tensors | {"value": tensors["key"]}),
                **options,
                scale=scale,
                backend="reference",
            )[1]
        return tensors | {"lse": lse}, options, tuple(name for name in stored if name != "value")

    return make_weights


def run_cross_attention_weights(
    call, backend: str | None, *, by_query: bool, **options
) -> tuple[Tensor, ...]:
    """Packed as the case's own form has it, whatever is dense in this call."""
    tensors = dict(call.tensors)
    query, key = tensors["query"], tensors["key"]
    if query.dim() == 4:
        tensors["lse"] = tensors["lse"].reshape(query.shape[:-1])
    weights = ops.cross_attention_weights(**tensors, **(call.options | options), backend=backend)
    if by_query and query.dim() == 4:
        # dense queries lead to weights by key
        weights = weights.unflatten(0, key.shape[:2]).permute(0, 2, 3, 1)
    return (weights.flatten(),)


def _start(case, seed: int):
    starts, lengths = zip(*case.ranges, strict=True)
    return torch.Generator().manual_seed(seed), starts, lengths


def _keys(g: torch.Generator, case) -> dict[str, Tensor]:
    tensors = {
        "key": _random(g, case.n_stored, case.heads, _dim(case)) + _offset(case),
        "value": _random(g, case.n_stored, case.heads, _dim(case) + 3) + _offset(case),
    }
    for tensor in tensors.values():
        tensor[~case.covered] = torch.nan
    if case.bias:
        tensors["bias"] = _random(g, case.n_stored)
        tensors["bias"][list(case.excluded)] = -torch.inf
    return tensors


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _dim(case) -> int:
    """The head size: that of the case, but no wider than heads are."""
    return case.dim if case.dim <= 128 else 72


def _offset(case) -> float:
    """Means that a normalisation would take away have no place here."""
    return 0.0 if case.norm else case.mean
