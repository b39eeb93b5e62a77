"""Gated attention pooling as a module, with CLAM's weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from survfuse.ops import gated_attention_pool, gated_attention_weights
from survfuse.ops.backends import plain_backend
from survfuse.ragged import Ragged

# ours: CLAM's
_CLAM = {"value": "attention_a.0", "gate": "attention_b.0", "score": "attention_c"}


class GatedAttentionPool(nn.Module):
    """Pools a bag of patches by gated attention: one vector per bag and pool.

    `sum_i softmax_i(w_k . (tanh(W_t x_i + b_t) * sigmoid(W_g x_i + b_g)) + b_k) x_i`

    Args:
        dim: width of the bag D.
        hidden: units of the hidden layer L.
        n_pools: number of weighted means K; CLAM calls them classes.
        dropout: probability with which an attention weight is dropped in training. (CLAM drops
            hidden units instead.)
        temperature: divides the logits. Below 1 a fresh module already tells patches apart, where
            one of 1 starts near the mean of all.
        backend: of `survfuse.ops.gated_attention_pool`; None for the fastest that can serve the
            call.

    Source:
        Ilse et al., "Attention-based deep multiple instance learning", ICML 2018; Lu et al.,
        "Data-efficient and weakly supervised computational pathology on whole-slide images", 2021.

    Example:
        >>> import torch
        >>> pool = GatedAttentionPool(8, hidden=4, n_pools=2)
        >>> pool(torch.randn(50, 8), Ragged.from_lengths([30, 20])).shape
        torch.Size([2, 2, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 256,
        n_pools: int = 1,
        dropout: float = 0.0,
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be greater than 0")
        self.dropout, self.temperature, self.backend = dropout, temperature, backend
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, n_pools)

    @classmethod
    def from_clam(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        prefix: str = "",
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> GatedAttentionPool:
        """A module with the weights of CLAM's `Attn_Net_Gated`.

        Args:
            state_dict: of that module, or of a model that holds it; other entries are ignored.
            prefix: what stands before "attention_a.0.weight" there, such as "attention_net.3.".
            dropout, backend: as of the module.

        Raises:
            ValueError: an entry is missing, which is named.
        """
        found = {}
        for ours, theirs in _CLAM.items():
            for part in ("weight", "bias"):
                key = f"{prefix}{theirs}.{part}"
                if key not in state_dict:
                    raise ValueError(f"state_dict has no {key!r}; prefix is {prefix!r}")
                found[f"{ours}.{part}"] = state_dict[key]
        hidden, dim = found["value.weight"].shape
        n_pools = found["score.weight"].shape[0]
        module = cls(dim, hidden, n_pools, dropout=dropout, backend=backend)
        module.to(found["value.weight"].dtype).load_state_dict(found)
        return module

    def forward(
        self, bag: Tensor, ragged: Ragged | None = None, *, bias: Tensor | None = None
    ) -> Tensor:
        """Pooled patches.

        Args:
            bag: [T, D] packed, described by `ragged`; or dense [B, N, D].
            ragged: the ranges of a packed bag. An empty bag pools to zeros.
            bias: [T] added to the logit of a patch; -inf excludes it.

        Returns:
            [B, K, D] of the type of the parameters.
        """
        return self.with_lse(bag, ragged, bias=bias)[0]

    def with_lse(
        self, bag: Tensor, ragged: Ragged | None = None, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pooled patches [B, K, D], and the logsumexp [B, K] by which `merge_attention` joins
        those of parts of a bag. Arguments as of `forward`.
        """
        pooled, lse = self._pool(bag, ragged, bias, self.dropout if self.training else 0.0)
        return pooled, lse

    def weights(
        self,
        bag: Tensor,
        ragged: Ragged | None = None,
        *,
        bias: Tensor | None = None,
        lse: Tensor | None = None,
        reduce: str | None = None,
    ) -> Tensor:
        """The weight of every patch in every pool, without dropout.

        Arguments as of `forward`; `reduce="rows"` averages over the pools, and `lse` is given where
        `bag` holds parts of the bags whose weights sum to 1. Returns [total, K], or [total], packed
        in batch order; the weights of a bag sum to 1 per pool.
        """
        if lse is None:
            lse = self._pool(bag, ragged, bias, 0.0).lse
        # the weights have no GPU kernel of their own: any backend but the reference means tiled
        backend = plain_backend(self.backend)
        return gated_attention_weights(
            bag,
            *self._parameters_of_op(),
            lse,
            bias=bias,
            ragged=ragged,
            reduce=reduce,
            backend=backend,
        )

    def _pool(self, bag: Tensor, ragged: Ragged | None, bias: Tensor | None, dropout: float):
        return gated_attention_pool(
            bag,
            *self._parameters_of_op(),
            bias=bias,
            ragged=ragged,
            dropout_p=dropout,
            backend=self.backend,
        )

    def _parameters_of_op(self) -> tuple[Tensor, ...]:
        hidden = (self.value, self.gate)
        parameters = [tensor for layer in hidden for tensor in (layer.weight, layer.bias)]
        score = (self.score.weight, self.score.bias)
        if self.temperature != 1.0:
            score = tuple(tensor / self.temperature for tensor in score)
        return (*parameters, *score)
