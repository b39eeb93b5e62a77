"""`CrossAttention`: `torch.nn.MultiheadAttention` for a few queries over very many keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from survfuse.ops import (
    cross_attention_weights,
    cross_attention_with_lse,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.ops.backends import plain_backend
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged


class CrossAttention(nn.MultiheadAttention):
    r"""Drop-in for `torch.nn.MultiheadAttention` where few queries attend to a long bag.

    .. math:: W_o\, \mathrm{concat}_h\, \mathrm{softmax}(q_h \cdot k_h / \sqrt{d})\, v_h + b_o

    Parameters, their names, shapes and initialisation are those of `torch.nn.MultiheadAttention`,
    which it is, so checkpoints load both ways. If key and value are one tensor, a bag, its
    projections are absorbed into the queries where that is cheaper, and K and V are never formed.
    Otherwise they are projected, and streamed. Either way no matrix of queries x keys is held, but
    for weights that are asked for.

    What differs from torch: a query whose keys are all masked gets `out_proj.bias`, and not NaN;
    returned weights are those before dropout, computed anew from a logsumexp in fp32, whose
    rounding they carry; there is no mask per query, since `key_padding_mask` says all that a set of
    patches needs.

    Args:
        embed_dim: width of the queries and the result.
        num_heads: number of heads H, which divides `embed_dim`.
        dropout: probability with which a weight is dropped in training.
        bias: of the projections.
        add_bias_kv, add_zero_attn: must be False.
        kdim, vdim: width of the keys and the values; None is `embed_dim`.
        batch_first: inputs and result are [B, L, E] instead of [L, B, E].
        device, dtype: of the parameters.
        absorb: "auto", "always" or "never", as in `survfuse.ops.tokens_attend_bag`.
        backend: of the ops; None for the fastest that can serve the call.

    Example:
        >>> attention = CrossAttention(16, 4, kdim=24, vdim=24, batch_first=True)
        >>> genes, bag = torch.randn(2, 6, 16), torch.randn(90, 24)
        >>> patients = Ragged.from_lengths([50, 40])
        >>> attention(genes, bag, bag, need_weights=False, ragged=patients)[0].shape
        torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        absorb: str = "auto",
        backend: str | None = None,
    ) -> None:
        for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise ValueError(
                    f"{name} is {given!r}; it must be False: CrossAttention attends to the keys it "
                    "is given and to no other"
                )
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}; the first must be a positive "
                "multiple of the second"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.absorb, self.backend = absorb, backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` to `key`, as `torch.nn.MultiheadAttention` computes it.

        Args:
            query: [Lq, B, E]; [B, Lq, E] if `batch_first`; [Lq, E] without a batch.
            key: [Lk, B, kdim], or [B, Lk, kdim], or [Lk, kdim]; packed [T, kdim] with `ragged`.
                Several bags whose length comes first are copied to lie one behind the other.
            value: likewise, of width vdim.
            key_padding_mask: [B, Lk], or [Lk] without a batch, or [T] with `ragged`: bool, True
                leaves a key out; or floating, added to its logits. A key left out, or with -inf,
                may hold anything, NaN included, if key and value are one tensor.
            need_weights: also return the weights, at the cost of a second pass over the keys.
            attn_mask, is_causal: must be None and False.
            average_attn_weights: return the mean of the weights over heads.
            ragged: the range of rows of each of the B bags in packed key and value.

        Returns:
            The result, of the shape of `query`, and the weights or None: [B, Lq, Lk], or
            [B, H, Lq, Lk] if they are not averaged, without B for inputs without it. With `ragged`
            they are packed, [total, Lq] or [total, Lq, H].

        Raises:
            ValueError, TypeError: an argument has the wrong shape or type; it is named.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal, ragged)
        batched, one_tensor = query.dim() == 3, key is value
        if ragged is None:
            key, value = self._batch_first(key), None if one_tensor else self._batch_first(value)
        query = self._batch_first(query)
        bias = self._bias(key_padding_mask, key, ragged)
        attend = self._attend_bag if one_tensor else self._attend_keys
        dropout_p = self.dropout if self.training else 0.0
        reduce = "heads" if average_attn_weights else None
        out, weights = attend(query, key, value, bias, ragged, dropout_p, need_weights, reduce)
        out = self.out_proj(out.flatten(2))
        if weights is not None and ragged is None:
            # packed by key: [B * Lk, Lq] or [B * Lk, Lq, H]
            weights = weights.unflatten(0, key.shape[:2])
            weights = weights.mT if average_attn_weights else weights.permute(0, 3, 2, 1)
            weights = weights if batched else weights[0]
        if not batched:
            return out[0], weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _attend_bag(
        self, query, bag, _, bias, ragged, dropout_p, need_weights, reduce
    ) -> tuple[Tensor, Tensor | None]:
        """One tensor of keys and values: the projections go into the op.

        The bias of the keys stays out: it shifts all logits of a row alike, and the lse it would
        be part of is used for these weights only.
        """
        (w_q, w_k, w_v), (b_q, _, b_v) = self._projections()
        query = self._heads(linear(query, w_q, b_q))
        heads = (self.num_heads, self.head_dim)
        w_k, w_v = w_k.unflatten(0, heads), w_v.unflatten(0, heads)
        b_v = None if b_v is None else b_v.unflatten(0, heads)
        out, lse = tokens_attend_bag_with_lse(
            query,
            bag,
            w_k,
            w_v,
            b_v=b_v,
            bias=bias,
            ragged=ragged,
            dropout_p=dropout_p,
            absorb=self.absorb,
            backend=self.backend,
        )
        if not need_weights:
            return out, None
        shared = {"bias": bias, "ragged": ragged, "reduce": reduce}
        backend = plain_backend(self.backend)
        return out, tokens_attend_bag_weights(query, bag, w_k, lse, backend=backend, **shared)

    def _attend_keys(
        self, query, key, value, bias, ragged, dropout_p, need_weights, reduce
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values of their own: they are projected."""
        weights, biases = self._projections()
        query, key, value = (
            self._heads(linear(x, w, b))
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        shared = {"bias": bias, "key_ragged": ragged}
        out, lse = cross_attention_with_lse(
            query, key, value, dropout_p=dropout_p, backend=self.backend, **shared
        )
        if not need_weights:
            return out, None
        backend = plain_backend(self.backend)
        return out, cross_attention_weights(
            query, key, lse, reduce=reduce, backend=backend, **shared
        )

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases of queries, keys and values."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(weights), tuple(biases)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _batch_first(self, x: Tensor) -> Tensor:
        """[B, L, E] of any form that is not packed."""
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _bias(self, mask: Tensor | None, key: Tensor, ragged: Ragged | None) -> Tensor | None:
        """The mask as what is added to the logits: [B, Lk], or [T] with `ragged`."""
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            kind = accumulation_type(key.dtype)
            mask = torch.zeros_like(mask, dtype=kind).masked_fill(mask, -torch.inf)
        return mask if ragged is not None else mask.reshape(key.shape[:2])

    def _check(self, query, key, value, mask, attn_mask, is_causal, ragged) -> None:
        for name, given in (("attn_mask", attn_mask is not None), ("is_causal", is_causal)):
            if given:
                raise ValueError(
                    f"{name} is given; CrossAttention has no mask per pair of query and key: "
                    "key_padding_mask leaves keys out, torch.nn.MultiheadAttention has the rest"
                )
        tensors = {"query": query, "key": key, "value": value}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
        batch, letters = query.dim() == 3, ("B", "L") if self.batch_first else ("L", "B")
        widths = (self.embed_dim, self.kdim, self.vdim)
        for (name, tensor), width in zip(tensors.items(), widths, strict=True):
            lead = letters if batch else ("L",)
            if ragged is not None and name != "query":
                lead = ("T",)
            if tensor.dim() != len(lead) + 1 or tensor.shape[-1] != width:
                wanted = ", ".join([*lead, str(width)])
                hint = "; with ragged, keys are packed" if lead == ("T",) else ""
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; it must be [{wanted}]{hint}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}; "
                "they must hold the same rows"
            )
        at = letters.index("B")
        if batch and ragged is None and key.shape[at] != query.shape[at]:
            raise ValueError(
                f"key has shape {tuple(key.shape)} and query {tuple(query.shape)}; "
                "they must have the same number of bags"
            )
        n_bags = query.shape[at] if batch else 1
        if isinstance(ragged, Ragged) and ragged.n_bags != n_bags:
            raise ValueError(
                f"ragged has {ragged.n_bags} bags and query {n_bags}; "
                "they must have the same number"
            )
        if mask is not None:
            _check_mask(mask, key, batch and ragged is None, at)


def _check_mask(mask: Tensor, key: Tensor, batched: bool, at: int) -> None:
    wanted = (key.shape[at], key.shape[1 - at]) if batched else tuple(key.shape[:1])
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask is {type(mask).__name__}; it must be a tensor")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"key_padding_mask is {mask.dtype}; it must be bool or floating")
    if mask.device != key.device:
        raise ValueError(
            f"key_padding_mask is on {mask.device} and the key on {key.device}; move one of them"
        )
    if tuple(mask.shape) != tuple(wanted):
        raise ValueError(
            f"key_padding_mask has shape {tuple(mask.shape)}; it must be "
            f"[{', '.join(map(str, wanted))}]"
        )
