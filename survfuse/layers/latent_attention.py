"""Attention of a few latent tokens: to a long bag, to one token, and among themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.ops import (
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.ragged import Ragged


def zero_gradients(x: Tensor, parameters: list[Tensor]) -> Tensor:
    """`x`, with `parameters` that took no part in it receiving zeros instead of no gradient.

    Optimisers and distributed training treat a parameter without a gradient differently from one
    whose gradient is zero; whether a modality is missing from a batch must not decide which.
    """
    # the sum of no elements is 0 whatever the parameters hold, and its gradient is zeros
    nothing = torch.cat([parameter.flatten()[:0] for parameter in parameters]).sum()
    return x + nothing


class BagCrossAttention(nn.Module):
    """Latents attend to a bag through normalised queries, keys and values.

    `act(W_o concat_h softmax(q_h . k_h / (sqrt(d) * temperature)) v_h + b_o)` with
    `q = W_q LN(latents)`, `k, v = W_k LN(bag), W_v LN(bag)`. The op normalises the bag on the fly
    and never forms K, V or the normalised bag where that is cheaper.

    Args:
        dim: width of the latents.
        bag_dim: width of the bag D.
        heads: number of heads H.
        head_dim: size of a head d.
        temperature: divides the logits.
        output_slope: negative slope of a LeakyReLU behind the output projection; None for none.
        dropout: probability with which an attention weight is dropped in training.
        absorb: "auto", "always" or "never", as in `survfuse.ops.tokens_attend_bag`.
        backend: of that op; None for the fastest that can serve the call.
    """

    def __init__(
        self,
        dim: int,
        bag_dim: int,
        *,
        heads: int,
        head_dim: int,
        temperature: float = 1.0,
        output_slope: float | None = None,
        dropout: float = 0.0,
        absorb: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.scale = 1.0 / (math.sqrt(head_dim) * temperature)
        self.output_slope, self.dropout = output_slope, dropout
        self.absorb, self.backend = absorb, backend
        self.query_norm = nn.LayerNorm(dim)
        self.bag_norm = nn.LayerNorm(bag_dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_weight = nn.Parameter(torch.empty(heads, head_dim, bag_dim))
        self.value_weight = nn.Parameter(torch.empty(heads, head_dim, bag_dim))
        self.output = nn.Linear(heads * head_dim, dim)
        for weight in (self.key_weight, self.value_weight):
            nn.init.uniform_(weight, -(bag_dim**-0.5), bag_dim**-0.5)

    def forward(self, latents: Tensor, bag: Tensor, ragged: Ragged | None = None) -> Tensor:
        """The update of the latents, without the residual.

        Args:
            latents: [B, Lq, dim].
            bag: [T, D] packed, described by `ragged`; or dense [B, N, D].
            ragged: the ranges of a packed bag. An empty bag pools to zeros.

        Returns:
            [B, Lq, dim].
        """
        pooled = tokens_attend_bag(
            self._queries(latents, bag),
            bag,
            self.key_weight,
            self.value_weight,
            **self._shared(ragged),
            dropout_p=self.dropout if self.training else 0.0,
            absorb=self.absorb,
            backend=self.backend,
        )
        return self._project(pooled.flatten(2))

    def with_weights(
        self, latents: Tensor, bag: Tensor, ragged: Ragged | None = None
    ) -> tuple[Tensor, Tensor]:
        """The update without dropout, and every patch's weight: the mean over latents and heads.

        The weights are streamed, so latents x patches is never formed. Returns [B, Lq, dim] and
        [total], packed in batch order.
        """
        query = self._queries(latents, bag)
        pooled, lse = self._pool(query, bag, ragged)
        weights = tokens_attend_bag_weights(
            query, bag, self.key_weight, lse, reduce="rows", **self._shared(ragged)
        )
        return self._project(pooled.flatten(2)), weights

    def weights_by_effect(
        self, latents: Tensor, bag: Tensor, ragged: Ragged | None = None
    ) -> Tensor:
        """Every patch's weight, where a head counts by how much what it finds changes the update.

        A head that looks at all patches alike, or makes nothing of what it looks at, says nothing
        about what a model goes by. A head of a latent counts by `||W_o,h (o_h - m_h)||`, o_h what
        it found and m_h the mean of its values over the bag; those of a sample sum to 1. Weights
        are as in `with_weights`, where all heads count the same.

        Returns:
            [total], packed in batch order; Lq H numbers per patch are held on the way.
        """
        query = self._queries(latents, bag)
        found, lse = self._pool(query, bag, ragged)  # [B, Lq, H, d]
        # a zero query gives every patch the same weight
        mean, _ = self._pool(torch.zeros_like(query), bag, ragged)
        weights = tokens_attend_bag_weights(
            query, bag, self.key_weight, lse, **self._shared(ragged)
        )  # [total, Lq, H]
        project = self.output.weight.unflatten(1, (self.heads, self.head_dim))  # [dim, H, d]
        moved = (found - mean).to(project.dtype)
        effect = torch.einsum("bqhd,ohd->bqho", moved, project).norm(dim=-1).flatten(1)
        total = effect.sum(1, keepdim=True)  # [B, 1]
        effect = torch.where(total > 0, effect / total, 1.0 / effect.shape[1])
        if ragged is None:
            of_patch = effect.repeat_interleave(bag.shape[1], 0)
        else:
            of_patch = ragged.per_patch(effect)
        return (weights.flatten(1) * of_patch).sum(1)

    def one_token(self, latents: Tensor, token: Tensor) -> Tensor:
        """The same for a bag of one row per sample, whose weight is always 1.

        Args:
            latents: [B, Lq, dim]; only their number matters.
            token: [B, D].

        Returns:
            The update, [B, Lq, dim].
        """
        value = self.value_weight.flatten(0, 1)
        # a type that is not the parameters' own is brought to theirs: a table is small
        pooled = functional.linear(self.bag_norm(token.to(value.dtype)), value)[:, None]
        if self.training and self.dropout > 0:
            n_latents = latents.shape[1]
            weights = pooled.new_ones(pooled.shape[0], n_latents, self.heads, 1)
            weights = functional.dropout(weights, self.dropout)
            pooled = (weights * pooled.unflatten(2, (self.heads, self.head_dim))).flatten(2)
        update = self._project(pooled).expand(-1, latents.shape[1], -1)
        # the softmax of one logit is constant: what makes the logit has zero gradient
        idle = [*self.query_norm.parameters(), *self.query.parameters(), self.key_weight]
        return zero_gradients(update, idle)

    def _shared(self, ragged: Ragged | None) -> dict[str, Any]:
        """What the pooling and its weights are computed with alike."""
        return {
            "norm_weight": self.bag_norm.weight,
            "norm_bias": self.bag_norm.bias,
            "norm_eps": self.bag_norm.eps,
            "ragged": ragged,
            "scale": self.scale,
        }

    def _pool(self, query: Tensor, bag: Tensor, ragged: Ragged | None) -> tuple[Tensor, Tensor]:
        """What every head finds, [B, Lq, H, d], without dropout, and lse [B, Lq, H]."""
        return tokens_attend_bag_with_lse(
            query,
            bag,
            self.key_weight,
            self.value_weight,
            absorb=self.absorb,
            backend=self.backend,
            **self._shared(ragged),
        )

    def _queries(self, latents: Tensor, bag: Tensor) -> Tensor:
        query = self.query(self.query_norm(latents)).unflatten(2, (self.heads, self.head_dim))
        kind = torch.promote_types(query.dtype, self.key_weight.dtype)
        return query.to(torch.promote_types(kind, bag.dtype))

    def _project(self, pooled: Tensor) -> Tensor:
        update = self.output(pooled.to(self.output.weight.dtype))
        if self.output_slope is None:
            return update
        return functional.leaky_relu(update, self.output_slope)


class LatentSelfAttention(nn.Module):
    """Latents attend to each other; arguments as in `BagCrossAttention`."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        temperature: float = 1.0,
        output_slope: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.scale = 1.0 / (math.sqrt(head_dim) * temperature)
        self.output_slope, self.dropout = output_slope, dropout
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, dim)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, Lq, dim] to the update [B, Lq, dim], without the residual."""
        normed = self.norm(latents)
        split = (self.heads, self.head_dim)
        query = self.query(normed).unflatten(2, split).transpose(1, 2)
        key, value = self.key_value(normed).unflatten(2, (2, *split)).unbind(2)
        pooled = functional.scaled_dot_product_attention(
            query,
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        update = self.output(pooled.transpose(1, 2).flatten(2))
        if self.output_slope is None:
            return update
        return functional.leaky_relu(update, self.output_slope)
