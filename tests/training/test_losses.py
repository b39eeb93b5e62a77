"""Losses against brute force, hand counts and finite differences."""

from __future__ import annotations

import pytest
import torch

from survfuse.training.losses import class_weights_of, cox_loss, nll_loss, risk_from_hazards

F64 = torch.float64


def brute_force_cox(risk, time, event, ties):
    """The definition, one event time after the other, without any shift."""
    total = risk.new_zeros(())
    for moment in time[event].unique():
        at_risk = risk[time >= moment].exp().sum()
        tied = risk[(time == moment) & event]
        for place in range(len(tied)):
            fraction = place / len(tied) if ties == "efron" else 0.0
            total = total + (at_risk - fraction * tied.exp().sum()).log()
        total = total - tied.sum()
    return total / event.sum()


def draw(seed, n=24):
    generator = torch.Generator().manual_seed(seed)
    risk = torch.randn(n, generator=generator, dtype=F64, requires_grad=True)
    time = torch.randint(0, 8, (n,), generator=generator).to(F64)
    event = torch.rand(n, generator=generator) < 0.6
    event[0] = True
    return risk, time, event


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_equals_brute_force_with_its_gradient(seed, ties):
    risk, time, event = draw(seed, n=3 + 2 * seed)
    loss = cox_loss(risk, time=time, event=event, ties=ties)
    expected = brute_force_cox(risk, time, event, ties)
    assert loss.dtype == F64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    (ours,), (theirs,) = (torch.autograd.grad(value, risk) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_gradcheck(ties):
    risk, time, event = draw(3, n=12)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time=time, event=event, ties=ties), risk)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_does_not_depend_on_the_order_of_patients(ties):
    risk, time, event = draw(4)
    expected = cox_loss(risk, time=time, event=event, ties=ties)
    for seed in range(5):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        loss = cox_loss(risk[order], time=time[order], event=event[order], ties=ties)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=1e-14)


def test_cox_keeps_patients_censored_at_the_event_time_at_risk():
    risk = torch.zeros(3, dtype=F64)
    time = torch.tensor([1.0, 1.0, 2.0])
    # one event at 1 among three at risk, whichever row comes first
    for event in ([True, False, False], [False, True, False]):
        loss = cox_loss(risk, time=time, event=torch.tensor(event))
        torch.testing.assert_close(loss, torch.tensor(3.0, dtype=F64).log())


def test_cox_divides_by_events_not_by_times():
    risk = torch.zeros(2, dtype=F64)
    time, event = torch.tensor([1.0, 1.0]), torch.tensor([True, True])
    breslow = cox_loss(risk, time=time, event=event, ties="breslow")
    efron = cox_loss(risk, time=time, event=event, ties="efron")
    # Breslow: 2 log 2 over 2 events; Efron: (log 2 + log 1) over 2
    torch.testing.assert_close(breslow, torch.tensor(2.0, dtype=F64).log())
    torch.testing.assert_close(efron, torch.tensor(2.0, dtype=F64).log() / 2)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cox_survives_risks_of_hundreds(ties, dtype):
    risk = torch.tensor([100.0, -800.0, 800.0, 0.0], dtype=dtype, requires_grad=True)
    time = torch.tensor([3.0, 2.0, 1.0, 3.0])
    event = torch.tensor([True, True, True, True])
    loss = cox_loss(risk, time=time, event=event, ties=ties)
    loss.backward()
    # 1: alone on top, 0; 2: log(e^100) + 800; 3: log(e^100 + 1) - 100 and log(e^100 + 1) - 0,
    # the second with half of both events left under Efron
    half = torch.tensor(2.0, dtype=F64).log() if ties == "efron" else 0.0
    expected = (900 + 100 - half) / 4
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=dtype))
    assert torch.isfinite(risk.grad).all()
    assert abs(risk.grad.sum()) < 1e-5


def test_cox_shift_changes_nothing():
    risk, time, event = draw(5)
    near = cox_loss(risk, time=time, event=event)
    far = cox_loss(risk + 500, time=time, event=event)
    torch.testing.assert_close(near, far, rtol=1e-11, atol=1e-11)


