"""`survfuse compare` and `survfuse ablate`, from the words to the table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_cases import TINY, call, interrupt

from survfuse.models.mean_pool import MeanPoolConfig


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "study.yaml").write_text(TINY)
    (tmp_path / "other.yaml").write_text(TINY + "optimizer: {lr: 0.1}\n")
    return tmp_path / "study.yaml"


def test_models_presets_and_files_come_into_one_table(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = study.parent / "out"
    words = ["compare", study, "--models", "mean_pool, elastic_net_cox", "-m", "mean_pool:default"]
    words += ["-c", study.with_name("other.yaml"), "--out", out, "-s", "training.epochs=1"]
    from survfuse.training import run_folds

    monkeypatch.setattr(run_folds, "fit_cox", interrupt)
    assert call(*words) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(*words) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert call(*words, "--resume", "--all-pairs", "--quiet") == 0
    text = capsys.readouterr().out
    for name in ("mean_pool", "elastic_net_cox", "mean_pool:default", "other (mean_pool)"):
        assert f"| {name} | honest |" in text
    assert "Holm-adjusted over 6 comparisons" in text
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        "elastic_net_cox",
        "mean_pool",
        "mean_pool-default",
        "other",
    ]


def test_the_model_of_the_file_against_another_file(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = study.parent / "out"
    assert call("compare", study, "-c", study.with_name("other.yaml"), "-o", out, "-q") == 0
    assert "| study (mean_pool) | other (mean_pool) |" in capsys.readouterr().out
    assert call("compare", study, "-o", out) == 2
    assert "needs at least two" in capsys.readouterr().err
    assert call("compare", study, "-c", study, "-o", out) == 2
    assert 'two runs are named "study"' in capsys.readouterr().err


def test_ablate_trains_what_the_model_names(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = study.parent / "out"
    assert call("ablate", study, "-o", out) == 2
    assert "names no ablation" in capsys.readouterr().err
    ablation = {"full": {}, "narrow": {"width": 2}, "dry": {"dropout": 0.0}}
    monkeypatch.setattr(MeanPoolConfig, "ABLATION", ablation, raising=False)
    assert call("ablate", study, "-o", out, "-q", "--only", "full,narrow") == 0
    assert "| full (mean_pool) | narrow (mean_pool) |" in capsys.readouterr().out
    assert (out / "compare.json").is_file()


def test_train_takes_the_file_as_an_option(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--config", study, "--check") == 0
    assert "train 30" in capsys.readouterr().out
    assert call("train", study, "--config", study, "--check") == 2
    assert "are both given; give one" in capsys.readouterr().err
