"""What `DeformableCrossAttention` refuses, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from survfuse import ops
from survfuse.layers import DeformableCrossAttention
from tests.layers.deformable_cases import DIM, RANGES, make_layer, maps, sparse_bags


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dim": 0}, "dim is 0; it must be a positive"),
        ({"dim": 3, "heads": 3, "offset_groups": 3}, "dim is 3; the MLP"),
        ({"heads": 2.0}, "heads is 2.0"),
        ({"offset_groups": 3}, "offset_groups is 3; it must divide heads, 4, and dim, 16"),
        ({"dim": 18, "offset_groups": 4}, "must divide heads, 4, and dim, 18"),
        ({"kernel_size": 2}, "kernel_size is 2 and downsample 4"),
        ({"kernel_size": 5}, "an even number more"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"heads": True}, "heads is True; it must be a positive integer"),
        ({"downsample": "4"}, "downsample is '4'; it must be a positive integer"),
        ({"kernel_size": 6.0}, "kernel_size is 6.0; it must be a positive integer"),
        ({"kernel_size": "6"}, "kernel_size is '6'; it must be a positive integer"),
        *(
            ({"offset_scale": scale}, f"offset_scale is {scale}; it must be at least 0 and finite")
            for scale in (float("nan"), float("inf"), -1)
        ),
        ({"bias": "tabel"}, "bias is 'tabel'; it must be \"exact\""),
        ({"table_size": 0}, "table_size is 0; it must be from 2"),
        ({"corners": "zeros"}, "corners is 'zeros'; it must be \"zero\""),
        ({"backend": "nativ"}, "backend is 'nativ'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words) -> None:
    with pytest.raises(ValueError, match=words):
        DeformableCrossAttention(**({"dim": DIM, "heads": 4, "dim_head": 6} | sizes))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": "a"}, "dropout is 'a'; it must be a number"),
        ({"dropout": None}, "dropout is None; it must be a number"),
        ({"offset_scale": "a"}, "offset_scale is 'a'; it must be a number"),
        ({"table_size": 2.5}, "table_size is 2.5; it must be an integer"),
        ({"dtype": torch.int32}, "dtype is torch.int32; it must be bf16"),
    ],
)
def test_options_of_the_wrong_type_are_named(options, words) -> None:
    with pytest.raises(TypeError, match=words):
        DeformableCrossAttention(DIM, **options)


def test_numpy_integers_are_sizes() -> None:
    layer = make_layer(heads=np.int64(4), table_size=np.int64(8), bias="table")
    out = layer(*maps(4, 4), shape=(np.int64(4), np.int32(4)))
    assert out.tokens.shape == (2, 16, DIM)


def test_inputs_that_do_not_fit_are_named() -> None:
    layer = make_layer()
    dense = dict(zip(("query", "context"), maps(8, 6), strict=True)) | {"shape": (8, 6)}
    query, context, grid = sparse_bags()
    packed = {"query": query, "context": context, "grid": grid, "ragged": RANGES}
    for good, changed, error, words in (
        (dense, {"shape": None}, ValueError, "of shape and grid neither is given"),
        (dense, {"grid": grid}, ValueError, "of shape and grid both is given"),
        (dense, {"shape": (8, 5)}, ValueError, r"shape is \(8, 5\) and query has 48 tokens"),
        (dense, {"shape": (-8, -6)}, ValueError, r"shape is \(-8, -6\)"),
        (dense, {"ragged": RANGES}, ValueError, "ragged is given beside shape"),
        (dense, {"shape": 48}, TypeError, r"shape is 48; it must be \(height, width\)"),
        (dense, {"shape": "ab"}, TypeError, r"shape is 'ab'; it must be \(height, width\)"),
        (dense, {"shape": (6.0, 8.0)}, TypeError, "height of shape is 6.0; .* an integer"),
        (dense, {"query": dense["query"].float()}, TypeError, "query is .*32 and the layer .*64;"),
        (dense, {"query": dense["query"].int()}, TypeError, "query is torch.int32; it must be"),
        (dense, {"query": dense["query"].to_sparse()}, TypeError, "query is torch.sparse_coo"),
        (dense, {"query": dense["query"].to("meta")}, ValueError, "query is on meta and the layer"),
        (dense, {"context": dense["context"].to("meta")}, ValueError, "context is on meta and the"),
        (dense, {"query": None}, TypeError, "query is NoneType"),
        (dense, {"query": query}, ValueError, r"query has shape .* must be \[B, h w, 16\]"),
        (dense, {"context": dense["context"][:1]}, ValueError, "context is .* must be alike"),
        (dense, {"context": dense["context"].float()}, ValueError, "they must be alike"),
        (packed, {"query": dense["query"]}, ValueError, r"query has shape .* must be \[T, 16\]"),
        (packed, {"grid": tuple(grid)}, TypeError, "grid is tuple"),
        (packed, {"grid": grid._replace(index=None)}, TypeError, "grid.index is NoneType"),
        (packed, {"grid": grid.to("meta")}, ValueError, "grid.index is on meta and the query on"),
        (packed, {"grid": grid._replace(shapes=grid.shapes - 1)}, ValueError, "shapes disagree"),
        (packed, {"ragged": None}, ValueError, "grid has 5 bags; ragged must say"),
        (packed, {"ragged": RANGES.select([0])}, ValueError, "ragged has 1 bags"),
        (packed, {"ragged": (0, 1)}, TypeError, "ragged is tuple"),
        (packed, {"query": query[:99], "context": context[:99]}, ValueError, "bag 4 is rows 90"),
    ):
        with pytest.raises(error, match=words):
            layer(**(good | changed))
    layer.released = True
    with pytest.raises(ValueError, match="grid is given and released=True"):
        layer(**packed)
    with pytest.raises(ValueError, match=r"shape is \(3, 16\); released=True needs at least"):
        layer(*maps(3, 16), shape=(3, 16))


def test_patches_without_a_cell_are_named() -> None:
    coords = torch.tensor([[0, 0], [1, 0], [0, 0]])
    grid = ops.grid_index(coords, patch_size=1, duplicates="first")
    tokens = torch.randn(3, DIM, dtype=torch.double)
    with pytest.raises(ValueError, match=r'no cell of packed patch 2; .* duplicates="first"'):
        make_layer()(tokens, tokens, grid=grid)


def test_autocast_widens_nothing_of_fp64() -> None:
    layer, inputs = make_layer().float(), maps(4, 4)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"query is .*64 and the layer .*32"),
    ):
        layer(*inputs, shape=(4, 4))


def test_places_on_a_map_need_points_and_for_released_layers_its_shape() -> None:
    layer = make_layer()
    with pytest.raises(TypeError, match="points is NoneType; it must be a tensor"):
        layer.sampled_cells(None)
    with pytest.raises(ValueError, match=r"points has shape \(2, 3\); it must be \[\.\.\., 2\]"):
        layer.sampled_cells(torch.zeros(2, 3))
    layer.released = True
    with pytest.raises(TypeError, match=r"shape is None; it must be \(height, width\)"):
        layer.sampled_cells(torch.zeros(2, 2))
