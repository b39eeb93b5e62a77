"""`survfuse predict` on files laid out as the public ones, with and without outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli_cases import call

from survfuse.training.run_folder import RunFolder, read_json

STUDY = """
data: {source: tcga_omics, folder: data, cohort: ours, groups: groups.csv}
protocol: {split: patients, n_folds: 2, n_bins: 2, validation: none}
model: {name: mean_pool, settings: {width: 4}}
training: {epochs: 1, batch_size: 16}
evaluation: {bootstrap: 100, figures: false}
"""
GENES = [f"{g}_rnaseq" for g in "ABCD"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_table(folder: Path, cohort: str, n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.standard_normal((n, 4)), columns=GENES)
    frame.insert(0, "case_id", [f"{cohort}-{i:03d}" for i in range(n)])
    frame.insert(1, "slide_id", frame["case_id"] + ".svs")
    frame.insert(2, "survival_months", rng.exponential(30 * np.exp(-frame["A_rnaseq"])))
    frame.insert(3, "censorship", rng.integers(0, 2, n))
    (folder / "tcga_omics").mkdir(parents=True, exist_ok=True)
    path = folder / "tcga_omics" / f"tcga_{cohort}_all_clean.csv.zip"
    frame.to_csv(path, index=False)
    return frame


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    write_table(folder / "data", "ours", 40, 0)
    (folder / "groups.csv").write_text("one,two\nA,C\nB,\n")
    (folder / "study.yaml").write_text(STUDY)
    assert call("train", folder / "study.yaml", "-o", folder / "run", "-q") == 0
    return folder / "run"


def test_groups_of_a_file_reach_the_model(run: Path) -> None:
    for fold in RunFolder(run).folds():
        assert read_json(fold.preprocessing)["groups"] == {"rnaseq": {"one": [0, 1], "two": [2]}}


def test_another_hospital_is_scored_with_what_was_frozen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = write_table(tmp_path / "data", "theirs", 30, 1)
    # other columns, another order, and a few whose outcome is not known
    frame = frame[[*frame.columns[:4], *GENES[::-1]]].assign(E_rnaseq=1.0)
    frame.loc[:4, ["survival_months", "censorship"]] = np.nan
    frame.to_csv(tmp_path / "data/tcga_omics/tcga_theirs_all_clean.csv.zip", index=False)
    (tmp_path / "ext.yaml").write_text("data: {source: tcga_omics, folder: data, cohort: theirs}\n")
    out = tmp_path / "new/predictions.csv"
    assert call("predict", run, "--config", tmp_path / "ext.yaml", "-o", out) == 0
    text = capsys.readouterr()
    assert "30 patients, 25 with a known outcome" in text.out
    assert "rnaseq: present in 30 of 30 rows" in text.out
    for name in ("seed1-fold0", "seed1-fold1", "mean of all models"):
        assert f"{name}: C 0." in text.out
    assert "warning" not in text.err
    written = pd.read_csv(out)
    assert len(written) == 60
    assert written["time"].isna().sum() == written["event"].isna().sum() == 10
    assert {"seed", "fold", "patient_id", "risk", "logit_1"} <= set(written.columns)
    patients = pd.read_csv(out.with_name("predictions_patients.csv"))
    mean = written.groupby("patient_id")["risk"].mean()
    np.testing.assert_allclose(patients.set_index("patient_id")["risk"], mean)
    again = tmp_path / "again.csv"
    words = ["--data", tmp_path / "data", "--set", "data.cohort=theirs"]
    assert call("predict", run, *words, "-o", again) == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_runs_own_patients_are_no_external_validation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("predict", run, "--data", run.parent / "data", "-o", tmp_path / "p.csv") == 0
    assert "40 patients bear names of patients the run learned from" in capsys.readouterr().err


def test_what_cannot_be_scored_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.csv"
    for words, message in (
        ([run], "name new patients with --config, --data or --set"),
        ([tmp_path, "--data", "x"], "holds no run"),
        ([run, "--data", tmp_path / "gone"], "does not exist"),
    ):
        assert call("predict", *words, "-o", out) == 2
        assert message in capsys.readouterr().err
    frame = write_table(tmp_path / "data", "ours", 6, 2).drop(columns="B_rnaseq")
    frame.to_csv(tmp_path / "data/tcga_omics/tcga_ours_all_clean.csv.zip", index=False)
    assert call("predict", run, "--data", tmp_path / "data", "-o", out) == 2
    assert "lacks 1 columns that training had: 'B_rnaseq'" in capsys.readouterr().err
    assert not out.exists()
