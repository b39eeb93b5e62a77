"""`pool_bag` in plain torch over tiles of the bag.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Needs, PooledBag, Pooling, accumulation_type
from survfuse.reference.dropout import keep_mask
from survfuse.tiled.tiles import Tile, operand_type, product, tiles


def pool_bag_forward(rows: Tensor, bag: Tensor, bias: Tensor | None, pooling: Pooling) -> PooledBag:
    """Results of the accumulation type."""
    kind = accumulation_type(bag.dtype)
    n_bags, n_rows, dim = rows.shape
    pooled = bag.new_zeros((n_bags, n_rows, dim), dtype=kind)
    lse = bag.new_full((n_bags, n_rows), -torch.inf, dtype=kind)
    weight_sum = bag.new_zeros((n_bags, n_rows), dtype=kind)
    for group in tiles(pooling.ragged, bag):
        if not group:
            continue
        bags = group[0].bags
        a = rows[bags].to(operand_type(bag, centred=pooling.normalize))
        top = bag.new_full(a.shape[:2], -torch.inf, dtype=kind)
        total_weight, kept_weight = torch.zeros_like(top), torch.zeros_like(top)
        z = bag.new_zeros(a.shape, dtype=kind)
        for tile in group:
            x, row_bias, _ = read_tile(tile, bag, bias, pooling)
            logits = tile_logits(a, x, row_bias, pooling.scale)
            new_top = torch.maximum(top, logits.amax(-1))
            # where nothing is included so far, subtract 0 and not -inf
            shift = torch.where(new_top == -torch.inf, 0.0, new_top)
            factor = torch.exp(top - shift)
            weights = torch.exp(logits - shift[..., None])
            total_weight = total_weight * factor + weights.sum(-1)
            if pooling.seed is not None:
                keep = tile_keep_mask(tile, pooling, n_rows, x.shape[1])
                weights = torch.where(keep, weights / (1.0 - pooling.dropout_p), 0.0)
            kept_weight = kept_weight * factor + weights.sum(-1)
            z = z * factor[..., None] + product(weights.to(x.dtype), x)
            top = new_top
        empty = total_weight == 0
        safe = torch.where(empty, 1.0, total_weight)
        pooled[bags] = torch.where(empty[..., None], 0.0, z / safe[..., None])
        infinite = torch.where(top == torch.inf, top, top + safe.log())
        lse[bags] = torch.where(empty, -torch.inf, infinite)
        kept = (total_weight if pooling.seed is None else kept_weight) / safe
        weight_sum[bags] = torch.where(empty, 0.0, kept)
    return PooledBag(pooled, lse, weight_sum)


def pool_bag_backward(
    d_results: PooledBag,
    results: PooledBag,
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    pooling: Pooling,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_rows [B, R, D], d_bag [T, D] of the bag's type, d_bias [T]; None where not needed."""
    kind = accumulation_type(bag.dtype)
    d_rows = torch.zeros(rows.shape, dtype=kind, device=bag.device) if needs.rows else None
    # sums of overlapping bags are rounded once, at the end
    d_bag = torch.zeros(bag.shape, dtype=kind, device=bag.device) if needs.bag else None
    d_bias = bag.new_zeros(bag.shape[0], dtype=kind) if needs.bias else None
    operand = operand_type(bag, centred=pooling.normalize)
    # rounded as in the products below: the two must cancel
    rounded = d_results.pooled.to(operand).to(kind)
    delta = weighted_gradient(rounded, d_results, results)
    d_logit_sum = torch.zeros_like(results.lse)
    for group in tiles(pooling.ragged, bag):
        for tile in group:
            a, dz = rows[tile.bags].to(operand), d_results.pooled[tile.bags].to(operand)
            x, row_bias, row_rstd = read_tile(tile, bag, bias, pooling)
            weights, d_logits = _score_gradients(
                tile,
                a,
                dz,
                x,
                row_bias,
                pooling,
                results.lse[tile.bags],
                delta[tile.bags],
                d_results.weight_sum[tile.bags],
            )
            d_scores = (d_logits * pooling.scale).to(x.dtype)
            if d_rows is not None:
                d_rows[tile.bags] += product(d_scores, x)
                d_logit_sum[tile.bags] += d_logits.sum(-1)
            if d_bias is not None:
                add_rows(d_bias, tile, d_logits.sum(-2))
            if d_bag is not None:
                d_x = product(d_scores.mT, a) + product(weights.to(x.dtype).mT, dz)
                if pooling.normalize:
                    d_x = normalize_gradient(d_x, x.to(kind), row_rstd)
                add_rows(d_bag, tile, included(d_x, row_bias))
    if d_rows is not None:
        balance_rows(d_rows, d_logit_sum, d_results.lse, results.pooled, pooling.scale)
    return d_rows, None if d_bag is None else d_bag.to(bag.dtype), d_bias


def weighted_gradient(d_pooled: Tensor, d_results: PooledBag, results: PooledBag) -> Tensor:
    """delta [B, R]: the mean of the gradients of a row's weights, less that of its lse."""
    delta = (d_pooled * results.pooled).sum(-1)
    return delta + d_results.weight_sum * results.weight_sum - d_results.lse


def balance_rows(
    d_rows: Tensor, d_logit_sum: Tensor, d_lse: Tensor, pooled: Tensor, scale: float
) -> None:
    """Take out of d_rows, in place, what the rounding of delta and lse put into it.

    The gradients of a row's logits sum to d_lse exactly. What their computed sum misses has gone
    along the softmax weights, so it stands in d_rows times the pooled patch, which is large where
    features are far from zero.
    """
    d_rows += (scale * (d_lse - d_logit_sum))[..., None] * pooled


