"""`tokens_attend_bag`: few tokens attend to a long bag, the projections absorbed into the tokens.

Oracle: survfuse/reference/tokens_attend_bag.py.  Math: docs/math.md, "Absorbing projections".
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.absorption import absorbs, check_absorb
from survfuse.ops.backends import check_backend
from survfuse.ops.checks import (
    check_bag,
    check_bias,
    check_dropout,
    check_eps,
    check_reduce,
    check_scale,
    check_tensor,
)
from survfuse.ops.cross_attention import cross_attention_with_lse
from survfuse.ops.pool_bag import pool_bag
from survfuse.ops.pool_weights import pool_weights
from survfuse.ops.project_bag import form_heads, packed_rows
from survfuse.ops.registration import autocast_off, call_reference, check_ranges_eagerly
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed


def tokens_attend_bag(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    absorb: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention of tokens to a bag, its key and value projections included.

    .. math:: o_{qh} = \sum_i \mathrm{softmax}_i(\mathrm{scale}\; q_{qh} \cdot (W_{k,h} \hat x_i
              + b_{k,h}) + bias_i)\, (W_{v,h} \hat x_i + b_{v,h})

    K and V are never formed where that is cheaper: W_k is absorbed into the queries and W_v is
    applied to the pooled bag, which is read once.

    Args:
        query: [B, Lq, H, d].
        bag: [T, D] packed, or dense [B, N, D]; see `pool_bag`.
        w_k: [H, d, D].
        w_v: [H, dv, D].
        b_k: [H, d].
        b_v: [H, dv].
        norm_weight, norm_bias: [D]; if either is given the bag is layer-normalised first, as
            `torch.nn.LayerNorm` would.
        norm_eps: its epsilon.
        bias: [T] added to the logits of that patch; -inf excludes it.
        ragged: the range of rows of each bag; None is one bag, or a dense `bag`.
        scale: by default d ** -0.5.
        dropout_p: probability with which a weight is dropped.
        absorb: "auto" by a cost rule (docs/math.md), "always" or "never".
        backend: None, "reference", "tiled", "triton" or "native". Where K and V are formed, torch
            multiplies and the backend attends (`cross_attention`).

    Returns:
        [B, Lq, H, dv] of the type of `query`. A bag of no rows, or with every bias -inf, gives
        zeros and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call.

    Precision: the absorbing products run in fp32 (fp64 for fp64) whatever autocast says; error
    against fp64 at most twice that of plain torch in the type of the bag.
    Determinism: bitwise.
    Cost: 4 N D Lq H operations forward, one read of the bag forward and one backward.
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> query, bag = torch.zeros(1, 2, 1, 4), torch.ones(5, 8)
        >>> tokens_attend_bag(query, bag, torch.ones(1, 4, 8), torch.ones(1, 3, 8)).shape
        torch.Size([1, 2, 1, 3])
    """
    return tokens_attend_bag_with_lse(
        query,
        bag,
        w_k,
        w_v,
        b_k=b_k,
        b_v=b_v,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        bias=bias,
        ragged=ragged,
        scale=scale,
        dropout_p=dropout_p,
        absorb=absorb,
        backend=backend,
    )[0]


