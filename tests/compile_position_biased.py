"""The calls of position-biased attention that compile_triton.py compiles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch
from compile_calls import TYPES, Launch, recording
from survfuse.triton_kernels import position_biased_attention
from survfuse.triton_kernels.pool_bag_shapes import Limits

from survfuse.attention import Attended
from survfuse.ops.position_bias import triton_shared_bytes
from survfuse.position_bias import PositionBias, PositionedAttention, PositionedNeeds

# bytes on sm_90: three layers of 64 units, and in fp32 both TF32 halves of an operand, leave too
# few registers. Goes when the kernels hold less; docs/kernels.md says so too.
KNOWN_SPILLS = {
    "bf16 W=64 x3 O=1 d=64": 112,
    "bf16 W=64 x3 O=4 d=128+dropout": 400,
    "fp16 W=64 x3 O=4 d=128+dropout": 408,
    "fp32 W=32 x2 O=1 d=128": 440,
    "fp32 W=32 x2 O=1 d=64": 88,
    "fp32 W=32 x2 O=2 d=32+dropout": 52,
    "fp32 W=32 x2 O=4 d=64": 72,
    "fp32 W=32 x3 O=1 d=64": 800,
    "fp32 W=64 x2 O=1 d=64": 1904,
    "fp32 W=64 x3 O=1 d=64": 3008,
    "fp32 W=64 x3 O=4 d=128+dropout": 4032,
}


@dataclass(frozen=True)
class Case:
    """One call of the launchers: 1000 queries over 144 keys, forward and every gradient."""

    dtype: torch.dtype
    width: int = 32
    depth: int = 2  # 0 has a table of 64 x 64 nodes
    per_group: int = 1  # heads
    dim: int = 64
    dropout: bool = False
    deterministic: bool = False
    hip: bool = False

    def __str__(self) -> str:
        bias = f"W={self.width} x{self.depth}" if self.depth else "table"
        flags = "+dropout" * self.dropout + "+deterministic" * self.deterministic
        return f"{TYPES[self.dtype]} {bias} O={self.per_group} d={self.dim}{flags}"


def record(case: Case, limits: Limits) -> list[Launch]:
    """Every launch of a forward, of all gradients and of those of a layer."""
    hidden = (case.depth, case.width) if case.depth else None
    if not case.hip and triton_shared_bytes(case.dtype, hidden) > limits.shared_bytes:
        return []  # the op does not ask for it there
    n_bags, n_queries, n_keys, groups = 2, 1000, 144, 2
    heads = groups * case.per_group
    query = torch.empty(n_bags * n_queries, heads, case.dim, dtype=case.dtype)
    key = torch.empty(n_bags, n_keys, heads, case.dim, dtype=case.dtype)
    places = torch.empty(n_bags * n_queries, 2), torch.empty(n_bags, groups, n_keys, 2)
    reach = None if case.depth else torch.ones(2)
    n_parameters = 3 * case.width + (case.depth - 1) * (case.width**2 + case.width)
    n_parameters += case.per_group * (case.width + 1)
    shape = (n_parameters,) if case.depth else (case.per_group, 64, 64)
    bias = PositionBias(torch.zeros(shape), reach, case.depth, case.width)
    lengths = torch.full((n_bags,), n_queries)
    attention = PositionedAttention(
        *(torch.arange(n_bags) * n_queries, lengths, n_bags * n_queries, n_queries),
        scale=0.125,
        dropout_p=0.25 if case.dropout else 0.0,
        seed=torch.zeros(1, dtype=torch.int64) if case.dropout else None,
    )
    module, arguments = position_biased_attention, (query, key, key, *places, bias, attention)
    modes = mock.patch.object(
        torch, "are_deterministic_algorithms_enabled", return_value=case.deterministic
    )
    hip = mock.patch.object(torch.version, "hip", "6.2") if case.hip else contextlib.nullcontext()
    with recording(module, case, limits) as launches, modes, hip:
        results = module.position_biased_attention_forward(*arguments)
        gradients = Attended(*map(torch.zeros_like, results))
        every = PositionedNeeds(*[True] * 6)
        # queries stay where they are in a layer
        for needs in (every, every._replace(query_pos=False)):
            module.position_biased_attention_backward(gradients, results, *arguments, needs)
    for launch in launches:
        launch.known_spills = KNOWN_SPILLS.get(str(case), 0)
    return launches


def cases(target: str, quick: bool) -> list[Case]:
    """Every width, depth, number of heads that share an MLP, and type; tables."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    hip = target.startswith("gfx")
    if quick:
        return [Case(bf16, hip=hip), Case(fp32, 0, 0, 2, 32, deterministic=True, hip=hip)]
    listed = [
        Case(dtype, width, depth, hip=hip)
        for dtype in (bf16, fp32)
        for width in (16, 32, 64)
        for depth in (1, 2, 3)
    ]
    listed += [Case(fp16, 32, depth, dropout=True, hip=hip) for depth in (1, 2, 3)]
    for dtype in (bf16, fp16, fp32):
        listed += [
            Case(dtype, 32, 2, 2, 32, dropout=True, hip=hip),
            Case(dtype, 32, 2, 4, 64, hip=hip),
            Case(dtype, 64, 3, 4, 128, dropout=True, hip=hip),
            Case(dtype, 32, 2, 1, 128, hip=hip),
            Case(dtype, 0, 0, 1, 64, hip=hip),
            Case(dtype, 0, 0, 4, 128, dropout=True, deterministic=True, hip=hip),
        ]
    if target != "sm_90":
        return [case for case in listed if case.dtype != fp16 and case.depth != 1]
    return listed
