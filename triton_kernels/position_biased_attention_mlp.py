"""The MLP of every pair of a tile, in registers: evaluated, and differentiated.

Math: docs/math.md, "Attention biased by position".  The vector of parameters holds, layer by layer,
the weight [out, in] and the bias [out]; hidden layers are WIDTH wide. A program takes one head, so
one row of the last layer.

Pairs are rows, which warps share out among them: a warp's rows stay its own from layer to layer,
where what one product leaves is the left operand of the next. The first layer is a product of 16
columns (signed logs, a 1 for its bias, zeros); the last, a number per pair, needs none. Of a layer
its values in the type of the operands are kept where a weight's gradient takes them, and a bit for
each unit that ReLU let pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signed_log(offset, dtype: tl.constexpr):
    """sign(d) log(1 + |d|) in fp32, for operands of `dtype`; a NaN stays one."""
    size = tl.abs(offset)
    length = tl.log(1.0 + size)
    if dtype == tl.float32:
        # below 1 the series of atanh, since the logarithm of the device is no good near 1
        s = size / (2.0 + size)
        t = s * s
        near = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t / 13)))))
        length = tl.where(size < 1.0, 2.0 * s * near, length)
    return tl.where(offset < 0, -length, length)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_first(parameters_ptr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """[16, WIDTH], the order of `_columns`."""
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, WIDTH)[None, :]
    at = tl.where(rows == 4, 2 * WIDTH + cols, 2 * cols + rows // 8)
    mask = (rows % 8 == 0) | (rows == 4)
    return tl.load(parameters_ptr + at, mask=mask & (cols >= 0), other=0.0).to(dtype)


@triton.jit
def _hidden_ptr(parameters_ptr, N: tl.constexpr, WIDTH: tl.constexpr):
    """Where the hidden layer behind N others begins."""
    return parameters_ptr + 3 * WIDTH + (N - 1) * (WIDTH * WIDTH + WIDTH)


@triton.jit
def _load_weight(ptr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """[out, in] of a hidden layer."""
    offs = tl.arange(0, WIDTH)
    return tl.load(ptr + offs[:, None] * WIDTH + offs[None, :]).to(dtype)


@triton.jit
def load_layers(parameters_ptr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, dtype: tl.constexpr):
    """What `bias_of_pairs` takes: the first layer [16, WIDTH], the weights [in, out] of the second
    and third; 0 where there are none."""
    first = _load_first(parameters_ptr, WIDTH, dtype)
    second, third = 0, 0
    if DEPTH > 1:
        second = tl.trans(_load_weight(_hidden_ptr(parameters_ptr, 1, WIDTH), WIDTH, dtype))
    if DEPTH > 2:
        third = tl.trans(_load_weight(_hidden_ptr(parameters_ptr, 2, WIDTH), WIDTH, dtype))
    return first, second, third


@triton.jit
def _load_shift(parameters_ptr, N: tl.constexpr, WIDTH: tl.constexpr):
    """[1, WIDTH] the bias of the hidden layer behind N others."""
    ptr = _hidden_ptr(parameters_ptr, N, WIDTH) + WIDTH * WIDTH
    return tl.load(ptr + tl.arange(0, WIDTH))[None, :]


@triton.jit
def _load_last(
    parameters_ptr, head, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PER_GROUP: tl.constexpr
):  # fmt: skip
    """Weight [WIDTH] and bias of a head of the group."""
    ptr = _hidden_ptr(parameters_ptr, DEPTH, WIDTH)
    weight = tl.load(ptr + head * WIDTH + tl.arange(0, WIDTH))
    return weight, tl.load(ptr + PER_GROUP * WIDTH + head)


@triton.jit
def load_slopes(
    parameters_ptr, head, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PER_GROUP: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """What `gradients_of_pairs` takes: weights [out, in] of the second and third layer, 0 where
    there are none, and the unit of the upper. The last layer's weight is in that, over its unit."""
    second, third = 0, 0
    last, _ = _load_last(parameters_ptr, head, WIDTH, DEPTH, PER_GROUP)
    unit = _scale_of(last, dtype)
    last = last / unit
    if DEPTH > 1:
        second = _load_weight(_hidden_ptr(parameters_ptr, 1, WIDTH), WIDTH, tl.float32)
        if DEPTH == 2:
            second = second * last[:, None]
        second = second.to(dtype)
    if DEPTH > 2:
        third = _load_weight(_hidden_ptr(parameters_ptr, 2, WIDTH), WIDTH, tl.float32)
        third = (third * last[:, None]).to(dtype)
    return second, third, unit


