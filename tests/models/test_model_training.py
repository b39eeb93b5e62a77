"""Every registered model in training: a batch without any event, and two backends side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contract_cases import GROUPS, MODEL_CASES, Case, build, mixed, undropped
from torch import Tensor
from torch.nn import functional

from survfuse.batch import ModelOutput
from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import BagModality, TableModality
from survfuse.data.splits import Split
from survfuse.models import FusionModel
from survfuse.training import cox_loss, fit, nll_loss, parse_config
from survfuse.training.run_folder import read_metrics

N_PATIENTS, BATCH = 24, 4
# of a loss after each step, in fp32, reference against the backend that is chosen by itself
CURVE_RTOL = 1e-4
WITH_BACKEND = {
    name: case for name, case in MODEL_CASES.items() if hasattr(build(case).config, "backend")
}


def rarely_seen() -> tuple[Cohort, Split]:
    """Three events among the sixteen training rows: of four batches, one at least has none."""
    rng = np.random.default_rng(0)
    genes = rng.standard_normal((N_PATIENTS, 5))
    genes[::5] = np.nan
    names = tuple(f"P-{i:02d}" for i in range(N_PATIENTS))
    cell = torch.arange(6 * N_PATIENTS) % 6
    bags = Bags(
        torch.randn(6 * N_PATIENTS, 6),
        [6] * N_PATIENTS,
        names,
        coords=torch.stack([cell % 3, cell // 3], 1) * 256,
    )
    slides = [() if i % 5 == 1 else (i,) for i in range(N_PATIENTS)]
    event = np.zeros(N_PATIENTS, dtype=bool)
    event[[2, 7, 11, 17, 18, 21, 22]] = True
    groups = {group: tuple(f"G{i}" for i in columns) for group, columns in GROUPS.items()}
    cohort = Cohort(
        unit_ids=names,
        patient_ids=names,
        time=rng.uniform(1, 60, N_PATIENTS),
        event=event,
        covariates=pd.DataFrame(index=names),
        modalities={
            "genes": TableModality(genes, tuple(f"G{i}" for i in range(5)), groups),
            "slides": BagModality(bags, tuple(slides)),
        },
        name="rarely seen",
    )
    rows = np.arange(N_PATIENTS)
    return cohort, Split(rows[:16], rows[:0], rows[16:])


@pytest.mark.parametrize("loss", ["cox", "nll"])
@pytest.mark.parametrize("name", MODEL_CASES)
def test_it_trains_through_batches_without_an_event(name: str, loss: str, tmp_path: Path) -> None:
    case = MODEL_CASES[name]
    cohort, split = rarely_seen()
    config = parse_config(
        {
            "data": {"modalities": list(case.modalities)},
            "protocol": {"validation": "none", "n_bins": 2},
            "model": {"name": name, "settings": plain(case.settings)},
            "loss": {"name": loss},
            "training": {"epochs": 1, "batch_size": BATCH, "patience": None},
            "evaluation": {"bootstrap": 100, "figures": False},
        }
    )
    result = fit(config, tmp_path / "run", cohort=cohort, split=split)
    [record] = read_metrics(tmp_path / "run/metrics.jsonl")
    assert np.isfinite(record["train_loss"])
    [weights] = (tmp_path / "run").rglob("weights.pt")
    held = torch.load(weights, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in held.values() if tensor.is_floating_point())
    assert np.isfinite(result.predictions.folds[0].test.risk).all()


@pytest.mark.parametrize("name", MODEL_CASES)
def test_a_batch_without_an_event_teaches_cox_nothing(name: str) -> None:
    case = MODEL_CASES[name]
    model, inputs = build(case, **undropped(case)), mixed(case)
    risk = model(inputs).logits["survival"][:, 0]
    nobody = torch.zeros(6, dtype=torch.bool)
    found = cox_loss(risk, time=torch.arange(6.0), event=nobody)
    assert found == 0.0
    found.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad == 0.0).all(), key
    model.zero_grad()
    logits = model(inputs).logits["survival"]
    found = nll_loss(logits, torch.tensor([0, 1, 2, 3, 0, 1]), nobody)
    assert found.isfinite()
    found.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", WITH_BACKEND)
def test_backends_train_alike(name: str) -> None:
    case = WITH_BACKEND[name]
    curves = []
    for backend in ("reference", None):
        model = build(case, **undropped(case), **kept(case), backend=backend)
        torch.manual_seed(2)
        curves.append(curve(model, mixed(case)))
    reference, own = curves
    assert reference[-1] < reference[0]
    torch.testing.assert_close(own, reference, rtol=CURVE_RTOL, atol=0.0)


def kept(case: Case) -> dict[str, Any]:
    """Settings with which bags are read in one piece, once: those of other tests cost time."""
    fields = vars(build(case).config)
    whole = {"piece_rows": None, "recompute": "none" if case.model == "survpath" else False}
    return {name: value for name, value in whole.items() if name in fields}


def curve(model: FusionModel, inputs: dict) -> Tensor:
    """The loss at each of 20 steps, in training mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = both_tasks(model(inputs))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def both_tasks(output: ModelOutput) -> Tensor:
    event = torch.tensor([True, False, True, True, False, True])
    survival = nll_loss(output.logits["survival"], torch.tensor([0, 1, 2, 3, 1, 2]), event)
    grade = functional.cross_entropy(output.logits["grade"], torch.tensor([0, 1, 1, 0, 0, 1]))
    return survival + grade + sum(output.auxiliary.values())


def plain(settings: dict) -> dict:
    """Settings as a file holds them."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()
    }
