"""Patches behind a learned layer: projected where they are needed, and attended to by tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.layers.dropout import dropout, dropped, rounded
from survfuse.layers.streaming import stream
from survfuse.ops import (
    merge_attention,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.ops.backends import plain_backend
from survfuse.ops.project_bag import project_bag
from survfuse.ragged import Ragged


class PatchProjection(nn.Linear):
    """`dropout(act(W x_i + b))` of every patch of a batch, packed in batch order.

    Args:
        bag_dim: width of the bag D.
        dim: width of the result.
        activation: "relu" or "none".
        dropout: probability with which a number of the result is dropped in training, rounded to
            a multiple of 2^-16.

    Raises:
        ValueError: `activation` is unknown.
    """

    def __init__(
        self, bag_dim: int, dim: int, *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        if activation not in ("relu", "none"):
            raise ValueError(f"activation is {activation!r}; it must be 'relu' or 'none'")
        super().__init__(bag_dim, dim)
        self.activation, self.dropout = activation, dropout

    def forward(self, bag: Tensor, ragged: Ragged) -> Tensor:
        """[total, dim] of the type of the bag, of [T, D] and its ranges."""
        if self.activation == "none":
            rows = project_bag(bag, self.weight, self.bias, ragged=ragged)
            return dropout(rows, self.dropout, self.training)
        if torch.compiler.is_compiling():
            # a compiler decides itself what it keeps
            rows = project_bag(bag, self.weight, self.bias, ragged=ragged)
            return dropout(functional.relu(rows), self.dropout, self.training)
        p = rounded(self.dropout) if self.training else 0.0
        # what is not dropped is scaled by way of the weights, which commutes with the rectifier
        weight, bias = (w / (1.0 - p) for w in (self.weight, self.bias))
        rows = project_bag(bag, weight, bias, ragged=ragged)
        return ReluDropout.apply(rows, p)


class ReluDropout(torch.autograd.Function):
    """`relu(x)`, some of it set to 0, that keeps its result and nothing else.

    The result is 0 where either of the two let nothing through, so it says all that the backward
    needs, and an attention over it keeps it anyhow. What is left is not scaled.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        out = functional.relu(x)
        if p > 0:
            out.masked_fill_(dropped(x, p), 0.0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(d_out, out, 0.0), None


class ProjectedBagAttention(nn.Module):
    """Tokens attend to the projected patches `h_i = dropout(relu(W x_i + b))`.

    `W_o concat_h softmax_i(q_h . W_k,h h_i / sqrt(d)) (W_v,h h_i + b_v,h) + b_o`, with
    `q = W_q tokens + b_q`. A bias of the keys would shift all logits of a query alike, and has no
    place here. The projections of the few queries absorb W_k and W_v. What is kept for the
    backward is one projected bag [N, dim], with `recompute` nothing of its length; all else exists
    for one piece of the bag at a time.

    Args:
        dim: width of tokens, of projected patches and of the result.
        bag_dim: width of the bag D.
        heads: number of heads H, which divides `dim`.
        dropout: probability with which a number of a projected patch is dropped in training.
        recompute, piece_rows: see `survfuse.layers.streaming.stream`.
        backend: of the ops; None for the fastest that can serve the call.
    """

    def __init__(
        self,
        dim: int,
        bag_dim: int,
        *,
        heads: int = 1,
        dropout: float = 0.0,
        recompute: bool = False,
        piece_rows: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.recompute, self.piece_rows = recompute, piece_rows
        self.project = PatchProjection(bag_dim, dim, dropout=dropout)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, bag: Tensor, ragged: Ragged) -> Tensor:
        """What the tokens [B, Lq, dim] read from the bag [T, D]: [B, Lq, dim].

        A bag of no rows gives the bias of the output.
        """
        out = self._attend(self._heads(self.query(tokens)), bag, ragged)[0]
        return self.output(out.flatten(2))

    def weights(self, tokens: Tensor, bag: Tensor, ragged: Ragged) -> Tensor:
        """The weight of each patch for each token, the mean over heads: [total, Lq], streamed."""
        query = self._heads(self.query(tokens))
        lse = self._attend(query, bag, ragged)[1]
        w_k = self._split(self.key.weight)
        # the weights have no kernel of their own: any backend but the reference means tiled
        backend = plain_backend(self.backend)

        def run(part: Ragged) -> tuple[Tensor]:
            rows = self.project(bag, part)
            return (
                tokens_attend_bag_weights(
                    query, rows, w_k, lse, ragged=part.packed(), reduce="heads", backend=backend
                ),
            )

        return torch.cat([found for (found,) in self._stream(run, bag, ragged)])

    def _attend(self, query: Tensor, bag: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        """[B, Lq, H, d] and the logsumexp [B, Lq, H] over all pieces."""
        w_k, w_v = self._split(self.key.weight), self._split(self.value.weight)
        b_v = self._split(self.value.bias)

        def run(part: Ragged) -> tuple[Tensor, Tensor]:
            rows = self.project(bag, part)
            return tokens_attend_bag_with_lse(
                query, rows, w_k, w_v, b_v=b_v, ragged=part.packed(), backend=self.backend
            )

        found = self._stream(run, bag, ragged)
        return found[0] if len(found) == 1 else merge_attention(*zip(*found))

    def _stream(self, run, bag: Tensor, ragged: Ragged) -> list[tuple[Tensor, ...]]:
        return stream(run, bag, ragged, recompute=self.recompute, rows=self.piece_rows)

    def _split(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.heads, -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
