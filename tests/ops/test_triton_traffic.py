"""How often the Triton kernels load each element of a bag, counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.triton_calls import CUDA, Call, make_call

needs_interpreter = pytest.mark.skipif(CUDA, reason="counts loads in Triton's interpreter")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch):
    """`count(tensor)` watches a tensor and returns how often each element is loaded."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    watched: list[tuple[Tensor, Tensor]] = []
    load = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, other, *rest):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        for tensor, counts in watched:
            at = (addresses - tensor.data_ptr()) // tensor.element_size()
            at = at[(at >= 0) & (at < counts.numel())]
            np.add.at(counts.view(-1).numpy(), at, 1)
        return load(self, pointers, mask, other, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def count(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        counts = torch.zeros(tensor.shape, dtype=torch.int64)
        watched.append((tensor, counts))
        return counts

    return count


def frozen_backward(call: Call, results: tuple[Tensor, ...]) -> None:
    gradients = tuple(torch.ones_like(result) for result in results)
    call.backward(results, gradients, bag=False, bias=False)


@needs_interpreter
@pytest.mark.parametrize(
    ("n_rows", "width", "normalize", "backward_reads"),
    # fp32, which the interpreter needs, has room for 8 query rows at D = 1024 in the backward
    [
        *((5, 40, True, 1), (5, 40, False, 1), (16, 512, False, 1)),
        *((8, 1024, True, 1), (16, 1024, False, 2)),
    ],
)
def test_each_row_is_read_once(reads, n_rows, width, normalize, backward_reads) -> None:
    ranges = [(2, 17), (20, 5)] if width < 100 else [(2, 20)]
    call = make_call(ranges, n_rows=n_rows, width=width, n_stored=30, normalize=normalize)
    counts = reads(call.bag)
    results = call.forward()
    inside = torch.zeros(30, dtype=torch.bool)
    for start, length in ranges:
        inside[start : start + length] = True
    assert torch.equal(counts, inside[:, None].long().expand_as(counts))
    counts.zero_()
    frozen_backward(call, results)
    assert torch.equal(counts, backward_reads * inside[:, None].long().expand_as(counts))


@needs_interpreter
@pytest.mark.parametrize(
    ("n_rows", "width", "forward_reads"),
    # two blocks of 16 rows in one pass; a pass for the scores and one for the product; two of each
    [(20, 1024, 2), (6, 1040, 2), (70, 48, 4)],
)
def test_reads_beyond_few_rows_and_moderate_widths(reads, n_rows, width, forward_reads) -> None:
    call = make_call([(0, 20)], n_rows=n_rows, width=width, n_stored=20)
    counts = reads(call.bag)
    results = call.forward()
    assert counts.eq(forward_reads).all()
    if width > 1024:
        counts.zero_()
        frozen_backward(call, results)
        assert counts.eq(2).all()


@needs_interpreter
def test_reads_of_a_trained_bag(reads) -> None:
    call = make_call([(0, 20), (10, 20)], n_rows=3, width=300, n_stored=40, normalize=True)
    results = call.forward()
    counts = reads(call.bag)
    gradients = tuple(torch.ones_like(result) for result in results)
    call.backward(results, gradients, rows=False)
    blocks = 3  # of 128 columns: each scores the whole row
    bags = torch.tensor([1] * 10 + [2] * 10 + [1] * 10 + [0] * 10)
    # and the normalisation reads once more; the first column is also the shift of the statistics
    expected = (blocks * bags + (bags > 0))[:, None].expand_as(counts)
    assert torch.equal(counts[:, 1:], expected[:, 1:])
    assert torch.equal(counts[:, 0], expected[:, 0] + blocks * bags)


@needs_interpreter
def test_attention_of_few_queries_reads_each_key_once(reads) -> None:
    """Forward, and in the one pass of the backward; also where a bag is cut into slots."""
    from survfuse.triton_kernels import cross_attention as launchers

    from survfuse import Ragged
    from survfuse.attention import Attended, Attention, AttentionNeeds

    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 2, 16, generator=g) for n in (12, 620, 620))
    ranges = [(300, 40), (10, 270)]
    key_ragged = Ragged.from_ranges(*zip(*ranges, strict=True))
    attention = Attention(*Ragged.from_lengths([6, 6]), *key_ragged, scale=0.3)
    inside = torch.zeros(620, dtype=torch.int64)
    for start, length in ranges:
        inside[start : start + length] = 1
    expected = inside[:, None, None].expand_as(key)
    counts = [reads(key), reads(value)]
    results = launchers.cross_attention_forward(query, key, value, None, attention)
    for count in counts:
        assert torch.equal(count, expected)
        count.zero_()
    ones = Attended(*(torch.ones_like(result) for result in results))
    needs = AttentionNeeds(query=True, key=True, value=True, bias=False)
    launchers.cross_attention_backward(ones, results, query, key, value, None, attention, needs)
    assert all(torch.equal(count, expected) for count in counts)


@needs_interpreter
def test_spread_tokens_reads_each_row_once(reads) -> None:
    """Forward, and twice backward: once for the weights, once for their product with the bag."""
    from survfuse.triton_kernels import spread_tokens as launchers

    from survfuse import Ragged
    from survfuse.attention import Attended
    from survfuse.pooling import Pooling, SpreadNeeds

    g = torch.Generator().manual_seed(0)
    keys, values, bag = (
        torch.randn(*s, generator=g) for s in ((2, 2, 6, 40), (2, 2, 6, 8), (90, 40))
    )
    ranges = Ragged.from_ranges([2, 50], [40, 33])
    pooling = Pooling(*ranges, scale=0.3, normalize=False, eps=0.0, mean=None, rstd=None)
    inside = torch.zeros(90, dtype=torch.int64)
    inside[2:42] = 1
    inside[50:83] = 1
    expected = inside[:, None].expand_as(bag)
    counts = reads(bag)
    results = launchers.spread_tokens_forward(keys, values, bag, None, pooling)
    assert torch.equal(counts, expected)
    counts.zero_()
    ones = Attended(*(torch.ones_like(result) for result in results))
    needs = SpreadNeeds(keys=True, values=True, bag=False, key_bias=False)
    launchers.spread_tokens_backward(ones, results.lse, keys, values, bag, None, pooling, needs)
    assert torch.equal(counts, 2 * expected)
