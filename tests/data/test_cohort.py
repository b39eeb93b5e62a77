"""Cohorts: missing modalities, minibatches without copies, frozen preprocessing."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import ArrayModality, BagModality, GraphModality, TableModality
from survfuse.data.prepared import PreparedCohort

N = 12
GENES = ("A", "B", "C")


def make_cohort(seed: int = 0) -> Cohort:
    """Twelve patients with all four kinds of modality, each absent for someone."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(N, 3))
    table[2] = np.nan
    table[5, 1] = np.nan
    lengths = [4, 3, 0, 6, 2]
    bags = Bags.from_list(
        [torch.full((n, 5), float(i)) for i, n in enumerate(lengths)],
        [f"slide{i}" for i in range(5)],
        coords=[torch.zeros(n, 2) for n in lengths],
    )
    # row 1: two adjacent slides; row 2: an empty slide only; row 3: slides that lie apart
    groups = ((0,), (0, 1), (2,), (0, 3), (), (4,), *[()] * 6)
    torch.manual_seed(seed)
    nodes = Bags.from_list([torch.rand(3, 4), torch.rand(2, 4)], ["g0", "g1"])
    edges = (torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1], [0]]))
    volume = torch.rand(N, 2, 3, 6)
    volume[7] = torch.nan
    return Cohort(
        unit_ids=tuple(f"P{i}" for i in range(N)),
        patient_ids=tuple(f"P{i}" for i in range(N)),
        time=np.arange(1.0, N + 1),
        event=np.arange(N) % 2 == 0,
        covariates=pd.DataFrame(
            {"age": rng.normal(60, 5, N), "site": ["x"] * N}, index=[f"P{i}" for i in range(N)]
        ),
        modalities={
            "genes": TableModality(table, GENES, {"pair": ("A", "C"), "none": ()}),
            "slides": BagModality(bags, groups),
            "volume": ArrayModality(volume, np.arange(N) != 7),
            "cells": GraphModality(nodes, edges, np.array([0, 1, -1, 1] + [-1] * 8)),
        },
    )


def bag_rows(batch, sample: int) -> list[float]:
    start, length = int(batch.ragged.starts[sample]), int(batch.ragged.lengths[sample])
    return batch.features[start : start + length, 0].tolist()


def test_channels_and_presence():
    cohort = make_cohort()
    assert cohort.channels() == {
        "genes": ("table", 3),
        "slides": ("bag", 5),
        "volume": ("array", 6),
        "cells": ("graph", 4),
    }
    assert np.flatnonzero(~cohort.present("genes")).tolist() == [2]
    # a slide without a patch is no slide
    assert np.flatnonzero(cohort.present("slides")).tolist() == [0, 1, 3, 5]
    assert np.flatnonzero(cohort.present("cells")).tolist() == [0, 1, 3]
    assert cohort.modalities["slides"].n_patches.tolist()[:6] == [4, 7, 0, 10, 0, 2]
    assert json.loads(json.dumps(cohort.summary()))["modalities"]["volume"]["present"] == 11


def test_a_batch_holds_every_kind_with_absent_rows_as_zeros():
    prepared = make_cohort().prepare(np.arange(8), n_bins=2)
    batch = prepared.batch([2, 0, 7])
    assert batch.time.dtype == torch.float32
    assert batch.time.tolist() == [3.0, 1.0, 8.0]
    assert batch.event.tolist() == [True, True, False]
    assert batch.rows.tolist() == [2, 0, 7]
    assert batch.label.dtype == torch.int64
    genes, volume = batch.inputs["genes"], batch.inputs["volume"]
    assert genes.present.tolist() == [False, True, True]
    assert (genes.values[0] == 0).all()
    assert genes.values.dtype == torch.float32
    assert volume.present.tolist() == [True, True, False]
    assert (volume.values[2] == 0).all()
    assert volume.values.shape == (3, 2, 3, 6)
    assert batch.inputs["slides"].present.tolist() == [False, True, False]


def test_bags_of_a_batch_are_views_of_the_store_where_slides_lie_together():
    prepared = make_cohort().prepare(None, n_bins=2)
    stored = prepared.cohort.modalities["slides"].bags.features
    batch = prepared.batch([1, 0, 4]).inputs["slides"]
    assert batch.features.data_ptr() == stored.data_ptr()
    assert bag_rows(batch, 0) == [0.0] * 4 + [1.0] * 3
    assert bag_rows(batch, 1) == [0.0] * 4
    assert bag_rows(batch, 2) == []
    apart = prepared.batch([3]).inputs["slides"]
    assert bag_rows(apart, 0) == [0.0] * 4 + [3.0] * 6


