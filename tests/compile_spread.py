"""The calls of `spread_tokens` that compile_triton.py compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import pool_bag_passes, spread_tokens
from survfuse.triton_kernels.pool_bag_shapes import Limits

from survfuse.attention import Attended
from survfuse.pooling import Pooling, SpreadNeeds


@dataclass(frozen=True)
class Case:
    """One call of the launchers: a bag of 10 thousand patches."""

    dtype: torch.dtype
    heads: int
    keys: int
    width: int
    value_dim: int
    normalize: bool = False
    stats: bool = False
    bias: bool = False
    dropout: bool = False
    wide_keys: bool = False  # fp32 keys over a 16-bit bag

    def __str__(self) -> str:
        flags = ("normalize", "stats", "bias", "dropout", "wide_keys")
        on = "+".join(name for name in flags if getattr(self, name))
        sizes = f"H={self.heads} Lk={self.keys} D={self.width} dv={self.value_dim}"
        return f"{TYPES[self.dtype]} {sizes} {on or 'plain'}"


def record(case: Case, limits: Limits) -> list[Launch]:
    """Every launch of a forward and of all gradients."""
    length, kind = 10_000, torch.float32 if case.wide_keys else case.dtype

    def empty(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys = empty(1, case.heads, case.keys, case.width)
    values = empty(1, case.heads, case.keys, case.value_dim)
    bag = empty(length, case.width, dtype=case.dtype)
    bias = empty(*keys.shape[:3]) if case.bias else None
    statistics = empty(length, dtype=torch.float32) if case.stats else None
    pooling = Pooling(
        *(empty(1, dtype=torch.int64), empty(1, dtype=torch.int64), length, length),
        scale=0.5,
        normalize=case.normalize,
        eps=1e-5,
        mean=statistics,
        rstd=statistics,
        dropout_p=0.25 if case.dropout else 0.0,
        seed=empty(1, dtype=torch.int64) if case.dropout else None,
    )
    args = (keys, values, bag, bias, pooling)
    # prepare and the sum of slots are launched by the passes of pool_bag
    with (
        recording(pool_bag_passes, case, limits) as shared,
        recording(spread_tokens, case, limits) as own,
    ):
        results = spread_tokens.spread_tokens_forward(*args)
        gradients = Attended(*map(torch.empty_like, results))
        needs = SpreadNeeds(keys=True, values=True, bag=True, key_bias=case.bias)
        spread_tokens.spread_tokens_backward(gradients, results.lse, *args, needs)
    return own + shared


def cases(target: str, quick: bool) -> list[Case]:
    """Every type and way to cut heads and keys into blocks, with no option and with all."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    every = {"normalize": True, "bias": True, "dropout": True}
    if quick:
        return [Case(bf16, 8, 6, 1024, 64), Case(bf16, 1, 200, 1024, 64, **every)]
    listed = []
    for dtype in (bf16, fp16, fp32):
        for sizes in ((8, 6, 1024, 64), (1, 6, 1536, 256), (1, 200, 1024, 64), (2, 33, 1029, 40)):
            listed.append(Case(dtype, *sizes))
            listed.append(Case(dtype, *sizes, normalize=True, stats=True))
            listed.append(Case(dtype, *sizes, **every, wide_keys=dtype != fp32))
    if target != "sm_90":
        return [case for case in listed if case.bias and case.dtype != fp16]
    return listed