@triton.jit
def _columns(x, y, dtype: tl.constexpr):
    """[pairs, 16]: signed logs in columns 0 and 8, 1 in column 4, zeros. A thread makes whole rows
    of its own numbers."""
    zero = tl.zeros(x.shape, tl.float32)
    four = tl.join(tl.join(x, y), tl.join(zero + 1.0, zero))
    eight = tl.join(four, tl.zeros(four.shape, tl.float32))
    sixteen = tl.join(eight, tl.zeros(eight.shape, tl.float32))
    return tl.reshape(sixteen, (x.shape[0], 16)).to(dtype)


@triton.jit
def _mask_of(x, PACK: tl.constexpr):
    """Which units [pairs, WIDTH] ReLU lets pass; packed, [pairs, 4] with a bit for each.

    A thread has two of eight neighbouring columns: it packs its own.
    """
    if PACK:
        TILES: tl.constexpr = x.shape[1] // 8
        passed = tl.reshape(x, (x.shape[0], TILES, 4, 2)) > 0
        bits = tl.where(passed, 1 << _bit_numbers(TILES), 0)
        # 0 is added, which the compiler does not know: it would keep x instead
        mask = tl.sum(tl.sum(bits, 3), 1) + tl.program_id(1)
    else:
        mask = x > 0
    return mask


