"""Gradient coordination: its arithmetic, its scores, and what it leaves alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from survfuse.evaluation import concordance_index
from survfuse.training import CoordinatedHead, GradientCoordination, risk_from_hazards
from survfuse.training.branch_scores import true_class_probability
from survfuse.training.gradient_conflict import resolve

quick = settings(derandomize=True, max_examples=60, deadline=None, database=None)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
both_modes = pytest.mark.parametrize("mode", ["projection", "released"])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / torch.where(lengths > 0, lengths, 1.0)


@st.composite
def gradients(draw) -> tuple[Tensor, Tensor]:
    """Rows in general position, opposite, nearly opposite or perpendicular, or zero."""
    dtype = draw(st.sampled_from(TYPES))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = torch.randn(2, rows, width, generator=g, dtype=torch.float64)
    noise = 10.0 ** draw(st.integers(-12, 0))
    for row in range(rows):
        kind = draw(st.sampled_from(["any", "opposite", "perpendicular", "zero"]))
        if kind == "opposite":
            b[row] = -draw(st.floats(0.1, 10)) * a[row] + noise * b[row]
        elif kind == "perpendicular":
            b[row] -= (1 + noise) * (a[row] @ b[row]) / (a[row] @ a[row]) * a[row]
        elif kind == "zero":
            (a if draw(st.booleans()) else b)[row] = 0
    scale = 10.0 ** draw(st.integers(-3, 2))
    return (scale * a).to(dtype), (scale * b).to(dtype)


@quick
@given(gradients(), st.sampled_from(["a", "b", None]))
def test_after_projection_no_rows_conflict(pair: tuple[Tensor, Tensor], weaker: str | None) -> None:
    a, b = pair
    found = resolve(a, b, mode="projection", weaker=weaker)
    assert cosines(found.a, found.b).min() >= -1e-6
    again = resolve(found.a, found.b, mode="projection", weaker=weaker)
    assert not again.conflict.any()
    # never longer than before, beyond rounding
    slack = 1 + 2 * torch.finfo(a.dtype).eps
    assert (found.a.double().norm(dim=1) <= slack * a.double().norm(dim=1) + 1e-6).all()
    for new, old, changed in ((found.a, a, found.changed_a), (found.b, b, found.changed_b)):
        assert new.dtype == old.dtype
        assert torch.equal(new[~changed], old[~changed])
        assert new.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("weaker", ["a", None])
def test_no_row_of_many_conflicts_after_rounding(dtype: torch.dtype, weaker: str | None) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20000, 3, generator=g, dtype=torch.float64).to(dtype)
    found = resolve(a, b, mode="projection", weaker=weaker)
    assert found.conflict.sum() > 5000
    assert not resolve(found.a, found.b, mode="projection", weaker=weaker).conflict.any()
    # moved by no more than rounding
    exact = resolve(a.double(), b.double(), mode="projection", weaker=weaker)
    change = (found.a.double() - exact.a).norm(dim=1)
    room = 3 * torch.finfo(dtype).eps * a.double().norm(dim=1)
    assert (change <= room).all()
    # so small that fp16 has few bits or none for them
    tiny = [(1e-6 * rows.double()).to(dtype) for rows in (a, b)]
    found = resolve(*tiny, mode="projection", weaker=weaker)
    assert found.conflict.sum() > 5000
    assert not resolve(found.a, found.b, mode="projection", weaker=weaker).conflict.any()


@quick
@given(gradients(), st.sampled_from(["a", "b", None]))
def test_released_leaves_the_stronger_and_ties(pair: tuple, weaker: str | None) -> None:
    a, b = pair
    found = resolve(a, b, mode="released", weaker=weaker)
    assert torch.equal(found.changed_a, found.conflict & (weaker == "a"))
    assert torch.equal(found.changed_b, found.conflict & (weaker == "b"))
    assert torch.equal(found.a[~found.changed_a], a[~found.changed_a])
    assert torch.equal(found.b[~found.changed_b], b[~found.changed_b])
    assert found.a.isfinite().all()
    assert found.b.isfinite().all()


def test_released_by_hand() -> None:
    # p = (.5, -.5), g' = (.5, .5), perpen = (0, 1): reflected, and as long as g'
    g, o = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    found = resolve(g, o, mode="released", weaker="a")
    torch.testing.assert_close(found.a, torch.tensor([[0.0, 0.5**0.5]]))
    assert torch.equal(found.b, o)
    assert float(found.strength_a) == pytest.approx((1 + 0.5) ** 0.5)
    other = resolve(o, g, mode="released", weaker="b")
    assert torch.equal(other.b, found.a)


def test_projection_by_hand_and_on_a_tie() -> None:
    g, o = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    torch.testing.assert_close(
        resolve(g, o, mode="projection", weaker="a").a, torch.tensor([[0.5, 0.5]])
    )
    tie = resolve(g, o, mode="projection", weaker=None)
    # each against the other as it was: o loses its part along (1, 0), not along (.5, .5)
    torch.testing.assert_close(tie.a, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(tie.b, torch.tensor([[0.0, 1.0]]))
    assert cosines(tie.a, tie.b) == pytest.approx(-float(cosines(g, o)))


def test_opposite_gradients_leave_nothing() -> None:
    o = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    # what is left is rounding of the gradients: it has no direction that an optimiser may enlarge
    opposite = -2.7 * o
    assert not resolve(opposite, o, mode="projection", weaker="a").a.any()
    assert resolve(opposite, o, mode="released", weaker="a").a.abs().max() < 1e-6


CERTAIN, VAGUE = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
GRADIENT = torch.tensor([[1.0, 0.0, -1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])


def small(mode: str = "projection", kind: str = "classes") -> tuple[nn.Parameter, object]:
    weight = nn.Parameter(torch.eye(2).repeat(1, 2))
    weight.grad = GRADIENT.clone()
    heads = {"task": CoordinatedHead(kind, weight)}
    return weight, GradientCoordination(heads, branches=("tumor", "immune"), mode=mode)


def test_the_weaker_branch_is_changed_and_the_record_says_what_happened() -> None:
    weight, coordination = small()
    coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
    record = coordination.coordinate()["task"]
    expected = {"tumor": VAGUE.softmax(1)[0, 0], "immune": CERTAIN.softmax(1)[0, 0]}
    assert record.scores == pytest.approx({k: float(v) for k, v in expected.items()})
    assert record.ratio == pytest.approx(float(expected["tumor"] / expected["immune"]))
    assert (record.conflicts, record.modified, record.skipped) == (1, 1, None)
    assert record.strength == pytest.approx(0.5**0.5)
    torch.testing.assert_close(weight.grad[0], torch.tensor([0.5, 0.5, -1.0, 1.0]))
    assert torch.equal(weight.grad[1], GRADIENT[1])


@pytest.mark.parametrize(("mode", "modified"), [("projection", 1), ("released", 0)])
def test_equal_scores(mode: str, modified: int) -> None:
    weight, coordination = small(mode)
    coordination.observe("task", VAGUE, VAGUE, label=torch.tensor([1]))
    record = coordination.coordinate()["task"]
    assert (record.ratio, record.conflicts, record.modified) == (1.0, 1, modified)
    changed = (weight.grad != GRADIENT).any(1)
    assert changed.tolist() == [bool(modified), False]


@both_modes
def test_without_a_conflict_every_bit_stays(mode: str) -> None:
    weight, coordination = small(mode)
    before = torch.tensor([[-0.0, 2.0, 1.0, 0.0], [1e-40, 0.0, -0.0, 3.0]])
    weight.grad = before.clone()
    coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
    record = coordination.coordinate()["task"]
    assert (record.conflicts, record.modified, record.strength) == (0, 0, 0.0)
    assert weight.grad.numpy().tobytes() == before.numpy().tobytes()


@both_modes
def test_a_second_call_changes_nothing(mode: str) -> None:
    weight, coordination = small(mode)
    label = torch.tensor([0])
    coordination.observe("task", VAGUE, CERTAIN, label=label)
    coordination.coordinate()
    once = weight.grad.clone()
    # what was observed is used up
    assert "no sample" in coordination.coordinate()["task"].skipped
    coordination.observe("task", VAGUE, CERTAIN, label=label)
    assert coordination.coordinate()["task"].conflicts == 0
    assert torch.equal(weight.grad, once)


def released_by_loops(w, bias, grad, f_a, f_b, label) -> np.ndarray:
    """The public loop, written down once more in numpy."""
    grad, width, scores = grad.copy(), f_a.shape[1], []
    for f, part in ((f_a, w[:, :width]), (f_b, w[:, width:])):
        e = np.exp(f @ part.T + bias / 2)
        scores.append(sum((e / e.sum(1, keepdims=True))[i, y] for i, y in enumerate(label)))
    for row in grad:
        g, o = (row[:width], row[width:]) if scores[0] < scores[1] else (row[width:], row[:width])
        if g @ o < 0:
            p = (g @ o) / (o @ o) * o
            rest = g - p
            perpen = rest - p
            g[:] = np.linalg.norm(rest) * perpen / np.linalg.norm(perpen)
    return grad


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_step_agrees_with_the_public_loop(seed: int) -> None:
    torch.manual_seed(seed)
    encoders = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))
    head = nn.Linear(8, 3)
    x, label = torch.randn(7, 5), torch.randint(3, (7,))
    a, b = (encoder(x) for encoder in encoders)
    nn.functional.cross_entropy(head(torch.cat([a, b], 1)), label).backward()
    numbers = [t.detach().double().numpy() for t in (head.weight, head.bias, head.weight.grad)]
    expected = released_by_loops(*numbers, *(t.detach().double().numpy() for t in (a, b)), label)
    others = [p.grad.clone() for p in (*encoders.parameters(), head.bias)]
    heads = {"task": CoordinatedHead("classes", head.weight, head.bias)}
    coordination = GradientCoordination(heads, branches=("a", "b"), mode="released")
    coordination.observe("task", a, b, label=label)
    changed = (np.abs(expected - numbers[2]) > 1e-9).any(1).sum()
    assert coordination.coordinate()["task"].modified == changed > 0
    before = head.weight.detach().double().numpy()
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    np.testing.assert_allclose(head.weight.detach(), before - 0.1 * expected, atol=1e-6)
    # nothing but the weight is touched
    for parameter, gradient in zip((*encoders.parameters(), head.bias), others, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_scores_of_every_kind() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4)
    label = torch.tensor([0, 1, 2, -1, 2, 0])
    time = torch.tensor([5.0, 3.0, 3.0, 8.0, 1.0, 9.0])
    event = torch.tensor([True, True, False, False, True, False])
    known = label >= 0
    for kind, out in (("classes", 3), ("ordinal", 2), ("survival", 3), ("cox", 1)):
        head = nn.Linear(8, out)
        heads = {kind: CoordinatedHead(kind, head.weight, head.bias)}
        coordination = GradientCoordination(heads, branches=("a", "b"))
        head.weight.grad = torch.zeros_like(head.weight)
        coordination.observe(kind, a, b, label=label, time=time, event=event)
        scores = coordination.coordinate()[kind].scores
        for name, features, part in (("a", a, head.weight[:, :4]), ("b", b, head.weight[:, 4:])):
            logits = (features @ part.T + head.bias / 2).detach()
            if kind in ("survival", "cox"):
                risk = logits[:, 0] if kind == "cox" else risk_from_hazards(logits)
                expected = concordance_index(risk.numpy(), time=time, event=event)
            elif kind == "classes":
                expected = logits.softmax(1)[known, label[known]].sum()
            else:
                hazard = torch.sigmoid(logits)
                levels = torch.stack(
                    [hazard[:, 0], (1 - hazard[:, 0]) * hazard[:, 1], (1 - hazard).prod(1)], 1
                )
                expected = levels[known, label[known]].sum()
            assert scores[name] == pytest.approx(float(expected), abs=1e-6)


def test_probabilities_of_levels_sum_to_one_at_any_logits() -> None:
    logits = torch.tensor([[80.0, -80.0], [-200.0, -200.0], [0.3, -0.7]])
    probabilities = [
        true_class_probability(logits, torch.full((3,), k), ordinal=True) for k in range(3)
    ]
    torch.testing.assert_close(torch.stack(probabilities).sum(0), torch.ones(3))


@pytest.mark.parametrize("kind", ["classes", "survival"])
def test_accumulated_batches_are_one_batch(kind: str) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 9, 4)
    label = torch.randint(3, (9,))
    time, event = torch.rand(9), torch.rand(9) < 0.6
    gradient = torch.randn(3, 8)
    found = []
    for sizes in ([9], [4, 0, 1, 4]):
        weight = nn.Parameter(torch.linspace(-1, 1, 24).view(3, 8))
        weight.grad = gradient.clone()
        heads = {kind: CoordinatedHead(kind, weight)}
        coordination = GradientCoordination(heads, branches=("a", "b"))
        cut = [values.split(sizes) for values in (a, b, label, time, event)]
        for parts in zip(*cut, strict=True):
            x, y, classes, t, e = parts
            coordination.observe(kind, x, y, label=classes, time=t, event=e)
        found.append((coordination.coordinate()[kind], weight.grad))
    assert found[0][0].conflicts > 0
    assert found[0][0].scores == pytest.approx(found[1][0].scores, rel=1e-6)
    assert torch.equal(found[0][1], found[1][1])


def test_samples_that_do_not_count_are_never_read() -> None:
    label = torch.tensor([0, 1, 0])
    grads = []
    for hole in (float("nan"), 7.0):
        weight, coordination = small()
        a, b = VAGUE.repeat(3, 1), CERTAIN.repeat(3, 1)
        a[1:] = hole
        valid, known = torch.tensor([True, False, True]), label.clone()
        known[2] = -1
        coordination.observe("task", a, b, label=known, valid=valid)
        grads.append((weight, coordination.coordinate()["task"]))
    assert grads[0][1] == grads[1][1]
    assert grads[0][1].scores["tumor"] == pytest.approx(float(VAGUE.softmax(1)[0, 0]))
    assert torch.equal(grads[0][0].grad, grads[1][0].grad)


@pytest.mark.parametrize(
    ("time", "event", "valid"),
    [
        ([1.0, 2.0], [False, False], None),
        ([1.0, 2.0], [False, True], None),
        ([2.0, 2.0], [True, True], None),
        ([1.0, 2.0], [True, True], [True, False]),
        ([1.0, 2.0], [True, True], [False, False]),
        ([], [], None),
    ],
)
def test_survival_without_a_comparable_pair_is_skipped(caplog, time, event, valid) -> None:
    weight, coordination = small(kind="survival")
    n = len(time)
    coordination.observe(
        "task",
        VAGUE.expand(n, 2),
        CERTAIN.expand(n, 2),
        time=torch.tensor(time),
        event=torch.tensor(event, dtype=torch.bool),
        valid=None if valid is None else torch.tensor(valid),
    )
    with caplog.at_level(logging.INFO, logger="survfuse"):
        record = coordination.coordinate()["task"]
    assert record.skipped.startswith("no ")
    assert record.skipped in caplog.text
    assert torch.equal(weight.grad, GRADIENT)
    assert all(np.isnan(score) for score in record.scores.values())


def test_an_event_and_a_censoring_at_one_time_are_comparable() -> None:
    _, coordination = small(kind="survival")
    time, event = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    a, b = torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [2, 0]])
    coordination.observe("task", a, b, time=time, event=event)
    record = coordination.coordinate()["task"]
    assert record.scores == {"tumor": 1.0, "immune": 0.0}
    assert np.isnan(record.ratio)
    assert (record.skipped, record.modified) == (None, 1)


def test_gradients_that_are_missing_or_not_finite_are_left(caplog) -> None:
    weight, coordination = small()
    for gradient, reason in ((None, "no gradient"), (GRADIENT / 0, "NaN or infinite")):
        weight.grad = None if gradient is None else gradient.clone()
        coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
        assert reason in coordination.coordinate()["task"].skipped
        assert (weight.grad is None) == (gradient is None)
    weight.grad = GRADIENT.clone()
    coordination.observe("task", VAGUE / 0, CERTAIN, label=torch.tensor([0]))
    assert "an output or a time is NaN" in coordination.coordinate()["task"].skipped
    assert torch.equal(weight.grad, GRADIENT)


@both_modes
def test_with_a_gradient_scaler(mode: str) -> None:
    found = []
    for order in ("before", "after", "unscaled"):
        weight, coordination = small(mode)
        weight.grad = None
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=order != "unscaled")
        optimizer = torch.optim.SGD([weight], lr=0.5)
        scaler.scale((weight * GRADIENT).sum()).backward()
        coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
        if order == "before":
            coordination.coordinate()
        scaler.unscale_(optimizer)
        if order != "before":
            coordination.coordinate()
        scaler.step(optimizer)
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])
    # overflow: nothing is coordinated and the scaler drops the step
    weight.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale((weight * GRADIENT * float("inf")).nansum()).backward()
    scaler.unscale_(optimizer)
    coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
    assert coordination.coordinate()["task"].skipped == "the gradient is NaN or infinite"
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.eye(2, dtype=dtype).repeat(1, 2))
    weight.grad = GRADIENT.to(dtype)
    heads = {"task": CoordinatedHead("classes", weight)}
    coordination = GradientCoordination(heads, branches=("a", "b"))
    # features of autocast beside parameters of any type; the product is not rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coordination.observe("task", VAGUE.bfloat16(), CERTAIN + 0.003, label=torch.tensor([0]))
    record = coordination.coordinate()["task"]
    assert record.modified == 1
    assert record.scores["b"] == pytest.approx(
        float((CERTAIN + torch.tensor([[0.003, 0.003]])).softmax(1)[0, 0]), rel=1e-6
    )
    assert weight.grad.dtype == dtype
    assert weight.grad[0].tolist() == [0.5, 0.5, -1.0, 1.0]


def test_columns_say_where_the_branches_are() -> None:
    weight = nn.Parameter(torch.eye(2).repeat(1, 3))
    # first the second branch, then columns of nobody, then the first
    order = [4, 5, 0, 1]
    weight.grad = torch.full((2, 6), 9.0)
    weight.grad[:, order] = GRADIENT
    heads = {"task": CoordinatedHead("classes", weight, columns=((4, 6), (0, 2)))}
    coordination = GradientCoordination(heads, branches=("a", "b"))
    coordination.observe("task", VAGUE, CERTAIN, label=torch.tensor([0]))
    coordination.coordinate()
    torch.testing.assert_close(weight.grad[0], torch.tensor([-1.0, 1.0, 9.0, 9.0, 0.5, 0.5]))
