"""Position encodings of grids, patch indices and slide coordinates."""

from __future__ import annotations

import math

import pytest
import torch

from survfuse import Ragged
from survfuse.layers.fourier import (
    append_channels,
    coordinate_positions,
    fourier_channels,
    fourier_encode,
    grid_positions,
    index_positions,
)


def test_encoding_is_sines_cosines_then_the_coordinate() -> None:
    positions = torch.tensor([[0.25, -0.5]], dtype=torch.float64)
    encoded = fourier_encode(positions, bands=2, max_frequency=6.0)
    assert encoded.shape == (1, fourier_channels(2, 2))
    expected = []
    for p in (0.25, -0.5):
        expected += [math.sin(math.pi * s * p) for s in (1.0, 3.0)]
        expected += [math.cos(math.pi * s * p) for s in (1.0, 3.0)]
        expected.append(p)
    torch.testing.assert_close(encoded[0], torch.tensor(expected, dtype=torch.float64))


def test_grid_runs_from_minus_one_to_one_on_every_axis() -> None:
    grid = grid_positions((3, 1, 2), dtype=torch.float32, device="cpu")
    assert grid.shape == (3, 1, 2, 3)
    assert grid[:, 0, 0, 0].tolist() == [-1.0, 0.0, 1.0]
    assert grid[0, :, 0, 1].tolist() == [-1.0]
    assert grid[0, 0, :, 2].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_index_positions_are_linspace_of_each_bag(dtype: torch.dtype) -> None:
    lengths = [1, 0, 2, 5, 1000]
    found = index_positions(Ragged.from_lengths(lengths), dtype=dtype)
    expected = torch.cat([torch.linspace(-1, 1, n, dtype=dtype) for n in lengths])
    torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=torch.finfo(dtype).eps)
    assert found[0, 0] == -1.0
    assert found[-1, 0] == 1.0


def test_coordinates_keep_the_aspect_ratio_of_each_slide() -> None:
    coords = torch.tensor([[100, 10], [300, 20], [7, 7], [200, 10], [9e5, 9e5]])
    ragged = Ragged.from_ranges([0, 3, 2], [2, 1, 1])
    found = coordinate_positions(coords, ragged)
    # a bag of one patch lies at the centre of its own box
    expected = torch.tensor([[-1.0, -0.05], [1.0, 0.05], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(found, expected)
    assert coordinate_positions(coords[:0], Ragged.from_lengths([0])).shape == (0, 2)


@pytest.mark.parametrize("trained", [False, True])
def test_appending_copies_the_bags_and_nothing_else(trained: bool) -> None:
    features = torch.randn(9, 5)
    features[4] = torch.nan  # in no bag
    features.requires_grad_(trained)
    ragged = Ragged.from_ranges([5, 0, 5], [3, 4, 3])
    channels = torch.arange(10.0)[:, None]
    bag, packed = append_channels(features, ragged, channels)
    assert ragged.rows().tolist() == [5, 6, 7, 0, 1, 2, 3, 5, 6, 7]
    assert packed.starts.tolist() == [0, 3, 7]
    assert torch.equal(bag, torch.cat([features[ragged.rows()], channels], 1))
    if trained:
        bag.sum().backward()
        assert features.grad[:, 0].tolist() == [1, 1, 1, 1, 0, 2, 2, 2, 0]
    else:
        assert bag.stride() == (8, 1)
