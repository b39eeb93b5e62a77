"""The MLP of every pair, in registers: evaluated, and differentiated in all it depends on.

Math: docs/math.md, "Attention biased by position".  The vector of parameters holds, layer by layer,
the weight [out, in] and the bias [out]; hidden layers are WIDTH wide.  Pairs of a tile
are one long column here, [pairs, WIDTH], and every layer a product on tensor cores: the first of
[pairs, 16], which holds both signed logs and a 1 for its bias, the last with [WIDTH, 16], a column
for each head. Hidden layers are kept in the type of the operands, and the first is formed again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signed_log(offset):
    """sign(d) log(1 + |d|); a NaN stays one."""
    size = tl.abs(offset)
    # below 1 the series of atanh, since the logarithm of the device is no good near 1
    s = size / (2.0 + size)
    t = s * s
    near = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t / 13)))))
    length = tl.where(size < 1.0, 2.0 * s * near, tl.log(1.0 + size))
    return tl.where(offset < 0, -length, length)


@triton.jit
def _relu(x):
    # a NaN stays one
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def columns_of_pairs(x, y, dtype: tl.constexpr):
    """[pairs, 16]: signed logs, 1, zeros."""
    cols = tl.arange(0, 16)[None, :]
    rest = tl.where(cols == 2, 1.0, 0.0)
    return tl.where(cols == 0, x[:, None], tl.where(cols == 1, y[:, None], rest)).to(dtype)


@triton.jit
def _weight_of_first(parameters_ptr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """[16, WIDTH]: by x, by y, bias, zeros."""
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, WIDTH)[None, :]
    at = tl.where(rows == 2, 2 * WIDTH + cols, 2 * cols + rows)
    return tl.load(parameters_ptr + at, mask=(rows < 3) & (cols >= 0), other=0.0).to(dtype)


@triton.jit
def first_layer(
    columns,  # [pairs, 16]
    parameters_ptr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pairs, WIDTH] behind its ReLU."""
    weight = _weight_of_first(parameters_ptr, WIDTH, columns.dtype)
    return _relu(tl.dot(columns, weight, input_precision=PRECISION)).to(columns.dtype)


@triton.jit
def _next_layer(given, weight_ptr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """relu(weight given + bias) [pairs, WIDTH]."""
    offs = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + offs[None, :] * WIDTH + offs[:, None]).to(given.dtype)
    shift = tl.load(weight_ptr + WIDTH * WIDTH + offs)
    product = tl.dot(given, weight, input_precision=PRECISION)
    return _relu(product + shift[None, :]).to(given.dtype)


