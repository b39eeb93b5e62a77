"""Properties that hold for any bag: what may be shuffled, doubled, split or left out."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.ops.backends import backend_obstacle
from survfuse.reference.dropout import draw_seed, keep_mask, keep_threshold
from tests.ops.tolerance import FP64_RELATIVE

CPU = torch.device("cpu")
DOUBLE = {"dtype": torch.float64}
# the same examples in every run: a failure here is a failure everywhere
quick = settings(derandomize=True, max_examples=12, deadline=None, database=None)
# so many standard errors: once in two million runs by chance, and the seed is fixed
SIGMAS = 5.0


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def usable(backend: str) -> object:
    obstacle = backend_obstacle(backend, device=CPU, dtype=torch.float64)
    return pytest.param(backend, marks=pytest.mark.skipif(bool(obstacle), reason=str(obstacle)))


BACKENDS = [usable("tiled"), usable("native")]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def attend(function: str, backend: str, rows: Tensor, bag: Tensor, **options) -> tuple:
    """(result, lse) of either op; for the attention, rows become queries of one head."""
    if function == "pool_bag":
        pooled, lse, _ = ops.pool_bag(rows, bag, backend=backend, **options)
        return pooled, lse
    g = torch.Generator().manual_seed(5)
    dim = rows.shape[-1]
    w_k, w_v = (torch.randn(1, dim, dim, generator=g, **DOUBLE) for _ in range(2))
    b_k, b_v = (torch.randn(1, dim, generator=g, **DOUBLE) for _ in range(2))
    out, lse = ops.tokens_attend_bag_with_lse(
        rows[:, :, None],
        bag,
        w_k / dim,
        w_v / dim,
        b_k=b_k,
        b_v=b_v,
        absorb="never" if function == "formed" else "always",
        backend=backend,
        **options,
    )
    return out[:, :, 0], lse[:, :, 0]


every_function = pytest.mark.parametrize(
    ("function", "backend"),
    [
        pytest.param(function, *param.values, marks=param.marks, id=f"{function}-{param.values[0]}")
        for function in ("pool_bag", "absorbed")
        for param in BACKENDS
    ]
    + [pytest.param("formed", "tiled", id="formed-tiled")],
)


class Drawn(NamedTuple):
    """A bag by its sizes, so that a failure prints them and not its numbers."""

    n: int
    dim: int
    n_rows: int
    seed: int
    excluded: float  # share of patches with bias -inf
    loud: bool  # one patch takes nearly all the weight

    def make(self) -> tuple[Tensor, Tensor, Tensor]:
        """rows [1, R, D], bag [N, D] and bias [N] in fp64."""
        g = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(1, self.n_rows, self.dim, generator=g, **DOUBLE)
        bag = torch.randn(self.n, self.dim, generator=g, **DOUBLE)
        bias = torch.randn(self.n, generator=g, **DOUBLE)
        bias[torch.rand(self.n, generator=g) < self.excluded] = -torch.inf
        if self.loud:
            bag[self.seed % self.n] *= 10.0
        return rows, bag, bias


SEEDS = st.integers(0, 2**31)
SIZES = {"dim": st.integers(1, 19), "n_rows": st.integers(1, 6), "seed": SEEDS}
TRAITS = {"excluded": st.sampled_from([0.0, 0.3]), "loud": st.booleans()}
CASES = st.builds(Drawn, n=st.integers(1, 70), **SIZES, **TRAITS)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=FP64_RELATIVE, atol=10 * FP64_RELATIVE)


def gradients(results: tuple, inputs: list[Tensor]) -> list[Tensor]:
    """Of one fixed function of the results: every part of it counts, -inf for nothing."""
    total = 0.0
    for index, result in enumerate(results):
        weight = torch.linspace(-1.0, 2.0, result.numel(), **DOUBLE).view(result.shape) + index
        finite = torch.where(result == -torch.inf, 0.0, result.double())
        total = total + (weight * finite).sum()
    return list(torch.autograd.grad(total, inputs))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@every_function
@quick
@given(data=st.data(), case=CASES)
def test_order_of_patches_changes_nothing(function, backend, data, case) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.n))))
    rows, bag, bias = leaves(*case.make())
    results = attend(function, backend, rows, bag, bias=bias)
    expected = gradients(results, [rows, bag, bias])
    shuffled = attend(function, backend, rows, bag[order], bias=bias[order])
    for got, want in zip(shuffled, results):
        assert_close(got, want)
    for got, want in zip(gradients(shuffled, [rows, bag, bias]), expected):
        assert_close(got, want)


@every_function
@quick
@given(case=CASES)
def test_every_patch_twice_adds_log_2_to_lse_only(function, backend, case) -> None:
    rows, bag, bias = case.make()
    out, lse = attend(function, backend, rows, bag, bias=bias)
    doubled, doubled_lse = attend(function, backend, rows, bag.repeat(2, 1), bias=bias.repeat(2))
    assert_close(doubled, out)
    assert_close(doubled_lse, lse + math.log(2.0))


@every_function
@quick
@given(data=st.data(), case=CASES)
def test_two_parts_merged_by_lse_equal_the_whole(function, backend, data, case) -> None:
    n = case.n
    # one part may be empty, or hold nothing but excluded patches
    cut = data.draw(st.integers(0, n))
    rows, bag, bias = leaves(*case.make())
    whole = attend(function, backend, rows, bag, bias=bias)
    ragged = Ragged.from_lengths([cut, n - cut])
    outs, lses = attend(function, backend, rows.expand(2, -1, -1), bag, bias=bias, ragged=ragged)
    lse = lses.logsumexp(0) if bool((lses > -torch.inf).any()) else lses[0]
    share = torch.where(lses == -torch.inf, 0.0, lses - lse).exp()
    share = torch.where(lses == -torch.inf, 0.0, share)
    merged = (share[..., None] * outs).sum(0, keepdim=True), lse[None]
    for got, want in zip(merged, whole):
        assert_close(got, want)
    inputs = [rows, bag, bias]
    for got, want in zip(gradients(merged, inputs), gradients(whole, inputs)):
        assert_close(got, want)


@every_function
@quick
@given(data=st.data(), case=CASES)
def test_an_excluded_patch_may_hold_anything(function, backend, data, case) -> None:
    n = case.n
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    filler = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    rows, bag, bias = case.make()
    bias = torch.where(kept, bias, -torch.inf)
    poisoned = torch.where((bias == -torch.inf)[:, None], filler, bag)
    rows, bag, poisoned, bias = leaves(rows, bag, poisoned, bias)
    clean = attend(function, backend, rows, bag[kept], bias=bias[kept])
    results = attend(function, backend, rows, poisoned, bias=bias)
    for got, want in zip(results, clean):
        assert_close(got, want)
    d_rows, d_bag, d_bias = gradients(results, [rows, poisoned, bias])
    expected = gradients(clean, [rows, bag, bias])
    for got, want in zip((d_rows, d_bag, d_bias), expected):
        assert_close(got, want)
    # zero, and not small
    assert not bool(d_bag[~kept].any())
    assert not bool(d_bias[~kept].any())


@every_function
@quick
@given(case=CASES, shift=st.floats(-50.0, 50.0))
def test_a_shift_of_all_biases_shifts_lse_only(function, backend, case, shift) -> None:
    rows, bag, bias = case.make()
    out, lse = attend(function, backend, rows, bag, bias=bias)
    shifted, shifted_lse = attend(function, backend, rows, bag, bias=bias + shift)
    # a bias of 50 has an absolute rounding of its own, which moves the weights
    torch.testing.assert_close(shifted, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(shifted_lse, lse + shift, rtol=1e-12, atol=1e-11)


@both_backends
@quick
@given(case=CASES, power=st.integers(-3, 3))
def test_scale_belongs_to_the_rows_or_to_the_product(backend, case, power) -> None:
    rows, bag, bias = leaves(*case.make())
    factor = 2.0**power
    first = ops.pool_bag(rows, bag, bias=bias, scale=0.7, backend=backend)
    other = ops.pool_bag(rows * factor, bag, bias=bias, scale=0.7 / factor, backend=backend)
    for got, want in zip(other, first):
        assert_close(got, want)
    inputs = [rows, bag, bias]
    for got, want in zip(gradients(other, inputs), gradients(first, inputs)):
        assert_close(got, want)


@both_backends
@quick
@given(case=CASES)
def test_no_bias_is_a_bias_of_zero(backend, case) -> None:
    rows, bag, _ = case.make()
    with_zero = ops.pool_bag(rows, bag, bias=torch.zeros(bag.shape[0], **DOUBLE), backend=backend)
    for got, want in zip(ops.pool_bag(rows, bag, backend=backend), with_zero):
        assert torch.equal(got, want)


@every_function
@quick
@given(case=CASES, copies=st.integers(2, 4))
def test_repeated_and_overlapping_bags_sum_their_gradients(function, backend, case, copies) -> None:
    rows, bag, bias = leaves(*case.make())
    n = bag.shape[0]
    many = torch.cat([rows.detach() * (1 + k) for k in range(copies)]).requires_grad_()
    starts = [min(k % 2, n - 1) for k in range(copies)]
    ragged = Ragged.from_ranges(starts, [n - start for start in starts])
    together = attend(function, backend, many, bag, bias=bias, ragged=ragged)
    weights = [torch.linspace(-1.0, 2.0, r.numel(), **DOUBLE).view(r.shape) for r in together]

    def scalar(results, part):
        finite = [torch.where(r == -torch.inf, 0.0, r) for r in results]
        return sum((w[part] * r).sum() for w, r in zip(weights, finite))

    got = torch.autograd.grad(scalar(together, slice(None)), [bag, bias])
    expected = [torch.zeros_like(bag), torch.zeros_like(bias)]
    for k, start in enumerate(starts):
        part = slice(k, k + 1)
        alone = attend(function, backend, many[part], bag[start:], bias=bias[start:])
        for total, gradient in zip(expected, torch.autograd.grad(scalar(alone, part), [bag, bias])):
            total += gradient
    for have, want in zip(got, expected):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [None, 1e-5])
@both_backends
@settings(quick, max_examples=4)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 5, 63, 130, 700]), min_size=1, max_size=5),
    seed=SEEDS,
)
def test_a_bag_does_not_feel_its_neighbours(backend, norm, dtype, lengths, seed) -> None:
    """Each bag of a batch, to the last bit, is what a call of its own gives."""
    g = torch.Generator().manual_seed(seed)
    ragged = Ragged.from_lengths(lengths)
    bag = torch.randn(ragged.total, 24, generator=g).to(dtype)
    bias = torch.randn(ragged.total, generator=g).to(dtype)
    rows = torch.randn(len(lengths), 5, 24, generator=g).to(dtype)
    rows, bag, bias = leaves(rows, bag, bias)
    options = {"normalize_eps": norm, "scale": 0.3, "backend": backend}
    together = ops.pool_bag(rows, bag, bias=bias, ragged=ragged, **options)
    order = torch.randperm(len(lengths), generator=g)
    selected = ops.pool_bag(rows[order], bag, bias=bias, ragged=ragged.select(order), **options)
    for got, want in zip(selected, together):
        assert torch.equal(got, want[order])
    together_gradients = batch_gradients(together, [rows, bag, bias])
    for b in range(len(lengths)):
        here = ragged.select([b])
        alone = ops.pool_bag(rows[b : b + 1], bag, bias=bias, ragged=here, **options)
        for got, want in zip(alone, together):
            assert torch.equal(got, want[b : b + 1])
        d_rows, d_bag, d_bias = batch_gradients(alone, [rows, bag, bias])
        mine = slice(int(here.starts[0]), int(here.starts[0]) + here.total)
        assert torch.equal(d_rows[b], together_gradients[0][b])
        assert torch.equal(d_bag[mine], together_gradients[1][mine])
        assert torch.equal(d_bias[mine], together_gradients[2][mine])


def batch_gradients(results: ops.PooledBag, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a function that weighs every bag alike, whatever else is in the batch."""
    pooled, lse, weight_sum = results
    channel = torch.linspace(-1.0, 2.0, pooled.shape[-1]).to(pooled.dtype)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.autograd.grad(
        (pooled * channel).sum() + finite.sum().to(pooled.dtype) + weight_sum.sum(), inputs
    )


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@quick
@given(case=CASES, heads=st.sampled_from([1, 2, 3]))
def test_weights_sum_to_one_and_pool_the_bag(backend, case, heads) -> None:
    rows, bag, bias = case.make()
    rows = rows.repeat(1, heads, 1)
    pooled, lse, _ = ops.pool_bag(rows, bag, bias=bias, backend="tiled")
    options = {"bias": bias, "backend": backend}
    weights = ops.pool_weights(rows, bag, lse, **options)
    included = (lse > -torch.inf).double()[0]
    assert_close(weights.sum(0), included)
    assert not bool(weights[bias == -torch.inf].any())
    assert_close(weights.T @ torch.nan_to_num(bag), pooled[0])
    by_head = lse.view(1, -1, heads)
    assert_close(ops.pool_weights(rows, bag, by_head, **options), weights.view(len(bag), -1, heads))
    means = ops.pool_weights(rows, bag, by_head, reduce="heads", **options)
    assert_close(means, weights.view(len(bag), -1, heads).mean(-1))
    assert_close(ops.pool_weights(rows, bag, lse, reduce="rows", **options), weights.mean(1))


