"""The four problems of attention over long bags: inputs, ways to compute each, what is exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.utils.checkpoint import checkpoint

from survfuse import Ragged, ops
from survfuse.ops.absorption import absorbs, absorbs_query

from . import work
from .peers import Layout
from .problem import Problem
from .shapes import CrossShape, PoolShape, TokensShape, skip_if_too_long

# pairs of query and key whose weights are held in fp64 at a time
_EXACT_PAIRS = 1 << 25


def _draw(*shape: int, like: Problem, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=like.device) * scale).to(like.dtype)


class PoolBag(Problem):
    """`pool_bag`, plain or over a layer-normalised bag."""

    bag, baseline = "bag", "plain torch"

    def __init__(self, shape: PoolShape, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        lengths, dim = shape.lengths, shape.dim
        total, n_bags = sum(lengths), len(lengths)
        skip_if_too_long(total, device)
        self.shape, self.lengths = shape, lengths
        self.op, self.label = shape.op, shape.label
        self.eps = 1e-5 if shape.normalize else None
        # queries of unit logits, as a model that has begun to learn has
        rows = _draw(n_bags, shape.rows, dim, like=self, scale=dim**-0.5)
        self.inputs = {"rows": rows.requires_grad_(), "bag": _draw(total, dim, like=self)}
        self.upstream = _draw(n_bags * shape.rows, 1, dim, like=self)
        self.ragged = Ragged.from_lengths(lengths, device=device)
        e, bag = dtype.itemsize, self.inputs["bag"]
        self.minimum = shape.minimum(e)
        self.traffic = {
            work.FORWARD: ([bag], [], []),
            work.BACKWARD: ([bag], [], []),
            work.TRAINED: ([], [bag], []),
        }
        self.add("survfuse", self.ours, self.minimum)
        self.add("survfuse tiled", lambda: self.ours("tiled"))
        layout = Layout((shape.rows,) * n_bags, lengths, device)
        normed = work.normalising(total, dim, e) if self.eps else None
        self.add_peers("", layout, self.sides, (1, dim, dim), normed)

    def ours(self, backend: str | None = None) -> Tensor:
        rows, bag = self.inputs["rows"], self.inputs["bag"]
        options = {"ragged": self.ragged, "normalize_eps": self.eps, "backend": backend}
        return ops.pool_bag(rows, bag, **options).pooled.reshape(-1, 1, self.shape.dim)

    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, bag = self.inputs["rows"], self.inputs["bag"]
        dim = self.shape.dim
        x = bag if self.eps is None else layer_norm(bag, (dim,), eps=self.eps)
        # peers scale logits by themselves
        return (rows * dim**0.5).reshape(-1, 1, dim), x[:, None], x[:, None]

    def exact(self) -> Tensor:
        outs = []
        for a, x in zip(self.inputs["rows"], self.inputs["bag"].split(self.lengths), strict=True):
            x = x.double()
            x = x if self.eps is None else layer_norm(x, x.shape[1:], eps=self.eps)
            outs.append((a.double() @ x.T).softmax(-1) @ x)
        return torch.cat(outs)[:, None]


class CrossAttention(Problem):
    """`cross_attention`: keys and values given, few queries, few keys, or both long."""

    baseline = "SDPA"

    def __init__(self, shape: CrossShape, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        self.lengths, self.op, self.label = shape.lengths, shape.op, shape.label
        tq, tk = map(sum, self.lengths)
        skip_if_too_long(max(tq, tk), device, shape.pairs * shape.heads)
        heads, d = shape.heads, shape.head_dim
        shapes = {"query": tq, "key": tk, "value": tk}
        self.inputs = {
            name: _draw(rows, heads, d, like=self).requires_grad_() for name, rows in shapes.items()
        }
        self.upstream = _draw(tq, heads, d, like=self)
        self.ragged = [
            Ragged.from_lengths(lengths, device=device) if isinstance(side, str) else None
            for side, lengths in zip((shape.queries, shape.keys), self.lengths, strict=True)
        ]
        layout = Layout(*self.lengths, device)
        self.layout, self.n_bags = layout, len(self.lengths[0])
        self.minimum = shape.minimum(dtype.itemsize)
        query, key, value = self.inputs.values()
        backward = ([self.upstream, self.upstream], [query, key, value], [])
        self.traffic = {work.FORWARD: ([key, value], [query], []), work.BACKWARD: backward}
        self.add("survfuse", self.ours, self.minimum)
        self.add("survfuse tiled", lambda: self.ours("tiled"))
        self.add_peers("", layout, lambda: tuple(self.inputs.values()), (heads, d, d))

    def ours(self, backend: str | None = None) -> Tensor:
        query, key, value = self.inputs.values()
        query_ragged, key_ragged = self.ragged
        if query_ragged is None:
            query = query.unflatten(0, (self.n_bags, -1))
        if key_ragged is None:
            key, value = (t.unflatten(0, (self.n_bags, -1)) for t in (key, value))
        options = {"query_ragged": query_ragged, "key_ragged": key_ragged, "backend": backend}
        out = ops.cross_attention(query, key, value, **options)
        return out.flatten(0, 1) if query_ragged is None else out

    def exact(self) -> Tensor:
        """Blocks of queries, each recomputed backward: two long sides never meet as a whole."""
        outs = []
        for q, k, v in self.layout.bags(*self.inputs.values()):
            block = max(1, _EXACT_PAIRS // (len(k) * k.shape[1]))
            k, v = k.double(), v.double()
            for part in q.double().split(block):
                outs.append(checkpoint(_attend, part, k, v, use_reentrant=False))
        return torch.cat(outs)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[n, H, d] by the formula."""
    logits = torch.einsum("nhe,khe->hnk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hnk,khe->nhe", logits.softmax(-1), value)


