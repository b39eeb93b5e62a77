"""Learning rates as functions of the step."""

from __future__ import annotations

import pytest
import torch

from survfuse.training.config import OptimizerConfig, ScheduleConfig
from survfuse.training.schedule import apply_schedule, learning_rate, make_optimizer


@pytest.mark.parametrize("total_steps", [10, 37, 250])
def test_onecycle_equals_torch(total_steps: int) -> None:
    settings = OptimizerConfig(name="adam", lr=0.0077)
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.Adam([weight], lr=0.0077)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.008, total_steps=total_steps)
    ours = make_optimizer([weight], settings)
    for step in range(total_steps):
        lr = apply_schedule(
            ours,
            step,
            total_steps=total_steps,
            settings=settings,
            schedule=ScheduleConfig("onecycle", max_lr=0.008),
        )
        expected = theirs.param_groups[0]
        assert lr == pytest.approx(expected["lr"], rel=1e-12)
        assert ours.param_groups[0]["betas"] == pytest.approx(expected["betas"], rel=1e-12)
        theirs.step()
        if step < total_steps - 1:
            scheduler.step()


def test_warmup_rises_to_the_rate_and_cosine_falls_to_its_end() -> None:
    settings = OptimizerConfig(lr=0.1)
    schedule = ScheduleConfig("cosine", warmup_steps=4, final_fraction=0.1)

    def rate(step: int) -> float:
        return learning_rate(step, total_steps=24, optimizer=settings, schedule=schedule)[0]

    assert [rate(step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rate(4) == pytest.approx(0.1)
    assert rate(14) == pytest.approx(0.055)
    assert rate(24) == pytest.approx(0.01)
    falling = [rate(step) for step in range(4, 24)]
    assert falling == sorted(falling, reverse=True)


def test_constant_leaves_the_rate_and_the_betas() -> None:
    settings = OptimizerConfig(lr=0.1)
    found = learning_rate(7, total_steps=9, optimizer=settings, schedule=ScheduleConfig())
    assert found == (0.1, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)],
)
def test_optimisers_are_those_named(name: str, kind: type) -> None:
    made = make_optimizer(
        [torch.nn.Parameter(torch.zeros(1))],
        OptimizerConfig(name, lr=0.3, weight_decay=0.2, betas=(0.5, 0.6)),
    )
    assert type(made) is kind
    assert made.defaults["lr"] == 0.3
    assert made.defaults["weight_decay"] == 0.2
    assert made.defaults["betas"] == (0.5, 0.6)