def test_philox_known_answer() -> None:
    """First word of the zero counter under the zero key, from Random123's known answers."""
    word, zero = 0x6627E8D5, torch.zeros(1, dtype=torch.int64)
    # a word below the threshold is dropped, so it is kept at p = word / 2^32 and not one above
    assert keep_threshold(word / 2**32) == word
    assert bool(keep_mask(zero, 0, zero, zero, word / 2**32))
    assert not bool(keep_mask(zero, 0, zero, zero, (word + 1) / 2**32))


def philox(counter: list[int], key: list[int]) -> int:
    """Philox 4x32-10 in Python's whole numbers: the first word."""
    low = 0xFFFFFFFF
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & low,
            (first >> 32) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter[0]


@quick
@given(
    seed=st.integers(0, 2**63 - 2),
    bag=st.integers(0, 2**31 - 1),
    row=st.integers(0, 2**20),
    position=st.integers(0, 2**31 - 1),
)
def test_mask_is_philox_of_its_place(seed, bag, row, position) -> None:
    word = philox([position, row, bag, 0], [seed & 0xFFFFFFFF, seed >> 32])
    place = (torch.tensor([seed]), bag, torch.tensor([row]), torch.tensor([position]))
    assert bool(keep_mask(*place, word / 2**32))
    if word < 2**32 - 2:
        assert not bool(keep_mask(*place, (word + 1) / 2**32))


