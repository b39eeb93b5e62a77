"""HEALNet in plain torch with K and V formed: what the fused model is measured against.

The same mathematics and the same parameter names as `survfuse.models.HEALNet`, so that one state
dict serves both and their equality can be tested. Like the public implementation it normalises the
bag, projects it to K and V and forms the probabilities [H, Lq, N], in every layer and for every
bag, and leaves the rest to autograd; `attention="sdpa"` asks torch's own fused attention instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import BagBatch, TableBatch
from survfuse.models.heads import TaskHeads
from survfuse.models.healnet_config import HEALNetConfig

_ATTENTION = ("softmax", "sdpa")


class PlainHEALNet(nn.Module):
    """Bags (no encoding, or that of the patch's index) and tables of one token.

    Args:
        config: as for HEALNet; `absorb` and `backend` have no meaning here.
        attention: "softmax" forms the probabilities, "sdpa" calls scaled_dot_product_attention.

    Raises:
        ValueError: the configuration asks for what the baseline leaves out.
    """

    def __init__(self, config: HEALNetConfig, *, attention: str = "softmax") -> None:
        super().__init__()
        if attention not in _ATTENTION:
            raise ValueError(f"attention is {attention!r}; it must be one of {_ATTENTION}")
        if config.latent_blocks or config.weight_sharing == "after_first" or not config.outputs:
            raise ValueError(
                "the plain baseline has no latent blocks and a readout; weight_sharing must be "
                "'all_layers' or 'none'"
            )
        for name, modality in config.modalities.items():
            if modality.kind not in ("bag", "table") or modality.table_tokens != "one":
                raise ValueError(f"modality {name!r} must be a bag or a table of one token")
            if modality.axes > 1:
                raise ValueError(f"modality {name!r} has axes={modality.axes}; it must be 0 or 1")
        self.config, self.attention = config, attention
        self.latents = nn.Parameter(torch.randn(config.n_latents, config.latent_dim))
        n_sets = 1 if config.weight_sharing == "all_layers" else config.depth
        self.layers = nn.ModuleList(_PlainLayer(config) for _ in range(n_sets))
        self.readout = TaskHeads(config.latent_dim, config.outputs, norm=True)

    def forward(self, inputs: Mapping[str, BagBatch | TableBatch]) -> Tensor:
        """Logits of the first task [B, out]; every modality present for every sample."""
        contexts = {name: self._contexts(name, inputs[name]) for name in self.config.modalities}
        n_samples = len(next(iter(contexts.values())))
        means = []
        for b in range(n_samples):
            x = self.latents
            for i in range(self.config.depth):
                layer = self.layers[min(i, len(self.layers) - 1)]
                for m, context in enumerate(contexts.values()):
                    x = x + layer.attention[m](x, context[b], self.config, self.attention)
                    x = x + layer.feed_forward[m](x, self.config)
            means.append(x.mean(0))
        return next(iter(self.readout(torch.stack(means)).values()))

    def _contexts(self, name: str, batch: BagBatch | TableBatch) -> list[Tensor]:
        """[N_b, C] per sample, encoded by a concatenation as the public code does."""
        if isinstance(batch, TableBatch):
            rows = list(batch.values[:, None])
        else:
            starts, lengths = batch.ragged.starts.tolist(), batch.ragged.lengths.tolist()
            rows = [batch.features[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        if not (self.config.fourier and self.config.modalities[name].axes):
            return rows
        return [torch.cat([x, self._encoding(x)], dim=1) for x in rows]

    def _encoding(self, x: Tensor) -> Tensor:
        config = self.config
        position = torch.linspace(-1, 1, x.shape[0], device=x.device)[:, None]
        scales = torch.linspace(1, config.max_frequency / 2, config.fourier_bands, device=x.device)
        angle = torch.pi * position * scales
        return torch.cat([angle.sin(), angle.cos(), position], dim=1).to(x.dtype)


class _PlainLayer(nn.Module):
    def __init__(self, config: HEALNetConfig) -> None:
        super().__init__()
        names = config.modalities
        self.attention = nn.ModuleList(
            _PlainAttention(config, config.token_width(name)) for name in names
        )
        self.feed_forward = nn.ModuleList(_PlainFeedForward(config.latent_dim) for _ in names)


class _PlainAttention(nn.Module):
    def __init__(self, config: HEALNetConfig, width: int) -> None:
        super().__init__()
        heads, size, dim = config.cross_heads, config.cross_head_dim, config.latent_dim
        self.query_norm, self.bag_norm = nn.LayerNorm(dim), nn.LayerNorm(width)
        self.query = nn.Linear(dim, heads * size, bias=False)
        self.key_weight = nn.Parameter(torch.randn(heads, size, width) * width**-0.5)
        self.value_weight = nn.Parameter(torch.randn(heads, size, width) * width**-0.5)
        self.output = nn.Linear(heads * size, dim)

    def forward(self, x: Tensor, context: Tensor, config: HEALNetConfig, attention: str) -> Tensor:
        heads = config.cross_heads
        normed = self.bag_norm(context)
        query = self.query(self.query_norm(x)).unflatten(1, (heads, -1)).transpose(0, 1)
        key = functional.linear(normed, self.key_weight.flatten(0, 1))
        value = functional.linear(normed, self.value_weight.flatten(0, 1))
        key, value = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (key, value))
        scale = config.cross_head_dim**-0.5 / config.temperature
        dropout = config.attention_dropout if self.training else 0.0
        if attention == "sdpa":
            pooled = functional.scaled_dot_product_attention(
                query[None], key[None], value[None], dropout_p=dropout, scale=scale
            )[0]
        else:
            weights = (scale * query @ key.transpose(1, 2)).softmax(-1)
            pooled = functional.dropout(weights, dropout) @ value
        out = self.output(pooled.transpose(0, 1).flatten(1))
        return (
            out if config.output_slope is None else functional.leaky_relu(out, config.output_slope)
        )


class _PlainFeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 8 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, config: HEALNetConfig) -> Tensor:
        value, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        gate = functional.selu(gate) if config.activation == "selu" else functional.gelu(gate)
        out = self.contract(value * gate)
        return functional.dropout(out, config.ff_dropout if self.training else 0.0)