@triton.jit
def _passed(mask, WIDTH: tl.constexpr):
    """[pairs, WIDTH] of `_mask_of`."""
    if mask.dtype == tl.int32:
        wide = tl.reshape(mask, (mask.shape[0], 1, 4, 1)) >> _bit_numbers(WIDTH // 8)
        mask = tl.reshape(wide & 1, (mask.shape[0], WIDTH)) != 0
    return mask


@triton.jit
def _bit_numbers(TILES: tl.constexpr):
    """[1, TILES, 1, 2]."""
    tiles = tl.arange(0, TILES)[None, :, None, None]
    return 2 * tiles + tl.arange(0, 2)[None, None, None, :]


@triton.jit
def bias_of_pairs(
    x,  # [pairs] signed logs
    y,
    layers,  # of load_layers
    parameters_ptr,
    head,  # of the group
    PACK: tl.constexpr,  # of _mask_of
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The bias [pairs], and what `gradients_of_pairs` needs of the hidden layers: the first, the
    one before the last, and a mask of each."""
    first, second, third = layers
    last = _relu(tl.dot(_columns(x, y, dtype), first, input_precision=PRECISION))
    mask_1 = _mask_of(last, PACK)
    one, two, mask_2, mask_3 = last, last, mask_1, mask_1
    if DEPTH > 1:
        one = last.to(dtype)
        product = tl.dot(one, second, input_precision=PRECISION)
        last = _relu(product + _load_shift(parameters_ptr, 1, WIDTH))
        mask_2 = _mask_of(last, PACK)
    if DEPTH > 2:
        two = last.to(dtype)
        product = tl.dot(two, third, input_precision=PRECISION)
        last = _relu(product + _load_shift(parameters_ptr, 2, WIDTH))
        mask_3 = _mask_of(last, PACK)
    weight, shift = _load_last(parameters_ptr, head, WIDTH, DEPTH, PER_GROUP)
    share = last * weight[None, :]
    if PACK:
        # with 0 times the masks, which the compiler does not know: it would put off packing them
        share = tl.sum(tl.sum(tl.reshape(share, (last.shape[0], WIDTH // 8, 4, 2)), 3), 1)
        share += ((mask_1 + mask_2 + mask_3) * tl.program_id(1)).to(tl.float32)
    return tl.sum(share, 1) + shift, (one, two, mask_1, mask_2, mask_3)


@triton.jit
def empty_sums(
    SIZE: tl.constexpr, WIDTH: tl.constexpr, N_WARPS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Of gradients of the parameters: those of the first layer by x, y and 1 and of the biases of
    the second and third, as `_own_sums`; of these layers' weights, as `_add_over_pairs`. Where the
    last layer's weight would be a factor, in the uppermost, it is left out."""
    STRIPS: tl.constexpr = SIZE // 16
    C: tl.constexpr = N_WARPS if N_WARPS < STRIPS else STRIPS
    vector = tl.zeros((C, 8, WIDTH), tl.float32)
    if dtype == tl.float32 and WIDTH < 64:
        square = tl.zeros((C, WIDTH, WIDTH), tl.float32)
    else:
        square = tl.zeros((64, WIDTH), tl.float32)
    return vector, vector, vector, vector, vector, square, square


@triton.jit
def gradients_of_pairs(
    d_bias,  # [pairs]
    x,  # [pairs] signed logs
    y,
    hidden,  # of bias_of_pairs
    slopes,  # of load_slopes
    parameters_ptr,
    head,  # of the group
    sums,  # of empty_sums, to which these pairs are added
    ADDS: tl.constexpr,  # which: 1, the uppermost hidden layer and what follows; 2, those below
    MOVES: tl.constexpr,  # whether the gradients of the offsets are wanted
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pairs] the gradients of both offsets, and the sums."""
    second, third, unit = slopes
    by_x, by_y, by_1, shift_2, shift_3, square_2, square_3 = sums
    one, two, mask_1, mask_2, mask_3 = hidden
    size = _scale_of(d_bias, dtype)
    d = (d_bias / size)[:, None]
    if DEPTH > 2:
        d = tl.where(_passed(mask_3, WIDTH), d, 0.0).to(dtype)
        if ADDS & 1:
            square_3 = _add_over_pairs(square_3, d, two, size, PRECISION)
            shift_3 += _own_sums(d.to(tl.float32), size, shift_3.shape)
        d = tl.dot(d, third, input_precision=PRECISION)
        size *= unit
    if DEPTH > 1:
        d = tl.where(_passed(mask_2, WIDTH), d, 0.0).to(dtype)
        if ADDS & (1 if DEPTH == 2 else 2):
            square_2 = _add_over_pairs(square_2, d, one, size, PRECISION)
            # of the rounded ones, which are needed behind the product in any case
            shift_2 += _own_sums(d.to(tl.float32), size, shift_2.shape)
        d = tl.dot(d, second, input_precision=PRECISION)
        size *= unit if DEPTH == 2 else 1.0
    d = tl.where(_passed(mask_1, WIDTH), d, 0.0)
    if ADDS & (1 if DEPTH == 1 else 2):
        by_x += _own_sums(d * x[:, None], size, by_x.shape)
        by_y += _own_sums(d * y[:, None], size, by_y.shape)
        by_1 += _own_sums(d, size, by_1.shape)
    d_x, d_y = x, y
    if MOVES:
        offs = 2 * tl.arange(0, WIDTH)
        slope_x, slope_y = tl.load(parameters_ptr + offs), tl.load(parameters_ptr + offs + 1)
        if DEPTH == 1:
            last, _ = _load_last(parameters_ptr, head, WIDTH, DEPTH, PER_GROUP)
            slope_x, slope_y = slope_x * last, slope_y * last
        # 1 / (1 + |offset|) is the slope of its signed log
        d_x = tl.sum(d * slope_x[None, :], 1) * (size * tl.exp(-tl.abs(x)))
        d_y = tl.sum(d * slope_y[None, :], 1) * (size * tl.exp(-tl.abs(y)))
    return d_x, d_y, (by_x, by_y, by_1, shift_2, shift_3, square_2, square_3)


@triton.jit
def _scale_of(values, dtype: tl.constexpr):
    """A power of two that brings the largest to 1, since fp16 has few exponents; 1 for others."""
    unit = 1.0
    if dtype == tl.float16:
        largest = tl.max(tl.abs(values), 0)
        unit = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
    return unit


@triton.jit
def _own_sums(x, size, LIKE: tl.constexpr):
    """[C, 8, N] as LIKE from [pairs, N], times `size`: every thread adds its own rows, where a
    product left them."""
    C: tl.constexpr = LIKE[0]
    x = tl.reshape(x, (x.shape[0] // (16 * C), C, 2, 8, x.shape[1]))
    return tl.sum(tl.sum(x, 2), 0) * size


@triton.jit
def _add_over_pairs(sums, left, right, size, PRECISION: tl.constexpr):
    """sums + left [pairs, M]^T right [pairs, N], times `size`.

    Sums [64, N] are of one product of all warps, `left` widened to its 64 rows; sums [C, M, N] of a
    product for each warp over rows of its own, whose operands take fewer registers.
    """
    if len(sums.shape) == 2:
        left = tl.trans(_widen(left))
    else:
        C: tl.constexpr = sums.shape[0]
        P: tl.constexpr = left.shape[0] // (16 * C)
        left = tl.permute(tl.reshape(left, (P, C, 16, left.shape[1])), (1, 3, 0, 2))
        left = tl.reshape(left, (C, left.shape[1], P * 16))
        right = tl.permute(tl.reshape(right, (P, C, 16, right.shape[1])), (1, 0, 2, 3))
        right = tl.reshape(right, (C, P * 16, right.shape[3]))
    if right.dtype == tl.float16:
        sums += tl.dot(left, right, input_precision=PRECISION) * size
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _widen(x):
    """[pairs, 64] from [pairs, WIDTH]: unit i in column i * (64 / WIDTH), zeros. Products have at
    least 64 rows on the tensor cores that work without registers."""
    if x.shape[1] < 32:
        x = tl.join(x, tl.zeros(x.shape, x.dtype))
        x = tl.reshape(x, (x.shape[0], 2 * x.shape[1]))
    if x.shape[1] < 64:
        x = tl.join(x, tl.zeros(x.shape, x.dtype))
        x = tl.reshape(x, (x.shape[0], 2 * x.shape[1]))
    return x


@triton.jit
def store_sums(
    to,  # [P] of a program, zeros
    sums,
    parameters_ptr,
    head,
    ADDS: tl.constexpr,  # of gradients_of_pairs
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """Write the sums in the order of the vector of parameters.

    With the uppermost layer's gradient as if the last weight were 1 goes that weight's own: what it
    is multiplied with is a linear function of that layer's parameters wherever ReLU let it pass.
    """
    by_x, by_y, by_1, shift_2, shift_3, square_2, square_3 = sums
    offs = tl.arange(0, WIDTH)
    last, _ = _load_last(parameters_ptr, head, WIDTH, DEPTH, PER_GROUP)
    d_last_ptr = _hidden_ptr(to, DEPTH, WIDTH) + head * WIDTH + offs
    if ADDS & (1 if DEPTH == 1 else 2):
        by_x, by_y, by_1 = _total(by_x), _total(by_y), _total(by_1)
        if DEPTH == 1:
            x = tl.load(parameters_ptr + 2 * offs).to(dtype).to(tl.float32)
            y = tl.load(parameters_ptr + 2 * offs + 1).to(dtype).to(tl.float32)
            shift = tl.load(parameters_ptr + 2 * WIDTH + offs).to(dtype).to(tl.float32)
            tl.store(d_last_ptr, by_x * x + by_y * y + by_1 * shift)
            by_x, by_y, by_1 = by_x * last, by_y * last, by_1 * last
        tl.store(to + 2 * offs, by_x)
        tl.store(to + 2 * offs + 1, by_y)
        tl.store(to + 2 * WIDTH + offs, by_1)
    if DEPTH == 2 and ADDS & 1:
        shift = _total(shift_2)
        d_last = _gradient_of_last(square_2, shift, parameters_ptr, 1, dtype, WIDTH)
        tl.store(d_last_ptr, d_last)
        _store_layer(_hidden_ptr(to, 1, WIDTH), square_2, shift, last, WIDTH)
    if DEPTH == 3 and ADDS & 2:
        _store_layer(_hidden_ptr(to, 1, WIDTH), square_2, _total(shift_2), last * 0 + 1, WIDTH)
    if DEPTH == 3 and ADDS & 1:
        shift = _total(shift_3)
        d_last = _gradient_of_last(square_3, shift, parameters_ptr, 2, dtype, WIDTH)
        tl.store(d_last_ptr, d_last)
        _store_layer(_hidden_ptr(to, 2, WIDTH), square_3, shift, last, WIDTH)


@triton.jit
def _whole(square, WIDTH: tl.constexpr):
    """[WIDTH, WIDTH] from the sums of `_add_over_pairs`."""
    if len(square.shape) == 3:
        whole = tl.sum(square, 0)
    else:
        whole = tl.sum(tl.reshape(square, (WIDTH, 64 // WIDTH, WIDTH)), 1)
    return whole


@triton.jit
def _gradient_of_last(
    square, shift, parameters_ptr, N: tl.constexpr, dtype: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """[WIDTH] that of the last weight, from that of the hidden layer before it."""
    ptr = _hidden_ptr(parameters_ptr, N, WIDTH)
    weight = _load_weight(ptr, WIDTH, dtype).to(tl.float32)
    square = tl.sum(weight * _whole(square, WIDTH), 1)
    return square + tl.load(ptr + WIDTH * WIDTH + tl.arange(0, WIDTH)) * shift


@triton.jit
def _store_layer(to, square, shift, factor, WIDTH: tl.constexpr):
    """Write a hidden layer's gradients, times a factor [WIDTH] of its units."""
    offs = tl.arange(0, WIDTH)
    square = _whole(square, WIDTH) * factor[:, None]
    tl.store(to + offs[:, None] * WIDTH + offs[None, :], square)
    tl.store(to + WIDTH * WIDTH + offs, shift * factor)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 0), 0)