@every_function
@settings(quick, max_examples=6)
@given(case=CASES, p=st.sampled_from([0.1, 0.5, 0.9]), seed=SEEDS)
def test_dropout_drops_exactly_the_mask(function, backend, case, p, seed) -> None:
    rows, bag, bias = case.make()
    n_rows, n = rows.shape[1], bag.shape[0]
    torch.manual_seed(seed)
    drawn = draw_seed(CPU)
    torch.manual_seed(seed)
    out, lse = attend(function, backend, rows, bag, bias=bias, dropout_p=p)
    keep = keep_mask(drawn, 0, torch.arange(n_rows), torch.arange(n), p)
    # every patch as a bag of its own is its value; its lse is its logit
    single = Ragged.from_lengths([1] * n)
    values, logits = attend(
        function, backend, rows.expand(n, -1, -1), bag, bias=bias, ragged=single
    )
    assert torch.equal(
        torch.nan_to_num(lse), torch.nan_to_num(attend(function, backend, rows, bag, bias=bias)[1])
    )
    weights = torch.where(logits == -torch.inf, 0.0, (logits - lse).exp())
    weights = torch.where(keep.T, weights / (1.0 - p), 0.0)
    assert_close(out[0], (weights[..., None] * values).sum(0))


@both_backends
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_expectation(backend, p) -> None:
    n, draws = 40, 1500
    g = torch.Generator().manual_seed(3)
    bag, row = torch.randn(n, 6, generator=g, **DOUBLE), torch.randn(1, 1, 6, generator=g, **DOUBLE)
    pooled, lse, _ = ops.pool_bag(row, bag, backend=backend)
    weights = ops.pool_weights(row, bag, lse)[:, 0]
    # one bag, many times in a batch: every copy draws a mask of its own
    ragged = Ragged.from_ranges([0] * draws, [n] * draws)
    dropped = ops.pool_bag(
        row.expand(draws, -1, -1), bag, ragged=ragged, dropout_p=p, backend=backend
    )
    assert torch.equal(dropped.lse, lse.expand(draws, 1))
    variance = p / (1.0 - p) * (weights[:, None].square() * bag.square()).sum(0)
    error = (dropped.pooled.mean(0)[0] - pooled[0, 0]).abs()
    assert bool((error <= SIGMAS * (variance / draws).sqrt()).all())
    spread = p / (1.0 - p) * weights.square().sum()
    sums = dropped.weight_sum[:, 0]
    assert abs(float(sums.mean()) - 1.0) <= SIGMAS * math.sqrt(spread / draws)
    # neither without variance nor with twice as much
    assert 0.8 <= float(sums.var()) / float(spread) <= 1.25
