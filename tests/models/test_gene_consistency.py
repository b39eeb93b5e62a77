"""Gene-guided consistency against plain loops; samples that lack something; histograms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.models.gene_consistency import (
    gene_consistency,
    offset_histogram,
    released_gene_consistency,
)


def _plain(genes: Tensor, vectors: Tensor) -> Tensor:
    def unit(matrix: Tensor) -> Tensor:
        return matrix / matrix.norm(dim=1, keepdim=True)

    by_genes = unit(genes @ genes.T)
    groups = [unit(vectors[:, g] @ vectors[:, g].T) for g in range(vectors.shape[1])]
    return ((by_genes - torch.stack(groups).mean(0)) ** 2).sum() / len(genes)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_against_plain_torch(n: int) -> None:
    genes, offsets = torch.randn(n, 6).double(), torch.randn(n, 3, 8).double()
    torch.testing.assert_close(gene_consistency(genes, offsets), _plain(genes, offsets))
    if n == 1:
        assert float(gene_consistency(genes, offsets)) == pytest.approx(0.0)


def test_only_samples_with_both_count() -> None:
    genes, offsets = torch.randn(5, 6).double(), torch.randn(5, 3, 8).double()
    present = torch.tensor([True, False, True, True, False])
    expected = _plain(genes[present], offsets[present])
    genes[1], offsets[4] = torch.nan, torch.nan
    genes.requires_grad_()
    offsets.requires_grad_()
    got = gene_consistency(genes, offsets, present)
    torch.testing.assert_close(got, expected)
    got.backward()
    for leaf in (genes, offsets):
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[~present].any()
        assert leaf.grad[present].any(-1).all()
    nobody = gene_consistency(genes, offsets, torch.zeros(5, dtype=torch.bool))
    assert float(nobody.detach()) == 0.0


def test_vectors_of_nothing_have_no_direction_and_finite_gradients() -> None:
    genes, offsets = torch.randn(4, 6), torch.randn(4, 3, 8)
    genes[1], offsets[2] = 0.0, 0.0
    genes.requires_grad_()
    offsets.requires_grad_()
    gene_consistency(genes, offsets).backward()
    assert genes.grad.isfinite().all()
    assert float(genes.grad.abs().max()) < 100.0
    assert offsets.grad.isfinite().all()


def test_gradients() -> None:
    genes = torch.rand(3, 4, dtype=torch.double, requires_grad=True)
    offsets = torch.rand(9, 2, 2, dtype=torch.double) * 3 - 1.5
    ragged = Ragged.from_lengths([4, 2, 3])

    def loss(genes: Tensor, offsets: Tensor) -> Tensor:
        return gene_consistency(genes, offset_histogram(offsets, ragged, reach=2.0))

    assert torch.autograd.gradcheck(loss, (genes, offsets.requires_grad_()))


def test_released_mixes_samples_and_groups_and_keeps_the_base_grid() -> None:
    n, n_groups, side = 3, 2, 4
    genes, offsets = torch.randn(n, 6).double(), torch.randn(n, n_groups, side * side, 2).double()
    cell = torch.arange(side * side)
    points = offsets + torch.stack([cell % side, cell // side], 1)
    # the tensor of the public code: samples and groups in one dimension, (x, y) as channels
    vgrid = points.mT.reshape(n * n_groups, 2, side, side)
    groups = vgrid.reshape(n_groups, n, -1)
    expected = _plain(genes, groups.transpose(0, 1))
    torch.testing.assert_close(released_gene_consistency(genes, points), expected)
    fixed = gene_consistency(genes, offsets.flatten(2))
    torch.testing.assert_close(fixed, _plain(genes, offsets.flatten(2)))
    # the base grid outweighs what samples differ in
    same = _plain(torch.ones_like(genes), points.flatten(2))
    assert float(same) < 0.3 * float(_plain(torch.ones_like(genes), offsets.flatten(2)))
    assert float(released_gene_consistency(genes[:0], points[:0])) == 0.0


def test_histograms_of_offsets() -> None:
    corner = torch.tensor([[-4.0, -4.0], [4.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    ragged = Ragged.from_lengths([1, 0, 2, 1])
    found = offset_histogram(corner[:, None], ragged, reach=4.0)
    assert found.shape == (4, 1, 25)
    assert found[0, 0].nonzero().tolist() == [[0]]
    assert not found[1].any()
    # (4, 4) and (0, 0), half each
    assert {i: float(found[2, 0, i]) for i in (12, 24)} == {12: 0.5, 24: 0.5}
    # (1, 0) is halfway from node (0, 0) to the next along x
    assert {i: float(found[3, 0, i]) for i in (12, 17)} == {12: 0.5, 17: 0.5}
    torch.testing.assert_close(found.sum(2)[:, 0], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    many = offset_histogram(torch.rand(7, 3, 2) * 8 - 4, Ragged.from_lengths([7]), reach=4.0)
    torch.testing.assert_close(many.sum(2), torch.ones(1, 3))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"genes has shape \(3, 4\) and offsets \(2, 1, 5\)"):
        gene_consistency(torch.zeros(3, 4), torch.zeros(2, 1, 5))
