"""`pack` and `encode` as commands: exit codes, messages, what lies on the disk afterwards."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from survfuse.cli.encode import encode_command
from survfuse.cli.pack import pack_command
from survfuse.data.readers import read_bag
from survfuse.data.store import BagStore


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("pack")(pack_command)
    app.command("encode")(encode_command)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for name, length in (("a", 3), ("b", 5)):
        np.save(folder / f"{name}.npy", np.ones((length, 8), dtype=np.float32))
    return folder


def test_pack_writes_and_verifies(tmp_path, folder, run):
    result = run("pack", folder, "--out", tmp_path / "out.h5", "--dtype", "float16", "--verify")
    assert result.exit_code == 0, result.output
    assert "2 bags, 8 patches of 8 features, float16" in result.output
    assert "all checksums right" in result.output
    assert BagStore(tmp_path / "out.h5").dtype == "float16"


def test_pack_takes_a_pattern_and_refuses_to_overwrite(tmp_path, folder, run):
    assert run("pack", folder, "-o", tmp_path / "out.h5", "--pattern", "a*").exit_code == 0
    assert BagStore(tmp_path / "out.h5").names == ["a"]
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert run("pack", folder, "-o", tmp_path / "out.h5", "--overwrite").exit_code == 0
    assert len(BagStore(tmp_path / "out.h5")) == 2


def test_pack_names_the_bad_file_and_goes_on_when_mended(tmp_path, folder, run):
    (folder / "c.npy").write_bytes(b"garbage")
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 1
    assert "c.npy cannot be read as .npy" in result.output
    np.save(folder / "c.npy", np.full((1, 8), np.nan, dtype=np.float32))
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert "error: 1 of 3 files cannot be packed" in result.output
    np.save(folder / "c.npy", np.ones((1, 8), dtype=np.float32))
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert "3 bags, 2 of them from an earlier run" in result.output


def test_pack_stopped_from_the_keyboard(tmp_path, folder, run, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("survfuse.cli.pack.pack", stop)
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.output


def test_help_teaches_with_an_example(run):
    text = run("pack", "--help").output
    assert "survfuse pack features_uni_v1/ --out blca.h5" in text
    for option in ("--dtype", "--verify", "--pattern", "--no-resume", "--overwrite"):
        assert option in text
    assert "survfuse encode slides/*.svs --out bags/" in run("encode", "--help").output


def test_encode_then_pack(tmp_path, shared_data, run):
    slides = sorted((shared_data / "slides").glob("*.svs"))
    options = ("--slide-mpp", "0.25", "--mpp", "1.0", "--out", tmp_path / "bags")
    result = run("encode", *slides, *options)
    assert result.exit_code == 0, result.output
    assert read_bag(tmp_path / "bags" / f"{slides[0].stem}.h5").patch_size_level0 == 1024
    assert run("encode", *slides, *options).output.count("skipped") == 2
    assert run("pack", tmp_path / "bags", "-o", tmp_path / "out.h5").exit_code == 0
    assert BagStore(tmp_path / "out.h5").names == [slide.stem for slide in slides]


def test_encode_goes_on_after_a_bad_slide(tmp_path, shared_data, run):
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    good = shared_data / "slides" / "cmu-1-small-region.svs"
    result = run("encode", tmp_path / "bad.svs", good, "-o", tmp_path / "bags", "--mpp", "2")
    assert result.exit_code == 1
    assert "1 of 2 slides failed" in result.output
    with h5py.File(tmp_path / "bags" / f"{good.stem}.h5") as file:
        assert len(file["features"]) > 0
    assert not (tmp_path / "bags" / "bad.h5").exists()
