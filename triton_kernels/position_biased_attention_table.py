"""The bias of every pair of a tile out of a table, and its gradients.

Math: docs/math.md, "The bias as a table".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cell_of(u, reach, table_size):
    """The lower node along an axis, how far behind it u lies, and whether the table covers u."""
    per_cell = (table_size - 1).to(tl.float32) / (2.0 * reach)
    at = (tl.where(u < -reach, -reach, tl.where(u > reach, reach, u)) + reach) * per_cell
    # a NaN stays in the fraction; as an index it must be one
    known = tl.where(at >= 0, at, 0.0)
    low = tl.minimum(tl.floor(known), (table_size - 2).to(tl.float32))
    return low.to(tl.int32), at - low, tl.abs(u) <= reach


@triton.jit
def interpolate(
    table_ptr,  # [n, n] in
    x,  # [M, N] signed logs
    y,
    reach_ptr,  # [2] in
    table_size,
    mask,  # [M, N]
):
    """[M, N]."""
    cell_x, far_x, _ = cell_of(x, tl.load(reach_ptr), table_size)
    cell_y, far_y, _ = cell_of(y, tl.load(reach_ptr + 1), table_size)
    at = table_ptr + cell_x * table_size + cell_y
    low = tl.load(at, mask=mask, other=0.0) * (1.0 - far_y)
    low += tl.load(at + 1, mask=mask, other=0.0) * far_y
    at += table_size
    high = tl.load(at, mask=mask, other=0.0) * (1.0 - far_y)
    high += tl.load(at + 1, mask=mask, other=0.0) * far_y
    return low * (1.0 - far_x) + high * far_x


@triton.jit
def slope_in_table(
    d_bias,  # [M, N]
    table_ptr,  # [n, n] in
    x,  # [M, N]
    y,
    reach_ptr,  # [2] in
    table_size,
    mask,
):
    """[M, N] the gradients of both signed logs."""
    reach_x, reach_y = tl.load(reach_ptr), tl.load(reach_ptr + 1)
    cell_x, far_x, covers_x = cell_of(x, reach_x, table_size)
    cell_y, far_y, covers_y = cell_of(y, reach_y, table_size)
    at = table_ptr + cell_x * table_size + cell_y
    node_00 = tl.load(at, mask=mask, other=0.0)
    node_01 = tl.load(at + 1, mask=mask, other=0.0)
    node_10 = tl.load(at + table_size, mask=mask, other=0.0)
    node_11 = tl.load(at + table_size + 1, mask=mask, other=0.0)
    along_x = (node_10 - node_00) * (1.0 - far_y) + (node_11 - node_01) * far_y
    along_y = (node_01 - node_00) * (1.0 - far_x) + (node_11 - node_10) * far_x
    cells = (table_size - 1).to(tl.float32)
    d_x = d_bias * along_x * (cells / (2.0 * reach_x))
    d_y = d_bias * along_y * (cells / (2.0 * reach_y))
    return tl.where(covers_x, d_x, 0.0), tl.where(covers_y, d_y, 0.0)


@triton.jit
def add_to_table(
    d_bias,  # [M, N]
    d_table_ptr,  # [n, n] add   fp32, or int64 in fixed point
    per_unit_ptr,  # [1] in      units of the fixed point in 1
    x,  # [M, N]
    y,
    reach_ptr,  # [2] in
    table_size,
    mask,
):
    """What these pairs give the four nodes around each."""
    cell_x, far_x, _ = cell_of(x, tl.load(reach_ptr), table_size)
    cell_y, far_y, _ = cell_of(y, tl.load(reach_ptr + 1), table_size)
    for c in tl.static_range(4):
        share_x = far_x if c // 2 else 1.0 - far_x
        share_y = far_y if c % 2 else 1.0 - far_y
        add = d_bias * (share_x * share_y)
        to = d_table_ptr + (cell_x + c // 2) * table_size + cell_y + c % 2
        if d_table_ptr.dtype.element_ty == tl.int64:
            units = add.to(tl.float64) * tl.load(per_unit_ptr)
            tl.atomic_add(to, tl.floor(units + 0.5).to(tl.int64), mask, "relaxed")
        else:
            tl.atomic_add(to, add, mask, "relaxed")
