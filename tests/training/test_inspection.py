"""What the models of a run look at, and new patients scored: tables with known answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from training_cases import given_split, small_cohort, small_config

from survfuse.data.modalities import TableModality
from survfuse.data.targets import ClassTarget
from survfuse.models.base import FusionModel
from survfuse.training import explain, fit, predict
from survfuse.training.config_files import load_config
from survfuse.training.external import ENSEMBLE, external_scores, trained_on
from survfuse.training.fold_models import fold_models
from survfuse.training.inspection import COLUMNS, explain_parts
from survfuse.training.run_folder import RunFolder, RunFolderError

SEEDS = [1, 2]
TEST = [f"P-{i:03d}" for i in range(50, 60)]


@pytest.fixture(scope="module")
def cohort():
    return small_cohort(missing=True)


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(training={"epochs": 1, "batch_size": 16, "seeds": SEEDS})
    folder = tmp_path_factory.mktemp("inspection") / "run"
    fit(config, folder, cohort=cohort, split=given_split())
    return folder


def test_every_patch_has_a_share_of_the_look(run: Path, cohort) -> None:
    tested = cohort.subset(given_split().test)
    frame = explain(run, cohort=tested, what=["attention"], top=0)
    assert list(frame.columns) == list(COLUMNS)
    assert set(frame["group"]) == {"layer 0"}
    sums = frame.groupby(["seed", "unit_id"])["value"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    lengths = dict(zip(tested.unit_ids, tested.modalities["slides"].n_patches))
    counts = frame[frame["seed"] == 1].groupby("unit_id").size()
    # nobody without a slide, everybody else with every patch once
    assert counts.to_dict() == {unit: n for unit, n in lengths.items() if n}
    assert frame["x"].isna().all()
    most = explain(run, cohort=tested, what=["attention"], top=2)
    assert (most.groupby(["seed", "unit_id"]).size() == 2).all()
    whole = frame.sort_values("value", ascending=False, kind="stable")
    expected = whole.groupby(["seed", "unit_id"]).head(2)
    assert set(map(tuple, most[["seed", "unit_id", "item"]].to_numpy())) == set(
        map(tuple, expected[["seed", "unit_id", "item"]].to_numpy())
    )
    pd.testing.assert_frame_equal(
        most, explain(run, cohort=tested, what=["attention"], top=2), check_exact=True
    )


def test_effects_and_gradients_are_those_of_the_risk(run: Path, cohort) -> None:
    tested = cohort.subset(given_split().test)
    frame = explain(run, cohort=tested, what=["modality_effect", "gradient"])
    effects = frame[frame["kind"] == "modality_effect"]
    for name in ("genes", "slides"):
        has = set(np.array(tested.unit_ids)[tested.present(name)])
        assert set(effects[effects["modality"] == name]["unit_id"]) == has
    # with it minus without it: what a cohort that lacks the table scores
    risk = predict(run, tested).set_index(["seed", "unit_id"])["risk"]
    without = predict(run, tested.only(["slides"])).set_index(["seed", "unit_id"])["risk"]
    found = effects[effects["modality"] == "genes"].set_index(["seed", "unit_id"])["value"]
    np.testing.assert_allclose(found, (risk - without)[found.index], atol=1e-5)
    gradients = frame[frame["kind"] == "gradient_x_input"]
    assert set(gradients["item"]) == set(cohort.modalities["genes"].features)
    assert gradients["value"].abs().max() > 0


def test_what_a_model_offers_beyond_is_taken_up(
    run: Path, cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def importance(self, inputs):
        n = len(inputs["genes"].present)
        return {"gate": {name: torch.full((n,), 0.5) for name in inputs}}

    def maps(self, inputs):
        lengths = inputs["slides"].ragged.lengths
        return {"slides": {"tumor": torch.arange(float(lengths.sum()))}}

    monkeypatch.setattr(FusionModel, "modality_importance", importance, raising=False)
    monkeypatch.setattr(FusionModel, "patch_maps", maps, raising=False)
    tested = cohort.subset([50, 52])
    frame = explain(run, cohort=tested, what=["attention", "gates"], top=1)
    assert set(frame["kind"]) == {"attention", "patch_map", "gate"}
    last = frame[(frame["kind"] == "patch_map") & (frame["seed"] == 1)]
    n = tested.modalities["slides"].n_patches
    assert last["item"].tolist() == [k - 1 for k in n if k]
    assert (frame[frame["kind"] == "gate"]["value"] == 0.5).all()


def test_the_run_says_who_was_tested(cohort, tmp_path: Path) -> None:
    sizes = {"n_train": 20, "n_inner": 0, "n_test": 4}
    config = small_config(
        data={"simulation": sizes},
        protocol={"validation": "none", "n_bins": 2},
        model={"name": "mean_pool", "settings": {"width": 4}},
        training={"epochs": 1, "batch_size": 8, "patience": None},
    )
    fit(config, tmp_path / "run")
    frame = explain(tmp_path / "run")
    # every patch weighs the same to this model, so there is nothing to say of patches
    assert set(frame["kind"]) == {"modality_effect"}
    assert sorted(set(frame["unit_id"])) == [f"SIM-{i:05d}" for i in range(20, 24)]
    one = explain(tmp_path / "run", patients=["SIM-00021"])
    assert set(one["unit_id"]) == {"SIM-00021"}
    assert explain(tmp_path / "run", what=["gates"]).empty
    with pytest.raises(ValueError, match="unknown patient 'SIM-21'"):
        explain(tmp_path / "run", patients=["SIM-21"])


def test_what_cannot_be_explained_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'gates'"):
        explain(run, what=["gate"])
    with pytest.raises(ValueError, match="top is -1; it must be at least 0"):
        list(explain_parts(run, top=-1))
    with pytest.raises(RunFolderError, match="given from Python and needs it again"):
        explain(run)
    with pytest.raises(RunFolderError, match="holds no run"):
        explain(tmp_path)


def test_a_model_is_rebuilt_with_the_groups_of_its_training(run: Path, cohort) -> None:
    config = load_config(run / "config.yaml")
    genes = cohort.modalities["genes"]
    grouped = TableModality(genes.values, genes.features, {"new": ("G1",)})
    other = dataclasses.replace(cohort, modalities={**cohort.modalities, "genes": grouped})
    for fold in fold_models(RunFolder(run), config, other, torch.device("cpu")):
        assert fold.model.config.modalities["genes"].groups == {}
        assert not fold.model.training


def test_new_patients_are_scored_with_and_without_an_outcome(run: Path, cohort) -> None:
    time = cohort.time.copy()
    time[::2] = np.nan
    external = dataclasses.replace(cohort, time=time, unknown_outcome=True)
    frame = predict(run, external)
    known = predict(run, cohort)
    assert (frame["risk"] == known["risk"]).all()
    assert frame["event"].isna().sum() == frame["time"].isna().sum() == 60
    scores = external_scores(frame, resamples=100)
    assert scores.n_known == 30
    assert list(scores.concordance) == ["seed1-fold0", "seed2-fold0", ENSEMBLE]
    mean = frame.groupby("patient_id", sort=False)["risk"].mean()
    np.testing.assert_allclose(scores.patients["risk"], mean)
    assert (scores.patients["models"] == 2).all()
    nobody = dataclasses.replace(external, time=np.full(60, np.nan))
    assert nobody.summary()["median_time"] is None
    assert external_scores(predict(run, nobody)).concordance == {}
    assert trained_on(run, {"P-000", "P-059", "else"}) == {"P-000"}
    with pytest.raises(ValueError, match="it can be scored, not trained on"):
        fit(small_config(), run.parent / "no", cohort=external, split=given_split())


def test_a_cohort_that_shares_nothing_with_the_models_is_refused(run: Path, cohort) -> None:
    renamed = dataclasses.replace(cohort, modalities={"omics": cohort.modalities["genes"]})
    with pytest.raises(ValueError, match="the model reads genes, slides, and it must have one"):
        predict(run, renamed)


def test_every_task_can_be_explained_and_classes_alone_too(cohort, tmp_path: Path) -> None:
    kind = np.where(np.arange(60) % 2, "b", "a")
    whole = dataclasses.replace(
        cohort,
        covariates=cohort.covariates.assign(kind=kind),
        targets={"grade": ClassTarget(np.arange(60) % 3, ("G1", "G2", "G3"), True)},
    )
    tasks = {"grade": {"kind": "ordinal"}, "dx": {"kind": "classes", "target": "kind"}}
    config = small_config(
        model={"name": "mean_pool", "settings": {"width": 4}},
        tasks=tasks,
        training={"epochs": 1, "batch_size": 16},
    )
    fit(config, tmp_path / "run", cohort=whole, split=given_split())
    what = ["modality_effect", "gradient"]
    levels = explain(tmp_path / "run", cohort=whole, what=what)
    assert set(levels["group"]) == {""}
    names = ["grade_G1", "grade_G2", "grade_G3"]

    def expected(given) -> pd.Series:
        scored = predict(tmp_path / "run", given).set_index("unit_id")
        return (scored[names] * [0, 1, 2]).sum(axis=1)

    change = expected(whole) - expected(whole.only(["genes"]))
    effects = levels[levels["kind"] == "modality_effect"].set_index(["modality", "unit_id"])
    found = effects.loc["slides"]["value"]
    np.testing.assert_allclose(found, change[found.index], atol=1e-6)
    classes = explain(tmp_path / "run", cohort=whole, what=what, task="dx")
    assert set(classes["group"]) == {"a", "b"}
    # two probabilities sum to 1, so their changes and gradients to 0
    sums = classes.groupby(["kind", "unit_id", "modality", "item"])["value"].sum()
    np.testing.assert_allclose(sums, 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"unknown task 'grad'.*did you mean 'grade'"):
        explain(tmp_path / "run", cohort=whole, task="grad")
    scores = external_scores(predict(tmp_path / "run", whole))
    assert scores.concordance == {}
    assert list(scores.patients.columns) == [
        *("patient_id", "time", "event", *names, "dx_a", "dx_b", "models"),
    ]
    np.testing.assert_allclose(scores.patients[["dx_a", "dx_b"]].sum(axis=1), 1)
    assert trained_on(tmp_path / "run", {"P-000", "P-059"}) == {"P-000"}


def test_survival_is_explained_wherever_it_stands_among_the_tasks(cohort, tmp_path: Path) -> None:
    tasks = {"sex": {"kind": "classes", "target": "is_female"}, "os": {"kind": "survival"}}
    config = small_config(
        model={"name": "mean_pool", "settings": {"width": 4}},
        tasks=tasks,
        training={"epochs": 1, "batch_size": 16},
        evaluation={"missing": ["only:genes"]},
    )
    fit(config, tmp_path / "run", cohort=cohort, split=given_split())
    frame = explain(tmp_path / "run", cohort=cohort, what=["modality_effect"])
    effects = frame.set_index(["modality", "unit_id"])["value"]["slides"]
    risk = predict(tmp_path / "run", cohort).set_index("unit_id")["risk"]
    without = predict(tmp_path / "run", cohort.only(["genes"])).set_index("unit_id")["risk"]
    np.testing.assert_allclose(effects, (risk - without)[effects.index], atol=1e-5)
    assert (tmp_path / "run/missing/only-genes/predictions.csv").is_file()
    unknown = dataclasses.replace(cohort, time=np.full(60, np.nan), unknown_outcome=True)
    assert (predict(tmp_path / "run", unknown)["sex_1"] >= 0).all()
