"""The MLP of every pair, in registers: evaluated, and differentiated in all it depends on.

Math: docs/math.md, "Attention biased by position".  The vector of parameters holds, layer by layer,
the weight [out, in] and the bias [out]; hidden layers are WIDTH wide.  Pairs are columns here, so
that warps share the rows of a weight, and every layer is a product on tensor cores: the first of
[16, pairs], which holds both signed logs and a 1 for its bias, the last of 16 rows, one for each head.
Hidden layers are kept in the type of the operands, and the first is formed again.
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
def rows_of_pairs(x, y, dtype: tl.constexpr):
    """[16, pairs]: signed logs, 1, zeros."""
    rows = tl.arange(0, 16)[:, None]
    rest = tl.where(rows == 2, 1.0, 0.0)
    return tl.where(rows == 0, x[None, :], tl.where(rows == 1, y[None, :], rest)).to(dtype)


@triton.jit
def _weight_of_first(parameters_ptr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """[WIDTH, 16]: by x, by y, bias, zeros."""
    rows, cols = tl.arange(0, WIDTH)[:, None], tl.arange(0, 16)[None, :]
    at = tl.where(cols == 2, 2 * WIDTH + rows, 2 * rows + cols)
    return tl.load(parameters_ptr + at, mask=(cols < 3) & (rows >= 0), other=0.0).to(dtype)


@triton.jit
def first_layer(
    inputs,  # [16, pairs]
    parameters_ptr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[WIDTH, pairs] behind its ReLU."""
    weight = _weight_of_first(parameters_ptr, WIDTH, inputs.dtype)
    return _relu(tl.dot(weight, inputs, input_precision=PRECISION)).to(inputs.dtype)


@triton.jit
def _next_layer(given, weight_ptr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """relu(weight given + bias) [WIDTH, pairs]."""
    offs = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + offs[:, None] * WIDTH + offs[None, :]).to(given.dtype)
    shift = tl.load(weight_ptr + WIDTH * WIDTH + offs)
    product = tl.dot(weight, given, input_precision=PRECISION)
    return _relu(product + shift[:, None]).to(given.dtype)


@triton.jit
def evaluate_hidden(
    inputs,  # [16, pairs]
    parameters_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second hidden layer, of three, and the last."""
    last = first_layer(inputs, parameters_ptr, WIDTH, PRECISION)
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
    last,  # [WIDTH, pairs]
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
    full = tl.dot(weight, last, input_precision=PRECISION)
    rows, heads = tl.arange(0, 16), tl.arange(0, BLOCK_H)
    bias = tl.zeros((BLOCK_H, last.shape[1]), tl.float32)
    for o in tl.static_range(BLOCK_H):
        shift = tl.load(parameters_ptr + SHIFT + head0 + o, mask=head0 + o < PER_GROUP, other=0.0)
        one = tl.sum(tl.where((rows == o)[:, None], full, 0.0), 0) + shift
        bias = tl.where((heads == o)[:, None], one[None, :], bias)
    return bias


@triton.jit
def rows_of_heads(d_bias, dtype: tl.constexpr):
    """[16, pairs] from [BLOCK_H, pairs]: zeros behind the heads."""
    rows, heads = tl.arange(0, 16), tl.arange(0, d_bias.shape[0])
    padded = tl.zeros((16, d_bias.shape[1]), tl.float32)
    for o in tl.static_range(d_bias.shape[0]):
        one = tl.sum(tl.where((heads == o)[:, None], d_bias, 0.0), 0)
        padded = tl.where((rows == o)[:, None], one[None, :], padded)
    return padded.to(dtype)


@triton.jit
def slope_of_last(
    d_rows,  # [16, pairs] of the heads
    last,
    parameters_ptr,
    head0,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[WIDTH, pairs] the gradient of the last hidden layer in front of its ReLU."""
    weight = _weight_of_last(parameters_ptr, head0, WIDTH, DEPTH, PER_GROUP, BLOCK_H, last.dtype)
    product = tl.dot(tl.trans(weight), d_rows, input_precision=PRECISION)
    return tl.where(last > 0, product, 0.0).to(last.dtype)


@triton.jit
def slope_before(
    d,  # [WIDTH, pairs] gradient of a layer in front of its ReLU
    given,  # [WIDTH, pairs] what it was given
    weight_ptr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[WIDTH, pairs] that of the layer before."""
    offs = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + offs[None, :] * WIDTH + offs[:, None]).to(d.dtype)
    product = tl.dot(weight, d, input_precision=PRECISION)
    return tl.where(given > 0, product, 0.0).to(d.dtype)


@triton.jit
def slope_of_offset(d_first, parameters_ptr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """[pairs] the gradients of both signed logs."""
    weight = _weight_of_first(parameters_ptr, WIDTH, d_first.dtype)
    full = tl.dot(tl.trans(weight), d_first, input_precision=PRECISION)
    rows = tl.arange(0, 16)[:, None]
    d_x = tl.sum(tl.where(rows == 0, full, 0.0), 0)
    return d_x, tl.sum(tl.where(rows == 1, full, 0.0), 0)


@triton.jit
def add_over_pairs(sums, left, right, unit, PRECISION: tl.constexpr):
    """sums [M, N] + left [M, pairs] right [N, pairs]^T, times unit, the scale of one side."""
    right = tl.trans(right)
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
    inputs = rows_of_pairs(x, y, dtype)
    second, last = evaluate_hidden(inputs, parameters_ptr, WIDTH, DEPTH, PRECISION)
    size = scale_of(d_bias, dtype)
    d = slope_of_last(
        rows_of_heads(d_bias / size, dtype), last, parameters_ptr, head0,
        WIDTH, DEPTH, PER_GROUP, BLOCK_H, PRECISION,
    )  # fmt: skip
    if DEPTH > 2:
        weight = parameters_ptr + 4 * WIDTH + WIDTH * WIDTH
        d = slope_before(d, second, weight, WIDTH, PRECISION)
    if DEPTH > 1:
        first = first_layer(inputs, parameters_ptr, WIDTH, PRECISION)
        d = slope_before(d, first, parameters_ptr + 3 * WIDTH, WIDTH, PRECISION)
    d_x, d_y = slope_of_offset(d, parameters_ptr, WIDTH, PRECISION)
    return d_x * size, d_y * size
