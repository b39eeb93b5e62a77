"""Gene-guided consistency: samples with like genes should look at their slides alike.

Source: Zhang et al., "Knowledge-driven subspace fusion and gradient coordination for multi-modal
learning", MICCAI 2024 (its public code). Both sides are matrices of similarity between the samples
of a batch: that of the genes, and the mean over offset groups of that of the sampled offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.layers.bag_mean import bag_mean
from survfuse.ops.registration import autocast_off
from survfuse.ragged import Ragged

# squared length below which a row of similarities has no direction
_NO_LENGTH = 1e-24


def gene_consistency(genes: Tensor, offsets: Tensor, present: Tensor | None = None) -> Tensor:
    r"""Squared difference of two similarities of samples, over the samples that have both.

    .. math:: \frac{1}{n} \sum_{ij} \Big( \widehat{g g^\top}
        - \frac{1}{G} \sum_k \widehat{v_k v_k^\top} \Big)_{ij}^2

    where the hat divides each row by its length. 0 for one sample.

    Args:
        genes: [B, dim] vector of the genes of each sample.
        offsets: [B, G, E] for each offset group a vector of one length for all samples: the offsets
            of one map's points, or `offset_histogram` where samples have different points.
        present: [B] bool, samples that have genes and points; None is all. The rest may hold
            anything and gets zero gradients.

    Returns:
        A number, fp32 (fp64), 0 where no sample has both.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if genes.dim() != 2 or offsets.dim() != 3 or genes.shape[0] != offsets.shape[0]:
        raise ValueError(
            f"genes has shape {tuple(genes.shape)} and offsets {tuple(offsets.shape)}; they must "
            "be [B, dim] and [B, G, E]"
        )
    kind = torch.float64 if genes.dtype == torch.float64 else torch.float32
    if present is None:
        present = torch.ones(genes.shape[0], dtype=torch.bool, device=genes.device)
    # the products of 16 bits are too coarse for differences of similarities
    with autocast_off(genes.device):
        rows = torch.where(present[:, None], genes.to(kind), 0.0)
        moved = torch.where(present[:, None, None], offsets.to(kind), 0.0)
        by_genes = _unit_rows(rows @ rows.mT)
        by_offsets = _unit_rows(torch.einsum("ike,jke->kij", moved, moved)).mean(0)
        return (by_genes - by_offsets).square().sum() / present.sum().clamp(min=1)


def released_gene_consistency(genes: Tensor, points: Tensor) -> Tensor:
    """What the public code computes for a batch of complete samples with maps of one size.

    Two things differ from `gene_consistency` of offsets, and each hides the offsets: points include
    the base grid, which is the same for all samples and much longer; and the tensor, which holds
    the groups of one sample after another, is read as the samples of one group after another, so
    that what is compared mixes both. (The code repeats the genes for each of 2500 patches, which
    the division by the length of a row takes back.)

    Args:
        genes: [B, dim].
        points: [B, G, M, 2] with the base grid.
    """
    n_samples, n_groups, n_points, _ = points.shape
    mixed = points.reshape(n_groups, n_samples, 2 * n_points).transpose(0, 1)
    return gene_consistency(genes, mixed)


def offset_histogram(offsets: Tensor, ragged: Ragged, *, reach: float, n_bins: int = 5) -> Tensor:
    """How the offsets of each bag are distributed: [B, G, n_bins ** 2].

    Slides have different numbers of points at places that do not correspond, so their offsets
    cannot be compared point by point. What can is how far and in which directions samples look: the
    share of offsets near each node of a regular grid over [-reach, reach] squared, an offset being
    shared among the four nodes around it as bilinear interpolation does. It does not depend on the
    order or number of points, its products are never negative, as those of genes behind a ReLU, and
    it has a slope almost everywhere.

    Args:
        offsets: [P, G, 2] packed, within `reach`.
        ragged: the points of each bag. A bag without points gets zeros.
        reach: the largest offset along an axis, above 0.
        n_bins: nodes along an axis, at least 2.
    """
    step = 2.0 * reach / (n_bins - 1)
    nodes = torch.arange(n_bins, device=offsets.device) * step - reach
    near = (1.0 - (offsets[..., None] - nodes).abs() / step).clamp(min=0.0)  # [P, G, 2, n]
    shares = near[..., 0, :, None] * near[..., 1, None, :]  # [P, G, n, n]
    flat = shares.flatten(1).contiguous()  # [P, G n n]
    return bag_mean(flat, ragged).to(flat.dtype).unflatten(1, (offsets.shape[1], -1))


def _unit_rows(matrix: Tensor) -> Tensor:
    """Rows of length 1; a row without length stays zeros, by selection and with zero gradient."""
    length = matrix.square().sum(-1, keepdim=True)
    there = length > _NO_LENGTH
    return torch.where(there, matrix / torch.where(there, length, 1.0).sqrt(), 0.0)