def test_graph_edges_name_rows_of_the_packed_nodes():
    cohort = make_cohort()
    batch = cohort.prepare(None, n_bins=2).batch([1, 2, 0, 3]).inputs["cells"]
    assert batch.present.tolist() == [True, False, True, True]
    nodes = cohort.modalities["cells"].nodes
    for sample, graph in ((0, 1), (2, 0), (3, 1)):
        start, length = int(batch.ragged.starts[sample]), int(batch.ragged.lengths[sample])
        assert torch.equal(batch.features[start : start + length], nodes[graph])
    assert batch.edges.tolist() == [[4, 0, 1, 4], [3, 1, 2, 3]]
    nothing = cohort.prepare(None, n_bins=2).batch([5]).inputs["cells"]
    assert nothing.edges.shape == (2, 0)


def test_the_same_rows_give_the_same_batch():
    first, again = (make_cohort().prepare(np.arange(8), n_bins=3).batch([5, 3, 2]) for _ in "ab")
    assert torch.equal(first.label, again.label)
    for name, mine in first.inputs.items():
        assert torch.equal(mine.present, again.inputs[name].present)
        values = mine.values if hasattr(mine, "values") else mine.features
        theirs = again.inputs[name]
        assert torch.equal(values, theirs.values if hasattr(theirs, "values") else theirs.features)


def test_tables_and_bins_see_training_rows_only():
    cohort = make_cohort()
    train = np.arange(8)
    changed = make_cohort()
    changed.modalities["genes"].values[8:] *= 50
    changed.time[8:] += 100
    state = cohort.prepare(train, n_bins=3).state
    assert changed.prepare(train, n_bins=3).state == state
    assert changed.prepare(None, n_bins=3).state != state
    # the rows that set the bins may be others than those that set the tables
    other = changed.prepare(train, n_bins=3, bin_rows=np.arange(N)).state
    assert other["tables"] == state["tables"]
    assert other["interior_edges"] != state["interior_edges"]


def test_state_goes_through_json_and_gives_the_same_batches():
    cohort = make_cohort()
    prepared = cohort.prepare(np.arange(8), n_bins=3, select=2)
    state = json.loads(json.dumps(prepared.state, allow_nan=False))
    again = PreparedCohort.from_state(cohort, state)
    assert again.channels() == prepared.channels()
    assert again.channels()["genes"] == ("table", 2)
    assert again.edges.tolist() == prepared.edges.tolist()
    mine, theirs = prepared.batch(np.arange(N)), again.batch(np.arange(N))
    assert torch.equal(mine.inputs["genes"].values, theirs.inputs["genes"].values)
    assert torch.equal(mine.label, theirs.label)
    assert again.state == prepared.state


def test_a_new_cohort_may_lack_modalities_and_order_columns_otherwise():
    trained = make_cohort().prepare(np.arange(8), n_bins=2)
    other = make_cohort()
    genes = other.modalities["genes"]
    swapped = TableModality(
        np.column_stack([np.ones(N), genes.values[:, ::-1]]), ("extra", *GENES[::-1])
    )
    applied = PreparedCohort.from_state(
        other.only(["genes"]).with_modality("genes", swapped), trained.state
    )
    assert applied.channels() == trained.channels()
    batch, reference = applied.batch([0, 5]), trained.batch([0, 5])
    assert torch.equal(batch.inputs["genes"].values, reference.inputs["genes"].values)
    for name in ("slides", "volume", "cells"):
        assert batch.inputs[name].present.tolist() == [False, False]
    assert batch.inputs["volume"].values.shape == (2, 2, 3, 6)
    no_table = PreparedCohort.from_state(other.only(["slides"]), trained.state).batch([0])
    assert no_table.inputs["genes"].present.tolist() == [False]
    assert no_table.inputs["genes"].values.tolist() == [[0.0, 0.0, 0.0]]


def test_a_state_that_does_not_fit_is_refused():
    cohort = make_cohort()
    state = cohort.prepare(None, n_bins=2).state
    narrow = TableModality(cohort.modalities["genes"].values[:, :2], GENES[:2])
    with pytest.raises(ValueError, match=r"table 'genes' lacks 1 columns .*: 'C'"):
        PreparedCohort.from_state(cohort.with_modality("genes", narrow), state)
    with pytest.raises(ValueError, match=r"modality 'slides' is a table; it must be a bag"):
        PreparedCohort.from_state(cohort.with_modality("slides", narrow), state)
    wide = BagModality(Bags(torch.zeros(1, 9), [1], ["s"]), ((0,),) * N)
    with pytest.raises(ValueError, match=r"modality 'slides' has 9 channels; it must have 5"):
        PreparedCohort.from_state(cohort.with_modality("slides", wide), state)
    with pytest.raises(ValueError, match=r"state has version 99; it must be 1"):
        PreparedCohort.from_state(cohort, {**state, "version": 99})


