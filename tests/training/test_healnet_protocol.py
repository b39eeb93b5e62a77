"""`protocol: healnet` against a plain-torch transcription of the released recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import small_cohort

from survfuse.models import HEALNet
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import load_config, parse_config
from survfuse.training.folds import plan_folds
from survfuse.training.loop import FoldTask, train_fold
from survfuse.training.run_folder import MetricsLog, RunFolder
from survfuse.training.run_folds import prepare
from survfuse.training.seeds import epoch_order
from survfuse.training.sources import load_cohort
from tests.models.healnet_transcription import Released, released_forward, released_parameters

SPEC = Released(
    channel_dims=(6,),
    num_spatial_axes=(1,),
    depth=2,
    max_freq=2.0,
    l_c=4,
    l_d=6,
    x_heads=1,
    cross_dim_head=5,
    self_per_cross_attn=0,
)
ROWS, BATCH, EPOCHS, L1 = 29, 4, 3, 1e-3


def config() -> TrainConfig:
    return parse_config(
        {
            "protocol": "healnet",
            "data": {"modalities": ["genes"]},
            "model": {"preset": "released"},
            "loss": {"l1": L1},
            "training": {"epochs": EPOCHS, "batch_size": BATCH, "seeds": [5]},
        }
    )


def released_loss(
    logits: torch.Tensor, label: torch.Tensor, event: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The published loss by its formula: products of hazards, clamped, weighted, alpha .4."""
    hazards = logits.sigmoid()
    survival = torch.cumprod(1 - hazards, dim=1)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival], dim=1)
    rows = torch.arange(len(label))
    seen = -(before[rows, label].clamp(min=1e-7).log() + hazards[rows, label].clamp(min=1e-7).log())
    censored = -before[rows, label + 1].clamp(min=1e-7).log()
    seen, censored = seen * event, censored * ~event
    weighted = (seen + censored) * (weights / weights.sum())[label]
    return (0.6 * weighted + 0.4 * seen).mean()


def test_twenty_steps_equal_the_released_recipe(tmp_path: Path) -> None:
    cohort = small_cohort(42).only(["genes"])
    run = config()
    (plan,) = plan_folds(run, cohort, None)
    train = np.asarray(plan.split.train)[:ROWS]
    prepared = prepare(run, cohort, plan.split)
    initial = released_parameters(SPEC, seed=1)
    model = HEALNet.from_released(
        initial, **SPEC.arguments(), names=["genes"], kinds=["table"]
    ).float()
    files = RunFolder(tmp_path).fold(5, 0)
    files.create()
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_bytes=0)
    losses: list[float] = []
    task = FoldTask(
        config=run,
        model=model,
        prepared=prepared,
        train=train,
        validation=np.asarray(plan.split.validation),
        seed=5,
        labels={"seed": 5, "fold": 0},
        device=torch.device("cpu"),
        folder=files,
        log=log,
        on_epoch=lambda record: losses.append(record["train_loss"]),
    )
    train_fold(task)
    log.close()

    parameters = {name: value.clone().requires_grad_() for name, value in initial.items()}
    values = torch.from_numpy(cohort.modalities["genes"].values).float()
    label = torch.from_numpy(prepared.labels)
    event = torch.from_numpy(cohort.event)
    # raw values and bins of all rows, weights of the training rows
    weights = 1.0 / torch.bincount(label[train], minlength=4).float()
    optimizer = torch.optim.Adam(parameters.values(), lr=0.007765016508403882)
    steps = -(-ROWS // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.008, epochs=EPOCHS, steps_per_epoch=steps
    )
    taken, expected = 0, []
    for epoch in range(1, EPOCHS + 1):
        order = train[epoch_order(ROWS, seed=5, epoch=epoch)]
        total = 0.0
        for rows in np.split(order, range(BATCH, ROWS, BATCH)):
            logits = released_forward(parameters, SPEC, [values[rows][:, None]])
            loss = released_loss(logits, label[rows], event[rows], weights)
            norms = sum(parameter.abs().sum() for parameter in parameters.values())
            (loss / 16 + L1 * norms).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1
            if taken < EPOCHS * steps:
                scheduler.step()
            total += float(loss.detach()) * len(rows)
        expected.append(total / ROWS)
    assert taken >= 20
    assert losses == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        ours = model.eval()(prepared.batch(np.arange(42)).inputs).logits["survival"]
        theirs = released_forward(parameters, SPEC, [values[:, None]])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # and something was learned in between
    with torch.no_grad():
        before = released_forward(initial, SPEC, [values[:, None]])
    assert (before - theirs).abs().max() > 0.05


def test_the_released_protocol_fits_bins_on_every_slide_row(shared_data: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "tcga_kirp_healnet.yaml"
    run = load_config(path, data=shared_data)
    assert run.training.seeds == tuple(range(1, 21))
    cohort = load_cohort(run).cohort
    plans = plan_folds(run, cohort, None)
    assert [len(part) for part in plans[0].split] == [199, 43, 42]
    prepared = prepare(run, cohort, plans[0].split)
    # HEALNet's Table 5
    assert np.bincount(prepared.labels).tolist() == [43, 56, 113, 72]
    features = prepared.features("omics")
    assert features[:2] == ("age", "is_female")
    table = prepared.table("omics").values.numpy()
    raw = cohort.modalities["omics"].values.astype(np.float32)
    # raw values, and the mean over all rows where one is unknown
    means = np.broadcast_to(np.nanmean(raw, axis=0), raw.shape)
    np.testing.assert_allclose(table, np.where(np.isnan(raw), means, raw), rtol=1e-5)
    # a patient on both sides is what this protocol is known for
    ids = np.asarray(cohort.patient_ids)
    assert any(set(ids[p.split.train]) & set(ids[p.split.test]) for p in plans)


@pytest.mark.parametrize("cohort", ["kirp", "blca"])
def test_honest_folds_are_the_published_patients(shared_data: Path, cohort: str) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / f"tcga_{cohort}_honest.yaml"
    run = load_config(path, data=shared_data)
    loaded = load_cohort(run)
    plans = plan_folds(run, loaded.cohort, loaded.split)
    assert len(plans) == 5
    tested = np.concatenate([plan.split.test for plan in plans])
    assert sorted(tested) == list(range(len(loaded.cohort)))
    assert {"clinical_cox", "elastic_net_cox"} <= set(run.evaluation.baselines)
