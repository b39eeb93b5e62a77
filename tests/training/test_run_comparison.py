"""Several models on one cohort: the same patients, folds and seeds, or a refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from training_cases import small_config

from survfuse.models.mean_pool import MeanPoolConfig
from survfuse.training import ConfigError, compare_runs, load_config
from survfuse.training.run_comparison import ablation_configs, model_configs
from survfuse.training.run_folder import RunFolderError
from survfuse.training.tasks import with_targets

SIZES = {"n_train": 24, "n_inner": 0, "n_test": 16}


def config(**sections):
    return small_config(
        **{
            "data": {"simulation": SIZES},
            "protocol": {"validation": "none", "n_bins": 2},
            "model": {"name": "mean_pool", "settings": {"width": 4}},
            "training": {"epochs": 1, "batch_size": 8, "patience": None, "threads": 1},
            **sections,
        }
    )


def test_models_are_trained_and_compared_and_a_stop_costs_nothing(tmp_path: Path) -> None:
    runs = model_configs(config(), ["mean_pool", "mean_pool:default"])
    assert runs["mean_pool"].model.settings == {"width": 4}
    runs["wide"] = config(model={"name": "mean_pool", "settings": {"width": 8}})
    found = compare_runs(runs, tmp_path / "out")
    assert list(found.runs) == ["mean_pool", "mean_pool:default", "wide"]
    assert [pair.model_b for pair in found.comparison.pairs] == [
        "mean_pool:default",
        "wide (mean_pool)",
    ]
    assert "simulated cohort: not patients" in found.comparison.notes
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    values = json.loads((tmp_path / "out/compare.json").read_text())
    assert len(values["reports"]) == 3
    assert (tmp_path / "out/compare.csv").read_text().count("harrell_c") == 3 + 2
    assert "| wide (mean_pool) | honest |" in (tmp_path / "out/compare.md").read_text()
    with pytest.raises(RunFolderError, match="holds a run already"):
        compare_runs(runs, tmp_path / "out")
    # as if it had been stopped before the last run
    for path in sorted((tmp_path / "out/wide").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    again = compare_runs(runs, tmp_path / "out", resume=True)
    assert again.comparison == found.comparison
    for path, content in before.items():
        if path.name != "environment.json":
            assert path.read_bytes() == content, path
    every = compare_runs(runs, tmp_path / "out", resume=True, all_pairs=True)
    assert len(every.comparison.pairs) == 3
    longer = dataclasses.replace(runs["wide"].training, epochs=2)
    runs["wide"] = dataclasses.replace(runs["wide"], training=longer)
    with pytest.raises(RunFolderError, match=r"another configuration: training\.epochs is 2"):
        compare_runs(runs, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"simulation": {**SIZES, "n_test": 20}}}, "have other patients: .* 40 in common"),
        ({"data": {"simulation": {**SIZES, "seed": 1}}}, "have other outcomes"),
        ({"training": {"seeds": [2], "epochs": 1}}, "training.seeds and protocol.split must agree"),
        (
            {"protocol": {"split": "patients", "validation": "none", "n_bins": 2, "n_folds": 2}},
            "training.seeds and protocol.split must agree",
        ),
    ],
)
def test_other_patients_or_folds_are_no_comparison(sections, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_runs({"a": config(), "b": config(**sections)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_inputs_of_the_same_patients_may_be_compared(tmp_path: Path) -> None:
    few = {"simulation": SIZES, "patches": {"fraction": 0.05}}
    runs = {
        "all": config(),
        "few": config(data=few),
        "genes": config(data={"simulation": SIZES, "modalities": ["genes"]}),
    }
    found = compare_runs(runs, tmp_path / "out")
    notes = found.runs["few"].report.notes
    assert any("a fixed random 5 %" in note for note in notes)
    # what is said of some of the runs names them
    said = [note for note in found.comparison.notes if "random 5 %" in note]
    assert len(said) == 1
    assert said[0].startswith("few: ")
    assert load_config(tmp_path / "out/few/config.yaml").data.patches.fraction == 0.05


def test_the_list_of_models_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='models names "mean_pool" twice'):
        model_configs(config(), ["mean_pool", "mean_pool"])
    with pytest.raises(ConfigError, match=r'models holds "healnet:no": model\.preset is "no"'):
        model_configs(config(), ["healnet:no"])
    with pytest.raises(ConfigError, match='models holds "resnet"'):
        model_configs(config(), ["resnet"])
    with pytest.raises(ConfigError, match="needs at least two"):
        compare_runs({"a": config()}, tmp_path)
    with pytest.raises(ConfigError, match="same folder"):
        compare_runs({"a:b": config(), "a-b": config()}, tmp_path)


def test_an_ablation_is_settings_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="mean_pool, which names no ablation"):
        ablation_configs(config())
    ablation = {"full": {}, "dry": {"dropout": 0.0}, "blocks": ("a", "b")}
    monkeypatch.setattr(MeanPoolConfig, "ABLATION", ablation, raising=False)
    found = ablation_configs(config())
    assert found["full"].model.settings == {"width": 4}
    assert found["dry"].model.settings == {"width": 4, "dropout": 0.0}
    assert found["blocks"].model.settings == {"width": 4, "blocks": ["a", "b"]}
    with pytest.raises(ConfigError, match='has no "wet"; it has full, dry, blocks'):
        ablation_configs(config(), ["wet"])
    done = compare_runs(ablation_configs(config(), ["full", "dry"]), tmp_path / "out")
    assert done.comparison.models == ("full (mean_pool)", "dry (mean_pool)")


def test_the_configuration_of_ammasurv_names_its_ablation() -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "ammasurv.yaml"
    found = ablation_configs(load_config(path))
    assert len(found) == 13
    assert found["crossing"].model.settings["blocks"] == ["pg", "gp"]
    assert found["crossing"].model.settings["dim"] == 32


SEX = {"sex": {"kind": "classes", "target": "is_female"}}
SURVIVAL = {"survival": {"kind": "survival"}}


def with_sex(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Simulated patients have a sex, as a task without survival needs; counts what is read."""
    from survfuse.training import run_comparison, sources

    read = []

    def load(given, *, external: bool = False):
        loaded = sources._simulated(given)
        cohort = loaded.cohort
        sex = cohort.covariates.assign(is_female=np.arange(len(cohort)) % 2)
        cohort = dataclasses.replace(cohort, covariates=sex)
        read.append(len(cohort))
        return loaded._replace(cohort=with_targets(given, cohort))

    monkeypatch.setattr(run_comparison, "load_cohort", load)
    return read


