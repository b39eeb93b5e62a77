"""Outcomes: polarity, checks of times, and time bins."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from survfuse.data.labels import (
    assign_bins,
    censorship_from_event,
    check_survival,
    discretize_survival,
    event_from_censorship,
)


def test_censorship_one_means_event_not_seen():
    assert event_from_censorship([1, 0, 1.0]).tolist() == [False, True, False]
    assert censorship_from_event([True, False]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cohort", "bins"), [("kirp", [43, 56, 113, 72]), ("ucec", [68, 143, 83, 244])]
)
def test_bins_of_slide_rows_equal_the_healnet_papers_table_5(shared_data, cohort, bins):
    path = shared_data / "tcga_omics" / f"tcga_{cohort}_all_clean.csv.zip"
    table = pd.read_csv(path, usecols=["survival_months", "censorship"])
    labels, edges = discretize_survival(
        table["survival_months"], event=event_from_censorship(table["censorship"])
    )
    assert np.bincount(labels).tolist() == bins
    assert edges[0] == 0
    assert edges[-1] == np.inf


def test_bins_are_closed_on_the_left_and_cover_every_time():
    # uncensored 1 .. 4 have quartiles 1.75, 2.5, 3.25
    time = [1.0, 2.0, 3.0, 4.0, 1.75, 0.0, 1e9]
    labels, edges = discretize_survival(time, event=[1, 1, 1, 1, 0, 0, 0])
    assert edges.tolist() == [0, 1.75, 2.5, 3.25, np.inf]
    assert labels.tolist() == [0, 1, 2, 3, 1, 0, 3]
    assert labels.dtype == np.int64


def test_edges_come_from_the_uncensored_rows_of_fit_on_alone():
    time = np.array([1.0, 2, 3, 4, 100, 200, 300, 400])
    event = np.ones(8, dtype=bool)
    rows = np.arange(4)
    labels, edges = discretize_survival(time, event=event, fit_on=rows)
    assert edges.tolist() == [0, 1.75, 2.5, 3.25, np.inf]
    assert labels.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    as_mask = discretize_survival(time, event=event, fit_on=time < 50)
    assert as_mask[1].tolist() == edges.tolist()
    changed = time.copy()
    changed[4:] *= 7
    assert discretize_survival(changed, event=event, fit_on=rows)[1].tolist() == edges.tolist()


def test_equal_edges_merge_with_a_warning():
    with pytest.warns(UserWarning, match=r"merged to 2 bins"):
        labels, edges = discretize_survival([5.0, 5, 5, 9], event=[1, 1, 1, 0])
    assert edges.tolist() == [0, 5, np.inf]
    assert labels.tolist() == [1, 1, 1, 1]


def test_assign_bins_wants_edges_from_zero_to_infinity():
    assert assign_bins([0, 2, 3], [0, 2, np.inf]).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"start at 0 and end at infinity"):
        assign_bins([1.0], [0, 2, 3])
    with pytest.raises(ValueError, match=r"must increase"):
        assign_bins([1.0], [0, 2, 2, np.inf])


def test_a_nan_time_is_named_by_column_row_and_unit():
    time = pd.Series([3.0, np.nan], index=["TCGA-1", "TCGA-2"], name="survival_months")
    with pytest.raises(
        ValueError, match=r"survival_months at row 1 \(TCGA-2\) is nan; .*must be known"
    ):
        discretize_survival(time, event=[1, 0])


def test_other_wrong_outcomes_are_named():
    with pytest.raises(ValueError, match=r"time at row 2 is -0.5; .*at least 0"):
        discretize_survival([1.0, 2, -0.5], event=[1, 1, 1])
    with pytest.raises(ValueError, match=r"time at row 0 is inf; .*finite"):
        check_survival([np.inf], [1])
    with pytest.raises(ValueError, match=r"event at row 1 \(b\) is 2; it must be 0 or 1"):
        check_survival([1.0, 2], [1, 2], unit_ids=["a", "b"])
    with pytest.raises(ValueError, match=r"event at row 0 is nan"):
        check_survival([1.0], [np.nan])
    with pytest.raises(ValueError, match=r"censorship holds 'yes'"):
        event_from_censorship(["yes", "no"])
    with pytest.raises(ValueError, match=r"time has 2 rows and event 1"):
        check_survival([1.0, 2], [1])
    with pytest.raises(ValueError, match=r"time is empty"):
        check_survival([], [])
    with pytest.raises(ValueError, match=r"time holds something that is not a number"):
        check_survival(["soon"], [1])


def test_all_censored_says_which_polarity_to_look_at():
    with pytest.raises(ValueError, match=r"every row is censored.*1 means censored"):
        discretize_survival([1.0, 2], event=[0, 0])
    with pytest.raises(ValueError, match=r"each of the 1 rows of fit_on is censored"):
        discretize_survival([1.0, 2], event=[0, 1], fit_on=[0])


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"n_bins is 1"):
        discretize_survival([1.0], event=[1], n_bins=1)
    with pytest.raises(ValueError, match=r"fit_on holds 5; rows are 0 to 1"):
        discretize_survival([1.0, 2], event=[1, 1], fit_on=[5])
    with pytest.raises(ValueError, match=r"fit_on is a mask of shape"):
        discretize_survival([1.0, 2], event=[1, 1], fit_on=[True])
    with pytest.raises(ValueError, match=r"must be row numbers or a mask"):
        discretize_survival([1.0, 2], event=[1, 1], fit_on=[0.5])
