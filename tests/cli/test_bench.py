"""`survfuse bench`: the benchmarks run from the package, what is kept, and how it ends."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from survfuse.cli import bench, main

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--smoke", "--device", "cpu", "--rounds", "1"]
LONG = ["--smoke", "--device", "cpu", "--rounds", "50"]
# SIGINT as a terminal has it: who starts the tests in the background has it ignored
CALL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv.pop(1))
from survfuse.cli import main
main()
"""


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def command(*arguments: object) -> list[str]:
    """The command line in a process of its own, of these sources."""
    return [sys.executable, "-c", CALL, str(ROOT), *map(str, arguments)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a machine that is busy, two threads would wait for each other
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """Every benchmark on its smallest shapes, from a folder that is nobody's project."""
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        command("bench", *QUICK, "--out", folder / "out"),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "--collect-only"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    return folder / "out", done


def rows_in(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_benchmark_works_and_is_written(outcome) -> None:
    folder, done = outcome
    assert done.returncode == 0, done.stdout + done.stderr
    ops = {row["op"].partition(",")[0] for row in rows_in(folder)}
    assert ops >= {"pool_bag", "tokens_attend_bag", "bag_attends_tokens", "cross_attention"}
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".log", ".png", ".svg"]
    for path in folder.glob("*.csv"):
        assert str(path) in done.stdout
    assert "pool_bag" in done.stdout
    assert "measured  pool_bag" in done.stderr


def test_forward_and_backward_are_apart_and_the_bag_frozen_or_trained(outcome) -> None:
    rows = [row for row in rows_in(outcome[0]) if row["op"] == "pool_bag" and not row["note"]]
    modes = {"forward", "backward", "both", "backward, trained", "both, trained"}
    assert {row["mode"] for row in rows} == modes
    names = {"survfuse", "survfuse tiled", "plain torch", "SDPA", "SDPA math"}
    assert {row["backend"] for row in rows} == names | {"floor (memory alone)"}
    by_mode = {row["mode"]: row for row in rows if row["backend"] == "survfuse"}
    gbytes = {mode: float(row["gbytes"]) for mode, row in by_mode.items()}
    assert gbytes["both"] == pytest.approx(gbytes["forward"] + gbytes["backward"], rel=1e-3)
    assert gbytes["backward, trained"] > gbytes["backward"]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])


def test_who_took_no_part_is_written_with_a_reason(outcome) -> None:
    absent = [row for row in rows_in(outcome[0]) if row["note"]]
    reasons = {row["backend"]: row["note"] for row in absent if row["op"] == "pool_bag"}
    assert reasons["varlen_attn"] == "needs a GPU"
    assert {"SDPA efficient", "SDPA cuDNN", "FlexAttention", "SDPA flash"} <= set(reasons)
    assert all(row["p50_ms"] == "nan" for row in absent)
    assert not [row for row in absent if row["backend"].startswith("survfuse")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "pool_bags"], "did you mean pool_bag?"),
        (["--op", "xyz"], "there are bag_attends_tokens, cross_attention"),
        (["--device", "tpu"], "--device is tpu; it must be cpu or cuda"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--smoke", "--full"], "--smoke and --full exclude each other"),
        (["--out", "file", "--device", "cpu"], "file: File exists"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert call("bench", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_the_extra_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert call("bench") == 2
    assert 'needs pytest_benchmark: pip install "survfuse[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (1, 1, "3 benchmark(s) failed"),
        (2, 130, "stopped"),
        (4, 1, "the benchmarks ended with code 4"),
        (5, 2, "this set holds no benchmark of what was asked for"),
    ],
)
def test_how_pytest_ended_is_how_the_command_ends(
    code: int,
    exit_code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: (code, 3))
    arguments = ["--op", "pool_bag", "--device", "cpu", "--out", tmp_path]
    assert call("bench", *arguments) == exit_code
    assert message in capsys.readouterr().err


def test_a_run_that_is_stopped_keeps_its_rows(tmp_path: Path) -> None:
    """More turns than anybody waits for, stopped after the first benchmark."""
    arguments = ["--op", "pool_bag", *LONG, "--out", tmp_path]
    process = subprocess.Popen(command("bench", *arguments), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("measured"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped; what was measured is kept" in err
    assert rows_in(tmp_path)
    assert list(tmp_path.glob("*.png"))


def test_killed_outright_it_leaves_whole_files(tmp_path: Path) -> None:
    arguments = ["--op", "pool_bag", *LONG, "--out", tmp_path]
    process = subprocess.Popen(command("bench", *arguments), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("measured"):
            break
    process.kill()
    process.wait(timeout=60)
    process.stderr.close()
    rows = rows_in(tmp_path)
    assert all(row["op"] and row["date"] for row in rows)
    # the measuring process ends by itself when nobody reads what it says
    (log,) = tmp_path.glob("*.log")
    for _ in range(120):
        before = log.with_suffix(".csv").stat().st_mtime_ns
        time.sleep(1)
        if log.with_suffix(".csv").stat().st_mtime_ns == before:
            break
    else:
        pytest.fail("it goes on measuring")


def test_help_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call("bench", "--help") == 0
    text = capsys.readouterr().out
    for option in ("--op", "--device", "--core", "--full", "--smoke", "--rounds", "--out"):
        assert re.search(rf"{option}\b", text), option
