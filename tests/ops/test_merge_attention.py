"""`merge_attention`: parts over disjoint keys are the whole, with every gradient."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from survfuse import Ragged, ops, reference
from tests.ops.tolerance import FP64_RELATIVE, assert_within_budget

DOUBLE = {"dtype": torch.float64}
quick = settings(derandomize=True, max_examples=12, deadline=None, database=None)
both = pytest.mark.parametrize("merge", [ops.merge_attention, reference.merge_attention])


def random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, **DOUBLE).requires_grad_()


def weighted(results: tuple[Tensor, ...]) -> Tensor:
    """One number that every entry counts in, -inf as nothing."""
    total = 0.0
    for index, result in enumerate(results):
        weight = torch.linspace(-1.0, 2.0, result.numel(), **DOUBLE).view(result.shape) + index
        total = total + (weight * torch.where(result == -torch.inf, 0.0, result)).sum()
    return total


def assert_same(got: tuple, expected: tuple, inputs: list[Tensor]) -> None:
    """Results and every gradient, in fp64."""
    for have, want in zip(got, expected, strict=True):
        assert_within_budget("result", have, want, want.detach(), torch.float64)
    gradients = [torch.autograd.grad(weighted(r), inputs) for r in (got, expected)]
    for have, want in zip(*gradients, strict=True):
        scale = 1.0 + float(want.norm())
        torch.testing.assert_close(have, want, rtol=0, atol=10 * scale * FP64_RELATIVE)


PARTS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@both
@quick
@given(lengths=PARTS, excluded=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 2**31))
def test_parts_of_keys_are_the_whole(merge, lengths, excluded, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    query, key, value = random(g, 1, 3, 2, 4), random(g, n, 2, 4), random(g, n, 2, 5)
    bias = torch.randn(n, generator=g, **DOUBLE)
    bias[torch.rand(n, generator=g) < excluded] = -torch.inf
    bias.requires_grad_()

    def attend(rows: slice):
        return ops.cross_attention_with_lse(
            query, key[rows], value[rows], bias=bias[rows], backend="tiled"
        )

    ends = torch.tensor(lengths).cumsum(0).tolist()
    parts = [attend(slice(end - n, end)) for n, end in zip(lengths, ends)]
    merged = merge(*zip(*parts, strict=True))
    assert_same(merged, attend(slice(0, n)), [query, key, value, bias])


@both
@quick
@given(lengths=PARTS, absorb=st.sampled_from(["always", "never"]), seed=st.integers(0, 2**31))
def test_parts_of_a_bag_are_the_whole(merge, lengths, absorb, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    bag, query = random(g, sum(lengths), 6), random(g, 1, 3, 2, 4)
    weights = [random(g, 2, 4, 6), random(g, 2, 5, 6), random(g, 2, 4), random(g, 2, 5)]
    norms = [random(g, 6), random(g, 6)]

    def attend(query: Tensor, ragged: Ragged):
        return ops.tokens_attend_bag_with_lse(
            query,
            bag,
            *weights[:2],
            b_k=weights[2],
            b_v=weights[3],
            norm_weight=norms[0],
            norm_bias=norms[1],
            ragged=ragged,
            absorb=absorb,
        )

    # as one call: the parts are bags of one packed matrix, and come back stacked
    parts = attend(query.expand(len(lengths), -1, -1, -1), Ragged.from_lengths(lengths))
    merged = merge(*parts)
    whole = attend(query, Ragged.from_lengths([sum(lengths)]))
    assert_same(merged, (whole[0][0], whole[1][0]), [bag, query, *weights, *norms])


@both
def test_gradcheck(merge) -> None:
    g = torch.Generator().manual_seed(0)
    outs, lses = random(g, 3, 2, 2, 4), random(g, 3, 2, 2)
    with torch.no_grad():
        lses[1, 0, 0] = -torch.inf
        lses[:, 1, 1] = -torch.inf
    hole = lses == -torch.inf

    def function(outs, finite):
        out, lse = merge(outs, torch.where(hole, -torch.inf, finite))
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    inputs = (outs, torch.where(hole, 0.0, lses).detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@both
@pytest.mark.parametrize("held", [0.0, 7.0, math.nan, math.inf])
def test_a_part_of_nothing_changes_nothing(merge, held: float) -> None:
    g = torch.Generator().manual_seed(1)
    outs, lses = [random(g, 4, 2, 3) for _ in range(2)], [random(g, 4, 2) for _ in range(2)]
    expected = merge(outs, lses)
    empty_out = torch.full((4, 2, 3), held, **DOUBLE, requires_grad=True)
    empty_lse = torch.full((4, 2), -torch.inf, **DOUBLE, requires_grad=True)
    got = merge([outs[0], empty_out, outs[1]], [lses[0], empty_lse, lses[1]])
    gradients = torch.autograd.grad(weighted(got), [empty_out, empty_lse], retain_graph=True)
    assert_same(got, expected, [*outs, *lses])
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_nothing_but_parts_of_nothing(merge) -> None:
    outs = torch.full((3, 2, 1, 4), 5.0, **DOUBLE, requires_grad=True)
    lses = torch.full((3, 2, 1), -torch.inf, **DOUBLE, requires_grad=True)
    out, lse = merge(outs, lses)
    assert torch.equal(out, torch.zeros(2, 1, 4, **DOUBLE))
    assert torch.equal(lse, torch.full((2, 1), -torch.inf, **DOUBLE))
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), [outs, lses]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_infinite_and_undefined_logits_do_as_softmax_does(merge) -> None:
    outs = torch.ones(2, 3, 1, 1)
    lses = torch.tensor([[0.0, torch.inf, torch.nan], [1.0, 2.0, 3.0]])[..., None]
    out, lse = merge(outs, lses)
    share = lses[..., 0].softmax(0).sum(0)
    assert torch.equal(out[:, 0, 0].isnan(), share.isnan())
    assert torch.equal(lse[:, 0].isnan(), lses[..., 0].logsumexp(0).isnan())
    assert lse[1, 0] == torch.inf


@both
def test_far_apart_and_large_logsumexps(merge) -> None:
    outs, lses = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[1e4], [1e4 + 1.0]])
    out, lse = merge(outs, lses)
    share = 1.0 / (1.0 + math.exp(-1.0))
    torch.testing.assert_close(out.item(), 1.0 + share)
    torch.testing.assert_close(lse.item(), 1e4 + 1.0 - math.log(share))
    out, lse = merge(outs, torch.tensor([[-1e4], [1e4]]))
    assert (out.item(), lse.item()) == (2.0, 1e4)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_precision(merge, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    outs = torch.randn(3, 50, 2, 4, generator=g).to(dtype)
    lses = torch.randn(3, 50, 2, generator=g)
    out, lse = merge(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    share = lses.softmax(0).to(dtype)[..., None]
    exact = reference.merge_attention(outs.double(), lses.double())
    assert_within_budget("out", out, (share * outs).sum(0), exact[0], dtype)
    assert_within_budget("lse", lse, lses.logsumexp(0), exact[1], torch.float32)


def test_order_is_fixed_and_a_batch_is_its_rows() -> None:
    outs, lses = torch.randn(4, 5, 2, 3), torch.randn(4, 5, 2)
    alone = ops.merge_attention(outs[:1], lses[:1])
    assert torch.equal(alone[0], outs[0])
    assert torch.equal(alone[1], lses[0])
    whole = ops.merge_attention(outs, lses)
    again = ops.merge_attention(list(outs), tuple(lses))
    rows = torch.vmap(ops.merge_attention, in_dims=1)(outs, lses)
    for result in (again, rows):
        assert torch.equal(result[0], whole[0])
        assert torch.equal(result[1], whole[1])


OUT, LSE = torch.zeros(4, 2, 3), torch.zeros(4, 2)
BAD = {
    "lengths": ([OUT, OUT], [LSE], ValueError, "outs are 2 parts and lses 1; every part needs one"),
    "no part": ([], [], ValueError, "outs holds no part; it must hold at least one"),
    "no parts stacked": (
        torch.zeros(0, 4, 2, 3),
        torch.zeros(0, 4, 2),
        ValueError,
        "holds no part",
    ),
    "scalar": (torch.tensor(1.0), [LSE], ValueError, "outs has shape (); stacked parts have"),
    "not a sequence": (OUT, 3.0, TypeError, "lses is float; it must be a sequence of tensors"),
    "not a tensor": (
        [OUT, None],
        [LSE, LSE],
        TypeError,
        "outs[1] is NoneType; it must be a tensor",
    ),
    "integers": (
        [OUT, OUT.long()],
        [LSE, LSE],
        TypeError,
        "outs[1] is torch.int64; it must be bf16",
    ),
    "shape": (
        [OUT, OUT[:3]],
        [LSE, LSE[:3]],
        ValueError,
        "outs[1] has shape (3, 2, 3); it must be",
    ),
    "lse": (
        [OUT, OUT],
        [LSE, LSE[:, :1]],
        ValueError,
        "lses[1] has shape (4, 1); it must be [4, 2]",
    ),
    "a vector": (
        [LSE[0]],
        [LSE[0, 0]],
        ValueError,
        "outs[0] has shape (2,); it must be [..., H, dv]",
    ),
    "device": (
        [OUT, OUT.to("meta")],
        [LSE, LSE],
        ValueError,
        "outs[1] is on meta and the first out on cpu; move one of them",
    ),
    "types": (
        [OUT, OUT.double()],
        [LSE, LSE],
        TypeError,
        "outs[1] is torch.float64 and the first part torch.float32; they must have one type",
    ),
    "types of lse": (
        [OUT, OUT],
        [LSE, LSE.double()],
        TypeError,
        "lses[1] is torch.float64 and the",
    ),
    "narrow lse": ([OUT], [LSE.half()], TypeError, "lses[0] is torch.float16; a logsumexp must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parts_are_named(case: str) -> None:
    outs, lses, kind, message = BAD[case]
    with pytest.raises(kind, match=re.escape(message)):
        ops.merge_attention(outs, lses)