@triton.jit
def evaluate_hidden(
    columns,  # [pairs, 16]
    parameters_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second hidden layer, of three, and the last."""
    last = first_layer(columns, parameters_ptr, WIDTH, PRECISION)
    if DEPTH > 1:
        last = _next_layer(last, parameters_ptr + 3 * WIDTH, WIDTH, PRECISION)
    second = last
    if DEPTH > 2:
        LAYER: tl.constexpr = WIDTH * WIDTH + WIDTH
        last = _next_layer(second, parameters_ptr + 3 * WIDTH + LAYER, WIDTH, PRECISION)
    return second, last


@triton.jit
def _weight_of_last(
    parameters_ptr, head0, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """[16, WIDTH]: a row for each head of a block, zeros."""
    LAST: tl.constexpr = 3 * WIDTH + (DEPTH - 1) * (WIDTH * WIDTH + WIDTH)
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, WIDTH)[None, :]
    mask = (rows < BLOCK_H) & (head0 + rows < PER_GROUP) & (cols >= 0)
    at = LAST + (head0 + rows) * WIDTH + cols
    return tl.load(parameters_ptr + at, mask=mask, other=0.0).to(dtype)


@triton.jit
def evaluate_last(
    last,  # [pairs, WIDTH]
    parameters_ptr,
    head0,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_H, pairs] the bias of a block of heads from the last hidden layer."""
    SHIFT: tl.constexpr = 3 * WIDTH + (DEPTH - 1) * (WIDTH * WIDTH + WIDTH) + PER_GROUP * WIDTH
    weight = _weight_of_last(parameters_ptr, head0, WIDTH, DEPTH, PER_GROUP, BLOCK_H, last.dtype)
    columns = tl.dot(last, tl.trans(weight), input_precision=PRECISION)
    cols, heads = tl.arange(0, 16), tl.arange(0, BLOCK_H)
    bias = tl.zeros((BLOCK_H, last.shape[0]), tl.float32)
    for o in tl.static_range(BLOCK_H):
        shift = tl.load(parameters_ptr + SHIFT + head0 + o, mask=head0 + o < PER_GROUP, other=0.0)
        one = tl.sum(tl.where((cols == o)[None, :], columns, 0.0), 1) + shift
        bias = one[None, :] if BLOCK_H == 1 else tl.where((heads == o)[:, None], one[None, :], bias)
    return bias


@triton.jit
def columns_of_heads(d_bias, dtype: tl.constexpr):
    """[pairs, 16] from [BLOCK_H, pairs]: a column for each head, zeros."""
    cols, heads = tl.arange(0, 16), tl.arange(0, d_bias.shape[0])
    columns = tl.zeros((d_bias.shape[1], 16), tl.float32)
    for o in tl.static_range(d_bias.shape[0]):
        one = tl.sum(tl.where((heads == o)[:, None], d_bias, 0.0), 0)
        columns = tl.where((cols == o)[None, :], one[:, None], columns)
    return columns.to(dtype)


@triton.jit
def slope_of_last(
    d_columns,  # [pairs, 16] of the heads
    last,
    parameters_ptr,
    head0,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pairs, WIDTH] the gradient of the last hidden layer in front of its ReLU."""
    weight = _weight_of_last(parameters_ptr, head0, WIDTH, DEPTH, PER_GROUP, BLOCK_H, last.dtype)
    product = tl.dot(d_columns, weight, input_precision=PRECISION)
    return tl.where(last > 0, product, 0.0).to(last.dtype)


@triton.jit
def slope_before(
    d,  # [pairs, WIDTH] gradient of a layer in front of its ReLU
    given,  # [pairs, WIDTH] what it was given
    weight_ptr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pairs, WIDTH] that of the layer before."""
    offs = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + offs[:, None] * WIDTH + offs[None, :]).to(d.dtype)
    product = tl.dot(d, weight, input_precision=PRECISION)
    return tl.where(given > 0, product, 0.0).to(d.dtype)


@triton.jit
def slope_of_offset(d_first, parameters_ptr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """[pairs] the gradients of both signed logs."""
    weight = _weight_of_first(parameters_ptr, WIDTH, d_first.dtype)
    columns = tl.dot(d_first, tl.trans(weight), input_precision=PRECISION)
    cols = tl.arange(0, 16)[None, :]
    d_x = tl.sum(tl.where(cols == 0, columns, 0.0), 1)
    return d_x, tl.sum(tl.where(cols == 1, columns, 0.0), 1)


@triton.jit
def add_over_pairs(sums, left, right, unit, PRECISION: tl.constexpr):
    """sums [M, N] + left [pairs, M]^T right [pairs, N], times unit, the scale of one side."""
    left = tl.trans(left)
    if right.dtype == tl.float16:
        sums += tl.dot(left, right, input_precision=PRECISION) * unit
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def scale_of(d_bias, dtype: tl.constexpr):
    """A power of two that brings a tile to 1, since fp16 has few exponents; 1 for other types."""
    unit = 1.0
    if dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(d_bias), 1), 0)
        unit = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
    return unit


@triton.jit
def slope_of_pairs(
    d_bias,  # [BLOCK_H, pairs]
    x,  # [pairs] signed logs
    y,
    parameters_ptr,
    head0,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pairs] the gradients of both signed logs, with the MLP evaluated again."""
    columns = columns_of_pairs(x, y, dtype)
    second, last = evaluate_hidden(columns, parameters_ptr, WIDTH, DEPTH, PRECISION)
    size = scale_of(d_bias, dtype)
    d = slope_of_last(
        columns_of_heads(d_bias / size, dtype), last, parameters_ptr, head0,
        WIDTH, DEPTH, PER_GROUP, BLOCK_H, PRECISION,
    )  # fmt: skip
    if DEPTH > 2:
        weight = parameters_ptr + 4 * WIDTH + WIDTH * WIDTH
        d = slope_before(d, second, weight, WIDTH, PRECISION)
    if DEPTH > 1:
        first = first_layer(columns, parameters_ptr, WIDTH, PRECISION)
        d = slope_before(d, first, parameters_ptr + 3 * WIDTH, WIDTH, PRECISION)
    d_x, d_y = slope_of_offset(d, parameters_ptr, WIDTH, PRECISION)
    return d_x * size, d_y * size
