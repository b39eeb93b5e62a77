"""Gene groups of tables, frozen with the preprocessing; modalities withheld from rows."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.gene_groups import with_gene_groups
from survfuse.data.modalities import ArrayModality, BagModality, GraphModality, TableModality
from survfuse.data.prepared import PreparedCohort
from survfuse.data.simulate import simulate_cohort
from survfuse.data.withhold import withhold_rows


def cohort() -> Cohort:
    names = tuple("pqrs")
    values = np.arange(24.0).reshape(4, 6) ** 1.5
    graph = Bags(torch.ones(2, 3), [2], ["g"])
    return Cohort(
        unit_ids=names,
        patient_ids=names,
        time=np.array([1.0, 2, 3, 4]),
        event=np.ones(4, dtype=bool),
        covariates=pd.DataFrame(index=names),
        modalities={
            "rnaseq": TableModality(values[:, :4], tuple(f"{g}_rnaseq" for g in "ABCD")),
            "mut": TableModality(values[:, 4:], ("A_mut", "X_mut")),
            "slides": BagModality(Bags(torch.ones(3, 2), [1, 2], ["s", "t"]), ((0,), (1,), (), ())),
            "volume": ArrayModality(torch.ones(4, 2, 1), np.array([True, True, False, True])),
            "graph": GraphModality(graph, (torch.tensor([[0], [1]]),), np.array([0, -1, 0, 0])),
        },
    )


def test_a_table_carries_the_columns_of_each_gene() -> None:
    genes = {"one": ["B", "A"], "two": ["D", "B", "Q"], "none": ["Z"]}
    grouped = with_gene_groups(cohort(), genes)
    assert grouped.modalities["rnaseq"].groups == {
        "one": ("A_rnaseq", "B_rnaseq"),
        "two": ("B_rnaseq", "D_rnaseq"),
    }
    assert grouped.modalities["mut"].groups == {"one": ("A_mut",)}
    expression = with_gene_groups(cohort(), genes, expression_only=True)
    assert expression.modalities["mut"].groups == {}
    with pytest.raises(ValueError, match=r"no gene of a\.csv is in a table of cohort as expr"):
        with_gene_groups(cohort(), {"g": ["X"]}, source="a.csv", expression_only=True)
    with pytest.raises(ValueError, match="has no table; gene groups need one"):
        with_gene_groups(cohort().only(["slides"]), genes)


@pytest.mark.parametrize("groups", [{}, {"other": ("C_rnaseq",)}])
def test_groups_are_those_of_training_on_any_cohort(groups) -> None:
    grouped = with_gene_groups(cohort().only(["rnaseq"]), {"one": ["D", "A"], "two": ["B"]})
    prepared = grouped.prepare(None, n_bins=2)
    state = json.loads(json.dumps(prepared.state))
    table = grouped.modalities["rnaseq"]
    turned = TableModality(table.values[:, ::-1].copy(), table.features[::-1], groups)
    other = dataclasses.replace(grouped, modalities={"rnaseq": turned})
    again = PreparedCohort.from_state(other, state)
    found = {name: columns.tolist() for name, columns in again.groups("rnaseq").items()}
    assert found == {"one": [0, 3], "two": [1]}
    assert torch.equal(again.table("rnaseq").values, prepared.table("rnaseq").values)
    assert again.state == prepared.state
    # a state from before groups were part of it
    del state["groups"]
    old = PreparedCohort.from_state(other, state)
    assert set(old.groups("rnaseq")) == set(groups)


def test_the_simulated_genes_come_in_two_groups() -> None:
    groups = simulate_cohort(n_patients=(3, 0, 2)).cohort.modalities["genes"].groups
    assert set(groups) == {"tumor", "microenvironment"}
    assert groups["tumor"][:2] == ("G01", "G02")
    assert groups["tumor"][-1] == "N10"
    assert groups["microenvironment"][-11:-9] == ("M20", "N11")
    assert [len(group) for group in groups.values()] == [30, 30]


def test_a_withheld_modality_is_absent_and_nothing_else_changes() -> None:
    whole = cohort()
    second = np.array([False, True, False, False])
    names = ("rnaseq", "slides", "volume")
    less = withhold_rows(whole, dict.fromkeys(names, second) | {"graph": ~second})
    assert less.present("rnaseq").tolist() == [True, False, True, True]
    assert less.present("slides").tolist() == [True, False, False, False]
    assert less.present("volume").tolist() == [True, False, False, True]
    assert not less.present("graph").any()
    assert less.modalities["mut"] is whole.modalities["mut"]
    assert less.modalities["slides"].bags is whole.modalities["slides"].bags
    assert whole.present("rnaseq").all()
    with pytest.raises(ValueError, match="did you mean 'slides'"):
        withhold_rows(whole, {"slide": second})
    with pytest.raises(ValueError, match=r"without\['mut'\] is int64 of shape"):
        withhold_rows(whole, {"mut": np.arange(4)})
