"""Cohorts from configurations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_cases import small_config

from survfuse.training import ConfigError, fit, run
from survfuse.training.sources import REGION, LoadedCohort, load_cohort

SIZES = {"n_train": 8, "n_inner": 4, "n_test": 4}


def test_a_simulated_cohort_brings_its_split_and_oracles() -> None:
    loaded = load_cohort(
        small_config(data={"simulation": {**SIZES, "width": 8, "min_patches": 1100, "seed": 3}})
    )
    assert [len(part) for part in loaded.split] == [8, 4, 4]
    assert loaded.cohort.channels() == {"genes": ("table", 60), "slides": ("bag", 8)}
    assert loaded.cohort.modalities["slides"].n_patches.min() >= 1089
    assert set(loaded.oracle) == {"full", "omics", "slide", "additive", "without_space"}
    assert all(risk.shape == (16,) for risk in loaded.oracle.values())


def test_shares_of_missing_modalities_are_passed_on() -> None:
    shares = {"complete": 0.0, "omics_only": 1.0, "slide_only": 0.0}
    cohort = load_cohort(small_config(data={"simulation": {**SIZES, **shares}})).cohort
    assert cohort.present("genes").all()
    assert not cohort.present("slides").any()


def test_modalities_are_chosen_by_name() -> None:
    sizes = {"simulation": SIZES}
    cohort = load_cohort(small_config(data={**sizes, "modalities": ["genes"]})).cohort
    assert list(cohort.modalities) == ["genes"]
    with pytest.raises(ConfigError, match=r"data\.modalities: .*gens"):
        load_cohort(small_config(data={**sizes, "modalities": ["gens"]}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"bags": "x.h5"}, "the simulated cohort has slides of its own"),
        ({"source": "slides"}, "data.folder is not set"),
        ({"source": "tcga_omics", "cohort": "kirp", "folder": "/nowhere"}, "/nowhere does not"),
    ],
)
def test_settings_that_do_not_fit_a_source_are_named(data: dict, message: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError)) as caught:
        load_cohort(small_config(data={"simulation": SIZES, **data}))
    assert message in str(caught.value)


def test_a_negative_control_says_so(shared_data: Path) -> None:
    config = small_config(
        data={
            "source": "tcga_omics",
            "cohort": "kirp",
            "folder": str(shared_data),
            "tables": "merged",
            "bags": "simulated",
        }
    )
    cohort = load_cohort(config).cohort
    assert cohort.channels() == {"omics": ("table", 1577), "control_slides": ("bag", 16)}
    assert any("negative control" in note for note in cohort.notes)


def test_other_endpoints_come_from_the_clinical_resource(shared_data: Path) -> None:
    pytest.importorskip("openpyxl", reason="reading TCGA-CDR's workbook needs openpyxl")
    common = {"source": "tcga_omics", "cohort": "blca", "folder": str(shared_data)}
    overall = load_cohort(small_config(data=common)).cohort
    specific = load_cohort(small_config(data={**common, "endpoint": "DSS"})).cohort
    assert specific.event.sum() < overall.event.sum()


def test_survpath_has_expression_and_specific_survival(shared_data: Path) -> None:
    config = small_config(
        data={"source": "survpath", "cohort": "blca", "folder": str(shared_data)}
        | {"endpoint": "DSS"},
        protocol={"split": "published", "validation": "none"},
    )
    from survfuse.training.folds import plan_folds

    cohort = load_cohort(config).cohort
    assert cohort.channels()["rnaseq"] == ("table", 1577)
    assert len(plan_folds(config, cohort, None)) == 5


def test_patches_and_groups_are_those_that_were_asked_for(tmp_path: Path) -> None:
    data = {"simulation": SIZES, "patches": {"fraction": 0.1}, "groups": str(tmp_path / "g.csv")}
    with pytest.raises(FileNotFoundError, match=r"g\.csv"):
        load_cohort(small_config(data=data))
    (tmp_path / "g.csv").write_text("first,second\nG01,M01\nG02,\n")
    cohort = load_cohort(small_config(data=data)).cohort
    assert cohort.modalities["genes"].groups == {"first": ("G01", "G02"), "second": ("M01",)}
    assert set(cohort.modalities["slides"].n_patches) == {102}
    genes = small_config(data={**data, "modalities": ["genes"]})
    assert not any("random" in note for note in load_cohort(genes).cohort.notes)
    (tmp_path / "g.csv").write_text("first\nTP53\n")
    with pytest.raises(ConfigError, match=r"data\.groups: no gene of .*g\.csv"):
        load_cohort(small_config(data=data))
    # what a trained model reads was frozen with it
    external = load_cohort(small_config(data=data), external=True).cohort
    assert set(external.modalities["genes"].groups) == {"tumor", "microenvironment"}
    with pytest.raises(ConfigError, match=r"data\.folder is not set"):
        load_cohort(small_config(data={**data, "groups": "families"}))


@pytest.mark.parametrize(
    ("source", "groups", "sizes"),
    [("tcga_omics", "families", [6, 6, 6]), ("survpath", "hallmarks", [50])],
)
def test_groups_by_name_are_read_below_the_folder(
    source: str, groups: str, sizes: list[int], shared_data: Path
) -> None:
    data = {"source": source, "folder": str(shared_data), "cohort": "blca", "groups": groups}
    cohort = load_cohort(small_config(data=data, protocol={"split": "published"})).cohort
    assert [len(table.groups) for table in cohort.modalities.values()] == sizes


def test_real_slides_go_all_the_way_through(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openslide", reason="encoding slides needs openslide")
    loaded = []

    def load(*arguments, **options) -> LoadedCohort:
        loaded.append(load_cohort(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(run, "load_cohort", load)
    config = small_config(
        data={"source": "slides", "folder": str(shared_data)},
        protocol={"split": "patients", "n_folds": 2, "validation": "none", "n_bins": 2},
        training={"epochs": 1},
    )
    result = fit(config, tmp_path / "run")
    ((cohort, *_),) = loaded
    assert cohort.modalities["slides"].n_patches.max() == REGION
    # the larger slide alone has 162 tissue patches
    assert cohort.modalities["slides"].n_patches.sum() > 162
    assert any("smoke test" in note for note in result.report.notes)
    assert "smoke test" in (tmp_path / "run/report.md").read_text()
    risk = np.concatenate([fold.test.risk for fold in result.predictions.folds])
    assert np.isfinite(risk).all()
    assert risk.std() > 0


def test_classes_of_patients_to_be_scored_are_not_read() -> None:
    config = small_config(
        data={"simulation": SIZES}, tasks={"dx": {"kind": "classes", "target": "nowhere"}}
    )
    with pytest.raises(ConfigError, match=r"tasks\.dx\.target"):
        load_cohort(config)
    assert load_cohort(config, external=True).cohort.targets == {}
