"""What the kernels of one call of `pool_bag` share, as they take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.pooling import Pooling

from . import pool_bag_shapes as shapes


class Call(NamedTuple):
    """What every kernel of one call shares."""

    bag: Tensor
    bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    seed: Tensor | None
    starts: Tensor
    lengths: Tensor
    total: int
    max_length: int
    shape: tuple[int, int, int]  # B, R, D
    scale: float
    normalize: bool
    eps: float
    threshold: int
    keep_scale: float
    # largest power of two up to 16 that divides the bag's row stride: Triton by itself tells only
    # multiples of 16, and a stride padded to 8 would lose its wide loads
    stride_unit: int

    @property
    def problem(self) -> shapes.Problem:
        """What launch shapes depend on."""
        return shapes.Problem(
            dtype=self.bag.dtype,
            n_rows=self.shape[1],
            width=self.shape[2],
            aligned=self.stride_unit * self.bag.element_size() >= 16
            and self.bag.data_ptr() % 16 == 0,
            normalize=self.normalize,
            given=self.mean is not None,
            dropout=self.seed is not None,
            bias=self.bias is not None,
        )

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The bag and what belongs to it, as the kernels that score it take them."""
        return self.bag, self.bias, self.mean, self.rstd, self.seed, self.starts, self.lengths

    @property
    def constants(self) -> dict[str, object]:
        """What those kernels are compiled for, beside their blocks."""
        return {
            "STRIDE_UNIT": self.stride_unit,
            "D": self.shape[2],
            "NORMALIZE": self.normalize,
            "PRECISION": products_precision(),
        }

    @property
    def row_stride(self) -> int:
        """Of the bag, in units of STRIDE_UNIT."""
        return self.bag.stride(0) // self.stride_unit

    @property
    def limits(self) -> shapes.Limits:
        """Of the device."""
        return shapes.device_limits(self.bag.device)

    def plan(self, align: int, *, programs: float, row_bytes: int) -> shapes.Slots:
        """Cut the bags into slots of a multiple of `align` rows."""
        n_bags, n_rows, width = self.shape
        return shapes.plan_slots(
            self.total,
            self.max_length,
            n_bags,
            align=align,
            slot_bytes=n_rows * (width + 3) * 4,
            row_bytes=row_bytes,
            batch_bytes=self.total * width * self.bag.element_size(),
            programs_per_slot=programs,
            limits=self.limits,
        )


def make_call(rows: Tensor, bag: Tensor, bias: Tensor | None, pooling: Pooling) -> Call:
    """What the launchers are given, as their kernels take it."""
    normalize, p = pooling.normalize, pooling.dropout_p
    return Call(
        bag=bag,
        bias=bias,
        mean=pooling.mean if normalize else None,
        rstd=pooling.rstd if normalize else None,
        seed=pooling.seed if p > 0 else None,
        starts=pooling.starts,
        lengths=pooling.lengths,
        total=pooling.total,
        max_length=pooling.max_length,
        shape=tuple(rows.shape),
        scale=pooling.scale,
        normalize=normalize,
        eps=pooling.eps,
        # as survfuse/reference/dropout.py; p = 1 drops all: no weight is left to scale
        threshold=min(round(p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - p) if p < 1 else 0.0,
        stride_unit=math.gcd(bag.stride(0), 16),
    )


def products_precision() -> str:
    """How fp32 products are formed: exactly, unless torch's own switch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