def test_cox_without_an_event_is_zero_with_zero_gradient():
    risk = torch.randn(4, requires_grad=True)
    loss = cox_loss(risk, time=torch.arange(4.0), event=torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (risk.grad == 0).all()
    empty = torch.zeros(0, requires_grad=True)
    assert cox_loss(empty, time=empty.detach(), event=torch.zeros(0, dtype=torch.bool)).item() == 0


def test_cox_takes_a_column_and_half_precision():
    risk, time, event = draw(6)
    column = cox_loss(risk[:, None], time=time, event=event)
    assert column == cox_loss(risk, time=time, event=event)
    half = risk.detach().to(torch.bfloat16).requires_grad_()
    loss = cox_loss(half, time=time, event=event)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    integers = cox_loss(risk, time=time.to(torch.int64), event=event)
    assert integers == cox_loss(risk, time=time, event=event)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_no_loss_reads_a_value_back_from_its_device(ties):
    # a tensor on "meta" has no values: whatever would make a GPU wait fails there
    risk, time, event = (value.detach().to("meta") for value in draw(7))
    loss = cox_loss(risk.requires_grad_(), time=time, event=event, ties=ties)
    loss.backward()
    assert (loss.shape, risk.grad.shape) == ((), (24,))
    logits, label, event = (value.detach().to("meta") for value in nll_inputs())
    weights = torch.ones(4, device="meta")
    loss = nll_loss(logits.requires_grad_(), label, event, class_weights=weights)
    loss.backward()
    assert (loss.shape, logits.grad.shape) == ((), (10, 4))
    assert risk_from_hazards(logits).shape == (10,)


def hand_nll(logits, label, event):
    hazard = torch.sigmoid(logits)
    survival = torch.cat([torch.ones(len(logits), 1, dtype=F64), (1 - hazard).cumprod(1)], 1)
    rows = torch.arange(len(logits))
    seen = -(survival[rows, label].log() + hazard[rows, label].log()) * event
    censored = -survival[rows, label + 1].log() * ~event
    return seen, censored


def nll_inputs(seed=0, n=10, n_bins=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_bins, generator=generator, dtype=F64, requires_grad=True)
    label = torch.randint(0, n_bins, (n,), generator=generator)
    return logits, label, torch.rand(n, generator=generator) < 0.5


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weighted", ["likelihood", "loss"])
@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.4]])
def test_nll_equals_its_definition(alpha, weighted, weights):
    logits, label, event = nll_inputs()
    seen, censored = hand_nll(logits, label, event)
    likelihood = seen + censored
    weight = torch.ones(4, dtype=F64) if weights is None else torch.tensor(weights, dtype=F64)
    if weighted == "likelihood":
        expected = (1 - alpha) * weight[label] * likelihood + alpha * seen
    else:
        expected = weight[label] * ((1 - alpha) * likelihood + alpha * seen)
    settings = {
        "alpha": alpha, "weighted": weighted,
        "class_weights": None if weights is None else weight,
    }  # fmt: skip
    for reduction, reduced in [
        ("none", expected), ("sum", expected.sum()), ("mean", expected.mean())
    ]:  # fmt: skip
        loss = nll_loss(logits, label, event, reduction=reduction, **settings)
        torch.testing.assert_close(loss, reduced, rtol=1e-12, atol=1e-13)


def test_nll_gradcheck():
    logits, label, event = nll_inputs(1, n=5)
    assert torch.autograd.gradcheck(lambda x: nll_loss(x, label, event, alpha=0.3), logits)


def test_nll_by_hand():
    # hazards of 1/2: an event in bin 1 has S_0 h_1 = 1/4, a patient censored there S_1 = 1/4
    logits = torch.zeros(2, 3, dtype=F64)
    loss = nll_loss(logits, torch.tensor([1, 1]), torch.tensor([True, False]), reduction="none")
    torch.testing.assert_close(loss, torch.full((2,), 4.0, dtype=F64).log())


def test_nll_of_extreme_logits_is_linear_not_clamped():
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    loss = nll_loss(logits, torch.tensor([0, 0]), torch.tensor([False, True]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([200.0, 200.0]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0], torch.tensor([1.0, -1.0]))


def test_unknown_labels_add_nothing():
    logits, label, event = nll_inputs(2)
    expected = nll_loss(logits[:7], label[:7], event[:7])
    masked = label.clone()
    masked[7:] = -1
    loss = nll_loss(logits, masked, event)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[7:] == 0).all()
    nothing = nll_loss(logits, torch.full_like(label, -1), event)
    assert nothing.item() == 0


