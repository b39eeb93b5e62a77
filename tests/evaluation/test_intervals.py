"""Bootstrap, paired comparison, corrected t and Holm."""

from __future__ import annotations

import numpy as np
import pytest

from survfuse.evaluation.concordance import concordance_index, uno_concordance, uno_weights
from survfuse.evaluation.intervals import (
    TRAINING_VARIANCE_NOTE,
    Fold,
    concordance_interval,
    corrected_t,
    holm,
    paired_difference,
    pooled_concordance,
    resample_counts,
)


def cohort(seed, n=120, noise=1.0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    time = np.ceil(rng.exponential(np.exp(-truth)) * 20)
    censoring = rng.integers(1, 60, n)
    event = time <= censoring
    return truth + noise * rng.normal(size=n), np.minimum(time, censoring), event


def in_folds(risk, time, event, n_folds):
    return [Fold(risk[k::n_folds], time[k::n_folds], event[k::n_folds]) for k in range(n_folds)]


def test_one_fold_pools_to_harrells_c():
    risk, time, event = cohort(0)
    expected = concordance_index(risk, time=time, event=event)
    assert pooled_concordance([Fold(risk, time, event)]) == pytest.approx(expected, abs=1e-14)


def test_uno_weights_pool_to_unos_c():
    risk, time, event = cohort(1)
    outcome = {"time": time, "event": event, "train_time": time, "train_event": event}
    weight = uno_weights(tau=20.0, **outcome)
    expected = uno_concordance(risk, tau=20.0, **outcome).index
    pooled = pooled_concordance([Fold(risk, time, event, None, weight)])
    assert pooled == pytest.approx(expected, abs=1e-13)


def test_risks_of_different_folds_are_never_compared():
    risk, time, event = cohort(2)
    folds = in_folds(risk, time, event, 4)
    shifted = [fold._replace(risk=fold.risk * (k + 1) + 100 * k) for k, fold in enumerate(folds)]
    assert pooled_concordance(shifted) == pooled_concordance(folds)
    # two folds by hand: 1 of 1 and 1 of 2 pairs agree
    by_hand = [
        Fold([2.0, 1.0], [1, 2], [1, 0]),
        Fold([2.0, 1.0, 3.0], [1, 2, 3], [1, 0, 0]),
    ]
    assert pooled_concordance(by_hand) == 2 / 3


def test_resamples_keep_each_folds_events_and_patients():
    folds = in_folds(*cohort(3), 3)
    for fold, counts in zip(folds, resample_counts(folds, 200, 0), strict=True):
        assert (counts[:, fold.event].sum(axis=1) == fold.event.sum()).all()
        assert (counts[:, ~fold.event].sum(axis=1) == (~fold.event).sum()).all()
        assert counts.std() > 0


def test_bootstrap_equals_resampling_by_index():
    risk, time, event = cohort(4, n=40)
    fold = Fold(risk, time, event)
    drawn = resample_counts([fold], 100, 5)[0]
    values = []
    for counts in drawn:
        rows = np.repeat(np.arange(40), counts.astype(int))
        values.append(concordance_index(risk[rows], time=time[rows], event=event[rows]))
    interval = concordance_interval([fold], resamples=100, seed=5)
    low, high = np.percentile(values, [2.5, 97.5])
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


def test_rows_of_a_patient_are_drawn_together():
    risk, time, event = cohort(5, n=40)
    patient = np.arange(40) // 2
    time, event = time[patient * 2], event[patient * 2]
    fold = Fold(risk, time, event, patient)
    counts = resample_counts([fold], 100, 0)[0]
    assert counts.shape == (100, 20)
    values = []
    for drawn in counts:
        rows = np.repeat(np.arange(40), drawn[patient].astype(int))
        values.append(concordance_index(risk[rows], time=time[rows], event=event[rows]))
    interval = concordance_interval([fold], resamples=100, seed=0, minimum_events=1)
    np.testing.assert_allclose(
        [interval.low, interval.high], np.percentile(values, [2.5, 97.5]), atol=1e-12
    )


def test_interval_is_seeded_and_says_what_it_leaves_out():
    folds = in_folds(*cohort(6), 5)
    one, same = (concordance_interval(folds, seed=1) for _ in range(2))
    other = concordance_interval(folds, seed=2)
    assert one == same
    assert one != other
    assert one.low < one.estimate < one.high
    assert one.note == TRAINING_VARIANCE_NOTE
    assert "training" in one.note
    wide = concordance_interval(folds, seed=1, level=0.99)
    assert wide.low < one.low < one.high < wide.high


def test_blocks_do_not_change_the_sums(monkeypatch):
    folds = in_folds(*cohort(7), 2)
    whole = concordance_interval(folds, resamples=100)
    monkeypatch.setattr("survfuse.evaluation.intervals._PAIRS_PER_BLOCK", 700)
    assert concordance_interval(folds, resamples=100).low == pytest.approx(whole.low, abs=1e-13)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(8)
    big = cohort(9, n=6000)
    truth = concordance_index(big[0], time=big[1], event=big[2])
    covered = 0
    for _ in range(100):
        rows = rng.choice(6000, 100, replace=False)
        interval = concordance_interval([Fold(*(v[rows] for v in big))], resamples=300)
        covered += interval.low <= truth <= interval.high
    assert 88 <= covered <= 100


def test_no_interval_under_ten_events():
    risk, time, event = cohort(10, n=60)
    event[np.flatnonzero(event)[9:]] = False
    interval = concordance_interval([Fold(risk, time, event)])
    assert (interval.low, interval.high) == (None, None)
    assert interval.note == "No interval: 9 patients with an event are fewer than 10."
    assert concordance_interval([Fold(risk, time, event)], minimum_events=9).low is not None


def test_events_after_tau_do_not_count_towards_the_minimum():
    risk, time, event = cohort(11, n=60)
    weight = np.where(event & (time < np.sort(time[event])[5]), 1.0, 0.0)
    assert concordance_interval([Fold(risk, time, event, None, weight)]).low is None


def test_paired_difference_uses_the_same_resamples():
    risk, time, event = cohort(12)
    folds = in_folds(risk, time, event, 5)
    same = paired_difference(folds, folds)
    assert (same.estimate, same.low, same.high, same.pvalue) == (0, 0, 0, 1)
    noise = np.random.default_rng(0).normal(size=risk.size)
    worse = paired_difference(folds, in_folds(noise, time, event, 5))
    assert worse.low > 0
    assert worse.pvalue == 2 / 2001
    swapped = paired_difference(in_folds(noise, time, event, 5), folds)
    assert swapped.estimate == -worse.estimate
    assert swapped.high == pytest.approx(-worse.low)
    # far narrower than the two intervals taken apart
    nearly = in_folds(risk + 0.1 * noise, time, event, 5)
    close = paired_difference(folds, nearly)
    alone = concordance_interval(folds)
    assert close.high - close.low < 0.5 * (alone.high - alone.low)


def test_corrected_t_by_hand():
    values = [0.02, 0.05, -0.01, 0.04]
    result = corrected_t(values, n_train=80, n_test=20)
    error = np.sqrt((1 / 4 + 20 / 80) * np.var(values, ddof=1))
    assert result.mean == pytest.approx(0.025)
    assert result.statistic == pytest.approx(0.025 / error)
    # the 97.5 % point of t with 3 degrees of freedom
    assert result.high - result.mean == pytest.approx(3.182446305 * error, rel=1e-8)
    assert result.degrees == 3
    assert 0 < result.pvalue < 1


def test_corrected_t_without_spread():
    assert corrected_t([0.1, 0.1], n_train=8, n_test=2).pvalue == 0
    assert corrected_t([0.0, 0.0], n_train=8, n_test=2).pvalue == 1


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([]).size == 0


def test_errors_are_named():
    risk, time, event = cohort(13)
    good = [Fold(risk, time, event)]
    with pytest.raises(ValueError, match="folds is empty"):
        pooled_concordance([])
    with pytest.raises(ValueError, match="no fold holds a comparable pair"):
        pooled_concordance([Fold(risk, time, np.zeros_like(event))])
    with pytest.raises(ValueError, match="resamples is 10; it must be at least 100"):
        concordance_interval(good, resamples=10)
    with pytest.raises(ValueError, match="level is 95; it must lie between 0 and 1"):
        concordance_interval(good, level=95)
    with pytest.raises(ValueError, match="risk must be finite; row 0 is nan"):
        concordance_interval([Fold(risk * np.nan, time, event)])
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        concordance_interval([Fold(risk, time, event, None, [1.0, 2.0])])
    with pytest.raises(ValueError, match=r"patient has shape \(2,\)"):
        concordance_interval([Fold(risk, time, event, ["a", "b"])])
    with pytest.raises(ValueError, match="patient 'a' has rows with different outcomes"):
        concordance_interval([Fold([1.0, 2.0], [1, 2], [1, 0], ["a", "a"])])
    with pytest.raises(ValueError, match="model a has 1 folds, model b 2"):
        paired_difference(good, good * 2)
    with pytest.raises(ValueError, match="fold 0: the two models differ in time"):
        paired_difference(good, [Fold(risk, time + 1, event)])
    with pytest.raises(ValueError, match="fold 0: the two models differ in patient"):
        paired_difference(good, [Fold(risk, time, event, np.arange(time.size))])
    with pytest.raises(ValueError, match="at least two finite numbers"):
        corrected_t([0.1], n_train=8, n_test=2)
    with pytest.raises(ValueError, match="n_train is 0 and n_test is 2; both must be positive"):
        corrected_t([0.1, 0.2], n_train=0, n_test=2)
    with pytest.raises(ValueError, match="pvalues must be a list of numbers between 0 and 1"):
        holm([0.1, 1.1])
