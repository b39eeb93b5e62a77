"""Position encoding of sequences by convolving them as square maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class SquareConvolution(nn.Module):
    """x + conv7(x) + conv5(x) + conv3(x), depthwise, of rows laid out as a square map row by row.

    A sequence is continued by its first rows up to a square number, and cut again behind the
    convolution, so that repeated rows are neighbours and nothing else. The three convolutions are
    one whose kernel is their sum.

    Args:
        dim: width of the rows.

    Source: Shao et al., "TransMIL", NeurIPS 2021, "pyramid position encoding generator".
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(dim, dim, size, groups=dim) for size in (7, 5, 3)]
        self.kernels = nn.ParameterList(layer.weight for layer in convolutions)
        self.biases = nn.ParameterList(layer.bias for layer in convolutions)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Convolve sequences [total + B, dim], a class token in front of each.

        Args:
            x: the sequences, one behind the other; class tokens stay as they are.
            lengths: rows of each, the class token not counted, on the host.
        """
        padded = [
            functional.pad(kernel, [(7 - kernel.shape[-1]) // 2] * 4) for kernel in self.kernels
        ]
        kernel, bias = sum(padded).to(x.dtype), sum(self.biases).to(x.dtype)
        found = []
        for part in x.split([n + 1 for n in lengths]):
            token, rows = part[:1], part[1:]  # [1, dim], [n, dim]
            found.append(token)
            if len(rows):
                found.append(rows + self._convolve(rows, kernel, bias))
        return torch.cat(found)

    def _convolve(self, rows: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        n, dim = rows.shape
        side = math.isqrt(n - 1) + 1
        if side * side > n:
            rows = torch.cat([rows, rows[: side * side - n]])
        # [1, dim, side, side], channels last in memory
        square = rows.view(1, side, side, dim).permute(0, 3, 1, 2)
        square = functional.conv2d(square, kernel, bias, padding=3, groups=dim)
        return square.permute(0, 2, 3, 1).reshape(side * side, dim)[:n]
