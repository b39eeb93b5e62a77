"""`block_attention`: one softmax over the union of blocks, whichever they are."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.attention import BLOCKS
from survfuse.ops import BlockSide
from tests.ops.tolerance import assert_within_budget

DOUBLE = {"dtype": torch.float64}
B, G, H, D, DV = 4, 3, 2, 5, 6
# overlapping, repeated and empty bags, and rows in none
RAGGED = Ragged.from_ranges([7, 1, 3, 1], [6, 5, 0, 5])
T = 15
SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(BLOCKS, n)]
every_subset = pytest.mark.parametrize("blocks", SUBSETS, ids="+".join)
both = pytest.mark.parametrize("backend", ["reference", "tiled"])


pytestmark = pytest.mark.usefixtures("one_thread")


def make(excluded: bool = True) -> tuple[BlockSide, BlockSide]:
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, **DOUBLE)

    tokens = [random(B, G, H, D), random(B, G, H, D), random(B, G, H, DV), random(B, G)]
    bag = [random(T, H, D), random(T, H, D), random(T, H, DV), random(T)]
    inside = torch.zeros(T, dtype=torch.bool)
    for start, length in zip(RAGGED.starts, RAGGED.lengths):
        inside[start : start + length] = True
    if excluded:
        # the second bag's tokens all, and a patch of two bags
        tokens[3][1], tokens[3][0, 2], bag[3][2] = -torch.inf, -torch.inf, -torch.inf
    for side, gone in ((tokens, tokens[3] == -torch.inf), (bag, bag[3] == -torch.inf)):
        for tensor in side[1:3]:
            tensor[gone] = torch.nan
    for tensor in bag[:3]:
        tensor[~inside] = torch.nan
    for tensor in (*tokens, *bag):
        tensor.requires_grad_()
    return BlockSide(*tokens), BlockSide(*bag, RAGGED)


def dense_softmax(tokens: BlockSide, bag: BlockSide, blocks, keep=None):
    """Per bag: the matrix of all logits, what is no block or excluded masked, one softmax.

    keep(b, block, n_rows, n_keys) gives factors [n_rows * H, n_keys] of the weights.
    """
    results = {name: ([], [], []) for name in ("tokens", "bag")}
    for b, (start, length) in enumerate(zip(RAGGED.starts.tolist(), RAGGED.lengths.tolist())):
        rows = slice(start, start + length)
        sizes = {"tokens": G, "bag": length}
        q, k, v, bias = (
            torch.cat([of_tokens[b], of_bag[rows]])
            for of_tokens, of_bag in zip(tokens[:4], bag[:4])
        )
        allowed = torch.cat(
            [
                torch.cat([torch.full((n, m), f"{a}->{c}" in blocks) for c, m in sizes.items()], 1)
                for a, n in sizes.items()
            ]
        )
        allowed = allowed & (bias > -torch.inf)
        k, v = (torch.where((bias == -torch.inf)[:, None, None], 0.0, t) for t in (k, v))
        q = torch.nan_to_num(q)
        logits = torch.einsum("nhe,khe->hnk", q, k) * D**-0.5
        logits = logits + torch.where(bias == -torch.inf, 0.0, bias)
        lonely = ~allowed.any(1)
        masked = torch.where(lonely[:, None], 0.0, logits.masked_fill(~allowed, -torch.inf))
        softmax = torch.where(lonely[:, None], 0.0, masked.softmax(-1))
        lse = torch.where(lonely, -torch.inf, masked.logsumexp(-1))
        weights = softmax
        if keep is not None:
            factors = [
                torch.cat([keep(b, f"{a}->{c}", n, m) for c, m in sizes.items()], -1)
                for a, n in sizes.items()
            ]
            weights = softmax * torch.cat(factors, 1)
        out = torch.einsum("hnk,khe->nhe", weights, v)
        mass = torch.stack([softmax[..., :G].sum(-1).T, softmax[..., G:].sum(-1).T], -1)
        for part, cut in zip(results.values(), (slice(0, G), slice(G, None))):
            for found, result in zip(part, (out, lse.T, mass)):
                found.append(result[cut])
    joined = []
    for name, join in (("tokens", torch.stack), ("bag", torch.cat)):
        served = any(block.startswith(f"{name}->") for block in blocks)
        joined += [join(part) if served else None for part in results[name]]
    return joined


def compare(got, expected, sides, names: str) -> None:
    total = [0.0, 0.0]
    for name, have, want in zip(ops.BlockAttended._fields, got, expected, strict=True):
        assert (have is None) == (want is None), name
        if want is None:
            continue
        assert_within_budget(f"{name} {names}", have, want, want, torch.float64)
        weight = torch.linspace(-1.0, 2.0, want.numel(), **DOUBLE).view(want.shape)
        for i, result in enumerate((have, want)):
            total[i] = total[i] + (weight * torch.where(result == -torch.inf, 0.0, result)).sum()
    inputs = [tensor for side in sides for tensor in side[:4]]
    gradients = [torch.autograd.grad(t, inputs, materialize_grads=True) for t in total]
    for i, (have, want) in enumerate(zip(*gradients, strict=True)):
        # the size of all gradients is the scale: some of them are zero but for rounding
        scale = torch.tensor([1.0, *(float(t.norm()) for t in gradients[1])]).max().double()
        have, want = (torch.cat([t.flatten(), scale[None]]) for t in (have, want))
        assert_within_budget(f"gradient {i} {names}", have, want, want, torch.float64)


@both
@every_subset
def test_union_of_blocks_is_one_softmax(blocks: tuple[str, ...], backend: str) -> None:
    tokens, bag = make()
    got = ops.block_attention(tokens, bag, set(blocks), backend=backend)
    compare(got, dense_softmax(tokens, bag, blocks), (tokens, bag), "+".join(blocks))


@both
@every_subset
def test_dropout_over_the_union_is_exact(blocks: tuple[str, ...], backend: str) -> None:
    from survfuse.reference.dropout import draw_seed, keep_mask

    tokens, bag = make()
    torch.manual_seed(9)
    seeds = {block: draw_seed(torch.device("cpu")) for block in BLOCKS if block in blocks}

    def keep(b: int, block: str, n: int, m: int) -> Tensor:
        if block not in seeds:
            return torch.zeros(H, n, m, **DOUBLE)
        mask = keep_mask(seeds[block], b, torch.arange(n * H), torch.arange(m), 0.4)
        return mask.double().unflatten(0, (n, H)).transpose(0, 1) / (1.0 - 0.4)

    torch.manual_seed(9)
    got = ops.block_attention(tokens, bag, blocks, dropout_p=0.4, backend=backend)
    expected = dense_softmax(tokens, bag, blocks, keep)
    compare(got, expected, (tokens, bag), "+".join(blocks))


@both
def test_masses_sum_to_one_where_anything_counts(backend: str) -> None:
    tokens, bag = make()
    got = ops.block_attention(tokens, bag, BLOCKS, backend=backend)
    for mass, lse in ((got.tokens_mass, got.tokens_lse), (got.bag_mass, got.bag_lse)):
        included = (lse > -torch.inf).double()
        assert_within_budget("mass", mass.sum(-1), included, included, torch.float64)
    # the third bag is empty: its tokens have only themselves
    assert not bool(got.tokens_mass[2, ..., 1].any())
    # the second bag's tokens are excluded
    assert not bool(got.tokens_mass[1, ..., 0].any())


@both
def test_a_row_that_may_attend_to_nothing_has_zero_gradients(backend: str) -> None:
    tokens, bag = make()
    blocks = {"tokens->bag", "bag->tokens"}
    got = ops.block_attention(tokens, bag, blocks, backend=backend)
    assert not bool(got.tokens_out[2].any())
    assert bool((got.tokens_lse[2] == -torch.inf).all())
    assert not bool(got.tokens_mass[2].any())
    # rows 6 to 10 are those of the bag whose tokens are excluded
    assert not bool(got.bag_out[6:11].any())
    results = (got.tokens_out, got.tokens_mass, got.bag_out, got.bag_mass)
    inputs = [tensor for side in (tokens, bag) for tensor in side[:4]]
    gradients = torch.autograd.grad(sum(r.sum() for r in results), inputs)
    assert not any(bool(gradient.isnan().any()) for gradient in gradients)
    assert not bool(gradients[0][2].any())


def test_masses_of_large_logits_sum_to_one() -> None:
    tokens, bag = make()
    tokens, bag = (
        BlockSide(*(t.detach().float() for t in side[:3]), side.bias.detach().float() + 1e4, ragged)
        for side, ragged in ((tokens, None), (bag, RAGGED))
    )
    got = ops.block_attention(tokens, bag, BLOCKS, backend="tiled")
    ones = torch.ones_like(got.bag_lse)
    assert_within_budget("mass", got.bag_mass.sum(-1), ones, ones.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    tokens, bag = make(excluded=False)
    bag = BlockSide(*(tensor.detach().to(dtype) for tensor in bag[:4]), RAGGED)
    wide = BlockSide(*(tensor.detach().float() for tensor in tokens[:4]))
    got = ops.block_attention(wide, bag, BLOCKS, backend="tiled")
    assert (got.tokens_out.dtype, got.bag_out.dtype) == (torch.float32, dtype)
    for result in (got.tokens_lse, got.tokens_mass, got.bag_lse, got.bag_mass):
        assert result.dtype == torch.float32
    # the very numbers these types hold; packed queries are multiplied in their own type
    exact = ops.block_attention(
        BlockSide(*(tensor.double() for tensor in wide[:4])),
        BlockSide(*(tensor.double() for tensor in bag[:4]), RAGGED),
        BLOCKS,
        backend="reference",
    )
    narrow = BlockSide(*(tensor.to(dtype) for tensor in wide[:4]))
    plain = dense_softmax(narrow, bag, BLOCKS)
    assert_within_budget("tokens", got.tokens_out, plain[0], exact.tokens_out, dtype)
    assert_within_budget("bag", got.bag_out, plain[3], exact.bag_out, dtype)


def test_dense_bags() -> None:
    tokens, _ = make(excluded=False)
    packed = [torch.randn(B * 4, H, e, **DOUBLE) for e in (D, D, DV)] + [torch.randn(B * 4)]
    ragged = BlockSide(*packed, Ragged.from_lengths([4] * B))
    dense = BlockSide(*(tensor.unflatten(0, (B, 4)) for tensor in packed))
    expected = ops.block_attention(tokens, ragged, BLOCKS, backend="tiled")
    got = ops.block_attention(tokens, dense, BLOCKS, backend="tiled")
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have.reshape(want.shape), want)


def tokens_with(**changes) -> tuple[BlockSide, BlockSide]:
    tokens, bag = make()
    return tokens._replace(**changes), bag


def bag_with(**changes) -> tuple[BlockSide, BlockSide]:
    tokens, bag = make()
    return tokens, bag._replace(**changes)


ALL = {"blocks": BLOCKS}
BAD = {
    "no block": ({"blocks": []}, ValueError, "blocks is empty; it must hold at least one of ('tok"),
    "one name": (
        {"blocks": "bag->bag"},
        TypeError,
        "blocks is 'bag->bag'; it must be a collection",
    ),
    "unknown": ({"blocks": ["bag->genes"]}, ValueError, "blocks holds 'bag->genes'; it must hold"),
    "not a side": (
        ALL | {"bag": make()[1].key},
        TypeError,
        "bag is Tensor; it must be a survfuse.ops",
    ),
    "a tuple": (
        ALL | {"tokens": ()},
        TypeError,
        "tokens is tuple; it must be a survfuse.ops.BlockSide",
    ),
    "ragged tokens": (tokens_with(ragged=RAGGED), ValueError, "tokens.ragged is given; tokens are"),
    "no query": (
        bag_with(query=None),
        ValueError,
        "bag.query is None; the block 'bag->tokens' needs",
    ),
    "no key": (tokens_with(key=None), ValueError, "tokens.key is None; the block 'tokens->tokens'"),
    "no value": (
        bag_with(value=None),
        ValueError,
        "bag.value is None; the block 'tokens->bag' needs",
    ),
    "packed tokens": (
        tokens_with(query=torch.zeros(G, H, D)),
        ValueError,
        "tokens.query has shape (3, 2, 5); it must be [B, G, H, d]",
    ),
    "heads": (
        bag_with(key=torch.zeros(T, H + 1, D)),
        ValueError,
        "bag.key has shape (15, 3, 5); it must be [15, 2, 5]",
    ),
    "value width": (
        bag_with(value=torch.zeros(T, H, DV + 1)),
        ValueError,
        "bag.value has shape (15, 2, 7); it must be [15, 2, 6]",
    ),
    "bias": (
        bag_with(bias=torch.zeros(B, T)),
        ValueError,
        "bag.bias has shape (4, 15); it must be [",
    ),
    "device": (
        bag_with(key=torch.zeros(T, H, D, device="meta")),
        ValueError,
        "bag.key is on meta and",
    ),
    "value type": (
        bag_with(value=torch.zeros(T, H, DV)),
        TypeError,
        "bag.value is torch.float32 and bag.key torch.float64; they must have one type",
    ),
    "mixed types": (
        bag_with(key=torch.zeros(T, H, D), value=torch.zeros(T, H, DV)),
        TypeError,
        "tokens.key is torch.float64 and bag.key is torch.float32; both or neither must be fp64",
    ),
    "bags": (
        bag_with(ragged=RAGGED.select([0])),
        ValueError,
        "tokens hold 4 bags and bag 1; they must",
    ),
    "ragged": (
        bag_with(ragged=[4, 5]),
        TypeError,
        "bag_ragged is list; it must be a survfuse.Ragged",
    ),
    "outside": (
        bag_with(ragged=RAGGED._replace(starts=RAGGED.starts + 3)),
        ValueError,
        "bag_ragged: bag 0 is rows 10 to 16",
    ),
    "dropout": (
        ALL | {"dropout_p": 1.0},
        ValueError,
        "dropout_p is 1.0; it must be at least 0 and",
    ),
    "scale": (ALL | {"scale": "1"}, TypeError, "scale is '1'; it must be a number"),
    "backend": (
        ALL | {"backend": "cudnn"},
        ValueError,
        "backend is 'cudnn'; it must be None or one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    changes, kind, message = BAD[case]
    tokens, bag = make()
    if isinstance(changes, tuple):
        changes = {"tokens": changes[0], "bag": changes[1]}
    with pytest.raises(kind, match=re.escape(message)):
        ops.block_attention(**({"tokens": tokens, "bag": bag, "blocks": BLOCKS} | changes))


def test_what_no_block_needs_may_be_missing() -> None:
    tokens, bag = make()
    asking, asked = BlockSide(query=tokens.query), bag._replace(query=None)
    got = ops.block_attention(asking, asked, ["tokens->bag"], backend="tiled")
    whole = ops.block_attention(tokens, bag, ["tokens->bag"], backend="tiled")
    assert torch.equal(got.tokens_out, whole.tokens_out)
    assert got[3:] == (None, None, None)
