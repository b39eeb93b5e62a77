"""Self-attention of a long bag through landmarks, at a cost that is linear in its length.

Source: Xiong et al., "Nystromformer: a Nystrom-based algorithm for approximating self-attention",
AAAI 2021, equations 13 and 14 and section "Approximate pseudo-inverse".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from survfuse.layers.bag_mean import bag_mean
from survfuse.layers.dropout import Dropout
from survfuse.layers.latent_attention import zero_gradients
from survfuse.ops import cross_attention, cross_attention_with_lse
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed, in_batch_order


class Landmarks(NamedTuple):
    """Means of runs of neighbouring rows; a bag of few rows has a landmark for each."""

    rows: Tensor  # [B, m, dim]; zeros where there is none
    present: Tensor  # [B, m] bool


class NystromSelfAttention(nn.Module):
    r"""Rows of a bag attend to one another through m landmarks.

    .. math:: W_o\, \mathrm{concat}_h\bigl(\mathrm{softmax}(Q \tilde K^T)\,
              \mathrm{softmax}(\tilde Q \tilde K^T)^{+}\, \mathrm{softmax}(\tilde Q K^T)\, V
              + \mathrm{conv}_h(V)\bigr) + b_o

    Landmarks of a bag are the means of m runs of neighbouring rows whose lengths differ by at most
    one; the order of the rows therefore matters. A bag of at most m rows has every row as its own
    landmark, and gets exact attention: the pseudo-inverse, which would cancel, is left out.

    Nothing is padded, so no sample depends on the others of its batch. (Public codes pad with rows
    that take part, and start the pseudo-inverse from a maximum over the whole batch.)

    Args:
        dim: width of the rows.
        heads: number of heads H.
        dim_head: size of a head d.
        landmarks: m, of one bag.
        iterations: of the pseudo-inverse.
        residual_kernel: odd length of the convolution of the values along the bag, one filter per
            head; None leaves it out.
        dropout: probability with which a number of the result is dropped in training.
        backend: of the ops; None for the fastest that can serve the call.

    Raises:
        ValueError: a size is below 1, or `residual_kernel` is even.

    Precision: the pseudo-inverse is formed in fp32 (fp64 for fp64).
    Cost: O(N (m + kernel) H d) operations. Beside Q, K and V nothing of the bag's length is held;
    landmarks take H m^2 numbers per bag.

    Example:
        >>> attention = NystromSelfAttention(16, heads=2, dim_head=8, landmarks=4)
        >>> attention(torch.randn(50, 16), Ragged.from_lengths([30, 20])).shape
        torch.Size([50, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        landmarks: int = 256,
        iterations: int = 6,
        residual_kernel: int | None = 33,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "dim_head": dim_head}
        for name, value in {**sizes, "landmarks": landmarks, "iterations": iterations}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if residual_kernel is not None and (residual_kernel < 1 or residual_kernel % 2 == 0):
            raise ValueError(f"residual_kernel is {residual_kernel}; it must be odd, or None")
        self.heads, self.dim_head = heads, dim_head
        self.landmarks, self.iterations, self.backend = landmarks, iterations, backend
        self.query_key_value = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.output = nn.Linear(heads * dim_head, dim)
        self.dropout = Dropout(dropout)
        self.residual = None
        if residual_kernel is not None:
            self.residual = nn.Parameter(torch.empty(heads, residual_kernel))
            nn.init.uniform_(self.residual, -(residual_kernel**-0.5), residual_kernel**-0.5)

    def forward(self, x: Tensor, ragged: Ragged | None = None) -> Tensor:
        """The update of the rows, without norm and residual.

        Args:
            x: [T, dim] packed, described by `ragged`; or dense [B, N, dim].
            ragged: the ranges of a packed bag; None is one bag.

        Returns:
            The shape of `x`; where bags leave rows out or share them [total, dim], packed in batch
            order.
        """
        shape = x.shape if x.dim() == 3 else None
        packed, ragged = as_packed(x, ragged)
        packed = packed.to(self.output.weight.dtype)
        # bags that lie densely one behind the other already are what a dense tensor holds
        packed, ragged = (packed, ragged) if shape else in_batch_order(packed, ragged)
        split = (3, self.heads, self.dim_head)
        query, key, value = self.query_key_value(packed).unflatten(1, split).unbind(1)
        marks = segment_means(packed, ragged, self.landmarks, backend=self.backend)
        marked = self.query_key_value(marks.rows).unflatten(2, split).unbind(2)
        attended, _ = nystrom_attention(
            (query, key, value),
            marked,
            marks.present,
            ragged,
            iterations=self.iterations,
            backend=self.backend,
        )
        if self.residual is not None:
            attended = attended + convolve_bags(value, ragged, self.residual)
        update = self.dropout(self.output(attended.flatten(1).to(packed.dtype)))
        return update if shape is None else update.view(shape)


def segment_means(
    x: Tensor, ragged: Ragged, landmarks: int, *, backend: str | None = None
) -> Landmarks:
    """Means of `landmarks` runs of rows per bag, or the rows themselves where there are fewer.

    Args:
        x: [T, dim] packed.
        ragged: its ranges.
        landmarks: at most so many per bag.
        backend: of `survfuse.ops.pool_bag`.

    Returns:
        `Landmarks` of `min(landmarks, ragged.max_length)`, of the type of `x`.
    """
    n_marks = max(1, min(landmarks, ragged.max_length))
    count = ragged.lengths.clamp(max=n_marks)[:, None]
    edge = torch.arange(n_marks + 1, device=x.device)
    # edges of run j are j N / m, rounded down: lengths differ by at most one, none is empty
    edges = torch.minimum(edge, count) * ragged.lengths[:, None] // count.clamp(min=1)
    starts, lengths = ragged.starts[:, None] + edges[:, :-1], edges.diff(dim=1)
    longest = -(-ragged.max_length // n_marks)
    runs = Ragged(starts.flatten(), lengths.flatten(), ragged.total, longest)
    means = bag_mean(x, runs, backend=backend).to(x.dtype).view(ragged.n_bags, n_marks, x.shape[1])
    return Landmarks(means, edge[:-1] < count)


def nystrom_attention(
    rows: tuple[Tensor, Tensor, Tensor],
    marked: tuple[Tensor, Tensor, Tensor],
    present: Tensor,
    ragged: Ragged,
    *,
    iterations: int = 6,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The attention of a bag to itself through landmarks.

    Args:
        rows: query, key and value of the rows, each [T, H, d] packed.
        marked: the same of the landmarks, each [B, m, H, d].
        present: [B, m] bool, which landmarks there are.
        ragged: the ranges of the rows.
        iterations: of the pseudo-inverse.
        scale: by default d ** -0.5.
        backend: of the ops.

    Returns:
        out [total, H, d], and lse [total, H]: an estimate of the logsumexp of a row's logits, which
        takes each landmark for all rows it stands for, `logsumexp_l(q . k_l) + log(N / m)`. By it
        out can be merged with attention to other keys. Both are exact where N <= m.
    """
    query, key, value = rows
    query_marks, key_marks, value_marks = marked
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lengths, n_marks = ragged.lengths, present.sum(1)
    # where every row is its own landmark, softmax and pseudo-inverse cancel
    mixed = value_marks
    if ragged.max_length > present.shape[1]:
        means = cross_attention(
            query_marks, key, value, key_ragged=ragged, scale=scale, backend=backend
        )  # [B, m, H, d]
        inverse = _inverse_between(query_marks, key_marks, present, scale, iterations)
        with torch.autocast(query.device.type, enabled=False):
            mixed = torch.einsum("bhij,bjhd->bihd", inverse, means.to(inverse.dtype))
        short = (lengths <= n_marks)[:, None, None, None]
        mixed = torch.where(short, value_marks.to(mixed.dtype), mixed)
    mixed = mixed.to(key_marks.dtype)
    bias = torch.zeros(present.shape, device=query.device, dtype=torch.float32)
    out, lse = cross_attention_with_lse(
        query,
        key_marks,
        mixed,
        bias=bias.masked_fill(~present, -torch.inf).to(accumulation_type(query.dtype)),
        query_ragged=ragged,
        scale=scale,
        backend=backend,
    )
    stands_for = (lengths.clamp(min=1) / n_marks.clamp(min=1)).log().to(lse.dtype)
    return out, lse + ragged.per_patch(stands_for)[:, None]


def _inverse_between(
    query: Tensor, key: Tensor, present: Tensor, scale: float, iterations: int
) -> Tensor:
    """[B, H, m, m], the pseudo-inverse of the landmarks' attention; zeros for absent ones."""
    kind = accumulation_type(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.einsum("bihd,bjhd->bhij", query.to(kind) * scale, key.to(kind))
        pair = (present[:, None, :] & present[:, :, None])[:, None]
        # a row without any key keeps finite logits in front of the softmax, and is zeros behind it
        logits = torch.where(present[:, None, None, :], logits, torch.finfo(kind).min)
        weights = torch.where(pair, logits.softmax(-1), 0.0)
        if not torch.is_grad_enabled():
            return pseudo_inverse(weights, iterations)
        # a dozen such matrices per iteration would be kept for the backward
        return checkpoint(
            pseudo_inverse, weights, iterations, use_reentrant=False, preserve_rng_state=False
        )


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    r"""Moore-Penrose inverse by the iteration of Razavi et al. (2014) that the paper uses.

    .. math:: Z \leftarrow \tfrac14 Z\,(13 I - A Z\,(15 I - A Z\,(7 I - A Z))),\quad
              Z_0 = A^T / (\|A\|_1 \|A\|_\infty)

    with the norms of each matrix itself.

    Args:
        matrix: [..., m, m]. Zero matrices, and zero rows with zero columns, stay zero.
        iterations: components with singular values below about `3.25 ** (-iterations / 2)` of the
            largest are damped.
    """
    size = matrix.abs()
    norms = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    norms = torch.where(norms == 0, 1.0, norms)[..., None, None]
    inverse = matrix.mT / norms
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15.0 * identity - product @ (7.0 * identity - product)
        inverse = 0.25 * (inverse @ (13.0 * identity - product @ inner))
    return inverse


def convolve_bags(values: Tensor, ragged: Ragged, filters: Tensor) -> Tensor:
    """Convolve values along each bag, one filter per head; beyond a bag's ends lie zeros.

    Args:
        values: [total, H, d], bags one behind the other.
        ragged: their ranges.
        filters: [H, kernel], odd.

    Returns:
        [total, H, d].
    """
    total, heads, dim_head = values.shape
    if total == 0:
        return zero_gradients(values, [filters])
    reach = filters.shape[1] // 2
    rows, place = values.flatten(1), None
    if ragged.n_bags > 1:
        # so many zero rows between two bags that no filter reaches across
        place = torch.arange(total, device=values.device) + reach * ragged.bags()
        apart = rows.new_zeros(total + reach * (ragged.n_bags - 1), rows.shape[1])
        rows = apart.index_copy(0, place, rows)
    # channels lie last in memory already, so neither side is transposed
    images = rows[None, :, None].permute(0, 3, 1, 2)
    weight = filters.to(rows.dtype).repeat_interleave(dim_head, 0)[:, None, :, None]
    convolved = functional.conv2d(images, weight, padding=(reach, 0), groups=images.shape[1])
    convolved = convolved[0, :, :, 0].T
    if place is not None:
        convolved = convolved.index_select(0, place)
    return convolved.unflatten(1, (heads, dim_head))
