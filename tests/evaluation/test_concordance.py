"""Harrell's and Uno's concordance against scikit-survival, brute force and hand counts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.metrics import concordance_index_censored, concordance_index_ipcw
from sksurv.util import Surv

from survfuse.evaluation.concordance import (
    concordance_index,
    concordance_pairs,
    uno_concordance,
    uno_weights,
)

# few values, so that times, risks and both together are often tied; the last two sit on either
# side of the tolerance
TIMES = st.sampled_from([0.0, 1.0, 1.5, 2.0, 7.0])
RISKS = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0 + 0.9e-8, 1.0 + 1.1e-8, -3.0, -3.0 + 1e-8]),
    st.floats(-5, 5),
)
ROWS = st.lists(st.tuples(RISKS, TIMES, st.booleans()), min_size=2, max_size=30)


def columns(rows):
    risk, time, event = zip(*rows)
    return np.array(risk), np.array(time), np.array(event)


def brute_force(risk, time, event):
    agreeing = comparable = 0.0
    for i in np.flatnonzero(event):
        for j in range(len(time)):
            if time[j] > time[i] or (time[j] == time[i] and not event[j]):
                comparable += 1
                gap = risk[i] - risk[j]
                agreeing += 0.5 if abs(gap) <= 1e-8 else float(gap > 0)
    return agreeing, comparable


@settings(derandomize=True, max_examples=300, deadline=None)
@given(ROWS)
def test_pairs_equal_brute_force_and_scikit_survival(rows):
    risk, time, event = columns(rows)
    agreeing, comparable = brute_force(risk, time, event)
    if comparable == 0:
        with pytest.raises(ValueError, match=r"no event|comparable"):
            concordance_pairs(risk, time=time, event=event)
        return
    pairs = concordance_pairs(risk, time=time, event=event)
    assert pairs.comparable == comparable
    assert pairs.concordant + 0.5 * pairs.tied_risk == agreeing
    index, concordant, discordant, tied_risk, tied_time = concordance_index_censored(
        event, time, risk
    )
    assert (pairs.concordant, pairs.discordant) == (concordant, discordant)
    assert (pairs.tied_risk, pairs.tied_time) == (tied_risk, tied_time)
    assert abs(pairs.index - index) < 1e-14


@settings(derandomize=True, max_examples=50, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_of_patients_does_not_matter(rows, random):
    risk, time, event = columns(rows)
    if brute_force(risk, time, event)[1] == 0:
        return
    order = list(range(len(risk)))
    random.shuffle(order)
    assert concordance_pairs(risk, time=time, event=event) == concordance_pairs(
        risk[order], time=time[order], event=event[order]
    )


@pytest.mark.parametrize(
    ("gap", "tied"), [(0.9e-8, 1), (1e-8, 1), (1.1e-8, 0), (-0.9e-8, 1), (-1.1e-8, 0)]
)
@pytest.mark.parametrize("level", [0.0, 1.0, -2.2265954, 512.25])
def test_risk_gaps_around_the_tolerance(gap, tied, level):
    risk = np.array([level + gap, level])
    # what the two floats differ by decides, not what was meant
    tied = int(abs(risk[0] - risk[1]) <= 1e-8)
    pairs = concordance_pairs(risk, time=[1.0, 2.0], event=[True, True])
    reference = concordance_index_censored(np.array([True, True]), np.array([1.0, 2.0]), risk)
    assert pairs.tied_risk == tied == reference[3]
    assert pairs.concordant == (1 - tied) * (gap > 0) == reference[1]


def test_events_at_one_time_are_not_comparable():
    pairs = concordance_pairs([3.0, 1.0, 2.0], time=[1, 1, 5], event=[1, 1, 0])
    assert pairs == (1, 1, 0, 0)


def test_event_tied_with_censoring_counts_the_censored_as_later():
    pairs = concordance_pairs([2.0, 1.0], time=[4, 4], event=[1, 0])
    assert pairs == (1, 0, 0, 1)
    assert pairs.index == 1.0


def test_hand_example():
    # pairs (0, 1) concordant, (0, 2) tied, (0, 3) and (2, 3) discordant
    pairs = concordance_pairs([2, 1, 2, 2.5], time=[1, 2, 3, 4], event=[1, 0, 1, 0])
    assert pairs == (1, 2, 1, 0)
    assert pairs.index == 1.5 / 4


def test_ties_are_exact_where_the_spacing_of_floats_exceeds_the_tolerance():
    big = 1e9
    risk = np.array([np.nextafter(big, 2 * big), big, big])
    assert concordance_pairs(risk, time=[1, 2, 3], event=[1, 1, 0]) == (2, 0, 1, 0)


def test_many_patients_are_counted_without_a_pair_matrix():
    rng = np.random.default_rng(3)
    n = 20_000
    risk, time = rng.normal(size=n).round(2), rng.exponential(size=n).round(3)
    event = rng.random(n) < 0.4
    tracemalloc.start()
    pairs = concordance_pairs(risk, time=time, event=event)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # one byte per pair would be 400 MB
    assert peak < 40e6
    concordant = tied = 0
    for i in np.flatnonzero(event):
        later = (time > time[i]) | ((time == time[i]) & ~event)
        gap = risk[i] - risk[later]
        concordant += int((gap > 1e-8).sum())
        tied += int((np.abs(gap) <= 1e-8).sum())
    assert (pairs.concordant, pairs.tied_risk) == (concordant, tied)


@pytest.mark.parametrize("seed", range(20))
def test_uno_equals_scikit_survival(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(10, 60)), 80
    time, train_time = rng.integers(1, 30, n) / 2, rng.integers(1, 30, m) / 2
    event, train_event = rng.random(n) < 0.6, rng.random(m) < 0.6
    event[0] = True
    time[0] = 0.5
    risk = rng.normal(size=n).round(1)
    ours = uno_concordance(
        risk, time=time, event=event, train_time=train_time, train_event=train_event, tau=11.0
    )
    reference = concordance_index_ipcw(
        Surv.from_arrays(train_event, train_time), Surv.from_arrays(event, time), risk, tau=11.0
    )
    assert abs(ours.index - reference[0]) < 1e-10
    assert ours.events_before == int((event & (time < 11.0)).sum())


def test_uno_by_hand():
    # training: censored at 1 and 3 of four, so G = 3/4 from 1 on and 3/8 from 3 on
    train = {"train_time": [1, 2, 3, 4], "train_event": [0, 1, 0, 1]}
    test = {"time": [2, 3, 5], "event": [1, 1, 0]}
    weights = uno_weights(tau=3.5, **test, **train)
    np.testing.assert_allclose(weights, [(4 / 3) ** 2, (8 / 3) ** 2, 0], rtol=1e-15)
    # pairs of row 0: one concordant, one discordant; of row 1: concordant
    risk = [2.0, 1.0 + 2.0, 0.5]
    expected = (weights[0] + weights[1]) / (2 * weights[0] + weights[1])
    assert uno_concordance(risk, tau=3.5, **test, **train).index == pytest.approx(expected)


def test_uno_takes_the_standard_tau():
    train = {"train_time": np.arange(1, 11), "train_event": np.zeros(10, bool)}
    result = uno_concordance([3.0, 2.0, 1.0], time=[1, 2, 20], event=[1, 1, 0], **train)
    # G falls by a tenth at each time: .2 at 8
    assert result.tau == 8.0
    assert result.index == 1.0


BAD = [
    ({"time": [1.0, np.nan, 3.0]}, r"time must be finite; row 1 is nan \(1 such rows\)"),
    ({"time": [1.0, -2.0, 3.0]}, r"time must not be negative; row 1 is -2\.0"),
    ({"time": [1.0, np.inf, 3.0]}, "time must be finite; row 1 is inf"),
    ({"time": [[1.0, 2.0, 3.0]]}, r"time has shape \(1, 3\); it must be 1-D"),
    ({"time": ["a", "b", "c"]}, "time has dtype .*; it must hold numbers"),
    ({"event": [0, 0, 0]}, "event holds no event: all 3 patients are censored"),
    ({"event": [0, 1]}, r"event has shape \(2,\) but time has shape \(3,\)"),
    ({"event": [0, 1, 2]}, "event must be bool or 0/1 .*; row 2 is 2"),
    ({"event": [0.0, 1.0, np.nan]}, "event must be bool or 0/1 .*; row 2 is nan"),
    ({"event": ["x", "y", "z"]}, "event has dtype .*; it must be bool or 0/1"),
    ({"risk": [1.0, np.nan, 0.0]}, "risk must be finite; row 1 is nan"),
    ({"risk": [1.0, 2.0]}, r"risk has shape \(2,\); it must be \(3,\)"),
    ({"risk": ["a", "b", "c"]}, "risk has dtype .*; it must hold numbers"),
    ({"time": [], "event": [], "risk": []}, "time is empty"),
    ({"event": [0, 0, 1]}, "no pair of patients is comparable"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change, message):
    good = {"risk": [1.0, 2.0, 0.5], "time": [1.0, 2.0, 3.0], "event": [1, 0, 1]}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=message):
        concordance_index(arguments["risk"], time=arguments["time"], event=arguments["event"])


def test_uno_errors_are_named():
    train = {"train_time": [1, 2, 3], "train_event": [1, 1, 0]}
    test = {"time": [1, 2, 5], "event": [1, 1, 1]}
    with pytest.raises(ValueError, match=r"train_time must be finite; row 0"):
        uno_concordance(
            [1, 2, 3], tau=2.0, **test, train_time=[np.nan, 1, 2], train_event=[1, 1, 0]
        )
    with pytest.raises(ValueError, match="no training patient is uncensored at 5"):
        uno_concordance([1, 2, 3], tau=6.0, **test, **train)
    with pytest.raises(ValueError, match="known up to 3 only, but is asked for at 5"):
        uno_concordance([1, 2, 3], tau=6.0, **test, train_time=[1, 2, 3], train_event=[0, 0, 1])
    with pytest.raises(ValueError, match=r"no pair of patients is comparable before tau = 0\.5"):
        uno_concordance([1, 2, 3], tau=0.5, **test, **train)
