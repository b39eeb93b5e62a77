"""One token per gene group of all tables of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from survfuse.batch import Modality
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork, side_by_side
from survfuse.models.settings import ModalityConfig


class GroupTokens(NamedTuple):
    """Tokens of gene groups."""

    values: Tensor  # [B, G, dim]; zeros where the group's table is absent
    present: Tensor  # [B, G] bool


class GeneTokens(nn.Module):
    """A self-normalising network per gene group, each giving a token.

    A table without groups is one group of all its columns.

    Args:
        modalities: of the model; those that are no table are left alone.
        widths: of the layers of every network, the last that of a token.
        activation, dropout: see `SelfNormalizingNetwork`.

    Attributes:
        names: of the groups, (table, group) in the order of their tokens.

    Raises:
        ValueError: there is no table.
    """

    def __init__(
        self,
        modalities: Mapping[str, ModalityConfig],
        widths: Sequence[int],
        *,
        activation: str = "selu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        groups = gene_groups(modalities)
        if not groups:
            raise ValueError("modalities holds no table; gene tokens need at least one")
        self.names = [(table, group) for table, group, _ in groups]
        self.networks = nn.ModuleList(
            SelfNormalizingNetwork(len(columns), widths, activation=activation, dropout=dropout)
            for _, _, columns in groups
        )
        for i, table in enumerate(self._tables):
            mine = [columns for name, _, columns in groups if name == table]
            # which columns is part of the configuration, not of the weights
            index = torch.tensor([column for columns in mine for column in columns])
            self.register_buffer(f"columns_{i}", index.to(torch.int64), persistent=False)

    @property
    def _tables(self) -> list[str]:
        return list(dict.fromkeys(table for table, _ in self.names))

    def forward(self, inputs: Mapping[str, Modality], n_samples: int) -> GroupTokens:
        """Tokens of the tables in `inputs`; the groups of a table that is not there are absent.

        Args:
            inputs: checked by `survfuse.models.inputs.encode_inputs`.
            n_samples: B.
        """
        columns, there = self._columns(inputs, n_samples)
        rows = columns.split([network[0][0].in_features for network in self.networks], 1)
        hidden = side_by_side(self.networks, rows)  # [B, G, dim]
        present = torch.stack([there[table] for table, _ in self.names], 1)
        return GroupTokens(torch.where(present[..., None], hidden, 0.0), present)

    def _columns(
        self, inputs: Mapping[str, Modality], n_samples: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The columns of all groups side by side, zeros where they are absent, and who has them.

        Those of a table that is not there at all are zeros too: its networks stay in the graph,
        and their gradients are zeros, not missing.
        """
        weight = self.networks[0][0][0].weight
        parts, there = [], {}
        for i, table in enumerate(self._tables):
            index = getattr(self, f"columns_{i}")
            if table in inputs:
                there[table] = inputs[table].present
                # an absent row may hold anything: it is replaced before any product
                values = torch.where(there[table][:, None], inputs[table].values, 0.0)
                parts.append(values.to(weight.dtype)[:, index])
            else:
                there[table] = index.new_zeros(n_samples, dtype=torch.bool)
                parts.append(weight.new_zeros(n_samples, len(index)))
        return torch.cat(parts, 1), there


def gene_groups(
    modalities: Mapping[str, ModalityConfig],
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(table, group, columns) of every gene group, tables in the order of `modalities`."""
    found = []
    for table, modality in modalities.items():
        if modality.kind == "table":
            groups = modality.groups or {table: tuple(range(modality.channels))}
            found += [(table, group, columns) for group, columns in groups.items()]
    return found
