"""Published predictions: every fold's C-index of MCAT's released results, to 1e-12."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy._core.multiarray import _reconstruct

from survfuse.evaluation.concordance import concordance_index

RUNS = [
    f"{model}/tcga_{cohort}_{model}_s1"
    for model in (
        "SNNsm_nll_surv_a0.0_reg1e-04_5foldcv_gc32_sig",
        "AMILsm_nll_surv_a0.0_5foldcv_gc32_sig",
        "MCATsm_nll_surv_a0.0_5foldcv_gc32_concat",
    )
    for cohort in ("blca", "ucec")
]


class _ArraysOnly(pickle.Unpickler):
    """Loads plain containers and numpy arrays of strings; refuses every other global."""

    allowed = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def read_predictions(path: Path):
    with path.open("rb") as stream:
        patients = list(_ArraysOnly(stream).load().values())
    risk = np.array([float(patient["risk"]) for patient in patients])
    time = np.array([float(patient["survival"]) for patient in patients])
    # the released tables hold censorship: 1 = censored
    censored = np.array([float(patient["censorship"]) for patient in patients])
    return risk, time, censored == 0


@pytest.mark.parametrize("run", RUNS)
def test_published_fold_indices_are_reproduced(shared_data, run):
    folder = shared_data / "mcat_predictions" / run
    with (folder / "summary_latest.csv").open(newline="") as stream:
        published = {int(row["folds"]): float(row["val_cindex"]) for row in csv.DictReader(stream)}
    assert sorted(published) == [0, 1, 2, 3, 4]
    for fold, expected in published.items():
        risk, time, event = read_predictions(folder / f"split_latest_val_{fold}_results.pkl")
        assert abs(concordance_index(risk, time=time, event=event) - expected) < 1e-12


def test_the_unpickler_refuses_code(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"TCGA": print}))
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load builtins\.print"):
        read_predictions(path)
