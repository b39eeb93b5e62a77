"""Models that pool a bag, in plain torch with everything formed: what ours are measured against.

The same modules, parameter names and mathematics as in `survfuse.models`, so that one state dict
serves both and their equality can be tested. What touches the patches is written as public codes
have it, and autograd keeps what it likes. Every modality must be present for every sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import BagBatch, Modality, ModelOutput
from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.models.abmil import ABMIL, ABMILConfig
from survfuse.models.encoders import PatchPool
from survfuse.models.inputs import Tokens, encode_inputs
from survfuse.models.late_fusion import LateFusion, LateFusionConfig
from survfuse.models.mean_pool import MeanPool
from survfuse.models.multimodn import MultiModN, MultiModNConfig
from survfuse.models.perceiver import Perceiver, PerceiverLayer, UnionAttention

from .plain_models import attend, bags_of


def gated_mean(pool: GatedAttentionPool, rows: Tensor) -> Tensor:
    """The rows [n, D] of one bag pooled by gated attention, [K, D]."""
    hidden = pool.value(rows).tanh() * pool.gate(rows).sigmoid()
    weights = pool.score(hidden).softmax(0)
    return functional.dropout(weights, pool.dropout, pool.training).to(rows.dtype).T @ rows


class PlainPatchPool(nn.Module):
    """`survfuse.models.encoders.PatchPool` with the layers and weights of `like`."""

    def __init__(self, like: PatchPool) -> None:
        super().__init__()
        self.project, self.pool = like.project, like.pool

    def forward(self, tokens: Tokens) -> Tensor:
        """[B, dim]."""
        pooled = []
        for rows in bags_of(tokens):
            hidden = functional.linear(rows, self.project.weight, self.project.bias).relu()
            hidden = functional.dropout(hidden, self.project.dropout, self.training)
            pooled.append(gated_mean(self.pool, hidden)[0])
        return torch.stack(pooled)


class PlainABMIL(ABMIL):
    """`survfuse.models.abmil.ABMIL` with a plain pool."""

    def __init__(self, config: ABMILConfig) -> None:
        super().__init__(config)
        self.pool = PlainPatchPool(self.pool)


class PlainLateFusion(LateFusion):
    """`survfuse.models.late_fusion.LateFusion` with plain pools."""

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__(config)
        for network in self.vectors.networks:
            if isinstance(network, nn.ModuleDict):
                network["pool"] = PlainPatchPool(network["pool"])


class PlainMultiModN(MultiModN):
    """`survfuse.models.multimodn.MultiModN` with pool "attention" and plain pools."""

    def __init__(self, config: MultiModNConfig) -> None:
        if config.pool != "attention":
            raise ValueError(f"pool is {config.pool!r}; the plain baseline has 'attention' alone")
        super().__init__(config)
        for step in self.steps:
            if step.pool is not None:
                step.pool = PlainPatchPool(step.pool)


class PlainMeanPool(MeanPool):
    """`survfuse.models.mean_pool.MeanPool` of bags and tables, with torch's own mean."""

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """As of `MeanPool`; logits and "joint" alone."""
        joint = self.bias
        for name, branch in zip(self.names, self.branches, strict=True):
            batch = inputs[name]
            if isinstance(batch, BagBatch):
                bag = Tokens(batch.features, batch.ragged, batch.present, ())
                mean = torch.stack([rows.mean(0) for rows in bags_of(bag)])
            else:
                mean = batch.values
            joint = joint + branch(mean.to(self.bias.dtype))
        return ModelOutput(self.readout(self.hidden(joint)), {"joint": joint}, {})


class PlainPerceiver(Perceiver):
    """`survfuse.models.perceiver.Perceiver` on the tokens of all modalities as one sequence.

    The common tokens are formed once, K and V of all of them in every iteration.
    """

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """As of `Perceiver`; logits and "latents" alone."""
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        rows = {name: _rows_of(found) for name, found in tokens.items()}
        sequences = [
            torch.cat([self._common(name, found[b]) for name, found in rows.items()])
            for b in range(n_samples)
        ]
        latents = self.latents.expand(n_samples, -1, -1)
        for i in range(self.config.depth):
            latents = _iterate(self._layer(i), latents, sequences)
        mean = latents.mean(1)
        return ModelOutput(self.readout(mean), {"latents": mean}, {})

    def _common(self, name: str, rows: Tensor) -> Tensor:
        """Tokens [n, C] of one modality brought to the common width."""
        common = self.common
        m = common.names.index(name)
        normed, code = common.norms[m](rows), common.codes[m]
        if common.maps is not None:
            return common.maps[m](normed) + code
        n, own = normed.shape
        zeros = normed.new_zeros(n, common.width - own - len(code))
        return torch.cat([normed, zeros, code.expand(n, -1)], 1)


def _rows_of(tokens: Tokens) -> list[Tensor]:
    """The tokens of each sample."""
    if tokens.ragged is not None:
        return bags_of(tokens)
    features = tokens.features
    return list(features if features.dim() == 3 else features[:, None])


def _iterate(layer: PerceiverLayer, latents: Tensor, sequences: list[Tensor]) -> Tensor:
    """The latents [B, Lq, dim] behind one iteration."""
    latents = latents + _read(layer.attention, latents, sequences)
    latents = latents + layer.feed_forward(latents)
    blocks = zip(layer.latent_attention, layer.latent_feed_forward, strict=True)
    for attention, feed_forward in blocks:
        latents = latents + attention(latents)
        latents = latents + feed_forward(latents)
    return latents


def _read(part: UnionAttention, latents: Tensor, sequences: list[Tensor]) -> Tensor:
    """What the latents read of each sample's sequence, [B, Lq, dim]."""
    queries = part.query(part.query_norm(latents))
    dropout, read = part.dropout if part.training else 0.0, []
    for query, tokens in zip(queries, sequences, strict=True):
        key = functional.linear(tokens, part.key_weight.flatten(0, 1))
        value = functional.linear(tokens, part.value_weight.flatten(0, 1))
        read.append(attend(query, key, value, part.heads, dropout=dropout))
    return part.output(torch.stack(read))
