"""The calls of `pool_bag` that compile_triton.py compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import pool_bag, pool_bag_call, pool_bag_passes, pool_bag_shapes

from survfuse.pooling import Needs, PooledBag, Pooling


@dataclass(frozen=True)
class Case:
    """One call of the launchers."""

    dtype: torch.dtype
    n_rows: int
    width: int
    normalize: bool = False
    stats: bool = False
    bias: bool = False
    dropout: bool = False
    wide_rows: bool = False  # fp32 query rows over a 16-bit bag
    padding: int = 0  # columns between the bag's rows

    def __str__(self) -> str:
        flags = ("normalize", "stats", "bias", "dropout", "wide_rows")
        on = "+".join(name for name in flags if getattr(self, name))
        width = f"{self.width}+{self.padding}" if self.padding else self.width
        return f"{TYPES[self.dtype]} R={self.n_rows} D={width} {on or 'plain'}"


def record(case: Case, limits: pool_bag_shapes.Limits) -> list[Launch]:
    """Every launch of a forward and of all gradients."""
    n_bags, length = 4, 1000
    n_stored = n_bags * length
    bag = torch.empty((n_stored, case.width + case.padding), dtype=case.dtype)[:, : case.width]
    row_type = torch.float32 if case.wide_rows else case.dtype
    rows = torch.empty((n_bags, case.n_rows, case.width), dtype=row_type)
    per_stored = torch.zeros(n_stored)
    ranges = torch.arange(n_bags) * length, torch.full((n_bags,), length)
    pooling = Pooling(
        *ranges,
        total=n_stored,
        max_length=length,
        scale=0.5,
        normalize=case.normalize,
        eps=1e-5,
        mean=per_stored if case.stats else None,
        rstd=per_stored if case.stats else None,
        dropout_p=0.25 if case.dropout else 0.0,
        seed=torch.zeros(1, dtype=torch.int64) if case.dropout else None,
    )
    bias = per_stored if case.bias else None
    args = (rows, bag, bias, pooling)
    with recording(pool_bag_passes, case, limits) as launches:
        results = pool_bag.pool_bag_forward(*args)
        gradients = PooledBag(*map(torch.empty_like, results))
        needs = Needs(rows=True, bag=True, bias=case.bias)
        pool_bag.pool_bag_backward(gradients, results, *args, needs)
        # a chunk after the first merges into what is there
        call = pool_bag_call.make_call(*args)
        state = pool_bag_passes.State(results.pooled, call)
        part = torch.empty((2, case.n_rows, case.width))
        state.n_merged = 1
        state.merge(part, [part, part, part], 2, 2, 256)
        per_query = torch.empty((n_bags, case.n_rows))
        known = (part[..., 0], results.pooled, per_query)
        pool_bag_passes.sum_slots(call, part, *known, results.pooled, 2, 2, 256)
    return launches


def cases(target: str, quick: bool) -> list[Case]:
    """Every type, blocks of query rows and widths that change a launch shape, and every option.

    Targets other than sm_90 take the calls with all options at once.
    """
    every = {"normalize": True, "bias": True, "dropout": True}
    given = {"normalize": True, "stats": True}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        return [
            Case(bf16, 6, 1024),
            Case(bf16, 16, 1024, **every),
            Case(fp32, 16, 1024, **every),
            Case(bf16, 200, 1024, **given),
            # narrow enough to be read once where shared memory is 64 KiB
            Case(bf16, 6, 256, **every),
        ]
    shapes = [
        *((1, 384, 0), (6, 256, 0), (6, 768, 0), (6, 1024, 0), (16, 1024, 0), (32, 512, 0)),
        *((64, 256, 0), (10, 1000, 0), (6, 1029, 3), (16, 1536, 0), (64, 2048, 0)),
        *((200, 1024, 0), (512, 4608, 0), (200, 2560, 0), (6, 1023, 0), (6, 1029, 0)),
    ]
    listed = []
    for dtype in (bf16, fp16, fp32):
        for n_rows, width, padding in shapes:
            wide_rows = dtype != fp32
            listed.append(Case(dtype, n_rows, width, padding=padding))
            listed.append(Case(dtype, n_rows, width, **every, wide_rows=wide_rows, padding=padding))
            listed.append(Case(dtype, n_rows, width, **given, padding=padding))
    if target != "sm_90":
        return [case for case in listed if case.normalize and case.bias and case.dtype != fp16]
    # each option alone, where it costs the most registers
    for dtype in (bf16, fp16, fp32):
        for on in ({"normalize": True}, {"bias": True}, {"dropout": True}, {**every, **given}):
            listed += [
                Case(dtype, n_rows, width, **on) for n_rows, width in ((16, 1024), (200, 1024))
            ]
    return listed
