"""MCAT, MOTCat and SurvPath in plain torch with everything formed: what ours are measured against.

The same modules, parameter names and mathematics as in `survfuse.models`, so that one state dict
serves both and their equality can be tested; only what touches the patches is written as public
codes have it: the whole bag projected, K and V (or q, k and v) formed, torch's own
scaled_dot_product_attention, and autograd keeping what it likes. Every modality must be present for
every sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.transport_attention import unbalanced_plan
from survfuse.models.inputs import Tokens, encode_inputs
from survfuse.models.mcat import MCAT
from survfuse.models.motcat import MOTCat
from survfuse.models.patches_and_genes import KnownTokens
from survfuse.models.survpath import SurvPath


class PlainMCAT(MCAT):
    """`survfuse.models.mcat.MCAT` with the projected bag, K and V formed."""

    def _attend(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        part, config = self.attention, self.config
        read = []
        for tokens, rows in zip(genes.values, bags_of(bag), strict=True):
            hidden = functional.linear(rows, part.project.weight, part.project.bias).relu()
            hidden = functional.dropout(hidden, config.patch_dropout, self.training)
            query, key, value = part.query(tokens), part.key(hidden), part.value(hidden)
            heads = (part.heads, -1)
            query, key, value = (
                x.unflatten(1, heads).transpose(0, 1)[None] for x in (query, key, value)
            )
            out = functional.scaled_dot_product_attention(query, key, value)
            read.append(part.output(out[0].transpose(0, 1).flatten(1)))
        return torch.stack(read)


class PlainMOTCat(MOTCat):
    """`survfuse.models.motcat.MOTCat` with the projected bag, and one plan after another."""

    def _attend(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        part, config = self.attention, self.config
        read = []
        for tokens, rows in zip(genes.values, bags_of(bag), strict=True):
            hidden = functional.linear(rows, part.project.weight, part.project.bias).relu()
            hidden = functional.dropout(hidden, config.patch_dropout, self.training)
            n, k = len(hidden), -(-len(hidden) // config.micro_batch)
            mix = self.training and k > 1
            order = (torch.randperm if mix else torch.arange)(n, device=hidden.device)
            total = torch.zeros_like(tokens)
            for j in range(k):
                mine = hidden[order[j::k]]
                total = total + self._plan(mine, tokens).to(mine.dtype).T @ mine
            read.append(total / k)
        return torch.stack(read)

    @torch.no_grad()
    def _plan(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[n, G] of one micro-batch, in fp64."""
        rows, tokens = (x.float() - x.float().amin(-1, keepdim=True) for x in (rows, tokens))
        cost = torch.cdist(rows, tokens).square()[None]
        everyone = cost.new_ones(1, len(rows), dtype=torch.bool)
        every_token = cost.new_ones(len(tokens), dtype=torch.bool)
        cost = cost / cost.amax().clamp(min=1e-30)
        reg, tau = self.config.transport_reg, self.config.transport_tau
        return unbalanced_plan(cost, everyone, every_token, reg=reg, tau=tau)[0]


class PlainSurvPath(SurvPath):
    """`survfuse.models.survpath.SurvPath` on the joint sequence of pathways and patches."""

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """As of `SurvPath`; logits and "joint" alone."""
        if self.patch_qkv is not None:
            raise ValueError(
                "shared_qkv is False; the plain baseline has one projection, as theirs"
            )
        tokens, n_samples = encode_inputs(inputs, self.config.modalities)
        genes = self.genes(inputs, n_samples)
        sides = []
        for pathways, rows in zip(genes.values, bags_of(tokens[self.patches]), strict=True):
            projected = functional.linear(rows, self.project.weight, self.project.bias)
            joint = torch.cat([pathways, projected])
            qkv = self.qkv(self.norm(joint)).unflatten(1, (3, self.config.heads, -1))
            query, key, value = qkv.permute(1, 2, 0, 3)[:, None]
            n = len(pathways)
            attend = functional.scaled_dot_product_attention
            out = torch.cat(
                [
                    attend(query[:, :, :n], key, value),
                    attend(query[:, :, n:], key[:, :, :n], value[:, :, :n]),
                ],
                dim=2,
            )
            out = self.feed_forward(out[0].transpose(0, 1).flatten(1))
            sides.append(torch.cat([out[:n].mean(0), out[n:].mean(0)]))
        hidden = self.hidden(torch.stack(sides))
        return ModelOutput(self.readout(hidden), {"joint": hidden}, {})


def bags_of(bag: Tokens) -> list[Tensor]:
    """The rows of each bag."""
    starts, lengths = bag.ragged.starts.tolist(), bag.ragged.lengths.tolist()
    return [bag.features[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def joined(parts: list[Tensor]) -> Tensor:
    """One behind the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """scaled_dot_product_attention of rows: [n, H d], [m, H d] and [m, H dv] to [n, H dv]."""
    sides = (x.unflatten(1, (heads, -1)).transpose(0, 1)[None] for x in (query, key, value))
    out = functional.scaled_dot_product_attention(*sides, attn_mask=mask, dropout_p=dropout)
    return out[0].transpose(0, 1).flatten(1)