def read_tile(
    tile: Tile, bag: Tensor, bias: Tensor | None, pooling: Pooling
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tile's rows [B, n, D] as operand, its bias [B, n], the factor of the norm [B, n].

    Excluded rows, and rows behind a bag's end, are zero with bias -inf and factor 0.
    """
    kind = accumulation_type(bag.dtype)
    x = tile.take(bag)
    row_bias = None if bias is None else tile.take(bias).to(kind)
    if tile.valid is not None:
        row_bias = torch.where(tile.valid, 0.0 if row_bias is None else row_bias, -torch.inf)
    excluded = None if row_bias is None else row_bias == -torch.inf
    if excluded is not None:
        x = torch.where(excluded[..., None], 0.0, x)
    operand = operand_type(bag, centred=pooling.normalize)
    if not pooling.normalize:
        return x.to(operand), row_bias, None
    if pooling.mean is not None:
        row_mean, row_rstd = tile.take(pooling.mean).to(kind), tile.take(pooling.rstd).to(kind)
        if excluded is not None:
            row_mean = torch.where(excluded, 0.0, row_mean)
            row_rstd = torch.where(excluded, 0.0, row_rstd)
        x = ((x.to(kind) - row_mean[..., None]) * row_rstd[..., None]).to(operand)
        return x, row_bias, row_rstd
    x, row_rstd = _normalized(x, pooling.eps, operand)
    if excluded is not None:
        row_rstd = torch.where(excluded, 0.0, row_rstd)
    return x, row_bias, row_rstd


def included(values: Tensor, row_bias: Tensor | None) -> Tensor:
    """`values` [B, n, D], zero for excluded rows whatever an infinite gradient made of them."""
    if row_bias is None:
        return values
    return torch.where((row_bias == -torch.inf)[..., None], 0.0, values)


def _normalized(x: Tensor, eps: float, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Layer-normalised rows of type `operand`, and the factor of each row."""
    if x.dtype in (torch.bfloat16, torch.float16):
        out, _, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)
        return out.to(operand), rstd[..., 0]
    # torch's kernel computes x * rstd - mean * rstd, which loses digits where |mean| >> std
    centered = x - x.mean(-1, keepdim=True)
    # once more: what rounding left of a large mean is common to all columns of the row
    centered -= centered.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centered, dim=-1)
    rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
    return centered.mul_(rstd[..., None]), rstd


def tile_logits(a: Tensor, x: Tensor, row_bias: Tensor | None, scale: float) -> Tensor:
    """[B, R, n] of the accumulation type."""
    logits = product(a, x.mT) * scale
    return logits if row_bias is None else logits + row_bias[:, None, :]


def tile_keep_mask(tile: Tile, pooling: Pooling, n_rows: int, n: int) -> Tensor:
    """[B, R, n] bool: which weights dropout keeps."""
    seed, p = pooling.seed, pooling.dropout_p
    row = torch.arange(n_rows, device=seed.device)
    position = tile.position + torch.arange(n, device=seed.device)
    bags = range(pooling.lengths.shape[0])[tile.bags]
    return torch.stack([keep_mask(seed, b, row, position, p) for b in bags])


def _score_gradients(
    tile: Tile,
    a: Tensor,
    dz: Tensor,
    x: Tensor,
    row_bias: Tensor | None,
    pooling: Pooling,
    lse: Tensor,
    delta: Tensor,
    d_weight_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights after dropout and the gradient of the logits, both [B, R, n]."""
    logits = tile_logits(a, x, row_bias, pooling.scale)
    excluded = (logits == -torch.inf) | (lse == -torch.inf)[..., None]
    softmax = torch.where(excluded, 0.0, torch.exp(logits - lse[..., None]))
    d_weights = product(dz, x.mT) + d_weight_sum[..., None]
    if pooling.seed is None:
        weights, d_logits = softmax, softmax * (d_weights - delta[..., None])
    else:
        keep = tile_keep_mask(tile, pooling, a.shape[1], x.shape[1])
        weights = torch.where(keep, softmax / (1.0 - pooling.dropout_p), 0.0)
        d_logits = weights * d_weights - softmax * delta[..., None]
    return weights, torch.where(excluded, 0.0, d_logits)


def normalize_gradient(d_x_hat: Tensor, x_hat: Tensor, rstd: Tensor) -> Tensor:
    """That of the rows, of the gradient of their normalised ones [B, n, D] and factors [B, n]."""
    # of rows with mean 0 and factor 1, in one pass
    one = torch.ones_like(rstd)[..., None]
    zero = torch.zeros_like(one)
    d_x = torch.ops.aten.native_layer_norm_backward(
        d_x_hat, x_hat, x_hat.shape[-1:], zero, one, None, None, [True, False, False]
    )[0]
    return d_x.mul_(rstd[..., None])


def add_rows(target: Tensor, tile: Tile, values: Tensor) -> None:
    """Add [B, n, ...] to the stored rows of a tile, bag by bag in ascending order."""
    if isinstance(tile.rows, slice):
        target[tile.rows] += values[0]
        return
    for b in range(values.shape[0]):
        # rows behind the end point at the bag's first row and add zero
        valid = tile.valid[b].reshape(-1, *(1,) * (values.dim() - 2))
        target.index_add_(0, tile.rows[b], torch.where(valid, values[b], 0.0))
