"""Ragged: every way to say which rows form which bag."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from survfuse import Ragged
from survfuse.ragged import as_packed, in_batch_order

quick = settings(derandomize=True, max_examples=30, deadline=None, database=None)
LENGTHS = st.lists(st.integers(0, 9), max_size=6)


def fields(ragged: Ragged) -> tuple:
    assert ragged.starts.dtype == ragged.lengths.dtype == torch.int64
    assert type(ragged.total) is type(ragged.max_length) is int
    return ragged.starts.tolist(), ragged.lengths.tolist(), ragged.total, ragged.max_length


@pytest.mark.parametrize(
    "lengths", [[3, 0, 2], torch.tensor([3, 0, 2]), torch.tensor([3, 0, 2], dtype=torch.int16)]
)
def test_from_lengths(lengths) -> None:
    ragged = Ragged.from_lengths(lengths)
    assert fields(ragged) == ([0, 3, 3], [3, 0, 2], 5, 3)
    assert ragged.n_bags == 3


def test_lengths_of_a_narrow_type_do_not_overflow() -> None:
    lengths = torch.tensor([200, 100], dtype=torch.uint8)
    assert fields(Ragged.from_lengths(lengths)) == ([0, 200], [200, 100], 300, 200)


@pytest.mark.parametrize("empty", [[], torch.zeros(0), torch.zeros(0, dtype=torch.int32)])
def test_no_bags(empty) -> None:
    assert fields(Ragged.from_lengths(empty)) == ([], [], 0, 0)
    assert fields(Ragged.from_offsets([0])) == ([], [], 0, 0)
    assert fields(Ragged.from_lengths([2]).select(empty)) == ([], [], 0, 0)


@quick
@given(lengths=LENGTHS, first=st.integers(0, 5))
def test_offsets_say_the_same_as_lengths(lengths: list[int], first: int) -> None:
    offsets = [first]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    starts, counts, *sizes = fields(Ragged.from_offsets(torch.tensor(offsets, dtype=torch.int32)))
    expected = fields(Ragged.from_lengths(lengths))
    assert [start - first for start in starts] == expected[0]
    assert (counts, *sizes) == expected[1:]


def test_from_ranges_keeps_order_repeats_and_overlap() -> None:
    ragged = Ragged.from_ranges([7, 0, 7, 3], [2, 5, 2, 0])
    assert fields(ragged) == ([7, 0, 7, 3], [2, 5, 2, 0], 9, 5)


def test_from_jagged() -> None:
    parts = [torch.randn(n, 3) for n in (2, 0, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    ragged = Ragged.from_jagged(nested)
    assert fields(ragged) == ([0, 2, 2], [2, 0, 4], 6, 4)
    assert nested.values().shape[0] == 6
    ragged.check(6)


def test_from_jagged_with_holes() -> None:
    """Lengths shorter than the offsets: rows between the bags belong to none."""
    values = torch.randn(10, 3)
    nested = torch.nested.nested_tensor_from_jagged(
        values, offsets=torch.tensor([0, 4, 7, 10]), lengths=torch.tensor([2, 0, 3])
    )
    ragged = Ragged.from_jagged(nested)
    assert fields(ragged) == ([0, 4, 7], [2, 0, 3], 5, 3)
    rows = nested.values()
    for bag, start, length in zip(nested.unbind(), ragged.starts, ragged.lengths):
        assert torch.equal(rows[start : start + length], bag)


@pytest.mark.parametrize("value", [torch.zeros(3, 2), [torch.zeros(3, 2)]])
def test_from_jagged_refuses_what_is_not_jagged(value) -> None:
    with pytest.raises(ValueError, match=r"nested must be a nested tensor with layout torch\.jagg"):
        Ragged.from_jagged(value)


@quick
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_select(lengths: list[int], data) -> None:
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    ragged = Ragged.from_lengths(lengths)
    chosen = ragged.select(indices)
    starts = ragged.starts.tolist()
    counts = [lengths[i] for i in indices]
    expected = ([starts[i] for i in indices], counts, sum(counts), max(counts, default=0))
    assert fields(chosen) == expected
    assert fields(ragged.select(torch.tensor(indices, dtype=torch.int32))) == expected


def test_select_refuses_what_is_no_index() -> None:
    ragged = Ragged.from_lengths([2, 3])
    with pytest.raises(ValueError, match=r"indices is .*float32"):
        ragged.select([0.5])
    with pytest.raises(ValueError, match=r"indices is .*bool"):
        ragged.select(torch.tensor([True, False]))
    with pytest.raises(IndexError):
        ragged.select([2])


def test_packed_closes_the_gaps() -> None:
    ragged = Ragged.from_ranges([7, 0, 7], [2, 5, 2])
    assert fields(ragged.packed()) == ([0, 2, 7], [2, 5, 2], 9, 5)


def test_to_another_device_keeps_the_host_integers() -> None:
    moved = Ragged.from_lengths([2, 3]).to("meta")
    assert moved.starts.device.type == moved.lengths.device.type == "meta"
    assert (moved.total, moved.max_length) == (5, 3)
    assert fields(Ragged.from_lengths([2, 3], device="cpu"))[2:] == (5, 3)
    for wrong in ("gpu", 1.5):
        with pytest.raises(
            ValueError, match=r"device is .*; it must be a torch\.device or the name"
        ):
            Ragged.from_lengths([2, 3], device=wrong)


def test_check_takes_what_fits() -> None:
    Ragged.from_ranges([7, 0, 9], [2, 9, 0]).check(9)
    Ragged.from_lengths([]).check(0)


@pytest.mark.parametrize(
    ("ragged", "message"),
    [
        (
            Ragged.from_ranges([0, 7], [2, 3]),
            "ragged: bag 1 is rows 7 to 10, but the bag matrix has 9 rows",
        ),
        (
            Ragged(torch.tensor([-1]), torch.tensor([2]), 2, 2),
            "ragged: bag 0 is rows -1 to 1, but the bag matrix has 9 rows",
        ),
        (
            Ragged(torch.tensor([3]), torch.tensor([-2]), -2, 0),
            "ragged: bag 0 is rows 3 to 1, but the bag matrix has 9 rows",
        ),
        (
            Ragged(torch.tensor([3]), torch.tensor([2]), 3, 2),
            "ragged: total and max_length are 3 and 2, but the lengths give 2 and 2",
        ),
        (
            Ragged(torch.tensor([3]), torch.tensor([2]), 2, 1),
            "ragged: total and max_length are 2 and 1, but the lengths give 2 and 2",
        ),
    ],
)
def test_check_names_what_does_not_fit(ragged: Ragged, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ragged.check(9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ragged.from_lengths([2, -1]), "lengths holds -1; a bag has at least 0 rows"),
        (lambda: Ragged.from_lengths([1.5]), "lengths is torch.float32 of shape (1,)"),
        (lambda: Ragged.from_lengths([True]), "lengths is torch.bool of shape (1,)"),
        (lambda: Ragged.from_lengths([[1, 2]]), "it must be a vector of integers"),
        (lambda: Ragged.from_lengths([-1, 2]), "lengths holds -1; a bag has at least 0 rows"),
        (lambda: Ragged.from_lengths([2**62] * 3), "3 such bags pass 2^63 rows"),
        (lambda: Ragged.from_lengths(None), "lengths is None; it must be a vector of integers"),
        (lambda: Ragged.from_lengths([1, 2j]), "it must be a vector of integers"),
        (lambda: Ragged.from_lengths(["1", "2"]), "lengths is ['1', '2']; it must be a vector"),
        (lambda: Ragged.from_lengths(3), "lengths is torch.int64 of shape ()"),
        (lambda: Ragged.from_offsets([]), "offsets is empty; it must hold B + 1 cumulative"),
        (lambda: Ragged.from_offsets([0.0, 1.0]), "offsets is torch.float32"),
        (lambda: Ragged.from_ranges([0], [1, 2]), "starts has 1 bags and lengths 2"),
        (lambda: Ragged.from_ranges([-3], [1]), "starts holds -3; a first row must be at least 0"),
        (
            lambda: Ragged.from_ranges(torch.tensor([0]), torch.tensor([1], device="meta")),
            "starts is on cpu and lengths on meta; they must be on one device",
        ),
    ],
)
def test_constructors_name_the_argument(make, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("offsets", [[0, 3, 2], [-1, 3]])
def test_offsets_that_decrease(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^offsets .* must"):
        Ragged.from_offsets(offsets)


@quick
@given(b=st.integers(0, 4), n=st.integers(0, 5))
def test_a_dense_bag_is_packed_row_by_row(b: int, n: int) -> None:
    bag = torch.arange(float(b * n * 2)).view(b, n, 2)
    packed, ragged = as_packed(bag, None, b)
    assert fields(ragged) == fields(Ragged.from_lengths([n] * b))
    for dense, start, length in zip(bag, ragged.starts, ragged.lengths):
        assert torch.equal(packed[start : start + length], dense)


def test_a_matrix_is_one_bag() -> None:
    bag = torch.zeros(4, 2)
    packed, ragged = as_packed(bag, None)
    assert packed is bag
    assert fields(ragged) == ([0], [4], 4, 4)


@quick
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_every_packed_patch_knows_its_bag_place_and_row(lengths: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 5, (len(lengths),), generator=draw)
    ragged = Ragged.from_ranges(starts, lengths)
    expected = [
        (b, i, int(starts[b]) + i, 2 * b) for b, length in enumerate(lengths) for i in range(length)
    ]
    values = 2 * torch.arange(len(lengths))
    found = (ragged.bags(), ragged.places(), ragged.rows(), ragged.per_patch(values))
    assert all(tensor.dtype == torch.int64 and tensor.shape == (ragged.total,) for tensor in found)
    assert list(zip(*(tensor.tolist() for tensor in found), strict=True)) == expected
    matrices = ragged.per_patch(values[:, None, None].expand(-1, 2, 3))
    assert matrices.shape == (ragged.total, 2, 3)


def test_what_each_patch_is_given_has_gradients() -> None:
    values = torch.zeros(3, 2, requires_grad=True)
    Ragged.from_lengths([2, 0, 3]).per_patch(values).sum().backward()
    assert values.grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize("may_wait", [False, True])
def test_in_batch_order_copies_only_what_lies_otherwise(may_wait: bool) -> None:
    matrix = torch.arange(10.0).view(5, 2)
    for ragged in (Ragged.from_lengths([5]), Ragged.from_lengths([2, 0, 3])):
        found, same = in_batch_order(matrix, ragged, may_wait=may_wait)
        assert found is matrix
        assert same is ragged
    ragged = Ragged.from_ranges([3, 0], [2, 3])
    found, packed = in_batch_order(matrix, ragged, may_wait=may_wait)
    assert found[:, 0].tolist() == [6, 8, 0, 2, 4]
    assert fields(packed) == ([0, 2], [2, 3], 5, 3)
    with pytest.raises(ValueError, match="bag 1 is rows 4 to 6"):
        in_batch_order(matrix, Ragged.from_ranges([0, 4], [1, 2]), may_wait=may_wait)
