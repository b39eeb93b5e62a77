"""Dropout of what is as long as a bag: on a processor, four elements to a random number.

There a mask of `torch.nn.functional.dropout` takes about as long as the product of matrices in
front of it: one draw of the Mersenne twister, one after the other, for each element. Probabilities
are multiples of 2^-16 here, for which 16 random bits are enough, so a draw of 64 makes four; and
the mask is kept in a byte per element.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEPS = 2**16
_PER_DRAW = 4


class Dropout(nn.Dropout):
    """As `torch.nn.Dropout`, with p rounded to a multiple of 2^-16, to which results are scaled.

    Example:
        >>> import torch
        >>> half = Dropout(0.5)
        >>> sorted(set(half(torch.ones(1000)).tolist()))
        [0.0, 2.0]
        >>> half.eval()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape and device, to the same."""
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """As `torch.nn.functional.dropout`, see `Dropout`."""
    p = rounded(p)
    if not training or p in (0.0, 1.0) or torch.compiler.is_compiling():
        # what is compiled draws its numbers by itself
        return functional.dropout(x, p, training)
    return x.masked_fill(dropped(x, p), 0.0).mul_(1.0 / (1.0 - p))


def rounded(p: float) -> float:
    """A probability as masks have it: a multiple of 2^-16, and 1 only if it was."""
    return p if p == 1.0 else min(round(p * _STEPS), _STEPS - 1) / _STEPS


def dropped(x: Tensor, p: float) -> Tensor:
    """Which elements go: bool of the shape of x, each True with probability p.

    Args:
        x: where and how many.
        p: below 1, as `rounded` gives it.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(p)
    n = x.numel()
    draws = torch.empty(-(-n // _PER_DRAW), dtype=torch.int64).random_(-(2**63), None)
    below = round(p * _STEPS) - _STEPS // 2
    return (draws.view(torch.int16)[:n] < below).view(x.shape)
