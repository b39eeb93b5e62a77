"""One token per gene group of all tables of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from survfuse.batch import Modality
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork
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
        for i, (_, _, columns) in enumerate(groups):
            # which columns is part of the configuration, not of the weights
            index = torch.tensor(columns, dtype=torch.int64)
            self.register_buffer(f"columns_{i}", index, persistent=False)

    def forward(self, inputs: Mapping[str, Modality], n_samples: int) -> GroupTokens:
        """Tokens of the tables in `inputs`; the groups of a table that is not there are absent.

        Args:
            inputs: checked by `survfuse.models.inputs.encode_inputs`.
            n_samples: B.
        """
        tokens, present = [], []
        weight = self.networks[0][0][0].weight
        for i, ((table, _), network) in enumerate(zip(self.names, self.networks)):
            if table in inputs:
                there, values = inputs[table].present, inputs[table].values
                # an absent row may hold anything: it is replaced before any product
                values = torch.where(there[:, None], values, 0.0).to(weight.dtype)
                token = network(values[:, getattr(self, f"columns_{i}")])
                token = torch.where(there[:, None], token, 0.0)
            else:
                there = torch.zeros(n_samples, dtype=torch.bool, device=weight.device)
                # keeps the network in the graph: its gradients are zeros, not missing
                token = network(weight.new_zeros(n_samples, network[0][0].in_features)) * 0.0
            tokens.append(token)
            present.append(there)
        return GroupTokens(torch.stack(tokens, 1), torch.stack(present, 1))


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
