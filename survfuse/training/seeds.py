"""Every source of randomness of a run: seeded, saved and restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed python, numpy's global generator and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def fold_seed(seed: int, fold: int, restart: int = 0) -> int:
    """The seed of one fold and restart. The first of both keep the run's seed, so a single split is
    seeded as written.
    """
    return seed + 1_000_003 * fold + 2_000_000_011 * restart


def epoch_order(n_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch draws `n_rows` training rows, a function of seed and epoch only.

    It needs no generator state, so a resumed epoch draws what the undisturbed one would have.
    """
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def random_state() -> dict[str, Any]:
    """The state of all generators, made of tensors and plain numbers only.

    A checkpoint is read with `weights_only=True`, which refuses anything else.
    """
    # the legacy global generator: libraries that draw from it are what is being restored here
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            name,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
