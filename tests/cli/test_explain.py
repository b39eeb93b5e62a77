"""`survfuse explain`: one tidy table, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from cli_cases import call

from survfuse.training.inspection import COLUMNS

STUDY = """
data:
  simulation: {n_train: 24, n_inner: 0, n_test: 6}
protocol: {validation: none, n_bins: 2}
model:
  name: healnet
  settings: {depth: 1, n_latents: 2, latent_dim: 4, cross_heads: 1, cross_head_dim: 4,
             modalities: {slides: {axes: 0}}}
training: {epochs: 1, batch_size: 4}
evaluation: {bootstrap: 100, figures: false}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("explain")
    (folder / "study.yaml").write_text(STUDY)
    assert call("train", folder / "study.yaml", "-o", folder / "run", "-q") == 0
    yield folder / "run"
    torch.set_num_threads(before)


def test_a_table_of_the_test_patients(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    out, again = tmp_path / "new/table.csv", tmp_path / "again.csv"
    what = "attention,modality_effect,gradient,gates"
    assert call("explain", run, "-o", out, "--what", what, "--top", 3) == 0
    said = capsys.readouterr().out
    assert "18 of attention, 360 of gradient_x_input, 12 of modality_effect" in said
    frame = pd.read_csv(out)
    assert tuple(frame.columns) == COLUMNS
    assert len(set(frame["unit_id"])) == 6
    patches = frame[frame["kind"] == "attention"]
    # 32 patches to a row of the slide, 256 pixels each
    item = patches["item"].astype(int)
    assert (patches["x"] == item % 32 * 256).all()
    assert (patches["y"] == item // 32 * 256).all()
    assert call("explain", run, "-o", again, "--what", what, "--top", 3) == 0
    assert again.read_bytes() == out.read_bytes()


def test_every_patch_of_two_patients(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.csv"
    names = "SIM-00024,SIM-00027"
    words = ["--what", "attention", "--patients", names, "--top", 0]
    assert call("explain", run, "-o", out, *words) == 0
    frame = pd.read_csv(out)
    assert frame.groupby("unit_id").size().to_dict() == dict.fromkeys(names.split(","), 1024)
    sums = frame.groupby("unit_id")["value"].sum()
    assert ((sums - 1).abs() < 1e-4).all()


def test_what_is_unknown_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    for words, message in (
        (["--what", "atention"], "did you mean 'attention'"),
        (["--patients", "SIM-1"], "unknown patient 'SIM-1'"),
        (["--top", -1], "top is -1"),
        (["--task", "survive"], "did you mean 'survival'"),
    ):
        assert call("explain", run, "-o", out, *words) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
