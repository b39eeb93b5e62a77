"""`BagCrossAttention`: how patches are weighed by what heads make of them, against plain torch."""

from __future__ import annotations

import pytest
import torch

from survfuse.layers.latent_attention import BagCrossAttention
from survfuse.ragged import Ragged

LENGTHS = [7, 1, 0, 30]


def layer(dtype: torch.dtype = torch.float64) -> BagCrossAttention:
    torch.manual_seed(0)
    made = BagCrossAttention(6, 5, heads=3, head_dim=4, temperature=0.3).to(dtype)
    with torch.no_grad():
        made.bag_norm.weight.uniform_(0.5, 1.5)
        made.bag_norm.bias.uniform_(-1.0, 1.0)
    return made


def plain(made: BagCrossAttention, latents: torch.Tensor, bag: torch.Tensor) -> torch.Tensor:
    """[N] of one sample, latents [Lq, dim] and bag [N, D]; all pairs held."""
    rows = made.bag_norm(bag)
    query = made.query(made.query_norm(latents)).unflatten(1, (3, 4))
    key = torch.einsum("nd,hed->nhe", rows, made.key_weight)
    value = torch.einsum("nd,hed->nhe", rows, made.value_weight)
    weights = (torch.einsum("qhe,nhe->qhn", query, key) / (2.0 * 0.3)).softmax(2)
    moved = torch.einsum("qhn,nhe->qhe", weights, value) - value.mean(0)
    effect = torch.zeros(latents.shape[0], 3, dtype=bag.dtype)
    for head in range(3):
        columns = made.output.weight[:, 4 * head : 4 * head + 4]
        effect[:, head] = (moved[:, head] @ columns.mT).norm(dim=1)
    return torch.einsum("qhn,qh->n", weights, effect / effect.sum())


@torch.no_grad()
def test_weights_by_effect_are_those_of_their_definition() -> None:
    made, ragged = layer(), Ragged.from_lengths(LENGTHS)
    latents, bag = torch.randn(4, 2, 6).double(), torch.randn(ragged.total, 5).double()
    found = made.weights_by_effect(latents, bag, ragged).split(LENGTHS)
    for i in (0, 3):
        first = sum(LENGTHS[:i])
        expected = plain(made, latents[i], bag[first : first + LENGTHS[i]])
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-12)
    # what is found in one patch is the mean: heads count alike
    assert found[1].item() == pytest.approx(1.0)


@torch.no_grad()
def test_dense_bags_weigh_patches_as_packed_ones_do() -> None:
    made = layer()
    latents, bag = torch.randn(3, 1, 6).double(), torch.randn(3, 8, 5).double()
    packed = made.weights_by_effect(latents, bag.flatten(0, 1), Ragged.from_lengths([8, 8, 8]))
    torch.testing.assert_close(made.weights_by_effect(latents, bag), packed)


@torch.no_grad()
def test_a_head_that_changes_nothing_counts_nothing() -> None:
    made, ragged = layer(), Ragged.from_lengths([20])
    latents, bag = torch.randn(1, 1, 6).double(), torch.randn(20, 5).double()
    made.output.weight[:, 4:] = 0.0
    by_effect = made.weights_by_effect(latents, bag, ragged)
    torch.testing.assert_close(by_effect, plain(made, latents[0], bag))
    by_mean = made.with_weights(latents, bag, ragged)[1]
    assert (by_effect - by_mean).abs().max() > 0.01
    made.output.weight.zero_()
    torch.testing.assert_close(made.weights_by_effect(latents, bag, ragged), by_mean)