def test_class_tasks_come_beside_survival_or_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = with_sex(monkeypatch)
    both = config(tasks={**SURVIVAL, **SEX})
    found = compare_runs(model_configs(both, ["mean_pool", "clinical_cox"]), tmp_path / "both")
    # regression knows survival only, and is fitted on the cohort that was read
    assert read == [40]
    assert [report.model for report in found.class_reports["sex"]] == ["mean_pool"]
    assert len(found.comparison.pairs) == 1
    text = (tmp_path / "both/compare.md").read_text()
    assert "# Differences in Harrell's C" in text
    assert "# sex" in text
    alone = config(tasks=SEX)
    runs = model_configs(alone, ["mean_pool", "mean_pool:default"])
    found = compare_runs(runs, tmp_path / "sex")
    assert found.comparison is None
    assert found.reports == []
    assert len(found.class_reports["sex"]) == 2
    text = (tmp_path / "sex/compare.md").read_text()
    assert "Harrell" not in text
    assert "* simulated cohort: not patients" in text
    assert (tmp_path / "sex/compare.csv").read_text().count("sex_auc") == 2
    again = compare_runs(runs, tmp_path / "sex", resume=True)
    assert again.class_reports == found.class_reports
    with pytest.raises(ConfigError, match="a predicts survival and b does not"):
        compare_runs({"b": alone, "a": config()}, tmp_path / "no")
    with pytest.raises(ConfigError, match='"clinical_cox": clinical_cox knows survival only'):
        model_configs(alone, ["mean_pool", "clinical_cox"])


def test_other_classes_of_a_task_are_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_sex(monkeypatch)
    swapped = {"sex": {"kind": "classes", "target": "is_female", "classes": ["1", "0"]}}
    runs = {"a": config(tasks=SEX), "b": config(tasks=swapped)}
    with pytest.raises(ConfigError, match="a and b have other classes of task sex"):
        compare_runs(runs, tmp_path / "out")
