"""Random changes to training batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.data.bags import Bags
from survfuse.data.modalities import BagModality
from survfuse.data.simulate import simulate_cohort
from survfuse.training import fit, predict
from survfuse.training.augment import Augmentation, drop_patches
from survfuse.training.config import AugmentConfig


def bags(lengths: list[int]) -> BagBatch:
    # stored with a gap in front, coordinates tell the rows
    ragged = Ragged.from_lengths(lengths)
    ragged = ragged._replace(starts=ragged.starts + 3)
    n = sum(lengths) + 3
    features = torch.arange(n * 2.0).view(n, 2)
    return BagBatch(features, ragged, ragged.lengths > 0, torch.arange(n * 2).view(n, 2))


def test_each_bag_keeps_its_share_of_distinct_patches_of_its_own() -> None:
    given = bags([40, 0, 1, 10])
    found = drop_patches(given, 0.75)
    assert found.ragged.lengths.tolist() == [10, 0, 1, 3]
    rows = found.coords[:, 0] // 2
    torch.testing.assert_close(found.features[:, 0], rows * 2.0)
    parts = rows.split(found.ragged.lengths.tolist())
    ranges = zip(given.ragged.starts.tolist(), given.ragged.lengths.tolist())
    for part, (start, length) in zip(parts, ranges):
        assert part.unique().numel() == part.numel()
        assert all(start <= row < start + length for row in part.tolist())
    # every patch is as likely as any other
    counts = torch.zeros(54)
    for _ in range(400):
        counts[drop_patches(given, 0.75).coords[:, 0] // 2] += 1
    assert counts[3:43].min() > 60
    assert counts[3:43].max() < 145


def test_a_slide_moves_as_a_whole_and_tables_lose_columns() -> None:
    settings = AugmentConfig(slide_shift=0.5, table_dropout=0.4)
    given = bags([40, 0, 1])
    slides = Augmentation(settings)(given)
    moved = slides.features - given.features[3:]
    torch.testing.assert_close(moved[:40], moved[:1].expand(40, -1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved[0], moved[40])
    assert slides.ragged.lengths.tolist() == [40, 0, 1]
    values = Augmentation(settings)(TableBatch(torch.ones(3, 50), torch.ones(3) > 0)).values
    assert set(values.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.6))}
    assert 30 < int((values == 0).sum()) < 90


def test_nothing_asked_changes_nothing() -> None:
    for given in (bags([4, 2]), TableBatch(torch.ones(3, 5), torch.ones(3) > 0)):
        nothing = Augmentation(AugmentConfig())
        assert nothing(given) is given


def test_empty_bags_and_other_types() -> None:
    settings = AugmentConfig(patch_dropout=0.5, slide_shift=1.0)
    change = Augmentation(settings)
    assert change(bags([0, 0])).ragged.total == 0
    half = bags([4, 2])
    half = half._replace(features=half.features.bfloat16(), coords=None)
    found = change(half)
    assert found.features.dtype == torch.bfloat16
    assert found.coords is None


@pytest.mark.parametrize("name", ["table_dropout", "patch_dropout"])
def test_training_differs_and_testing_does_not_draw(tmp_path: Path, name: str) -> None:
    config = small_config(training={"augment": {name: 0.5}})
    risks = []
    for number, settings in enumerate((config, small_config(), config)):
        result = fit(settings, tmp_path / str(number), cohort=small_cohort(), split=given_split())
        risks.append(result.predictions.folds[0].test.risk)
    assert not np.array_equal(risks[0], risks[1])
    np.testing.assert_array_equal(risks[0], risks[2])


def test_neighbourhoods_are_those_of_all_patches_and_move_with_them() -> None:
    cells = torch.arange(64)
    coords = torch.stack([cells % 8, cells // 8], 1) * 256
    stored = Bags(torch.randn(64, 2), [64], ["a"], coords=coords)
    modality = BagModality(stored, ((0,), ()), neighbourhood=7)
    change = Augmentation(AugmentConfig(patch_dropout=0.5, slide_shift=0.3))
    found = modality.batch(np.array([0, 1]), change=change)
    assert found.features.shape == (32, 4)
    # a square as large as the slide holds every patch, those left out as well
    moved = (
        found.features[0, :2]
        - stored.features[found.coords[0, 1] // 32 + found.coords[0, 0] // 256]
    )
    mean = (stored.features.mean(0) + moved).expand(32, -1)
    torch.testing.assert_close(found.features[:, 2:], mean)
    assert modality.channels == 4


def test_neighbourhoods_end_at_the_slide_and_are_the_same_held_or_not(monkeypatch) -> None:
    coords = torch.tensor([[0, 0], [256, 0], [0, 256], [0, 0], [256, 0], [512, 0]])
    rows = torch.randn(6, 2)
    # a bag that nobody has may lack its coordinates
    stored = Bags(
        torch.cat([rows, torch.randn(2, 2)]),
        [3, 3, 2],
        ["a", "b", "c"],
        coords=torch.cat([coords.double(), torch.full((2, 2), float("nan"))]),
    )
    expected = torch.cat([rows[:3].mean(0).expand(3, -1), rows[3:6].mean(0).expand(3, -1)])
    for limit in (2**30, 0):
        monkeypatch.setattr("survfuse.data.neighbourhood._HELD", limit)
        modality = BagModality(stored, ((1, 0), (), (1,)), neighbourhood=3)
        found = modality.batch(np.array([0, 1, 2]))
        assert found.ragged.lengths.tolist() == [6, 0, 3]
        assert found.present.tolist() == [True, False, True]
        order = torch.tensor([3, 4, 5, 0, 1, 2, 3, 4, 5])
        features = found.features[found.ragged.rows()]
        torch.testing.assert_close(features, torch.cat([rows, expected], 1)[order])
        assert torch.equal(found.coords[found.ragged.rows()], coords[order].double())
    # a batch is computed of what it holds, not of all bags
    asked = []
    monkeypatch.setattr(stored, "batch", lambda groups, **_: asked.append(groups) or found)
    monkeypatch.setattr("survfuse.data.neighbourhood.with_neighbourhood", lambda batch, _: batch)
    modality.batch(np.array([2]))
    assert asked == [[[1]]]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="have no coordinates, or some that are not finite"):
        BagModality(stored, ((2,),), neighbourhood=3).batch(np.array([0]))


def test_a_trained_model_finds_neighbourhoods_in_new_cohorts(tmp_path: Path) -> None:
    config = small_config(
        data={
            "simulation": {"n_train": 30, "n_inner": 10, "n_test": 10},
            "patches": {"neighbourhood": 2},
        }
    )
    fit(config, tmp_path / "run")
    # the cohort itself knows nothing of it
    new = simulate_cohort(n_patients=(4, 0, 0), seed=5).cohort
    assert new.channels()["slides"] == ("bag", 16)
    assert len(predict(tmp_path / "run", new)) == 4


@pytest.mark.parametrize(
    ("name", "value"), [("table_dropout", 1.0), ("patch_dropout", -0.1), ("slide_shift", -1.0)]
)
def test_wrong_amounts_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"training\.augment\.{name} is {value}"):
        small_config(training={"augment": {name: value}})
