"""Checkpoints: everything one fold needs to go on as if it had never stopped."""

from __future__ import annotations

import copy
import io
import os
import zipfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from survfuse.data.atomic import atomic_path

FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""

    exit_code = 2


def is_better(value: float | None, than: float | None, *, rising: bool) -> bool:
    """Whether a value improves on another; None and NaN never do, and any other does on None."""
    if value is None or value != value:
        return False
    return than is None or (value > than if rising else value < than)


@dataclass
class EarlyStopping:
    """The best epoch so far, its weights copied in full, and how long ago it was.

    Attributes:
        patience: epochs without improvement before stopping; None never stops.
        higher_is_better: the watched number is a C-index or the like, not a loss.
        best: best value seen; None before the first epoch.
        best_epoch: its epoch, counted from 1.
        last: value of the newest epoch.
        waited: epochs since then.
        weights: a copy of the parameters of that epoch, on the CPU.
    """

    patience: int | None
    higher_is_better: bool
    best: float | None = None
    best_epoch: int = 0
    last: float | None = None
    waited: int = 0
    weights: dict[str, Tensor] | None = None

    def update(self, value: float, epoch: int, model: torch.nn.Module) -> bool:
        """Take in an epoch; True if training must stop.

        A NaN never counts as an improvement, so it can only run the patience down.
        """
        self.last = float(value)
        if is_better(value, self.best, rising=self.higher_is_better):
            self.best, self.best_epoch, self.waited = float(value), epoch, 0
            # a reference would follow the weights as they train on
            self.weights = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in model.state_dict().items()
            }
        else:
            self.waited += 1
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "last": self.last,
            "waited": self.waited,
            "weights": self.weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.last = state["last"]
        self.waited = state["waited"]
        self.weights = state["weights"]


@dataclass
class Progress:
    """Where a fold stands between two optimiser steps.

    Attributes:
        epoch: the epoch under way, from 1.
        batch: batches of this epoch already used.
        step: optimiser steps taken in the whole fold.
        loss_sums: by task, its loss over this epoch's rows so far, summed.
        loss_rows: by task, how many rows those were.
        risks: per batch of this epoch, the risks of its rows, for the training C-index.
        finished: the last epoch is over.
        metrics_bytes: length of metrics.jsonl that belongs to this state.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    loss_rows: dict[str, int] = field(default_factory=dict)
    risks: list[Tensor] = field(default_factory=list)
    finished: bool = False
    metrics_bytes: int = 0

    def begin_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self.batch, self.loss_sums, self.loss_rows, self.risks = 0, {}, {}, []

    def add(self, task: str, mean: float, rows: int) -> None:
        """Take in the mean loss of a batch over `rows` rows."""
        self.loss_sums[task] = self.loss_sums.get(task, 0.0) + mean * rows
        self.loss_rows[task] = self.loss_rows.get(task, 0) + rows

    def mean_losses(self) -> dict[str, float]:
        """The mean loss of every task in this epoch; NaN for one without a row."""
        return {
            task: total / self.loss_rows[task] if self.loss_rows[task] else float("nan")
            for task, total in self.loss_sums.items()
        }

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "loss_sums": self.loss_sums,
            "loss_rows": self.loss_rows,
            "risks": self.risks,
            "finished": self.finished,
            "metrics_bytes": self.metrics_bytes,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(**copy.copy(state))


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write tensors and plain values so that a reader sees the old file or the whole new one."""
    save_tensors(path, {"format": FORMAT, **content})


def save_tensors(path: str | os.PathLike[str], content: Any) -> None:
    """`torch.save`, atomically; the same content gives the same bytes."""
    # given a path, torch would write the temporary file's random name into the archive; given a
    # stream of a full disk, it would say that a position was unexpected
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(buffer.getbuffer())


def load_weights(path: str | os.PathLike[str], model: torch.nn.Module) -> None:
    """Load the weights of a finished fold into its model, onto the device it is on.

    Raises:
        CheckpointError: the file is unreadable, or holds the weights of another model.
    """
    advice = "train into a new folder to have them again"
    content = _read(path, "weights", advice)
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise CheckpointError(f"{path} holds no weights; {advice}")
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in content.items()}
    if have != found:
        wrong = [name for name in {**have, **found} if have.get(name) != found.get(name)]
        raise CheckpointError(
            f"{path} holds the weights of another model: {wrong[0]} has the shape "
            f"{found.get(wrong[0])}, the model's is {have.get(wrong[0])}; {advice}"
        )
    model.load_state_dict(content)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Nothing in the file is executed (`weights_only=True`).

    Raises:
        CheckpointError: it is unreadable or of another format.
    """
    content = _read(path, "a checkpoint", "delete it to train this fold from the start")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} has checkpoint format {found}; this version reads format {FORMAT}"
        )
    return content


def _read(path: str | os.PathLike[str], what: str, advice: str) -> Any:
    """What `save_tensors` wrote, on the CPU; nothing in the file is executed."""
    try:
        # torch does not look at the checksums of the archive that it writes
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its entry {damaged} does not fit: it was damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read as {what} ({reason}); {advice}") from None
