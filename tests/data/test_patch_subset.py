"""Fewer patches and dealt-out coordinates, whatever holds the bags."""

from __future__ import annotations

import pytest
import torch

from survfuse.data.bags import Bags
from survfuse.data.modalities import BagModality
from survfuse.data.patch_subset import PatchSubset, with_patch_subset
from survfuse.data.simulate import simulate_cohort


def bags(names=("a", "b", "c", "d")) -> Bags:
    lengths = [10, 4, 0, 1]
    features = torch.arange(15.0)[:, None].repeat(1, 3)
    coords = torch.stack([torch.arange(15.0), 100 + torch.arange(15.0)], 1)
    return Bags(features, lengths, names, coords=coords)


def rows_of(batch) -> list[torch.Tensor]:
    ranges = zip(batch.ragged.starts.tolist(), batch.ragged.lengths.tolist())
    return [batch.features[s : s + n] for s, n in ranges]


def test_a_bag_keeps_the_same_patches_in_every_batch() -> None:
    subset = PatchSubset(bags(), fraction=0.3, seed=1)
    assert subset.lengths.tolist() == [3, 1, 0, 1]
    assert (len(subset), subset.width) == (4, 3)
    whole = subset.batch([[0], [1], [2], [3]])
    other = subset.batch([[3, 0], [], [0]])
    assert other.present.tolist() == [True, False, True]
    assert torch.equal(rows_of(other)[0], torch.cat([rows_of(whole)[3], rows_of(whole)[0]]))
    assert torch.equal(rows_of(other)[2], rows_of(whole)[0])
    # a patch takes its coordinates along, and the order stays
    assert torch.equal(whole.coords[:, 0], whole.features[:, 0])
    assert rows_of(whole)[0][:, 0].diff().min() > 0
    # by name, not by place
    renamed = PatchSubset(bags(("d", "b", "c", "a")), fraction=0.3, seed=1)
    assert not torch.equal(renamed.kept(0), subset.kept(0))
    assert not torch.equal(PatchSubset(bags(), fraction=0.3, seed=2).kept(0), subset.kept(0))


def test_nothing_present_is_a_batch_too() -> None:
    batch = PatchSubset(bags(), fraction=0.5).batch([[], [2]])
    assert batch.features.shape == (0, 3)
    assert not batch.present.any()


def test_coordinates_are_dealt_out_within_each_bag_and_the_stored_ones_stay() -> None:
    source = bags()
    subset = PatchSubset(source, shuffle_coords=True)
    batch = subset.batch([[1], [0], [0]])
    # nothing was gathered
    assert batch.features is source.features
    assert batch.coords[:10, 0].sort().values.tolist() == list(range(10))
    assert batch.coords[10:14, 0].sort().values.tolist() == [10, 11, 12, 13]
    assert not torch.equal(batch.coords, source.coords)
    assert torch.equal(batch.coords[:, 1], batch.coords[:, 0] + 100)
    assert source.coords[:, 0].tolist() == list(range(15))
    both = PatchSubset(source, fraction=0.5, shuffle_coords=True).batch([[0]])
    plain = PatchSubset(source, fraction=0.5).batch([[0]])
    assert torch.equal(both.features, plain.features)
    assert torch.equal(both.coords.sort(0).values, plain.coords)


def test_bags_made_when_asked_for_give_what_those_in_memory_give() -> None:
    sizes = {"n_patients": (2, 0, 2), "n_patches": (1024, 1200)}
    found = []
    for lazy in (False, True):
        cohort = simulate_cohort(**sizes, lazy=lazy).cohort
        subset = with_patch_subset(cohort, fraction=0.08, shuffle_coords=True)
        found.append(subset.modalities["slides"].batch([0, 3]))
        assert subset.notes[-2].startswith("every bag is a fixed random 8 %")
        assert "negative control" in subset.notes[-1]
        whole = cohort.modalities["slides"].n_patches
        assert subset.modalities["slides"].n_patches.tolist() == [round(0.08 * n) for n in whole]
    assert torch.equal(found[0].features, found[1].features)
    assert torch.equal(found[0].coords, found[1].coords)


def test_what_cannot_be_is_refused() -> None:
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fraction is"):
            PatchSubset(bags(), fraction=fraction)
    cohort = simulate_cohort(n_patients=(2, 0, 1)).cohort
    with pytest.raises(ValueError, match="has no bags to take patches of"):
        with_patch_subset(cohort.only(["genes"]), fraction=0.5)
    assert isinstance(with_patch_subset(cohort).modalities["slides"], BagModality)
