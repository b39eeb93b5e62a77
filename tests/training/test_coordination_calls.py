"""Gradient coordination among processes, between epochs, and called wrongly."""

from __future__ import annotations

import coordination_worker
import pytest
import torch
import torch.multiprocessing
from torch import nn

from survfuse.training import CoordinatedHead, GradientCoordination
from tests.processes import START_METHOD


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        coordination_worker.run, (str(folder),), nprocs=2, start_method=START_METHOD
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", ["projection", "released"])
def test_processes_decide_alike_and_like_one(ranks, mode: str) -> None:
    alone = coordination_worker.one_step(mode, 0, 1)
    for step in ("all", "lone"):
        first, second = (found[mode]["step"][step] for found in ranks)
        # as text: a ratio may be NaN
        assert str(first["records"]) == str(second["records"])
        for name, gradient in first["gradients"].items():
            assert torch.equal(gradient, second["gradients"][name])
            torch.testing.assert_close(gradient, alone[step]["gradients"][name])
        for task, record in first["records"].items():
            one = alone[step]["records"][task]
            assert record["scores"] == pytest.approx(one["scores"], rel=1e-5)
            assert (record["conflicts"], record["modified"]) == (one["conflicts"], one["modified"])
    assert all("no sample" in why for why in ranks[0][mode]["step"]["none"].values())
    # pairs of patients that no process could compare by itself
    survival = ranks[0][mode]["step"]["all"]["records"]["survival"]
    assert survival["skipped"] is None
    assert any(r["modified"] for r in ranks[0][mode]["step"]["all"]["records"].values())


def test_replicas_stay_the_same(ranks) -> None:
    for mode in ("projection", "released"):
        first, second = (found[mode]["parallel"] for found in ranks)
        assert all(torch.equal(first[name], second[name]) for name in first)
    projected, released = (ranks[0][mode]["parallel"] for mode in ("projection", "released"))
    assert any(not torch.equal(projected[name], released[name]) for name in projected)


def make(kind: str = "classes", out: int = 2) -> GradientCoordination:
    weight = nn.Parameter(torch.eye(out, 2).repeat(1, 2))
    weight.grad = torch.tensor([1.0, 0.0, -1.0, 1.0]).repeat(out, 1)
    return GradientCoordination({"task": CoordinatedHead(kind, weight)}, branches=("a", "b"))


def step(coordination: GradientCoordination) -> None:
    coordination.heads["task"].weight.grad[:] = torch.tensor([1.0, 0.0, -1.0, 1.0])
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    coordination.observe("task", a, b, label=torch.tensor([0]))
    coordination.coordinate()


def test_totals_and_taking_them_up_again() -> None:
    whole = make()
    for _ in range(3):
        step(whole)
    whole.coordinate()
    expected = {"steps": 4, "skipped": 1, "conflicts": 6, "modified": 6, "strength": 0.5**0.5}
    assert whole.summary() == pytest.approx(expected)
    before, after = make(), make()
    step(before)
    after.load_state_dict(before.state_dict())
    # a copy: what goes on after it is not in it
    step(before)
    for _ in range(2):
        step(after)
    after.coordinate()
    assert after.summary() == whole.summary()
    after.reset()
    assert not any(after.summary().values())
    with pytest.raises(ValueError, match=r"state has \['steps'\]; it must have \['changed', "):
        after.load_state_dict({"steps": 1})


def test_the_state_is_taken_between_steps() -> None:
    coordination = make()
    a = torch.zeros(1, 2)
    coordination.observe("task", a, a, label=torch.tensor([0]))
    with pytest.raises(RuntimeError, match="between observe and coordinate"):
        coordination.state_dict()
    coordination.clear()
    assert coordination.state_dict()["steps"] == 0


WEIGHT = nn.Parameter(torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hazards"}, r"kind is 'hazards'; it must be one of \['classes', "),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\) and dtype .*; it must be \[out, "),
        ({"weight": torch.zeros(2, 6).int()}, r"dtype torch\.int32; it must be \[out, columns\]"),
        ({"weight": torch.zeros(2, 5)}, "weight has 5 columns, which have no two halves"),
        ({"kind": "cox"}, "weight has 2 rows; for kind 'cox' it must have 1"),
        ({"weight": torch.zeros(1, 6)}, "for kind 'classes' it must have at least 2"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); it must be \(2,\)"),
        ({"columns": ((0, 3), (2, 5))}, "two disjoint .* equally many columns of 6"),
        ({"columns": ((0, 3), (3, 5))}, "two disjoint .* equally many columns of 6"),
        ({"columns": ((0, 4), (4, 8))}, "two disjoint .* equally many columns of 6"),
        ({"columns": ((0, 0), (3, 3))}, "two disjoint .* equally many columns of 6"),
    ],
)
def test_heads_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinatedHead(**{"kind": "classes", "weight": WEIGHT, **arguments})
    with pytest.raises(TypeError, match="weight is NoneType; it must be a Parameter"):
        CoordinatedHead("classes", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {}}, r"heads is \{\}; it must map at least one task"),
        ({"heads": {"task": WEIGHT}}, r"heads\['task'\] is .*; it must be a CoordinatedHead"),
        ({"branches": ("a", "a")}, r"branches is \('a', 'a'\); it must hold two different names"),
        ({"mode": "none"}, r"mode is 'none'; it must be one of \['projection', 'released'\]"),
    ],
)
def test_what_is_coordinated_is_checked(arguments: dict, message: str) -> None:
    heads = {"task": CoordinatedHead("classes", WEIGHT)}
    with pytest.raises(ValueError, match=message):
        GradientCoordination(**{"heads": heads, "branches": ("a", "b"), **arguments})


F, LABEL = torch.zeros(2, 2), torch.tensor([0, 1])
OUTCOME = {"time": torch.ones(2), "event": torch.ones(2, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("kind", "features", "arguments", "message"),
    [
        ("classes", (F, F[:, :1]), {}, r"features_b has shape \(2, 1\) .* \[samples, 2\] of fl"),
        ("classes", (F.int(), F), {}, r"features_a has .* torch\.int32; it must be"),
        ("classes", (F, F[:1]), {}, "features_b has 1 samples and features_a 2"),
        ("classes", (F, F), {}, "label is None; this kind of task needs it"),
        ("classes", (F, F), {"label": LABEL[:1]}, r"label has shape \(1,\); it must be \(2,\)"),
        ("classes", (F, F), {"label": LABEL.float()}, r"label has dtype torch\.float32"),
        ("classes", (F, F), {"label": LABEL + 1}, "label holds class 2; with 2 classes the last"),
        ("ordinal", (F, F), {"label": LABEL + 2}, "label holds class 3; with 3 classes the last"),
        ("survival", (F, F), {"time": torch.ones(2)}, "event is None"),
        ("survival", (F, F), {**OUTCOME, "event": LABEL}, r"event has dtype torch\.int64"),
        ("cox", (F, F), {**OUTCOME, "valid": LABEL}, r"valid has dtype torch\.int64"),
    ],
)
def test_what_is_observed_is_checked(kind, features, arguments, message) -> None:
    coordination = make(kind, out=1 if kind == "cox" else 2)
    with pytest.raises(ValueError, match=message):
        coordination.observe("task", *features, **arguments)
    with pytest.raises(ValueError, match=r"task is 'other'; it must be one of \['task'\]"):
        coordination.observe("other", F, F)
    # the last level of an ordinal task has no logit of its own
    if kind == "ordinal":
        coordination.observe("task", F, F, label=LABEL + 1)
