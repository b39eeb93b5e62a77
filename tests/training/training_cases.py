"""A small cohort and small configurations that train in well under a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import BagModality, TableModality
from survfuse.data.splits import Split
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import parse_config

GENES, PATCH_WIDTH = 6, 5


def small_cohort(n: int = 60, *, seed: int = 0, missing: bool = False) -> Cohort:
    """Patients whose first gene carries the risk; bags of 3 to 8 patches."""
    rng = np.random.default_rng(seed)
    genes = rng.standard_normal((n, GENES))
    time = 40 * rng.exponential(size=n) * np.exp(-genes[:, 0])
    censoring = rng.uniform(20, 90, n)
    lengths = rng.integers(3, 9, n).tolist()
    features = torch.from_numpy(rng.standard_normal((sum(lengths), PATCH_WIDTH))).float()
    names = tuple(f"P-{i:03d}" for i in range(n))
    groups = [(i,) for i in range(n)]
    if missing:
        genes[::5] = np.nan
        groups[1::5] = [()] * len(groups[1::5])
    return Cohort(
        unit_ids=names,
        patient_ids=names,
        time=np.minimum(time, censoring),
        event=time <= censoring,
        covariates=pd.DataFrame(
            {"age": rng.uniform(40, 80, n), "is_female": rng.integers(0, 2, n)}, index=names
        ),
        modalities={
            "genes": TableModality(genes, tuple(f"G{i}" for i in range(GENES))),
            "slides": BagModality(Bags(features, lengths, names), tuple(groups)),
        },
        name="small",
    )


def given_split(n: int = 60) -> Split:
    """Two thirds train, a sixth validation, a sixth test."""
    rows = np.arange(n)
    return Split(rows[: 2 * n // 3], rows[2 * n // 3 : 5 * n // 6], rows[5 * n // 6 :])


def small_config(**sections: dict[str, Any]) -> TrainConfig:
    """A tiny HEALNet for three epochs; `sections` replace values of single sections."""
    values: dict[str, Any] = {
        "protocol": {"validation": "split", "n_bins": 3},
        "model": {
            "settings": {
                "depth": 1,
                "n_latents": 3,
                "latent_dim": 8,
                "cross_heads": 1,
                "cross_head_dim": 4,
                "ff_dropout": 0.2,
                "attention_dropout": 0.1,
                "modalities": {"slides": {"axes": 0}},
            }
        },
        "optimizer": {"lr": 0.01},
        "training": {"epochs": 3, "batch_size": 8, "patience": None},
        "evaluation": {"bootstrap": 100, "figures": False},
    }
    for section, given in sections.items():
        values[section] = {**values.get(section, {}), **given}
    return parse_config(values)