class TokensAttendBag(Problem):
    """`tokens_attend_bag`, against two linear layers and every peer."""

    op, bag, baseline = "tokens_attend_bag", "bag", "Linear + SDPA"

    def __init__(self, shape: TokensShape, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        tokens, heads, d, _, dim = shape
        self.shape, self.lengths = shape, shape.lengths
        total, n_bags, width = sum(self.lengths), len(self.lengths), heads * d
        skip_if_too_long(total, device)
        self.label = shape.label("q")
        self.inputs = {
            "query": _draw(n_bags, tokens, heads, d, like=self).requires_grad_(),
            "w_k": _draw(width, dim, like=self, scale=dim**-0.5).requires_grad_(),
            "w_v": _draw(width, dim, like=self, scale=dim**-0.5).requires_grad_(),
            "bag": _draw(total, dim, like=self),
        }
        self.upstream = _draw(n_bags * tokens, heads, d, like=self)
        self.ragged = Ragged.from_lengths(self.lengths, device=device)
        e, rows, bag = dtype.itemsize, tokens * heads, self.inputs["bag"]
        absorbed, whole = shape.attending(e)
        self.minimum = work.least(absorbed, whole)
        self.traffic = {
            work.FORWARD: ([bag], [], []),
            work.BACKWARD: ([bag], [], []),
            work.TRAINED: ([], [bag], []),
        }
        layout = Layout((tokens,) * n_bags, self.lengths, device)
        formed = work.linear(total, dim, width, e)
        formed = work.added(formed, formed)
        around = work.absorbing(rows, n_bags, dim, 2 * d)
        sizes = {"n_queries": tokens, "n_heads": heads, "head_dim": d, "value_dim": d}
        absorb = absorbs("auto", **sizes, dim=dim, n_bags=n_bags, total=total)
        self.add("survfuse", self.ours, absorbed if absorb else whole)
        self.add("survfuse tiled", lambda: self.ours("tiled"))
        plain = work.added(work.plain_pooling(total, rows, dim, e), around)
        self.add("plain torch, absorbed", self.absorbed_plain, plain)
        self.add_peers("Linear + ", layout, self.sides, (heads, d, d), formed)

    def weights(self) -> tuple[Tensor, Tensor]:
        heads = (self.shape.heads, self.shape.head_dim)
        return tuple(self.inputs[name].unflatten(0, heads) for name in ("w_k", "w_v"))

    def ours(self, backend: str | None = None) -> Tensor:
        query, bag = self.inputs["query"], self.inputs["bag"]
        options = {"ragged": self.ragged, "backend": backend}
        return ops.tokens_attend_bag(query, bag, *self.weights(), **options).flatten(0, 1)

    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.shape.heads, self.shape.head_dim)
        bag = self.inputs["bag"]
        key, value = (linear(bag, self.inputs[name]).unflatten(1, heads) for name in ("w_k", "w_v"))
        return self.inputs["query"].flatten(0, 1), key, value

    def absorbed_plain(self) -> Tensor:
        """The same algebra in torch expressions: what absorption alone gives."""
        query, bag = self.inputs["query"], self.inputs["bag"]
        return self._absorbed(query, bag, *self.weights())

    def exact(self) -> Tensor:
        # absorbed, which is exact and takes a fraction of the operations of forming K and V; that
        # the peers, which form them, agree is the check of the algebra
        query, bag = self.inputs["query"].double(), self.inputs["bag"]
        return self._absorbed(query, bag, *(w.double() for w in self.weights()))

    def _absorbed(self, query: Tensor, bag: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
        scale = self.shape.head_dim**-0.5
        rows = torch.einsum("bqhe,hed->bqhd", query, w_k).flatten(1, 2)
        pooled = []
        for a, x in zip(rows, bag.split(self.lengths), strict=True):
            x = x.to(query.dtype)
            pooled.append((a @ x.T * scale).softmax(-1) @ x)
        pooled = torch.stack(pooled).unflatten(1, (-1, self.shape.heads))
        return torch.einsum("bqhd,hed->bqhe", pooled, w_v).flatten(0, 1)


class BagAttendsTokens(Problem):
    """`bag_attends_tokens`, against a linear layer and every peer."""

    op, bag, baseline = "bag_attends_tokens", "bag", "Linear + SDPA"

    def __init__(self, shape: TokensShape, dtype: torch.dtype, device: str) -> None:
        super().__init__(dtype, device)
        tokens, heads, d, _, dim = shape
        self.shape, self.lengths = shape, shape.lengths
        total, n_bags, width = sum(self.lengths), len(self.lengths), heads * d
        skip_if_too_long(total, device)
        self.label = shape.label("k")
        self.inputs = {
            "w_q": _draw(width, dim, like=self, scale=dim**-0.5).requires_grad_(),
            "key": _draw(n_bags * tokens, heads, d, like=self).requires_grad_(),
            "value": _draw(n_bags * tokens, heads, d, like=self).requires_grad_(),
            "bag": _draw(total, dim, like=self),
        }
        self.upstream = _draw(total, heads, d, like=self)
        self.ragged = Ragged.from_lengths(self.lengths, device=device)
        e, bag, out = dtype.itemsize, self.inputs["bag"], self.upstream
        absorbed, whole = shape.spreading(e)
        self.minimum = work.least(absorbed, whole)
        self.traffic = {
            work.FORWARD: ([bag], [], [out]),
            work.BACKWARD: ([bag, out], [], []),
            work.TRAINED: ([out], [bag], []),
        }
        layout = Layout(self.lengths, (tokens,) * n_bags, device)
        formed = work.linear(total, dim, width, e)
        sizes = {"n_keys": tokens, "n_heads": heads, "head_dim": d, "value_dim": d}
        absorb = absorbs_query("auto", **sizes, dim=dim, n_bags=n_bags, total=total)
        self.add("survfuse", self.ours, absorbed if absorb else whole)
        self.add("survfuse tiled", lambda: self.ours("tiled"))
        self.add_peers("Linear + ", layout, self.sides, (heads, d, d), formed)

    def ours(self, backend: str | None = None) -> Tensor:
        w_q, key, value, bag = self.inputs.values()
        w_q = w_q.unflatten(0, (self.shape.heads, -1))
        key, value = (t.unflatten(0, (-1, self.shape.tokens)) for t in (key, value))
        options = {"ragged": self.ragged, "backend": backend}
        return ops.bag_attends_tokens(bag, w_q, key, value, **options)

    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        w_q, key, value, bag = self.inputs.values()
        return linear(bag, w_q).unflatten(1, (self.shape.heads, -1)), key, value

    def exact(self) -> Tensor:
        w_q, key, value, bag = self.inputs.values()
        tokens, outs = (self.shape.tokens,) * len(self.lengths), []
        for x, k, v in zip(bag.split(self.lengths), key.split(tokens), value.split(tokens)):
            query = linear(x.double(), w_q.double()).unflatten(1, (self.shape.heads, -1))
            outs.append(_attend(query, k.double(), v.double()))
        return torch.cat(outs)
