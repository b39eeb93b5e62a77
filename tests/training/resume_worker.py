"""What the process does that the tests of resuming kill."""

from __future__ import annotations

import os
import signal

import torch
from training_cases import given_split, small_cohort

from survfuse.training import fit
from survfuse.training.config_files import load_config


def train_until(flushes: int, config: str, folder: str) -> None:
    """Train until the n-th flush of a file to disk, then be gone without a word.

    Flushes happen in the middle of writing checkpoints, metrics, weights, tables and reports.
    """
    torch.set_num_threads(1)
    left, flush = flushes, os.fsync

    def killing(handle: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    os.fsync = killing
    fit(load_config(config), folder, cohort=small_cohort(missing=True), split=given_split())
