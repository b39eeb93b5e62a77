"""Bags: views where a view is possible, copies of the needed rows where not."""

from __future__ import annotations

import pytest
import torch

from survfuse.data.bags import Bags, empty_rows, padded_width
from survfuse.reference.pool_bag import pool_bag


@pytest.fixture
def bags() -> Bags:
    """Four bags of 3, 0, 1 and 4 rows of 5 features; row i holds i in every column."""
    matrices = [torch.full((n, 5), 0.0) for n in (3, 0, 1, 4)]
    bags = Bags.from_list(
        matrices,
        ["a", "b", "c", "d"],
        coords=[torch.zeros(3, 2), None, torch.ones(1, 2), None],
        attributes={"patch_size_level0": [256.0, None, 512.0, 512.0]},
    )
    bags.features.copy_(torch.arange(8.0)[:, None].expand(8, 5))
    return bags


def rows_of(batch, sample: int) -> list[float]:
    start, length = int(batch.ragged.starts[sample]), int(batch.ragged.lengths[sample])
    return batch.features[start : start + length, 0].tolist()


def test_rows_are_padded_to_a_multiple_of_eight(bags):
    assert bags.features.stride() == (8, 1)
    assert bags.width == 5
    assert [padded_width(n) for n in (1, 8, 1029)] == [8, 8, 1032]


def test_from_list_keeps_values_names_and_coords(bags):
    assert [bags[i][:, 0].tolist() for i in range(4)] == [[0, 1, 2], [], [3], [4, 5, 6, 7]]
    assert bags.lengths.tolist() == [3, 0, 1, 4]
    assert bags.coords_of(2).tolist() == [[1.0, 1.0]]
    assert bool(bags.coords_of(3).isnan().all())


def test_batch_of_single_bags_copies_nothing(bags):
    batch = bags.batch([[3], [], [0], [3]])
    assert batch.features.data_ptr() == bags.features.data_ptr()
    assert batch.coords.data_ptr() == bags.coords.data_ptr()
    assert [rows_of(batch, i) for i in range(4)] == [[4, 5, 6, 7], [], [0, 1, 2], [4, 5, 6, 7]]
    assert batch.present.tolist() == [True, False, True, True]
    assert (batch.ragged.total, batch.ragged.max_length) == (11, 4)


def test_adjacent_bags_of_a_group_are_one_range(bags):
    # the empty bag between them is no gap
    batch = bags.batch([[0, 1, 2], [2, 3]])
    assert batch.features.data_ptr() == bags.features.data_ptr()
    assert [rows_of(batch, i) for i in range(2)] == [[0, 1, 2, 3], [3, 4, 5, 6, 7]]


def test_other_groups_gather_only_their_rows(bags):
    batch = bags.batch([[3, 0], [2], []])
    assert batch.features.data_ptr() != bags.features.data_ptr()
    assert batch.features.shape == (8, 5)
    assert batch.features.stride() == (8, 1)
    assert [rows_of(batch, i) for i in range(3)] == [[4, 5, 6, 7, 0, 1, 2], [3], []]
    assert batch.coords[7].tolist() == [1.0, 1.0]
    batch.ragged.check(8)
    smaller = bags.batch([[2, 0]])
    assert smaller.features.shape[0] == 4


def test_another_device_gets_only_the_rows_of_the_batch(bags):
    batch = bags.batch([[2], [], [0]], device="meta")
    assert batch.features.device.type == "meta"
    assert batch.features.shape == (4, 5)
    assert batch.coords.shape == (4, 2)
    assert batch.present.device.type == "meta"
    assert (batch.ragged.total, batch.ragged.max_length) == (4, 3)


def test_a_sample_without_a_patch_is_absent(bags):
    assert bags.batch([[1], [1, 2]]).present.tolist() == [False, True]


def test_select_is_a_view_and_may_repeat(bags):
    chosen = bags.select([3, 0, 3])
    assert chosen.features.data_ptr() == bags.features.data_ptr()
    assert chosen.names == ["d", "a", "d"]
    assert chosen[2][:, 0].tolist() == [4, 5, 6, 7]
    assert chosen.attributes["patch_size_level0"] == [512.0, 256.0, 512.0]
    assert chosen.index_of("d") == 0
    assert bags.select(torch.tensor([2]))[0][0, 0] == 3
    assert len(bags.select([])) == 0


