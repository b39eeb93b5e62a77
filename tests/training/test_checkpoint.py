"""Checkpoints, random states, early stopping, the metrics log."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from survfuse.training.checkpoint import (
    CheckpointError,
    EarlyStopping,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_tensors,
)
from survfuse.training.run_folder import MetricsLog, RunFolder, RunFolderError, read_metrics
from survfuse.training.seeds import (
    epoch_order,
    fold_seed,
    random_state,
    restore_random_state,
    seed_everything,
)


def draws() -> list[float]:
    # the legacy generator is what libraries draw from, so its state has to survive
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),  # noqa: NPY002
        float(torch.randn(1)),
    ]


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(3)
    # an odd number of gaussians leaves one cached in both python's and numpy's generator
    draws()
    save_checkpoint(tmp_path / "c.pt", {"random": random_state()})
    expected = draws()
    seed_everything(4)
    restore_random_state(load_checkpoint(tmp_path / "c.pt")["random"])
    assert draws() == expected


def test_seeding_seeds_everything() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first


def test_an_epoch_draws_every_row_once_in_an_order_of_its_own() -> None:
    first = epoch_order(50, seed=1, epoch=1)
    assert sorted(first) == list(range(50))
    assert (first == epoch_order(50, seed=1, epoch=1)).all()
    assert (first != epoch_order(50, seed=1, epoch=2)).any()
    assert (first != epoch_order(50, seed=2, epoch=1)).any()


def test_fold_seeds_differ_and_fold_zero_keeps_the_seed() -> None:
    assert fold_seed(7, 0) == 7
    seeds = {fold_seed(s, f, r) for s in range(30) for f in range(10) for r in range(5)}
    assert len(seeds) == 1500


def test_the_best_weights_do_not_follow_training() -> None:
    model = torch.nn.Linear(2, 1)
    stopping = EarlyStopping(patience=2, higher_is_better=False)
    assert not stopping.update(1.0, 1, model)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    assert not stopping.update(1.0, 2, model)
    assert stopping.update(2.0, 3, model)
    assert (stopping.best, stopping.best_epoch, stopping.last) == (1.0, 1, 2.0)
    assert all(torch.equal(stopping.weights[name], best[name]) for name in best)


def test_early_stopping_can_watch_a_c_index_and_never_takes_nan() -> None:
    model = torch.nn.Linear(1, 1)
    stopping = EarlyStopping(patience=3, higher_is_better=True)
    stopping.update(float("nan"), 1, model)
    assert stopping.weights is None
    stopping.update(0.6, 2, model)
    stopping.update(0.5, 3, model)
    stopping.update(float("nan"), 4, model)
    assert (stopping.best, stopping.waited) == (0.6, 2)
    assert stopping.update(0.6, 5, model)


def test_without_patience_training_goes_on() -> None:
    stopping = EarlyStopping(patience=None, higher_is_better=False)
    assert not any(stopping.update(1.0 + k, k, torch.nn.Linear(1, 1)) for k in range(50))


def test_a_truncated_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="delete it to train this fold from the start"):
        load_checkpoint(path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path, model = tmp_path / "weights.pt", torch.nn.Linear(30, 20)
    save_tensors(path, model.state_dict())
    content = bytearray(path.read_bytes())
    at = content.index(model.weight.detach().numpy().tobytes())
    content[at + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum of its entry .*data/0 does not fit"):
        load_weights(path, model)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="format 99; this version reads format 3"):
        load_checkpoint(tmp_path / "c.pt")


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"format": 3, "x": _Evil()}, tmp_path / "c.pt", pickle_protocol=pickle.HIGHEST_PROTOCOL
    )
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"x": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"x": 2})
    assert load_checkpoint(path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_metrics_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, keep_bytes=0)
    log.append({"epoch": 1, "loss": 0.5})
    counted = log.n_bytes
    log.append({"epoch": 2, "loss": float("nan")})
    log.close()
    assert read_metrics(path)[1]["loss"] is None
    log = MetricsLog(path, keep_bytes=counted)
    log.append({"epoch": 2, "loss": 0.25})
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 0.25]


def test_a_metrics_log_shorter_than_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="0 bytes but the checkpoint counts 7"):
        MetricsLog(tmp_path / "metrics.jsonl", keep_bytes=7)


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(RunFolderError, match="another process"),
        RunFolder(tmp_path).lock(),
    ):
        pass
    with RunFolder(tmp_path).lock():
        pass


def test_folds_are_listed_in_numeric_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for seed, fold in [(10, 0), (2, 1), (2, 0)]:
        run.fold(seed, fold).create()
    assert [files.path.name for files in run.folds()] == [
        "seed2-fold0",
        "seed2-fold1",
        "seed10-fold0",
    ]


def test_weights_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path, model = tmp_path / "weights.pt", torch.nn.Linear(30, 20)
    save_tensors(path, model.state_dict())
    other = torch.nn.Linear(30, 20)
    load_weights(path, other)
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(CheckpointError, match=r"weights\.pt holds the weights of another model: w"):
        load_weights(path, torch.nn.Linear(30, 21))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"weights\.pt cannot be read as weights"):
        load_weights(path, model)