def test_nll_in_half_precision_is_computed_in_float32():
    logits, label, event = nll_inputs(3)
    half = logits.detach().to(torch.bfloat16).requires_grad_()
    loss = nll_loss(half, label, event)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nll_loss(half.detach().float(), label, event))
    assert half.grad.dtype == torch.bfloat16


def test_class_weights_sum_to_one():
    label = torch.tensor([0, 0, 0, 1, 3, 3, -1])
    weights = class_weights_of(label, 4)
    torch.testing.assert_close(weights, torch.tensor([2.0, 6.0, 0.0, 3.0]) / 11)
    root = class_weights_of(label, 4, kind="inverse_root")
    torch.testing.assert_close(root / root[1], torch.tensor([3**-0.5, 1.0, 0.0, 2**-0.5]))
    assert root.sum() == pytest.approx(1)


def test_risk_rises_with_every_hazard():
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    risk = risk_from_hazards(logits)
    torch.testing.assert_close(risk[0], torch.tensor(-0.75, dtype=F64))
    assert risk[1] > risk[0]
    assert risk[2] > risk[0]


def test_nll_errors_are_named():
    logits, label, event = nll_inputs()
    for change, message in [
        ({"logits": logits[0]}, r"logits has shape \(4,\)"),
        ({"logits": logits.detach().long()}, "must be \\[patients, bins\\] of floats"),
        ({"label": label[:3]}, r"label has shape \(3,\); it must be \(10,\)"),
        ({"label": label.float()}, r"label has dtype torch\.float32; it must be torch\.int64"),
        ({"label": label + 4}, "label holds bin 7; with 4 bins the last is 3"),
        ({"event": event.float()}, r"event has dtype torch\.float32; it must be torch\.bool"),
        ({"event": event.to("meta")}, "event is on meta; it must be on cpu"),
    ]:
        arguments = {"logits": logits, "label": label, "event": event, **change}
        with pytest.raises(ValueError, match=message):
            nll_loss(arguments["logits"], arguments["label"], arguments["event"])
    for setting, message in [
        ({"alpha": 1.5}, r"alpha is 1\.5; it must lie in \[0, 1\]"),
        ({"class_weights": torch.ones(3)}, r"class_weights has shape \(3,\); it must be \(4,\)"),
        ({"weighted": "none"}, "weighted is 'none'; it must be 'likelihood' or 'loss'"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ]:
        with pytest.raises(ValueError, match=message):
            nll_loss(logits, label, event, **setting)
    with pytest.raises(ValueError, match=r"logits has shape \(4,\)"):
        risk_from_hazards(logits[0])
    with pytest.raises(ValueError, match="label holds bin 3; with 2 bins the last is 1"):
        class_weights_of(torch.tensor([3]), 2)
    with pytest.raises(ValueError, match="label holds no known bin"):
        class_weights_of(torch.tensor([-1]), 2)
    with pytest.raises(ValueError, match="kind is 'log'"):
        class_weights_of(torch.tensor([1]), 2, kind="log")


def test_cox_errors_are_named():
    risk, time, event = draw(0)
    for change, message in [
        ({"risk": risk.reshape(12, 2)}, r"risk has shape \(12, 2\)"),
        ({"risk": torch.zeros(24, dtype=torch.long)}, "must be \\[patients\\] or"),
        ({"time": time[:3]}, r"time has shape \(3,\); it must be \(24,\)"),
        ({"time": time.to("meta")}, "time is on meta; it must be on cpu"),
        ({"time": time * torch.nan}, "time must be finite"),
        ({"event": event.long()}, r"event has dtype torch\.int64; it must be torch\.bool"),
        ({"ties": "exact"}, "ties is 'exact'; it must be 'efron' or 'breslow'"),
    ]:
        arguments = {"time": time, "event": event, **change}
        with pytest.raises(ValueError, match=message):
            cox_loss(arguments.pop("risk", risk), **arguments)
