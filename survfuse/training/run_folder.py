"""The folder a run lives in: names of its files, its lock, its metrics log.

run/
  config.yaml           the resolved configuration
  environment.json      versions, device, threads, fingerprint of the cohort
  metrics.jsonl .csv    one record per seed, fold and epoch
  predictions.csv .json one row per seed, fold and row, test and training rows
  report.json .md       figures/
  folds/seed1-fold0/    weights.pt, preprocessing.json, predictions.csv and .json, done.json;
                        checkpoint.pt (restart0/... with training.restarts) while it is trained
  baselines/<name>/     a run folder for every baseline
  missing.json .md      missing/<design>/predictions: test rows with modalities withheld
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from survfuse.data.atomic import atomic_path


class RunFolderError(RuntimeError):
    """A run folder that cannot be used as asked; the message says what to do."""

    exit_code = 2


class FoldFolder:
    """Files of one seed and fold."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.weights = path / "weights.pt"
        self.preprocessing = path / "preprocessing.json"
        self._done = path / "done.json"

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def restart(self, number: int) -> FoldFolder:
        """Files of one of several trainings, of which the fold keeps one; gone once it has."""
        return FoldFolder(self.path / f"restart{number}")

    @property
    def done(self) -> dict[str, Any] | None:
        """What `finish` recorded, or None while the fold is not over."""
        return read_json(self._done) if self._done.is_file() else None

    def finish(self, record: dict[str, Any]) -> None:
        """Mark the fold as over. Everything else of it must already be on disk."""
        write_json(self._done, record)
        self.remove_temporary()

    def remove_temporary(self) -> None:
        """Delete what is needed only until the fold is over."""
        self.checkpoint.unlink(missing_ok=True)
        for restart in self.path.glob("restart*"):
            shutil.rmtree(restart)


class RunFolder:
    """Names of a run's files."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.metrics_table = self.path / "metrics.csv"
        self.report = self.path / "report.json"
        self.report_text = self.path / "report.md"
        self.figures = self.path / "figures"

    def fold(self, seed: int, fold: int) -> FoldFolder:
        return FoldFolder(self.path / "folds" / f"seed{seed}-fold{fold}")

    def folds(self) -> list[FoldFolder]:
        """Every fold that was begun, by seed and fold."""

        def order(path: Path) -> list[int]:
            return [int(part.lstrip("sedfol")) for part in path.name.split("-")]

        found = (self.path / "folds").glob("seed*-fold*")
        return [FoldFolder(path) for path in sorted(found, key=order)]

    def baseline(self, name: str) -> RunFolder:
        return RunFolder(self.path / "baselines" / name.replace(":", "-"))

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def remove_leftovers(self) -> None:
        """Delete the half-written temporary files a killed process left behind."""
        for leftover in self.path.rglob(".*.partial"):
            leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. The lock dies with the process, however it dies.

        Raises:
            RunFolderError: another process trains in this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(
                    f"another process is training in {self.path}; wait for it or choose another "
                    "folder"
                ) from None
            yield


class MetricsLog:
    """Append-only JSON lines whose length is part of every checkpoint.

    A record is flushed to disk before the checkpoint that counts it is written, so after any kill
    the file holds at least what the checkpoint says. Cutting it there removes what will be redone.
    """

    def __init__(self, path: Path, *, keep_bytes: int):
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise RunFolderError(
                f"{path} has {size} bytes but the checkpoint counts {keep_bytes}; the file was "
                "changed since, so the run cannot be resumed: train into a new folder"
            )
        self._stream: IO[bytes] = path.open("ab")
        self._stream.truncate(keep_bytes)

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(_without_nan(record), separators=(", ", ": "))
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    @property
    def n_bytes(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics log."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_metrics_table(records: list[dict[str, Any]], path: Path) -> None:
    """The records as CSV, atomically. An absent number is an empty cell."""
    import csv

    columns = list(dict.fromkeys(key for record in records for key in record))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN becomes null."""
    write_text(path, json.dumps(_without_nan(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not readable JSON: {error}") from None


def describe_environment(device: str, *, threads: int | None = None) -> dict[str, Any]:
    """Versions and hardware that a result depends on.

    Args:
        device: where the run computes.
        threads: CPU threads it was told to use; None for torch's own number.
    """
    import importlib.metadata

    import torch

    import survfuse

    versions = {}
    names = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "h5py", "triton", "pydantic")
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    described = {
        "survfuse": survfuse.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device,
        "threads": threads or torch.get_num_threads(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
