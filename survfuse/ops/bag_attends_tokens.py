"""`bag_attends_tokens`: patches attend to a few tokens, the query projection absorbed into them.

Oracle: survfuse/reference/bag_attends_tokens.py.
Math: docs/math.md, "Spreading tokens over a bag".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.absorption import absorbs_query, check_absorb
from survfuse.ops.backends import check_backend
from survfuse.ops.checks import check_bag, check_dropout, check_eps, check_scale, check_tensor
from survfuse.ops.cross_attention import cross_attention_with_lse
from survfuse.ops.project_bag import form_heads
from survfuse.ops.registration import autocast_off, call_reference, check_ranges_eagerly
from survfuse.ops.spread_tokens import spread_tokens
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed


def bag_attends_tokens(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    b_q: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    absorb: str = "auto",
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention of every patch to a few tokens, its query projection included.

    .. math:: o_{ih} = \sum_j \mathrm{softmax}_j(\mathrm{scale}\; (W_{q,h} \hat x_i + b_{q,h})
              \cdot k_{jh} + bias_j)\, v_{jh}

    The queries are never formed where that is cheaper: W_q is absorbed into the keys, and the bag
    is read once.

    Args:
        bag: [T, D] packed, or dense [B, N, D]; see `pool_bag`.
        w_q: [H, d, D].
        key: [B, Lk, H, d].
        value: [B, Lk, H, dv].
        b_q: [H, d].
        norm_weight, norm_bias: [D]; if either is given the bag is layer-normalised first, as
            `torch.nn.LayerNorm` would.
        norm_eps: its epsilon.
        key_bias: [B, Lk] added to the logits of that token; -inf excludes it, and it may then hold
            anything, NaN included.
        ragged: the range of rows of each bag; None is one bag, or a dense `bag`.
        scale: by default d ** -0.5.
        dropout_p: probability with which a weight is dropped.
        absorb: "auto" by a cost rule (docs/math.md), "always" or "never".
        backend: None, "reference", "tiled", "triton" or "native". Where queries are formed, torch
            multiplies and the backend attends (`cross_attention`).

    Returns:
        [total, H, dv] of the type of `value`, packed per (bag, patch) in batch order. Where all
        tokens of a bag are excluded, or there are none: zeros, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call.

    Precision: the absorbing products run in fp32 (fp64 for fp64) whatever autocast says; error
    against fp64 at most twice that of plain torch in the type of the bag.
    Determinism: bitwise.
    Cost: absorbed 2 N Lk H (D + dv) operations forward; one read of the bag and one write of the
    result forward, one read of both backward.
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> bag, key, value = torch.ones(5, 8), torch.zeros(1, 2, 1, 4), torch.ones(1, 2, 1, 3)
        >>> bag_attends_tokens(bag, torch.ones(1, 4, 8), key, value).shape
        torch.Size([5, 1, 3])
    """
    return bag_attends_tokens_with_lse(
        bag,
        w_q,
        key,
        value,
        b_q=b_q,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        key_bias=key_bias,
        ragged=ragged,
        scale=scale,
        dropout_p=dropout_p,
        absorb=absorb,
        backend=backend,
    )[0]


def bag_attends_tokens_with_lse(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    b_q: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    absorb: str = "auto",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `bag_attends_tokens`, and the logsumexp of the logits before dropout.

    Returns:
        out [total, H, dv], and lse [total, H] in fp32 (fp64 for fp64), differentiable, so that
        results over several token sets can be merged.
    """
    packed, ragged = _check(
        bag, w_q, key, value, b_q, norm_weight, norm_bias, norm_eps, key_bias, ragged, scale
    )
    check_dropout(dropout_p)
    check_absorb(absorb)
    check_backend(backend)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.bag_attends_tokens_with_lse,
            packed,
            w_q,
            key,
            value,
            b_q=b_q,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            key_bias=key_bias,
            ragged=ragged,
            scale=scale,
            dropout_p=dropout_p,
        )
    n_bags, n_keys, heads, head_dim = key.shape
    scale = head_dim**-0.5 if scale is None else scale
    eps = norm_eps if norm_weight is not None or norm_bias is not None else None
    with autocast_off(bag.device):
        if not absorbs_query(
            absorb,
            n_keys=n_keys,
            n_heads=heads,
            head_dim=head_dim,
            value_dim=value.shape[3],
            dim=packed.shape[1],
            n_bags=n_bags,
            total=ragged.total,
        ):
            query = form_heads(
                w_q,
                b_q,
                bag=packed,
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                norm_eps=eps,
                bias=None,
                ragged=ragged,
            )
            out, lse = cross_attention_with_lse(
                query,
                key,
                value,
                bias=key_bias,
                query_ragged=ragged.packed(),
                scale=scale,
                dropout_p=dropout_p,
                backend=backend,
            )
            return out.to(value.dtype), lse
        keys, bias = absorb_keys(key, w_q, b_q, norm_weight, norm_bias, key_bias, scale)
        out, lse = spread_tokens(
            keys,
            # values of the bag's type spare a result in the wider one
            (value if value.dtype == packed.dtype else value.to(keys.dtype)).transpose(1, 2),
            packed,
            key_bias=bias,
            ragged=ragged,
            scale=scale,
            normalize_eps=eps,
            dropout_p=dropout_p,
            backend=backend,
        )
        return out.to(value.dtype), lse


def absorb_keys(
    key: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Keys [B, H, Lk, D] whose product with a (normalised) patch is W_q x . k, and their bias.

    What the patch has no part in, scale * (W_q beta + b_q) . k, differs from token to token, so it
    stays in the logits: the bias is [B, H, Lk], or None where there is none of any kind.
    """
    kind = accumulation_type(key.dtype)
    key, w_q = key.to(kind), w_q.to(kind)
    if key_bias is not None:
        key = torch.where((key_bias == -torch.inf)[..., None, None], 0.0, key)
    shift = None if b_q is None else b_q.to(kind)
    if norm_bias is not None:
        projected = w_q @ norm_bias.to(kind)
        shift = projected if shift is None else shift + projected
    keys = torch.einsum("bkhe,hed->bhkd", key, w_q)
    if norm_weight is not None:
        keys = keys * norm_weight.to(kind)
    bias = None if shift is None else scale * torch.einsum("bkhe,he->bhk", key, shift)
    if key_bias is not None:
        per_head = key_bias.to(kind)[:, None].expand(-1, key.shape[2], -1)
        bias = per_head if bias is None else bias + per_head
    return keys, bias


def _check(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    b_q: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    key_bias: Tensor | None,
    ragged: Ragged | None,
    scale: float | None,
) -> tuple[Tensor, Ragged]:
    check_bag(bag)
    device, dim = bag.device, bag.shape[-1]
    check_tensor("w_q", w_q, shape=("H", "d", dim), device=device)
    heads, head_dim = w_q.shape[:2]
    if head_dim == 0:
        raise ValueError(f"w_q has shape {tuple(w_q.shape)}; its heads need at least 1 channel")
    check_tensor("key", key, shape=("B", "Lk", heads, head_dim), device=device)
    check_tensor("value", value, shape=(*key.shape[:3], "dv"), device=device)
    for name, tensor, shape in (
        ("b_q", b_q, (heads, head_dim)),
        ("norm_weight", norm_weight, (dim,)),
        ("norm_bias", norm_bias, (dim,)),
        ("key_bias", key_bias, tuple(key.shape[:2])),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape=shape, device=device)
    check_eps("norm_eps", norm_eps)
    if scale is not None:
        check_scale(scale)
    return as_packed(bag, ragged, key.shape[0])
