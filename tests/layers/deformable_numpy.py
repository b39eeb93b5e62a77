"""The released deformable cross-attention of Subspace fusion in plain numpy, fp64.

Written from a description of what its public code computes, for one sample at a time and with
loops, to hold the layer to it: offsets of a depthwise convolution, `grid_sample` between the outer
edges with zeros around, a bias of the signed log of normalised distances. Its quirks are its own:
the x of a point is scaled by the number of rows, and keys are placed on the coarse grid's extent.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def pointwise(weight: np.ndarray, x: np.ndarray, n_groups: int) -> np.ndarray:
    """A 1 x 1 convolution in groups: x [C, ...] to [O, ...]."""
    out = []
    for w, part in zip(np.split(weight[:, :, 0, 0], n_groups), np.split(x, n_groups), strict=True):
        out.append(np.tensordot(w, part, axes=1))
    return np.concatenate(out)


def depthwise(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, stride: int) -> np.ndarray:
    """x [C, h, w] under one kernel per channel, padded so that kernels are centred."""
    kernel = weight.shape[-1]
    reach = (kernel - stride) // 2
    x = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    rows, columns = ((n - kernel) // stride + 1 for n in x.shape[1:])
    out = np.empty((x.shape[0], rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            out[:, i, j] = (window * weight[:, 0]).sum((1, 2)) + bias
    return out


def between(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """image [C, h, w] at (x, y) in [-1, 1], which are its outer edges; zeros beyond."""
    height, width = image.shape[1:]
    column, row = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    left, top = math.floor(column), math.floor(row)
    out = np.zeros(image.shape[0])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                share = (1 - abs(row - i)) * (1 - abs(column - j))
                out += share * image[:, i, j]
    return out


def normalised(grid: np.ndarray) -> np.ndarray:
    """[2, h, w] (x, y) as the released code scales it: x by the rows, y by the columns."""
    height, width = grid.shape[1:]
    return np.stack([2 * grid[0] / max(height - 1, 1) - 1, 2 * grid[1] / max(width - 1, 1) - 1])


def own_grid(height: int, width: int) -> np.ndarray:
    """[2, h, w]: the (x, y) of each cell."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([columns, rows]).astype(np.float64)


def position_mlp(state: dict[str, np.ndarray], offset: np.ndarray) -> np.ndarray:
    """[..., 2] to [..., heads of a group]."""
    x = np.sign(offset) * np.log(np.abs(offset) + 1)
    for layer in ("0.0", "1.0"):
        weight, bias = (state[f"rel_pos_bias.mlp.{layer}.{part}"] for part in ("weight", "bias"))
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ state["rel_pos_bias.mlp.2.weight"].T + state["rel_pos_bias.mlp.2.bias"]


def deformable_cross_attention(
    state: dict[str, np.ndarray],
    query: np.ndarray,
    context: np.ndarray,
    *,
    heads: int,
    n_groups: int,
    stride: int,
    offset_scale: float,
    group_queries: bool = True,
    group_key_values: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Result [dim, h, w] and vgrid [G, 2, h', w'] of maps [dim, h, w]."""
    height, width = query.shape[1:]
    q = pointwise(state["to_q.weight"], query, n_groups if group_queries else 1)
    vgrids, samples = [], []
    for mine, image in zip(np.split(q, n_groups), np.split(context, n_groups), strict=True):
        hidden = gelu(
            depthwise(state["to_offsets.0.weight"], state["to_offsets.0.bias"], mine, stride)
        )
        offsets = np.tanh(pointwise(state["to_offsets.2.weight"], hidden, 1)) * offset_scale
        vgrid = own_grid(*offsets.shape[1:]) + offsets
        vgrids.append(vgrid)
        xs, ys = normalised(vgrid).reshape(2, -1)
        samples.append(
            np.stack([between(image, x, y) for x, y in zip(xs, ys, strict=True)], axis=1)
        )
    sampled = np.concatenate(samples)  # [dim, M]
    key_groups = n_groups if group_key_values else 1
    k, v = (pointwise(state[name], sampled, key_groups) for name in ("to_k.weight", "to_v.weight"))
    size = q.shape[0] // heads
    query_at = normalised(own_grid(height, width)).reshape(2, -1).T
    outs = []
    for head in range(heads):
        group, which = divmod(head, heads // n_groups)
        key_at = normalised(vgrids[group]).reshape(2, -1).T
        rows = slice(head * size, (head + 1) * size)
        logits = q[rows].reshape(size, -1).T @ k[rows] / math.sqrt(size)
        logits += position_mlp(state, query_at[:, None] - key_at)[..., which]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        outs.append((weights / weights.sum(1, keepdims=True)) @ v[rows].T)
    out = np.concatenate(outs, axis=1).T.reshape(-1, height, width)
    out = pointwise(state["to_out.weight"], out, 1) + state["to_out.bias"][:, None, None]
    return out, np.stack(vgrids)