def test_to_keeps_the_padding(bags):
    moved = bags.to("meta")
    assert moved.features.stride() == (8, 1)
    assert moved.coords.device.type == "meta"
    assert bags.to("cpu") is bags


def test_ops_take_a_batch(bags):
    batch = bags.batch([[3], []])
    pooled = pool_bag(torch.zeros(2, 1, 5), batch.features, ragged=batch.ragged).pooled
    torch.testing.assert_close(pooled[:, 0, 0], torch.tensor([5.5, 0.0]))


def test_offsets_beyond_int32():
    """T * D is beyond 2^31 elements; nothing of that size is allocated."""
    rows = 3_000_000
    wide = torch.ones(1, 1024, dtype=torch.bfloat16).expand(rows, 1024)
    assert wide.numel() > 2**31
    bags = Bags(wide, [rows - 1, 1], ["long", "last"])
    batch = bags.batch([[1], [0, 1]])
    assert batch.features.data_ptr() == wide.data_ptr()
    assert batch.ragged.starts.tolist() == [rows - 1, 0]
    assert batch.ragged.total == rows + 1
    assert bags[1].shape == (1, 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.zeros(4, 3, dtype=torch.int64)}, "floating matrix"),
        ({"features": torch.zeros(4)}, "floating matrix"),
        ({"features": torch.zeros(3, 4).T}, "last stride must be 1"),
        ({"lengths": [2, 3]}, "bag 1 is rows 2 to 5, but the bag matrix has 4 rows"),
        ({"lengths": [4]}, "1 lengths and 2 names"),
        ({"lengths": [5, -1]}, "lengths holds -1"),
        ({"names": ["a", "a"]}, "names holds 'a' twice"),
        ({"coords": torch.zeros(3, 2)}, r"coords has shape \(3, 2\); it must be \[4, 2\]"),
        ({"coords": torch.zeros(4, 2, device="meta")}, "coords is on meta and features on cpu"),
        ({"attributes": {"encoder": ["uni"]}}, "must have one per bag, 2"),
        ({"starts": [0]}, "starts has 1 bags and lengths 2"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"features": torch.zeros(4, 3), "lengths": [2, 2], "names": ["a", "b"]}
    with pytest.raises(ValueError, match=message):
        Bags(**{**good, **arguments})


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ([], "matrices is empty"),
        ([torch.zeros(1, 3)], "1 matrices and 2 names"),
        ([torch.zeros(1, 3), torch.zeros(1, 4)], "'b' has 4 features per patch and bag 'a' has 3"),
        ([torch.zeros(1, 3), torch.zeros(1, 3).half()], "'b' is torch.float16"),
        ([torch.zeros(1, 3), torch.zeros(3)], r"'b' has shape \(3,\)"),
    ],
)
def test_from_list_names_the_bag_at_fault(matrices, message):
    with pytest.raises(ValueError, match=message):
        Bags.from_list(matrices, ["a", "b"])


def test_unknown_names_and_indices(bags):
    with pytest.raises(KeyError, match="unknown bag 'e'"):
        bags.index_of("e")
    with pytest.raises(IndexError, match="bag index 4 is out of range; there are 4 bags"):
        bags.batch([[4]])
    with pytest.raises(TypeError, match=r"groups\[0\] is 0; it must be a list of bag numbers"):
        bags.batch([0, 1, 2])
    with pytest.raises(IndexError, match="bag index -1"):
        bags.select([-1])
    with pytest.raises(ValueError, match=r"coords of bag 'a' have shape \(2, 2\)"):
        Bags.from_list([torch.zeros(3, 4)], ["a"], coords=[torch.zeros(2, 2)])


def test_empty_rows_has_the_asked_shape():
    matrix = empty_rows(3, 9, dtype=torch.bfloat16)
    assert (matrix.shape, matrix.stride()) == ((3, 9), (16, 1))
