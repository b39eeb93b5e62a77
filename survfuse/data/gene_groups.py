"""Give the tables of a cohort their gene groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from survfuse.data.modalities import TableModality
from survfuse.data.omics import group_columns

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


def with_gene_groups(
    cohort: Cohort,
    genes: Mapping[str, Sequence[str]],
    *,
    source: str = "genes",
    expression_only: bool = False,
) -> Cohort:
    """The cohort whose tables carry the groups of `genes`, in place of those they had.

    A group holds, for each of its genes, every column of that gene in the table. A table without
    any of the genes has no groups, which models read as one group of all its columns.

    Args:
        cohort: with at least one table.
        genes: gene names by group, for example of `survfuse.data.omics.read_signatures`.
        source: where they are from, for errors.
        expression_only: leave out columns of copy number and mutation.

    Raises:
        ValueError: there is no table, or no table holds any of the genes.
    """
    tables = {n: s for n, s in cohort.modalities.items() if isinstance(s, TableModality)}
    if not tables:
        raise ValueError(f"{cohort.name} has no table; gene groups need one")
    changed, used = dict(cohort.modalities), False
    for name, table in tables.items():
        columns = [
            column
            for column in table.features
            if not (expression_only and column.endswith(("_cnv", "_mut")))
        ]
        groups = {group: found for group, found in group_columns(columns, genes).items() if found}
        used = used or bool(groups)
        changed[name] = dataclasses.replace(table, groups=groups)
    if not used:
        kind = " as expression (an rnaseq column)" if expression_only else ""
        raise ValueError(f"no gene of {source} is in a table of {cohort.name}{kind}")
    return dataclasses.replace(cohort, modalities=changed)
