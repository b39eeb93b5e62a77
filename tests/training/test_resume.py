"""A killed run that is resumed ends bit-identical to one that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import resume_worker
from training_cases import given_split, small_cohort, small_config

from survfuse.training import fit, resume
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import dump_config
from tests.processes import forked


def config(restarts: int = 1) -> TrainConfig:
    return small_config(
        protocol={"split": "patients", "n_folds": 2, "inner_fraction": 0.3, "min_inner_events": 1}
        | {"validation": "inner"},
        schedule={"name": "cosine", "warmup_steps": 2},
        training={"epochs": 3, "checkpoint_steps": 2, "patience": 2, "batch_size": 4}
        | {"accumulate": 2, "restarts": restarts},
        evaluation={"baselines": ["mean_pool"]},
    )


def finished(folder: Path) -> dict[str, bytes]:
    """Every file of a run by name, but for locks and what tells of the machine."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (".lock", "environment.json"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def run_undisturbed(folder: Path, restarts: int) -> dict[str, bytes]:
    import torch

    torch.set_num_threads(1)
    fit(config(restarts), folder / "run", cohort=small_cohort(missing=True), split=given_split())
    return finished(folder / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run_undisturbed(tmp_path_factory.mktemp("undisturbed"), 1)


@pytest.fixture(scope="module")
def undisturbed_restarts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run_undisturbed(tmp_path_factory.mktemp("restarts"), 2)


def start(folder: Path, flushes: int, restarts: int = 1) -> int | None:
    """The exit code of a run in a process of its own that is killed at its n-th flush."""
    dump_config(config(restarts), folder / "config.yaml")
    arguments = (flushes, str(folder / "config.yaml"), str(folder / "run"))
    process = forked.Process(target=resume_worker.train_until, args=arguments)
    process.start()
    try:
        process.join(120)
        # None of one that hangs
        return process.exitcode
    finally:
        process.kill()


# head of the run, a checkpoint in mid-epoch, between a fold's last mark and the end of its
# checkpoint, the baseline, its end
@pytest.mark.parametrize("flushes", [3, 9, 29, 67, 118])
def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path, undisturbed: dict[str, bytes], flushes: int
) -> None:
    assert start(tmp_path, flushes) == -signal.SIGKILL
    run = tmp_path / "run"
    if (run / "config.yaml").exists():
        resume(run, cohort=small_cohort(missing=True), split=given_split())
    else:
        # killed before there was a run: it is simply begun again in the same folder
        fit(config(), run, cohort=small_cohort(missing=True), split=given_split())
    found = finished(run)
    assert sorted(found) == sorted(undisturbed)
    different = [name for name in found if found[name] != undisturbed[name]]
    assert not different


# in the first training of a fold, at the mark behind it, in the second, in the other fold
@pytest.mark.parametrize("flushes", [8, 22, 27, 61])
def test_killed_between_restarts(
    tmp_path: Path, undisturbed_restarts: dict[str, bytes], flushes: int
) -> None:
    assert start(tmp_path, flushes, restarts=2) == -signal.SIGKILL
    resume(tmp_path / "run", cohort=small_cohort(missing=True), split=given_split())
    assert finished(tmp_path / "run") == undisturbed_restarts


def test_killed_twice_in_one_fold(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert start(tmp_path, 12) == -signal.SIGKILL
    run = tmp_path / "run"
    partial = (run / "metrics.jsonl").read_bytes()

    def interrupt(event: dict) -> None:
        if event["kind"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(run, cohort=small_cohort(missing=True), split=given_split(), progress=interrupt)
    assert len((run / "metrics.jsonl").read_bytes()) > len(partial)
    resume(run, cohort=small_cohort(missing=True), split=given_split())
    assert finished(run) == undisturbed
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = [(record["seed"], record["fold"], record["epoch"]) for record in epochs]
    assert keys == sorted(set(keys))
