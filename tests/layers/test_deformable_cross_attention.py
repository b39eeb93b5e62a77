"""Deformable cross-attention on true grids: dense and sparse, bag by bag; refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, pad

from survfuse import Ragged, ops
from survfuse.data.slides import tile_slide
from survfuse.layers.sparse_convolution import coarse_cells, convolve_patches
from tests.layers.deformable_cases import (
    DIM,
    RANGES,
    full_grid,
    make_layer,
    maps,
    sparse_bags,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_offsets_points_lie_on_the_centres_of_coarse_cells() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.to_offsets[2].weight.zero_()
    points = layer(*maps(8, 12), shape=(8, 12)).points
    cells = layer.sampled_cells(points)[0, 0]
    assert cells.tolist() == [[x, y] for y in (1.5, 5.5) for x in (1.5, 5.5, 9.5)]


def test_turning_the_maps_turns_the_points() -> None:
    """x and y are treated alike: swap them in maps and weights, and all is swapped."""
    layer, height, width = make_layer(), 13, 9
    query, context = maps(height, width)
    expected = layer(query, context, shape=(height, width))
    with torch.no_grad():
        layer.to_offsets[0].weight.copy_(layer.to_offsets[0].weight.mT.clone())
        layer.to_offsets[2].weight.copy_(layer.to_offsets[2].weight.flip(0).clone())
        layer.rel_pos_bias.mlp[0][0].weight.copy_(layer.rel_pos_bias.mlp[0][0].weight.flip(1))
    turned = [
        t.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2) for t in (query, context)
    ]
    got = layer(*turned, shape=(width, height))
    tokens = got.tokens.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(tokens, expected.tokens)
    points = got.points.flip(-1).unflatten(2, (3, 4)).transpose(2, 3).flatten(2, 3)
    torch.testing.assert_close(points, expected.points)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 8), {}),
        ((11, 9), {"group_queries": False, "corners": "renormalise"}),
        ((3, 6), {"group_key_values": False}),
        ((1, 1), {}),
        ((7, 10), {"downsample": 3, "kernel_size": 3, "offset_scale": 0.5, "offset_groups": 4}),
        ((9, 9), {"downsample": 2, "kernel_size": 8, "offset_groups": 1}),
    ],
    ids=str,
)
def test_dense_equals_sparse_on_a_full_rectangle(shape, options) -> None:
    layer = make_layer(**options)
    query, context = maps(*shape)
    inputs = [query, context, *layer.parameters()]
    grid, ragged = full_grid(*shape, 2)
    dense = layer(query, context, shape=shape)
    sparse = layer(query.flatten(0, 1), context.flatten(0, 1), grid=grid, ragged=ragged)
    up = torch.randn_like(dense.tokens)
    up_points = torch.randn_like(dense.points)
    dense_points, sparse_points = dense.points, sparse.points.unflatten(0, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(sparse.tokens, dense.tokens.flatten(0, 1))
    torch.testing.assert_close(sparse_points, dense_points)
    outs = []
    for tokens, points in ((dense.tokens, dense_points), (sparse.tokens, sparse_points)):
        total = (tokens.reshape(up.shape) * up).sum() + (points * up_points).sum()
        outs.append(torch.autograd.grad(total, inputs))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("corners", ["zero", "renormalise"])
def test_ragged_sparse_bags_equal_one_by_one(corners) -> None:
    layer = make_layer(corners=corners)
    query, context, grid = sparse_bags()
    got = layer(query, context, grid=grid, ragged=RANGES)
    assert got.tokens.shape == (RANGES.total, DIM)
    tokens, points = [], []
    for b in range(RANGES.n_bags):
        rows = slice(int(RANGES.starts[b]), int(RANGES.starts[b] + RANGES.lengths[b]))
        alone = grid.select(b)
        alone = alone._replace(index=torch.where(alone.index < 0, -1, alone.index - rows.start))
        one = layer(query[rows], context[rows], grid=alone)
        tokens.append(one.tokens)
        points.append(one.points)
    assert [len(p) for p in points] == got.point_ragged.lengths.tolist()
    torch.testing.assert_close(got.tokens, torch.cat(tokens))
    torch.testing.assert_close(got.points, torch.cat(points))
    inputs = [query, context, *layer.parameters()]
    up = torch.randn_like(got.tokens)
    outs = [torch.autograd.grad((t * up).sum(), inputs) for t in (got.tokens, torch.cat(tokens))]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def test_points_are_as_many_as_coarse_cells_with_tissue() -> None:
    layer = make_layer()
    query, context, grid = sparse_bags()
    got = layer(query, context, grid=grid, ragged=RANGES)
    cells = grid.cells(RANGES)
    for b, (mine, points) in enumerate(
        zip(
            cells.split(RANGES.lengths.tolist()),
            got.points.split(got.point_ragged.lengths.tolist()),
            strict=True,
        )
    ):
        held = {tuple(cell) for cell in (mine // 4).tolist()}
        assert len(points) == len(held), b
        off = points - torch.tensor(sorted(held, key=lambda at: at[::-1])).reshape(-1, 1, 2)
        assert bool((off.abs() <= 4).all())


def test_the_convolution_of_patches_is_conv2d() -> None:
    _, _, grid = sparse_bags()
    cells = grid.cells(RANGES)
    coarse = coarse_cells(grid, cells, RANGES, stride=4, kernel_size=6)
    patches = torch.randn(RANGES.total, 2, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 1, 6, 6, dtype=torch.double, requires_grad=True)
    bias = torch.randn(3, dtype=torch.double, requires_grad=True)
    got = convolve_patches(patches, coarse.neighbours, weight.flatten(1), bias)
    expected, first = [], 0
    for b, length in enumerate(RANGES.lengths.tolist()):
        height, width = grid.shapes[b].tolist()
        if length == 0:
            continue
        x, y = cells[first : first + length].unbind(1)
        image = torch.zeros(height, width, 2, 3, dtype=torch.double)
        image = image.index_put((y, x), patches[first : first + length]).permute(2, 3, 0, 1)
        image = pad(image, (0, -width % 4, 0, -height % 4))
        out = conv2d(image, weight, bias, stride=4, padding=1, groups=3)
        at = coarse.places[coarse.ragged.starts[b] :][: int(coarse.ragged.lengths[b])]
        expected.append(out[:, :, at[:, 1], at[:, 0]].permute(2, 0, 1))
        first += length
    torch.testing.assert_close(got, torch.cat(expected))
    up = torch.randn_like(got)
    inputs = [patches, weight, bias]
    outs = [torch.autograd.grad((t * up).sum(), inputs) for t in (got, torch.cat(expected))]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    small = [t.detach()[:, :1, :1].clone().requires_grad_() for t in (patches,)]
    assert torch.autograd.gradcheck(
        lambda p, w, s: convolve_patches(p, coarse.neighbours[:4], w, s),
        (
            *small,
            weight.detach().flatten(1)[:1].requires_grad_(),
            bias.detach()[:1].requires_grad_(),
        ),
    )


@pytest.mark.parametrize("released", [False, True])
def test_every_parameter_and_both_maps_learn(released: bool) -> None:
    layer = make_layer(released=released, dropout=0.1)
    query, context = maps(9, 12)
    out = layer(query, context, shape=(9, 12))
    out.tokens.square().sum().backward()
    for name, tensor in (("query", query), ("context", context), *layer.named_parameters()):
        # the last bias is added to all keys alike
        learns = name != "rel_pos_bias.mlp.2.bias"
        assert bool(tensor.grad.abs().max() > 1e-9) == learns, name
    # and the offsets alone, through the second result
    query.grad = None
    layer(query, context, shape=(9, 12)).points.square().sum().backward()
    assert bool(query.grad.any())


def test_dropout_and_eval() -> None:
    layer = make_layer(dropout=0.5)
    call = {"shape": (8, 8)}
    inputs = maps(8, 8)
    assert not torch.equal(layer(*inputs, **call).tokens, layer(*inputs, **call).tokens)
    layer.eval()
    assert torch.equal(layer(*inputs, **call).tokens, layer(*inputs, **call).tokens)


def test_table_and_reference_are_near() -> None:
    layer = make_layer()
    query, context, grid = sparse_bags()
    options = {"grid": grid, "ragged": RANGES}
    exact = layer(query, context, **options).tokens
    layer.backend = "reference"
    torch.testing.assert_close(layer(query, context, **options).tokens, exact)
    layer.backend, layer.bias = None, "table"
    table = layer(query, context, **options).tokens
    error = float((table - exact).detach().abs().max())
    assert 0 < error < 1e-2
    layer.table_size = 16
    coarse = layer(query, context, **options).tokens
    assert float((coarse - exact).detach().abs().max()) > 4 * error


@pytest.mark.parametrize("downsample", [1, 4, 5, 16])
def test_a_kernel_reaches_one_patch_beyond_its_cell_by_default(downsample: int) -> None:
    layer = make_layer(downsample=downsample)
    assert layer.to_offsets[0].kernel_size == (downsample + 2,) * 2
    query, context, grid = sparse_bags()
    dense = layer(*maps(18, 20), shape=(18, 20))
    assert dense.points.shape[2] == -(-18 // downsample) * -(-20 // downsample)
    assert layer(query, context, grid=grid, ragged=RANGES).tokens.shape == (RANGES.total, DIM)


@pytest.mark.parametrize("bias", ["exact", "table"])
def test_meta_tensors_tell_the_shapes(bias: str) -> None:
    layer = make_layer(bias=bias).to("meta")
    got = layer(*(tensor.to("meta") for tensor in maps(9, 12)), shape=(9, 12))
    assert got.tokens.shape == (2, 9 * 12, DIM)
    assert got.points.shape == (2, 2, 9, 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_sparse_bags_in_sixteen_bits(autocast: bool) -> None:
    layer = make_layer()
    query, context, grid = sparse_bags()
    exact = layer(query, context, grid=grid, ragged=RANGES)
    kind = torch.float32 if autocast else torch.bfloat16
    layer, inputs = layer.to(kind), [t.detach().to(kind).requires_grad_() for t in (query, context)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = layer(*inputs, grid=grid, ragged=RANGES)
    assert got.tokens.dtype == torch.bfloat16
    error = (got.tokens - exact.tokens).norm() / exact.tokens.norm()
    assert error.item() < 0.1
    got.tokens.square().sum().backward()
    for tensor in (*inputs, *layer.parameters()):
        assert tensor.grad.dtype == kind
        assert bool(tensor.grad.isfinite().all())


def test_corners_at_the_outline_count_as_told() -> None:
    query, context, grid = sparse_bags()
    outs = []
    for corners in ("zero", "renormalise"):
        torch.manual_seed(0)
        layer = make_layer(corners=corners)
        outs.append(layer(query, context, grid=grid, ragged=RANGES))
    torch.testing.assert_close(outs[0].points, outs[1].points)
    assert not torch.allclose(outs[0].tokens, outs[1].tokens)


def test_sixteen_bits_keep_their_points() -> None:
    """Far from the corner bf16 knows whole coarse cells only; the points do not."""
    layer, shape = (
        make_layer(heads=1, offset_groups=1, downsample=8, kernel_size=8, offset_scale=0.5),
        (1, 1600),
    )
    query, context = maps(*shape, n_bags=1)
    exact = layer(query, context, shape=shape).points
    half = layer.bfloat16()
    got = half(query.bfloat16(), context.bfloat16(), shape=shape)
    assert got.tokens.dtype == torch.bfloat16
    assert got.points.dtype == torch.float32
    assert float((got.points - exact).detach().abs().max()) < 0.05
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(query.float(), context.float(), shape=shape)
    assert cast.points.dtype == torch.float32
    assert float((cast.points - exact).detach().abs().max()) < 0.05


def test_no_bags_and_empty_bags() -> None:
    layer = make_layer()
    nothing = torch.zeros(0, DIM, dtype=torch.double, requires_grad=True)
    for lengths, bias in itertools.product(([], [0], [0, 0]), ("exact", "table")):
        layer.bias = bias
        ragged = Ragged.from_lengths(lengths)
        coords = torch.zeros(0, 2, dtype=torch.int64)
        grid = ops.grid_index(coords, patch_size=1, ragged=ragged)
        got = layer(nothing, nothing, grid=grid, ragged=ragged)
        assert got.tokens.shape == (0, DIM)
        assert got.points.shape == (0, 2, 2)
        gradients = torch.autograd.grad(got.tokens.sum(), [nothing, *layer.parameters()])
        assert not any(bool(gradient.any()) for gradient in gradients)
    assert layer(*maps(4, 4, n_bags=0), shape=(4, 4)).tokens.shape == (0, 16, DIM)


@pytest.mark.parametrize("released", [False, True])
def test_received_attention_is_what_sampled_values_say(released: bool) -> None:
    """A channel that marks one patch, carried by the values alone, tells the weight it gets."""
    layer, shape = make_layer(released=released, offset_groups=4, dropout=0.5), (9, 11)
    query, context = maps(*shape)
    received = layer.received(query, context, shape=shape)
    layer.eval()
    with torch.no_grad():
        # every head hands on its first channel, which reads the first of its group
        layer.to_v.weight.zero_().view(4, 6, 4)[:, 0, 0] = 1.0
        layer.to_out.weight.zero_().view(DIM, 4, 6)[0, :, 0] = 0.25
        layer.to_out.bias.zero_()
    for patch in (0, 40, 98):
        # keys must not see the mark: only what the values read changes
        key_weight = layer.to_k.weight.detach().clone()
        layer.to_k.weight.data.view(24, 4)[:, 0] = 0.0
        marked = context.detach().clone()
        marked[..., ::4] = 0.0
        marked[:, patch, ::4] = 1.0
        expected = layer(query, marked, shape=shape).tokens[..., 0].mean(1)
        same_keys = layer.received(query, marked, shape=shape)[:, patch]
        torch.testing.assert_close(same_keys, expected)
        layer.to_k.weight.data.copy_(key_weight)
    assert float(received.sum(1).max()) <= 1.0 + 1e-9
    assert float(received.min()) >= 0.0


def test_received_attention_of_ragged_bags() -> None:
    layer, ragged = make_layer(), Ragged.from_ranges([0, 60, 5], [60, 30, 0])
    query, context, _ = sparse_bags()
    place = torch.randperm(15 * 13)[:120]
    coords = torch.stack([place % 15, place // 15], 1)
    grid = ops.grid_index(coords, patch_size=1, ragged=ragged)
    got = layer.received(query, context, grid=grid, ragged=ragged)
    assert got.shape == (120,)
    assert not got[90:].any()
    for rows in (slice(0, 60), slice(60, 90)):
        alone = ops.grid_index(coords[rows], patch_size=1)
        one = layer.received(query[rows], context[rows], grid=alone)
        torch.testing.assert_close(got[rows], one)


def test_dense_maps_compile_as_one_graph() -> None:
    torch._dynamo.reset()
    layer = make_layer().float()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    query, context = (tensor.detach().float() for tensor in maps(9, 12))
    got, expected = (f(query, context, shape=(9, 12)) for f in (compiled, layer))
    torch.testing.assert_close(got.tokens, expected.tokens)
    torch.testing.assert_close(got.points, expected.points)


def test_a_real_section(shared_data) -> None:
    """The outline of a real slide: shifting its tiles on the slide changes nothing."""
    tiles = tile_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", target_mpp=None)
    layer, coords = make_layer(corners="renormalise"), torch.as_tensor(tiles.coords)
    query, context = (torch.randn(len(coords), DIM, dtype=torch.double) for _ in range(2))
    outs = []
    for shift, size in itertools.product((0, -123456), (256,)):
        grid = ops.grid_index(coords + shift, patch_size=size)
        outs.append(layer(query, context, grid=grid))
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert len(coords) / 16 <= len(outs[0].points) <= np.prod([(n + 3) // 4 for n in (14, 18)])
