"""Baselines of any name, the comparator by patient, and modalities withheld at test time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from training_cases import given_split, small_cohort, small_config

from survfuse.evaluation.predictions import Predictions
from survfuse.training import ConfigError, fit
from survfuse.training.baselines import baseline_config, training_rank, unimodal_by_patient
from survfuse.training.config_files import parse_config
from survfuse.training.missing import complete_rows, withheld

BASELINES = ["unimodal_by_patient", "mean_pool:default", "clinical_cox"]
QUICK = {"training": {"epochs": 1, "batch_size": 16}}


@pytest.fixture(scope="module")
def cohort():
    return small_cohort(missing=True)


@pytest.fixture(scope="module")
def result(cohort, tmp_path_factory: pytest.TempPathFactory):
    evaluation = {"baselines": BASELINES, "missing": ["only:genes", "only:slides", "half"]}
    config = small_config(**QUICK, evaluation=evaluation)
    config = dataclasses.replace(config, title="tuned")
    return fit(config, tmp_path_factory.mktemp("run") / "run", cohort=cohort, split=given_split())


def test_the_single_modalities_come_with_the_comparator(result) -> None:
    names = [
        "mean_pool:default",
        "clinical_cox",
        "only:genes",
        "only:slides",
        "unimodal_by_patient",
    ]
    assert list(result.baselines) == names
    assert (result.folder / "baselines/mean_pool-default/config.yaml").is_file()
    assert (result.folder / "baselines/unimodal_by_patient/report.md").is_file()
    loaded = Predictions.load(result.folder / "baselines/unimodal_by_patient")
    assert loaded.head == "risk"
    assert len(result.comparison.pairs) == 5


def test_a_patient_with_one_modality_has_the_rank_by_it(result, cohort) -> None:
    singles = {n: result.baselines[f"only:{n}"].predictions for n in cohort.modalities}
    found = unimodal_by_patient(singles, cohort).folds[0]
    rows = np.array([cohort.unit_ids.index(unit) for unit in found.test.unit_ids])
    ranks = {}
    for name, single in singles.items():
        fold = single.folds[0]
        trained = [cohort.unit_ids.index(unit) for unit in fold.train.unit_ids]
        known = fold.train.risk[cohort.present(name)[trained]]
        ranks[name] = np.array(
            [((known < x).mean() + (known <= x).mean()) / 2 for x in fold.test.risk]
        )
    genes, slides = (cohort.present(name)[rows] for name in ("genes", "slides"))
    assert (~genes).any()
    assert (~slides).any()
    np.testing.assert_allclose(found.test.risk[~slides], ranks["genes"][~slides])
    np.testing.assert_allclose(found.test.risk[~genes], ranks["slides"][~genes])
    both = genes & slides
    mean = (ranks["genes"] + ranks["slides"]) / 2
    np.testing.assert_allclose(found.test.risk[both], mean[both])
    assert training_rank(np.array([2.0]), np.array([])).tolist() == [0.5]


SINGLE = {
    "genes": {"name": "snn", "settings": {"widths": [4]}},
    "slides": {"name": "abmil", "settings": {"dim": 4, "hidden": 3}},
}


def test_models_that_need_both_are_compared_with_others_of_one(cohort, tmp_path: Path) -> None:
    model = {"name": "mcat", "settings": {"dim": 4, "encoder_heads": 2}}

    def config(**evaluation):
        given = small_config(**QUICK, evaluation={"baselines": BASELINES[:1], **evaluation})
        values = {**given.to_dict(), "model": model}
        return parse_config(values)

    with pytest.raises(ConfigError, match=r'"only:slides".*evaluation\.single_models names'):
        fit(config(), tmp_path / "own", cohort=cohort, split=given_split())
    assert not (tmp_path / "own").exists()
    run = fit(config(single_models=SINGLE), tmp_path / "run", cohort=cohort, split=given_split())
    assert list(run.baselines) == ["only:genes", "only:slides", "unimodal_by_patient"]
    models = [run.baselines[name].config.model.name for name in run.baselines]
    assert models[:2] == ["snn", "abmil"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"single_models": {"rna": SINGLE["genes"]}}, 'holds "rna"; the modalities are genes'),
        ({"single_models": SINGLE, "baselines": ["only:genes"]}, 'holds neither "only:slides"'),
    ],
)
def test_single_models_that_nobody_asked_for(
    cohort, tmp_path: Path, evaluation: dict, message: str
) -> None:
    config = small_config(evaluation={"baselines": BASELINES[:1], **evaluation})
    with pytest.raises(ConfigError, match=message):
        fit(config, tmp_path / "run", cohort=cohort, split=given_split())


def test_single_models_have_presets_that_exist() -> None:
    wrong = {"genes": {"name": "snn", "preset": "huge"}}
    with pytest.raises(ConfigError, match=r"evaluation.single_models.genes: .*huge"):
        small_config(evaluation={"baselines": ["only:genes"], "single_models": wrong})


def test_designs_score_the_complete_test_patients_without_what_is_withheld(result, cohort) -> None:
    found = json.loads((result.folder / "missing.json").read_text())
    assert list(found) == ["complete", "only:genes", "only:slides", "half"]
    rows = complete_rows(cohort, given_split().test)
    assert {one["patients"] for one in found.values()} == {len(rows)}
    assert all(one["single_modalities"] and one["difference"] for one in found.values())
    risks = {
        name: dict(zip(table.unit_ids, table.risk))
        for name in found
        for table in [
            Predictions.load(result.folder / "missing" / name.replace(":", "-")).folds[0].test
        ]
    }
    # nothing withheld is the run itself
    whole = result.predictions.folds[0].test
    own = dict(zip(whole.unit_ids, whole.risk))
    for unit, risk in risks["complete"].items():
        assert risk == pytest.approx(own[unit], abs=1e-6)
        half = risks["half"][unit]
        sides = risks["only:genes"][unit], risks["only:slides"][unit]
        assert min(abs(half - side) for side in sides) < 1e-6
    assert risks["only:genes"] != risks["only:slides"]
    text = (result.folder / "missing.md").read_text()
    assert "| half |" in text


def test_half_of_the_patients_lose_each_side(cohort) -> None:
    rows = complete_rows(cohort, np.arange(len(cohort)))
    masks = withheld("half", cohort, rows, 0)
    assert (masks["genes"] ^ masks["slides"]).all()
    assert abs(int(masks["genes"].sum()) - len(rows) / 2) <= 0.5
    again = withheld("half", cohort, rows, 0)
    assert np.array_equal(again["genes"], masks["genes"])
    assert not np.array_equal(withheld("half", cohort, rows, 1)["genes"], masks["genes"])
    one = cohort.only(["genes"])
    with pytest.raises(ConfigError, match='"half", which withholds tables from one half'):
        withheld("half", one, rows, 0)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"missing": ["only:gene"]}, "the modalities are genes, slides"),
        ({"baselines": ["healnet"]}, "the name of the run itself"),
        ({"baselines": ["only:omics"]}, "the modalities are genes, slides"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_training(
    evaluation, message: str, cohort, tmp_path: Path
) -> None:
    config = small_config(**QUICK, evaluation=evaluation)
    with pytest.raises(ConfigError, match=message):
        fit(config, tmp_path / "run", cohort=cohort, split=given_split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"baselines": ["cox"]}}, "or only:<modality>"),
        ({"evaluation": {"baselines": ["healnet:papers"]}}, "must be null or one of paper"),
        ({"evaluation": {"baselines": ["clinical_cox:x"]}}, "has no presets"),
        ({"evaluation": {"baselines": ["mean_pool", "mean_pool"]}}, "they must differ"),
        ({"evaluation": {"missing": ["quarter"]}}, 'it must be "half", only:<modality>'),
        ({"evaluation": {"missing": ["half", "half"]}}, "they must differ"),
        (
            {"evaluation": {"missing": ["half"]}, "model": {"name": "clinical_cox"}},
            "no way to go without a modality",
        ),
        ({"data": {"groups": "pathways"}}, "it must be null, one of families"),
        (
            {"data": {"patches": {"fraction": 0}}},
            r"patches.fraction is 0.0; it must be in \(0, 1\]",
        ),
        ({"data": {"patches": {"seed": -1}}}, "patches.seed is -1"),
    ],
)
def test_wrong_settings_name_their_key(sections, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**sections)


def test_a_baseline_of_another_model_drops_what_it_cannot_do() -> None:
    config = small_config(evaluation={"missing": ["half"]})
    found = baseline_config(config, "healnet:released:kirp", ["genes"])
    assert (found.model.preset, found.label) == ("released:kirp", "healnet:released:kirp")
    assert found.evaluation.missing == ()