def tokens_attend_bag_with_lse(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    absorb: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tokens_attend_bag`, and the logsumexp of the logits before dropout.

    Returns:
        out [B, Lq, H, dv], and lse [B, Lq, H] in fp32 (fp64 for fp64), differentiable, so that
        results over several key sets can be merged.
    """
    packed, bias, ragged = _check(
        query, bag, w_k, w_v, b_k, b_v, norm_weight, norm_bias, bias, ragged
    )
    _check_scales(norm_eps, scale)
    check_dropout(dropout_p)
    check_absorb(absorb)
    check_backend(backend)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.tokens_attend_bag_with_lse,
            query,
            packed,
            w_k,
            w_v,
            b_k=b_k,
            b_v=b_v,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            bias=bias,
            ragged=ragged,
            scale=scale,
            dropout_p=dropout_p,
        )
    n_bags, n_queries, n_heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    normalize = norm_weight is not None or norm_bias is not None
    with autocast_off(bag.device):
        if not absorbs(
            absorb,
            n_queries=n_queries,
            n_heads=n_heads,
            head_dim=head_dim,
            value_dim=w_v.shape[1],
            dim=packed.shape[1],
            n_bags=n_bags,
            total=ragged.total,
        ):
            form = partial(
                form_heads,
                bag=packed,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                norm_eps=norm_eps if normalize else None,
                bias=bias,
                ragged=ragged,
            )
            return cross_attention_with_lse(
                query,
                form(w_k, b_k),
                form(w_v, b_v),
                bias=None if bias is None else bias[packed_rows(ragged, packed.shape[0])],
                key_ragged=ragged.packed(),
                scale=scale,
                dropout_p=dropout_p,
                backend=backend,
            )
        pooled, lse, weight_sum = pool_bag(
            absorb_queries(query, w_k, norm_weight),
            packed,
            bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=norm_eps if normalize else None,
            dropout_p=dropout_p,
            backend=backend,
        )
        kind = pooled.dtype
        pooled = pooled.unflatten(1, (n_queries, n_heads))
        weight_sum = weight_sum.unflatten(1, (n_queries, n_heads))[..., None]
        if norm_weight is not None:
            pooled = pooled * norm_weight.to(kind)
        if norm_bias is not None:
            pooled = pooled + norm_bias.to(kind) * weight_sum
        out = torch.einsum("bqhd,hed->bqhe", pooled, w_v.to(kind))
        if b_v is not None:
            out = out + b_v.to(kind) * weight_sum
        lse = lse.unflatten(1, (n_queries, n_heads))
        constant = constant_logit(query, w_k, b_k, norm_bias, scale)
        if constant is not None:
            # beta and b_k shift all logits of a row alike: no weight changes, but lse does
            lse = torch.where(lse == -torch.inf, lse, lse + constant)
        return out.to(query.dtype), lse


def tokens_attend_bag_weights(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    lse: Tensor,
    *,
    b_k: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    reduce: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weights each token gives to each patch, streamed; see `pool_weights`.

    Args:
        query, bag, w_k, b_k, norm_weight, norm_bias, norm_eps, bias, ragged, scale: those of the
            `tokens_attend_bag_with_lse` call.
        lse: [B, Lq, H] what that call returned.
        reduce: None; "rows", the mean over tokens and heads; "heads", the mean over heads.
        backend: None, "reference" or "tiled".

    Returns:
        [total, Lq, H]; [total] for "rows"; [total, Lq] for "heads". Before dropout, fp32 (fp64 for
        fp64), differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
    """
    packed, bias, ragged = _check(
        query, bag, w_k, None, b_k, None, norm_weight, norm_bias, bias, ragged
    )
    _check_scales(norm_eps, scale)
    check_reduce(reduce)
    check_tensor("lse", lse, shape=tuple(query.shape[:3]), device=bag.device)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.tokens_attend_bag_weights,
            query,
            packed,
            w_k,
            lse,
            b_k=b_k,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            bias=bias,
            ragged=ragged,
            scale=scale,
            reduce=reduce,
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    normalize = norm_weight is not None or norm_bias is not None
    with autocast_off(bag.device):
        constant = constant_logit(query, w_k, b_k, norm_bias, scale)
        return pool_weights(
            absorb_queries(query, w_k, norm_weight),
            packed,
            lse if constant is None else lse - constant,
            bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=norm_eps if normalize else None,
            reduce=reduce,
            backend=backend,
        )


def absorb_queries(query: Tensor, w_k: Tensor, norm_weight: Tensor | None) -> Tensor:
    """The rows [B, Lq * H, D] whose dot product with a (normalised) patch is q . W_k x."""
    kind = accumulation_type(query.dtype)
    rows = torch.einsum("bqhe,hed->bqhd", query.to(kind), w_k.to(kind))
    if norm_weight is not None:
        rows = rows * norm_weight.to(kind)
    return rows.flatten(1, 2)


def constant_logit(
    query: Tensor, w_k: Tensor, b_k: Tensor | None, norm_bias: Tensor | None, scale: float
) -> Tensor | None:
    """scale * q . (W_k beta + b_k), [B, Lq, H]: what absorbing leaves out of every logit."""
    kind = accumulation_type(query.dtype)
    shift = None if b_k is None else b_k.to(kind)
    if norm_bias is not None:
        projected = w_k.to(kind) @ norm_bias.to(kind)
        shift = projected if shift is None else shift + projected
    return None if shift is None else scale * torch.einsum("bqhe,he->bqh", query.to(kind), shift)


def _check(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    ragged: Ragged | None,
) -> tuple[Tensor, Tensor | None, Ragged]:
    check_bag(bag)
    device, dim = bag.device, bag.shape[-1]
    check_tensor("query", query, shape=("B", "Lq", "H", "d"), device=device)
    heads, head_dim = query.shape[2:]
    if head_dim == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; its heads need at least 1 channel")
    check_tensor("w_k", w_k, shape=(heads, head_dim, dim), device=device)
    if w_v is not None:
        check_tensor("w_v", w_v, shape=(heads, "dv", dim), device=device)
    for name, tensor, shape in (
        ("b_k", b_k, (heads, head_dim)),
        ("b_v", b_v, (heads, "dv" if w_v is None else w_v.shape[1])),
        ("norm_weight", norm_weight, (dim,)),
        ("norm_bias", norm_bias, (dim,)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape=shape, device=device)
    if bias is not None:
        bias = check_bias(bias, bag)
    packed, ragged = as_packed(bag, ragged, query.shape[0])
    return packed, bias, ragged


def _check_scales(norm_eps: float, scale: float | None) -> None:
    check_eps("norm_eps", norm_eps)
    if scale is not None:
        check_scale(scale)