def test_a_table_never_runs_out_of_columns():
    """No column is dropped for being constant, and a selection keeps at least one."""
    cohort = make_cohort()
    with pytest.raises(ValueError, match="select is 0; it must be at least 1"):
        cohort.prepare(None, n_bins=2, select=0)
    with pytest.raises(ValueError, match="features is empty; a table needs at least one column"):
        TableModality(np.empty((N, 0)), ())
    unknown = cohort.with_modality("genes", TableModality(np.full((N, 3), np.nan), GENES))
    with pytest.raises(ValueError, match="table 'genes' is absent from every training row"):
        unknown.prepare(None, n_bins=2)
    # constant in training, or unknown there: 0 for all who trained
    constant = np.tile([1.0, 2.0, np.nan], (N, 1))
    constant[11] = 7.0
    same = cohort.with_modality("genes", TableModality(constant, GENES))
    for select, width in ((None, 3), (1, 1)):
        prepared = same.prepare(np.arange(8), n_bins=2, select=select)
        assert prepared.channels()["genes"] == ("table", width)
        assert (prepared.table("genes").values[:8] == 0).all()


def test_groups_follow_the_selected_columns():
    prepared = make_cohort().prepare(None, n_bins=2)
    groups = prepared.groups("genes")
    assert {name: columns.tolist() for name, columns in groups.items()} == {
        "pair": [0, 2],
        "none": [],
    }
    kept = make_cohort().prepare(None, n_bins=2, select=1)
    position = {name: i for i, name in enumerate(kept.features("genes"))}
    assert kept.groups("genes")["pair"].tolist() == [position[g] for g in "AC" if g in position]


def test_subset_keeps_rows_together_and_copies_no_bag():
    cohort = make_cohort()
    part = cohort.subset([3, 0])
    assert part.unit_ids == ("P3", "P0")
    assert part.time.tolist() == [4.0, 1.0]
    assert part.covariates["age"].tolist() == cohort.covariates["age"].iloc[[3, 0]].tolist()
    assert part.modalities["slides"].groups == ((0, 3), (0,))
    assert part.modalities["slides"].bags is cohort.modalities["slides"].bags
    assert part.modalities["cells"].graph_of.tolist() == [1, 0]
    assert len(cohort.subset(cohort.event)) == 6


