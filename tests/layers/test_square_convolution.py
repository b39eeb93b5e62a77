"""SquareConvolution: three depthwise convolutions and the identity, at the price of one."""

from __future__ import annotations

import torch
from torch.nn import functional

from survfuse.layers.square_convolution import SquareConvolution


def three_convolutions(layer: SquareConvolution, rows: torch.Tensor, side: int) -> torch.Tensor:
    """Of one whole map, each with the kernel that it is given."""
    dim = rows.shape[1]
    square = rows.T.reshape(1, dim, side, side)
    expected = square
    for kernel, bias in zip(layer.kernels, layer.biases, strict=True):
        padding = kernel.shape[-1] // 2
        expected = expected + functional.conv2d(square, kernel, bias, padding=padding, groups=dim)
    return expected.flatten(2)[0].T


def test_one_kernel_is_the_sum_of_three_convolutions() -> None:
    layer = SquareConvolution(4)
    assert [kernel.shape[-1] for kernel in layer.kernels] == [7, 5, 3]
    x = torch.randn(1 + 9 + 1, 4)
    found = layer(x, [9, 0])
    assert torch.equal(found[[0, 10]], x[[0, 10]])
    torch.testing.assert_close(found[1:10], three_convolutions(layer, x[1:10], 3))


def test_first_rows_complete_the_square_and_are_cut_again() -> None:
    layer, x = SquareConvolution(3), torch.randn(8, 3)
    found = layer(x, [7])
    assert torch.equal(found[0], x[0])
    expected = three_convolutions(layer, torch.cat([x[1:], x[1:3]]), 3)[:7]
    torch.testing.assert_close(found[1:], expected)


def test_a_sequence_of_one_row_and_of_none() -> None:
    layer, x = SquareConvolution(2), torch.randn(3, 2)
    found = layer(x, [1, 0])
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(found[1:2], three_convolutions(layer, x[1:2], 1))
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
