"""`merge_over_group`: ranks that each hold a shard of the keys get what one rank would get."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

from survfuse import ops
from tests.ops import group_worker
from tests.ops.group_worker import CASES, SHARDS, make
from tests.processes import START_METHOD

RANKS = [n for n in SHARDS if n > 1]
on_groups = pytest.mark.parametrize("n_ranks", RANKS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of three processes found, by the size of the group it was found in."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        group_worker.run, (str(folder),), nprocs=3, start_method=START_METHOD
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("case", CASES)
@on_groups
def test_ranks_together_equal_one_rank(ranks, n_ranks: int, case: str) -> None:
    whole = group_worker.differentiate(case, 0, 1, lambda out, lse: (out, lse))
    shared, rows, _ = make(case)
    for rank, found in enumerate(of_group(ranks, n_ranks)):
        found = found[case]
        for name in ("out", "lse", "d_behind", *(f"d_{name}" for name in shared)):
            torch.testing.assert_close(found[name], whole[name], msg=f"{name} on rank {rank}")
        for name in rows:
            torch.testing.assert_close(found[f"d_{name}"], whole[f"d_{name}"][found["index"]])
    held = torch.cat([found[case]["index"] for found in of_group(ranks, n_ranks)])
    assert torch.equal(held.sort().values, torch.arange(len(rows["bias"])))


@on_groups
def test_every_rank_gets_the_same_bits(ranks, n_ranks: int) -> None:
    first, *others = of_group(ranks, n_ranks)
    for found in others:
        for case in CASES:
            for name in ("out", "lse", "d_behind"):
                assert torch.equal(found[case][name], first[case][name])


@on_groups
def test_results_have_the_types_of_their_parts(ranks, n_ranks: int) -> None:
    for found in of_group(ranks, n_ranks):
        out, lse = found["narrow"]
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(out, torch.full_like(out, (n_ranks - 1) / 2))
        torch.testing.assert_close(lse, torch.full_like(lse, float(n_ranks)).log())


@on_groups
def test_ranks_that_disagree_all_raise(ranks, n_ranks: int) -> None:
    for found in of_group(ranks, n_ranks):
        wrong = "ValueError: out has shape (3, 1, 3) and elements of 4 bytes on rank 1, "
        assert found["shapes"] == f"{wrong}(2, 1, 3) and 4 on rank 0; they must agree"
        assert "elements of 8 bytes on rank 1" in found["types"]


def test_what_is_no_group_of_this_process(ranks) -> None:
    assert ranks[2]["outside"].startswith("ValueError: group does not hold this process")
    for found in ranks:
        assert found[3]["not a group"].startswith(
            "TypeError: group is str; it must be a torch.dist"
        )


def of_group(ranks: list[dict], n_ranks: int) -> list[dict]:
    return [found[n_ranks] for found in ranks[:n_ranks]]


def test_no_group_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised; call"):
        ops.merge_over_group(torch.zeros(2, 1, 3), torch.zeros(2, 1), group=None)


def test_parts_are_checked_before_the_group() -> None:
    with pytest.raises(TypeError, match=r"lse is torch\.float16; a logsumexp must be fp32 or fp64"):
        ops.merge_over_group(torch.zeros(2, 1, 3), torch.zeros(2, 1).half(), group=None)
    with pytest.raises(ValueError, match=r"lse has shape \(2,\); it must be \[2, 1\]"):
        ops.merge_over_group(torch.zeros(2, 1, 3), torch.zeros(2), group=None)
