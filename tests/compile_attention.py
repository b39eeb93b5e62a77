"""The calls of `cross_attention` that compile_triton.py compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import cross_attention
from survfuse.triton_kernels.pool_bag_shapes import Limits

from survfuse.attention import Attended, Attention, AttentionNeeds


@dataclass(frozen=True)
class Case:
    """One call of the launchers: 4 bags, or 1."""

    dtype: torch.dtype
    queries: int  # of each bag
    keys: int
    heads: int
    dim: int
    value_dim: int = 0  # as dim
    bias: bool = False
    dropout: bool = False
    wide_query: bool = False  # fp32 queries over 16-bit keys

    def __str__(self) -> str:
        on = "+".join(name for name in ("bias", "dropout", "wide_query") if getattr(self, name))
        dims = f"{self.dim}:{self.value_dim}" if self.value_dim else self.dim
        sizes = f"{self.queries}x{self.keys} H={self.heads} d={dims}"
        return f"{TYPES[self.dtype]} {sizes} {on or 'plain'}"


def record(case: Case, limits: Limits) -> list[Launch]:
    """Every launch of a forward and of all gradients."""
    n_bags = 1
    value_dim = case.value_dim or case.dim
    kind = torch.float32 if case.wide_query else case.dtype
    # of no memory: the numbers are never looked at
    query = torch.empty((n_bags * case.queries, case.heads, case.dim), dtype=kind, device="meta")
    key = torch.empty((n_bags * case.keys, case.heads, case.dim), dtype=case.dtype, device="meta")
    value = torch.empty(
        (n_bags * case.keys, case.heads, value_dim), dtype=case.dtype, device="meta"
    )
    bias = torch.empty(n_bags * case.keys, device="meta") if case.bias else None
    ranges = torch.empty(n_bags, dtype=torch.int64, device="meta")
    attention = Attention(
        *(ranges, ranges, n_bags * case.queries, case.queries),
        *(ranges, ranges, n_bags * case.keys, case.keys),
        scale=0.5,
        dropout_p=0.25 if case.dropout else 0.0,
        seed=torch.empty(1, dtype=torch.int64, device="meta") if case.dropout else None,
    )
    args = (query, key, value, bias, attention)
    with recording(cross_attention, case, limits) as launches:
        results = cross_attention.cross_attention_forward(*args)
        gradients = Attended(*map(torch.empty_like, results))
        needs = AttentionNeeds(True, True, True, case.bias)
        cross_attention.cross_attention_backward(gradients, results, *args, needs)
    return launches


def cases(target: str, quick: bool) -> list[Case]:
    """Every route with every head size that changes a launch shape, and every option.

    Targets other than sm_90 take the calls with all options at once.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    every = {"bias": True, "dropout": True}
    if quick:
        return [
            Case(bf16, 6, 10**6, 1, 256),
            Case(bf16, 256, 10**5, 8, 64, **every),
            Case(bf16, 10**5, 200, 8, 64),
            Case(fp32, 6, 10**4, 1, 256),
        ]
    sides = ((6, 10**6), (32, 10**5), (256, 10**5), (10**5, 200))
    listed = []
    for dtype in (bf16, fp16, fp32):
        for n_queries, n_keys in sides:
            for heads, dim, value_dim in (
                *((1, 256, 0), (8, 64, 0), (4, 128, 0), (2, 40, 72), (2, 37, 100)),
            ):
                sizes = (n_queries, n_keys, heads, dim, value_dim)
                listed.append(Case(dtype, *sizes))
                listed.append(Case(dtype, *sizes, **every, wide_query=dtype != fp32))
    if target != "sm_90":
        return [case for case in listed if case.bias and case.dtype != fp16]
    return listed
