"""What a layer of AMMASurv looks at: the attention each modality gets, the weight of each patch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from survfuse.models.ammasurv_layer import AsymmetricLayer, Membership, Part
from survfuse.ops import tokens_attend_bag_weights


def attention_masses(
    layer: AsymmetricLayer, patches: Tensor, genes: Tensor, batch: Membership
) -> dict[str, Tensor]:
    """The share of attention on every modality, by who asks ("patches", "genes").

    Args:
        layer: in evaluation mode.
        patches, genes, batch: what the layer is given.

    Returns:
        [B, 1 + tables]: the patches, then the tables; the mean over heads and over the tokens that
        ask. A row sums to 1, or to 0 where no token asks or nothing is there to be asked.
    """
    heads = layer.heads(genes)
    found = layer.parts(patches, heads, batch)
    _, gene_bias = layer.key_biases(batch)
    # values that say which table a gene token is of: attention to them is the mass of each table
    n_tables = int(layer.tables.max())
    tables = functional.one_hot(layer.tables - 1, n_tables).to(patches.dtype)[None, :, None]
    masses = {}
    for asking, parts in found.items():
        of_tables = None
        if "g" in parts:
            values = tables.expand(*heads.key.shape[:-1], n_tables)
            if asking == "p":
                of_tables = layer.patches_to_genes(
                    patches, None, heads.key, values, gene_bias, batch
                ).out
            else:
                of_tables = layer.genes_to_genes(heads, values, gene_bias).out
        if parts:
            masses["patches" if asking == "p" else "genes"] = _mean_over_tokens(
                _by_modality(parts, of_tables, n_tables), asking, batch
            )
    return masses


def _by_modality(parts: dict[str, Part], of_tables: Tensor | None, n_tables: int) -> Tensor:
    """[..., 1 + tables], the mean over heads."""
    lses = torch.stack([part.lse for part in parts.values()])
    total = lses.logsumexp(0)
    shares = torch.where(lses == -torch.inf, 0.0, (lses - total).exp())
    share = dict(zip(parts, shares, strict=True))
    nothing = torch.zeros_like(total)
    columns = [share.get("p", nothing)[..., None]]
    if of_tables is None:
        columns += [nothing[..., None]] * n_tables
    else:
        columns.append(share["g"][..., None] * of_tables)
    return torch.cat(columns, -1).mean(-2)


def _mean_over_tokens(mass: Tensor, asking: str, batch: Membership) -> Tensor:
    """[B, 1 + tables] of [total, 1 + tables] (patches) or [B, G, 1 + tables] (genes)."""
    if asking == "p":
        lengths = batch.ragged.lengths
        total = mass.new_zeros(len(lengths), mass.shape[1])
        total = total.index_add(0, batch.ragged.bags(), mass)
        mean = total / lengths.clamp(min=1)[:, None]
        return torch.where(batch.has_patches[:, None], mean, 0.0)
    present = batch.has_genes[..., None]
    return torch.where(present, mass, 0.0).sum(1) / present.sum(1).clamp(min=1)


def gene_weights(
    layer: AsymmetricLayer, patches: Tensor, genes: Tensor, batch: Membership
) -> Tensor:
    """How much each gene token looks at each patch, among the patches: [total, G], streamed.

    A sample's weights sum to 1 for each of its tokens, and are 0 for tokens it lacks.
    """
    query = layer.heads(genes).query.to(patches.dtype)
    _, lse = layer.genes_to_patches(patches, None, query, batch, 0.0)
    weights = tokens_attend_bag_weights(
        layer.contrasted(query),
        patches,
        layer.patches.weight("key"),
        lse,
        ragged=batch.ragged,
        reduce="heads",
        **layer.patches.norms(),
    )
    there = batch.has_genes & batch.has_patches[:, None]
    return torch.where(batch.ragged.per_patch(there), weights, 0.0)
