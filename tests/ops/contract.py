"""What the contract suite knows of each op. A new op is one entry of OPS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from survfuse import Ragged, ops
from tests.ops.contract_attention import (
    make_bag_attends,
    make_both,
    make_few,
    make_many,
    make_spread,
    plain_of_bag_attends,
    plain_of_cross_attention,
    plain_of_spread,
    run_bag_attends,
    run_cross_attention,
    run_cross_attention_weights,
    run_spread,
    with_lse,
)
from tests.ops.plain import plain_attention, plain_gated_attention_pool, plain_pool_bag

CUDA = torch.cuda.is_available()
# (backend, device); without a GPU, Triton runs under its interpreter
TARGETS = [("tiled", "cpu"), ("native", "cpu"), ("triton", "cuda" if CUDA else "cpu")]
if CUDA:
    TARGETS.append(("tiled", "cuda"))


@dataclass(frozen=True)
class Case:
    """Sizes and traits of a call."""

    name: str
    ranges: tuple[tuple[int, int], ...] = ((0, 65),)  # (start, length) of each bag
    n_stored: int = 70  # rows of the packed matrix, more than the bags cover
    dim: int = 16
    queries: int = 3
    heads: int = 2
    bias: bool = True
    norm: bool = False
    scale: float = 0.7
    mean: float = 0.0  # of the features, in standard deviations
    excluded: tuple[int, ...] = ()  # rows with bias -inf; they hold NaN

    @property
    def covered(self) -> Tensor:
        """[T] bool: rows that a bag holds and no bias excludes."""
        inside = self.covered_by_bags
        inside[list(self.excluded)] = False
        return inside

    @property
    def covered_by_bags(self) -> Tensor:
        """[T] bool: rows that a bag holds."""
        inside = torch.zeros(self.n_stored, dtype=torch.bool)
        for start, length in self.ranges:
            inside[start : start + length] = True
        return inside


CASES = (
    Case("one bag"),
    Case("no bias, no norm", bias=False),
    Case("normalised", norm=True),
    Case("far from zero", norm=True, mean=30.0),
    Case("very far from zero", norm=True, mean=300.0),
    Case(
        "gaps, overlap, repeats, empty",
        ranges=((60, 9), (3, 40), (20, 30), (3, 40), (7, 0), (69, 1)),
        excluded=(5, 21, 69),
        norm=True,
    ),
    Case("one row, beside others", ranges=((4, 1), (0, 4)), n_stored=6),
    Case("nothing", ranges=((2, 0), (0, 0)), n_stored=3),
    Case("all excluded", ranges=((0, 3), (3, 3)), n_stored=6, excluded=(0, 1, 2)),
    Case("block - 1", ranges=((0, 63),), n_stored=63),
    Case("block + 1, odd width", ranges=((1, 129),), n_stored=131, dim=37, norm=True),
    Case("prime", ranges=((0, 251), (251, 127)), n_stored=378, dim=24, queries=7, heads=1),
    Case("many rows", ranges=((0, 97),), n_stored=97, dim=20, queries=9, heads=5, norm=True),
    Case("positive features, not normalised", mean=1.0),
    Case("one row", ranges=((4, 1),), n_stored=6),
    Case("empty bag last", ranges=((0, 5), (5, 0)), n_stored=5),
)
# without a normalisation: docs/math.md says what holds here, and where
FAR_CASE = Case("far from zero, not normalised", mean=30.0)
WIDE_CASES = (
    Case("wide", ranges=((0, 700), (650, 300)), n_stored=1000, dim=1029, queries=6, heads=1),
    Case("healnet", ranges=((0, 600),), n_stored=600, dim=517, queries=25, heads=8, norm=True),
    Case(
        "many tokens",
        ranges=((0, 301), (280, 170), (290, 0)),
        n_stored=450,
        dim=150,
        queries=41,
        excluded=(7, 299),
        norm=True,
    ),
)


@dataclass(frozen=True)
class Call:
    """Arguments of one call: tensors in order, differentiable ones named, and options."""

    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    stored: tuple[str, ...] = ("bag",)  # the tensors whose rows `ragged` ranges pick

    def to(self, dtype: torch.dtype, device: str = "cpu", *, wide: bool = False) -> Call:
        """In another type; `wide` keeps all but the stored tensors in fp32 beside 16-bit ones."""

        def convert(name: str, tensor: Tensor) -> Tensor:
            narrow = torch.finfo(dtype).bits < 32
            kind = torch.float32 if wide and narrow and name not in self.stored else dtype
            return tensor.detach().to(device, kind).requires_grad_()

        options = {
            key: value.to(device) if isinstance(value, Ragged) else value
            for key, value in self.options.items()
        }
        return self.with_tensors({n: convert(n, t) for n, t in self.tensors.items()}, **options)

    def with_tensors(self, tensors: dict[str, Tensor], **options) -> Call:
        """The same call with some tensors, and options, replaced."""
        return replace(self, tensors=self.tensors | tensors, options=self.options | options)

    def dense(self, n_bags: int) -> Call:
        """With stored tensors [B * N, ...] as [B, N, ...]; a bias belongs to them."""
        tensors = {
            name: tensor.detach().unflatten(0, (n_bags, -1)).requires_grad_()
            for name, tensor in self.tensors.items()
            if name in self.stored or (name == "bias" and "key" in self.stored)
        }
        ranges = {k: None for k, v in self.options.items() if isinstance(v, Ragged)}
        return self.with_tensors(tensors, **ranges)


@dataclass(frozen=True)
class Op:
    """One op under contract."""

    name: str
    function: Callable  # (call, backend, **options) -> tuple of tensors
    plain: Callable  # (call) -> tuple of tensors, no dropout
    make: Callable[[Case], Call]
    backends: tuple[str, ...]
    has_dropout: bool
    registered: str = "pool_bag"  # the module whose registered op it calls


def make_bag(case: Case, seed: int) -> tuple[torch.Generator, Tensor, Tensor | None, Ragged]:
    g = torch.Generator().manual_seed(seed)
    bag = torch.randn(case.n_stored, case.dim, generator=g, dtype=torch.float64) + case.mean
    bias = None
    if case.bias:
        bias = torch.randn(case.n_stored, generator=g, dtype=torch.float64)
        bias[list(case.excluded)] = -torch.inf
    # whatever no bag covers must never be read
    bag[~case.covered] = torch.nan
    starts, lengths = zip(*case.ranges, strict=True)
    return g, bag, bias, Ragged.from_ranges(starts, lengths)


def random(g: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=g, dtype=torch.float64)


def make_pool_bag(case: Case) -> Call:
    g, bag, bias, ragged = make_bag(case, 1)
    rows = random(g, len(case.ranges), case.queries * case.heads, case.dim, std=case.dim**-0.5)
    tensors = {"rows": rows, "bag": bag}
    if bias is not None:
        tensors["bias"] = bias
    eps = 1e-5 if case.norm else None
    return Call(tensors, {"ragged": ragged, "scale": case.scale, "normalize_eps": eps})


def make_attention(case: Case) -> Call:
    g, bag, bias, ragged = make_bag(case, 2)
    heads, d, dv = case.heads, 5, 6
    tensors = {
        "query": random(g, len(case.ranges), case.queries, heads, d),
        "bag": bag,
        "w_k": random(g, heads, d, case.dim, std=case.dim**-0.5),
        "w_v": random(g, heads, dv, case.dim, std=case.dim**-0.5),
        "b_k": random(g, heads, d),
        "b_v": random(g, heads, dv),
    }
    if case.norm:
        tensors["norm_weight"] = 1.0 + random(g, case.dim, std=0.3)
        tensors["norm_bias"] = random(g, case.dim, std=0.3)
    if bias is not None:
        tensors["bias"] = bias
    return Call(tensors, {"ragged": ragged, "scale": case.scale})


def plain_of_attention(call: Call) -> tuple[Tensor, ...]:
    arguments = {"norm_weight": None, "norm_bias": None, "bias": None, "norm_eps": 1e-5}
    return plain_attention(**(arguments | call.tensors | call.options))


def run_weights(call: Call, backend: str | None, **options) -> tuple[Tensor, ...]:
    return (ops.pool_weights(**call.tensors, **(call.options | options), backend=backend),)


def make_weights(case: Case) -> Call:
    call = make_pool_bag(case)
    with torch.no_grad():
        lse = ops.pool_bag(**call.tensors, **call.options, backend="reference").lse
    return Call(call.tensors | {"lse": lse}, call.options)


def plain_weights(call: Call) -> tuple[Tensor, ...]:
    return run_weights(call, "reference")


def make_spread_tokens(case: Case) -> Call:
    tensors, options, stored = make_spread(case)
    return Call(tensors, options | {"scale": case.scale}, stored)


def bag_attends_op(name: str, absorb: str, backends: tuple[str, ...]) -> Op:
    def make_call(case: Case) -> Call:
        tensors, options, stored = make_bag_attends(case)
        return Call(tensors, options | {"scale": case.scale}, stored)

    return Op(
        f"bag_attends_tokens, {name}",
        lambda call, backend, **options: run_bag_attends(call, backend, absorb=absorb, **options),
        plain_of_bag_attends,
        make_call,
        backends,
        has_dropout=True,
        registered="spread_tokens",
    )


def cross_attention_op(name: str, make: Callable) -> Op:
    def make_call(case: Case) -> Call:
        tensors, options, stored = make(case)
        return Call(tensors, options | {"scale": case.scale * 0.3}, stored)

    return Op(
        f"cross_attention, {name}",
        run_cross_attention,
        plain_of_cross_attention,
        make_call,
        ("tiled", "native", "triton"),
        has_dropout=True,
        registered="cross_attention",
    )


def cross_attention_weights_op(name: str, make: Callable, reduce: str | None) -> Op:
    def make_call(case: Case) -> Call:
        scale = case.scale * 0.3
        tensors, options, stored = with_lse(make)(case, scale)
        return Call(tensors, options | {"scale": scale, "reduce": reduce}, stored)

    def run(call: Call, backend: str | None, **options) -> tuple[Tensor, ...]:
        by_query = make is make_many and reduce != "rows"
        return run_cross_attention_weights(call, backend, by_query=by_query, **options)

    return Op(
        f"cross_attention_weights, {name}",
        run,
        lambda call: run(call, "reference"),
        make_call,
        ("tiled",),
        has_dropout=False,
        registered="cross_attention_weights",
    )


def make_gated(case: Case) -> Call:
    g, bag, bias, ragged = make_bag(case, 4)
    n_hidden, n_pools = 5, case.queries
    if case.norm:
        # the op has no normalisation: whose features lie far from zero centres them first
        bag = bag - case.mean
    tensors = {
        "bag": bag,
        "w_tanh": random(g, n_hidden, case.dim, std=case.dim**-0.5),
        "b_tanh": random(g, n_hidden),
        "w_gate": random(g, n_hidden, case.dim, std=case.dim**-0.5),
        "b_gate": random(g, n_hidden),
        "w_score": random(g, n_pools, n_hidden),
        "b_score": random(g, n_pools),
    }
    if bias is not None:
        tensors["bias"] = bias
    return Call(tensors, {"ragged": ragged})


def run_gated_weights(call: Call, backend: str | None, **options) -> tuple[Tensor, ...]:
    options = call.options | options
    return (ops.gated_attention_weights(**call.tensors, **options, backend=backend),)


def make_gated_weights(case: Case) -> Call:
    call = make_gated(case)
    with torch.no_grad():
        lse = ops.gated_attention_pool(**call.tensors, **call.options, backend="reference").lse
    return Call(call.tensors | {"lse": lse}, call.options)


OPS = (
    Op(
        "pool_bag",
        lambda call, backend, **options: tuple(
            ops.pool_bag(**call.tensors, **(call.options | options), backend=backend)
        ),
        lambda call: plain_pool_bag(**({"bias": None} | call.tensors | call.options)),
        make_pool_bag,
        ("tiled", "native", "triton"),
        has_dropout=True,
    ),
    Op(
        "tokens_attend_bag, absorbed",
        lambda call, backend, **options: ops.tokens_attend_bag_with_lse(
            **call.tensors, **(call.options | options), backend=backend, absorb="always"
        ),
        plain_of_attention,
        make_attention,
        ("tiled", "native", "triton"),
        has_dropout=True,
    ),
    Op(
        "tokens_attend_bag, formed",
        lambda call, backend, **options: ops.tokens_attend_bag_with_lse(
            **call.tensors,
            **(call.options | options),
            absorb="never",
            backend=backend,
        ),
        plain_of_attention,
        make_attention,
        ("tiled",),
        has_dropout=True,
    ),
    Op(
        "pool_weights",
        run_weights,
        plain_weights,
        make_weights,
        ("tiled",),
        has_dropout=False,
        registered="pool_weights",
    ),
    cross_attention_op("few queries", make_few),
    cross_attention_op("many queries", make_many),
    cross_attention_op("both ragged", make_both),
    Op(
        "spread_tokens",
        run_spread,
        plain_of_spread,
        make_spread_tokens,
        ("tiled", "native", "triton"),
        has_dropout=True,
        registered="spread_tokens",
    ),
    bag_attends_op("absorbed", "always", ("tiled", "native", "triton")),
    bag_attends_op("formed", "never", ("tiled", "native")),
    cross_attention_weights_op("few queries", make_few, None),
    cross_attention_weights_op("many queries", make_many, None),
    cross_attention_weights_op("both ragged", make_both, "rows"),
    Op(
        "gated_attention_pool",
        lambda call, backend, **options: tuple(
            ops.gated_attention_pool(**call.tensors, **(call.options | options), backend=backend)
        ),
        lambda call: plain_gated_attention_pool(**({"bias": None} | call.tensors | call.options)),
        make_gated,
        ("tiled", "native", "triton"),
        has_dropout=True,
        registered="gated_attention_pool",
    ),
    Op(
        "gated_attention_weights",
        run_gated_weights,
        lambda call: run_gated_weights(call, "reference"),
        make_gated_weights,
        ("tiled",),
        has_dropout=False,
        registered="gated_attention_weights",
    ),
)
