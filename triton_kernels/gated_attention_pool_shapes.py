"""Launch shapes of the gated kernels. Nothing here depends on the number of rows, except the plan
of slots, which are runtime values. Reasons: docs/kernels.md."""

from __future__ import annotations

from typing import NamedTuple

from .pool_bag_shapes import Limits, Problem, Slots, next_power

SLOT_ROWS = 256  # of the backward: a multiple of every block of rows


def hidden_shape(problem: Problem, limits: Limits, n_hidden: int) -> dict[str, int]:
    """Blocks of the kernels that compute the hidden layer; problem.n_rows counts the pools."""
    block_p = max(16, next_power(problem.n_rows))
    half, roomy = problem.half, limits.shared_bytes > 100_000
    few = block_p <= 32
    # scores of many pools, and addresses of rows that are not aligned, take registers
    block_t = 128 if half and block_p == 16 and problem.aligned else 64 if half or few else 32
    block_l = min(max(16, next_power(n_hidden)), 64 if half and few else 32)
    return {
        "BLOCK_P": block_p,
        "BLOCK_T": block_t if block_p <= 64 else 32,
        "BLOCK_L": block_l,
        "BLOCK_K": (64 if problem.aligned else 32) if half else 16,
        "num_warps": 8,
        "num_stages": (3 if roomy else 2) if half else 2,
    }


def weights_shape(problem: Problem, limits: Limits, n_hidden: int) -> dict[str, int]:
    """Blocks of gated_weights_kernel."""
    half = problem.half
    return {
        "BLOCK_N": (64 if problem.aligned else 32) if half else 16,
        "BLOCK_L": min(128 if half else 64, max(16, next_power(2 * n_hidden))),
        "BLOCK_D": min(128, max(16, next_power(problem.width))),
        "num_warps": 8,
        "num_stages": (3 if limits.shared_bytes > 100_000 else 2) if half else 1,
    }


def bag_shape(problem: Problem, n_hidden: int) -> dict[str, int]:
    """Blocks of gated_bag_kernel."""
    half = problem.half
    return {
        "BLOCK_P": max(16, next_power(problem.n_rows)),
        "BLOCK_N": 64 if half else 32,
        "BLOCK_L": min(64 if half else 16, max(16, next_power(n_hidden))),
        "BLOCK_D": min(128, max(16, next_power(problem.width))),
        "num_warps": 8,
        "num_stages": 2,
    }


class Plan(NamedTuple):
    """How the backward is cut: slots, and the splits of the product with the bag."""

    slots: Slots
    splits: int


def plan_backward(
    problem: Problem,
    limits: Limits,
    *,
    n_slots: int,
    n_hidden: int,
    block_t: int,
    batch_bytes: int,
) -> Plan:
    """As much of the hidden layer at a time as the workspace holds."""
    budget = max(16 * 2**20, batch_bytes // 100)
    padded = -(-n_hidden // 16) * 16
    shape = weights_shape(problem, limits, n_hidden)
    blocks = -(-2 * padded // shape["BLOCK_L"]) * -(-problem.width // shape["BLOCK_D"])
    split_bytes = 2 * padded * problem.width * 4
    # every processor a program, in half of the workspace
    splits = max(1, min(-(-limits.n_processors // blocks), budget // 2 // split_bytes, n_slots))
    row_bytes = 2 * padded * problem.dtype.itemsize + 4 + 4 * problem.n_rows
    tile_bytes = 4 * (2 * padded + problem.n_rows * n_hidden)
    slot_bytes = SLOT_ROWS * row_bytes + SLOT_ROWS // block_t * tile_bytes
    chunk = max(1, min(n_slots, (budget - splits * split_bytes) // slot_bytes))
    return Plan(Slots(SLOT_ROWS, n_slots, chunk), splits)
