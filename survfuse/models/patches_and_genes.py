"""What models of one bag of patches and any gene tables share: checks, tokens, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from survfuse.batch import Modality
from survfuse.models.gene_tokens import GeneTokens
from survfuse.models.inputs import Tokens
from survfuse.models.settings import (
    ModalityConfig,
    bags_and_graphs,
    check_choice,
    check_probabilities,
    check_widths,
)


class KnownTokens(NamedTuple):
    """Tokens of gene groups that an attention can always be asked with."""

    values: Tensor  # [B, G, dim]
    usable: Tensor  # [B, G] bool, at least one in every sample
    known: Tensor  # [B] bool, False where the sample has no gene group and stand-ins are used

    @property
    def bias(self) -> Tensor:
        """[B, G] of the type of the tokens: 0, and -inf where a token is left out."""
        zeros = torch.zeros_like(self.usable, dtype=self.values.dtype)
        return zeros.masked_fill(~self.usable, -torch.inf)


class GeneSide(nn.Module):
    """A token per gene group, with learned ones for a sample that has no group at all.

    A group that a sample lacks beside others that it has is left out of every attention and mean.
    If it lacks all of them, a learned token per group stands in, so that its patches are still
    read.

    Args:
        modalities, widths, activation, dropout: see `GeneTokens`.
    """

    def __init__(
        self,
        modalities: Mapping[str, ModalityConfig],
        widths: Sequence[int],
        *,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.groups = GeneTokens(modalities, widths, activation=activation, dropout=dropout)
        # small and unequal: nearly the mean of the patches at first, and free to part
        self.stand_in = nn.Parameter(torch.empty(len(self.groups.names), widths[-1]))
        nn.init.normal_(self.stand_in, std=0.02)

    @property
    def names(self) -> list[str]:
        """Of the groups; with the table in front where two tables have a group of one name."""
        groups = [group for _, group in self.groups.names]
        if len(set(groups)) == len(groups):
            return groups
        return [f"{table}/{group}" for table, group in self.groups.names]

    def forward(self, inputs: Mapping[str, Modality], n_samples: int) -> KnownTokens:
        """Tokens of a batch that `survfuse.models.inputs.encode_inputs` has checked."""
        values, present = self.groups(inputs, n_samples)
        known = present.any(1)
        values = torch.where(known[:, None, None], values, self.stand_in.to(values.dtype))
        return KnownTokens(values, present | ~known[:, None], known)


def patch_modality(modalities: Mapping[str, ModalityConfig], model: str) -> str | None:
    """The name of the one bag or graph of `modalities`, None where there is none.

    Raises:
        ValueError: there are several, there is no table, or a modality is of another kind.
    """
    patches = bags_and_graphs(modalities)
    if len(patches) > 1:
        raise ValueError(
            f"data.modalities holds the bags or graphs {patches}; {model} reads one of them beside "
            "its tables: leave the others out"
        )
    others = [name for name, item in modalities.items() if item.kind == "array"]
    if others:
        raise ValueError(
            f"data.modalities holds the array {others[0]!r}; {model} takes one bag or graph, and "
            "tables"
        )
    if len(modalities) == len(patches):
        raise ValueError(f"data.modalities holds no table; {model} needs at least one of genes")
    return patches[0] if patches else None


def check_gene_side(config: Any, model: str) -> None:
    """Raise unless the modalities are `patch_modality`'s and a `GeneSide` can be made."""
    patch_modality(config.modalities, model)
    check_widths(config, "gene_widths")
    check_choice(config, "gene_activation", ("selu", "elu"))
    check_probabilities(config, "gene_dropout")


def check_heads(config: Any, dim: str, *names: str) -> None:
    """Raise unless each named number of heads divides the field `dim`."""
    for name in names:
        if getattr(config, dim) % getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)}; it must divide {dim} {getattr(config, dim)}"
            )


def check_piece_rows(config: Any) -> None:
    """Raise unless `piece_rows` is None or a positive integer."""
    value = config.piece_rows
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"piece_rows is {value!r}; it must be None or an integer of at least 1")


def weights_by_group(
    genes: GeneSide, weights: Tensor, usable: Tensor, bag: Tokens
) -> dict[str, Tensor]:
    """Weights [total, G] of patches as one [total] per gene group.

    A group that a sample lacks, and a bag that counts as absent, have zeros.

    Args:
        genes: whose groups look.
        weights: packed in batch order.
        usable: [B, G] bool, which groups look.
        bag: what they look at.
    """
    looks = bag.ragged.per_patch(usable & bag.present[:, None])
    weights = torch.where(looks, weights, 0.0)
    return dict(zip(genes.names, weights.unbind(1), strict=True))