def test_wrong_cohorts_are_named():
    good = make_cohort()
    cases = [
        ({"time": np.r_[np.nan, good.time[1:]]}, r"time at row 0 \(P0\) is nan"),
        ({"time": np.r_[good.time[:-1], -1]}, r"time at row 11 \(P11\) is -1; .*at least 0"),
        ({"event": np.full(N, 2)}, r"event at row 0 \(P0\) is 2"),
        ({"unit_ids": ("P0", *good.unit_ids[:-1])}, r"unit_ids holds 'P0' twice"),
        ({"patient_ids": good.patient_ids[:-1]}, r"patient_ids has 11 rows and time 12"),
        (
            {"modalities": {"genes": good.modalities["genes"].subset(np.arange(3))}},
            r"modalities\['genes'\] has 3 rows and time 12",
        ),
        ({"modalities": {}}, r"modalities is empty; it must map at least one name"),
        ({"modalities": [good.modalities["genes"]]}, r"modalities is list; it must map"),
        ({"modalities": {1: good.modalities["genes"]}}, r"modalities has the name 1; "),
        (
            {"covariates": good.covariates.iloc[::-1]},
            r"covariates.index at row 0 is 'P11'; it must be the unit id 'P0'",
        ),
        ({"covariates": good.covariates.reset_index(drop=True)}, r"row 0 is '0'; .* 'P0'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            good._replace(**change)


@pytest.mark.parametrize(
    "raw", [np.zeros((N, 3)), torch.zeros(N, 3), pd.DataFrame(np.zeros((N, 3)))], ids=type
)
def test_raw_data_is_no_modality(raw):
    kind = type(raw).__name__
    message = rf"modalities\['genes'\] is {kind}; it must be one of TableModality, BagModality"
    with pytest.raises(TypeError, match=message):
        make_cohort()._replace(modalities={"genes": raw})


def test_a_cohort_takes_a_frame_of_covariates():
    with pytest.raises(TypeError, match=r"covariates is dict; it must be a DataFrame"):
        make_cohort()._replace(covariates={"age": [60] * N})


def test_a_cohort_is_shown_in_one_line():
    assert repr(make_cohort()) == (
        "Cohort('cohort', 12 units of 12 patients, 6 events; genes: table of 3, 11 present; "
        "slides: bag of 5, 4 present; volume: array of 6, 11 present; cells: graph of 4, 3 present)"
    )


def test_wrong_requests_are_named():
    cohort = make_cohort()
    with pytest.raises(ValueError, match=r"unknown modality 'gene'.*did you mean 'genes'"):
        cohort.present("gene")
    with pytest.raises(ValueError, match=r"unknown covariate 'Age'.*did you mean 'age'"):
        cohort.covariate_matrix(["Age"])
    with pytest.raises(ValueError, match=r"covariate 'site' of cohort holds text"):
        cohort.covariate_matrix(["age", "site"])
    with pytest.raises(ValueError, match=r"table 'genes' is absent from every training row"):
        cohort.prepare([2], n_bins=2)
    with pytest.raises(ValueError, match=r"each of the 2 rows of fit_on is censored"):
        cohort.prepare([1, 3], n_bins=2)
    with pytest.raises(ValueError, match=r"train_rows is empty"):
        cohort.prepare([])
    with pytest.raises(ValueError, match=r"n_bins is '4'; it must be an integer"):
        cohort.prepare(None, n_bins="4")
    with pytest.raises(ValueError, match=r"rows holds 12; rows are 0 to 11"):
        cohort.prepare(None, n_bins=2).batch([12])
    with pytest.raises(ValueError, match=r"unknown table 'slides'"):
        cohort.prepare(None, n_bins=2).features("slides")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableModality([[1, 2]], ("a", "b")), r"values is list; it must be a numpy array"),
        (
            lambda: TableModality(np.array([["1", "2"]]), ("a", "b")),
            r"values is ndarray of <U1; it must be a numpy array of numbers",
        ),
        (lambda: TableModality(np.array([[1, "x"]], dtype=object), ("a", "b")), r"of object"),
        (lambda: TableModality(pd.DataFrame(np.zeros((1, 1))), ("a",)), r"values is DataFrame; "),
        (lambda: TableModality(np.zeros((1, 2)), "ab"), r"features is 'ab'; it must be the names"),
        (lambda: TableModality(np.zeros((1, 2)), (0, 1)), r"features is \(0, 1\); it must be"),
        (lambda: BagModality([torch.zeros(1, 2)], ((0,),)), r"bags is list; it must be Bags"),
        (
            lambda: BagModality(Bags(torch.zeros(1, 2), [1], ["s"]), (0,)),
            r"groups: row 0 is 0; it must be a tuple of bag numbers",
        ),
        (lambda: ArrayModality(np.zeros((1, 2, 3)), np.ones(1, bool)), r"values is ndarray; it"),
    ],
)
def test_raw_values_of_a_modality_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_names_of_columns_may_be_a_list():
    assert TableModality(np.zeros((1, 2)), ["a", "b"]).features == ("a", "b")


def test_wrong_modalities_are_named():
    with pytest.raises(ValueError, match=r"must be \[rows, 2\]"):
        TableModality(np.zeros((2, 3)), ("a", "b"))
    with pytest.raises(ValueError, match=r"features holds 'a' twice"):
        TableModality(np.zeros((2, 2)), ("a", "a"))
    with pytest.raises(ValueError, match=r"row 1 names bag 3; there are 1 bags"):
        BagModality(Bags(torch.zeros(1, 2), [1], ["s"]), ((0,), (3,)))
    with pytest.raises(ValueError, match=r"values is .* of shape \(2, 3\)"):
        ArrayModality(torch.zeros(2, 3), np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match=r"present is bool of shape \(3,\)"):
        ArrayModality(torch.zeros(2, 3, 1), np.ones(3, dtype=bool))
    nodes = Bags(torch.zeros(2, 2), [2], ["g"])
    with pytest.raises(ValueError, match=r"edges of graph 0 name node 2; it has 2 nodes"):
        GraphModality(nodes, (torch.tensor([[0], [2]]),), np.array([0]))
    with pytest.raises(ValueError, match=r"graph_of reaches from 0 to 1"):
        GraphModality(nodes, (torch.zeros(2, 0, dtype=torch.int64),), np.array([0, 1]))
