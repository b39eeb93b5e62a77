"""`position_biased_attention` on the CPU by the native core.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Kernels: csrc/cpu/position_biased_attention.cpp.
Math: docs/math.md, "Attention biased by position".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.native.core import (
    CPU_ISAS,
    ELEMENT_TYPES,
    address,
    native_core,
    workspace,
)
from survfuse.pooling import accumulation_type
from survfuse.position_bias import PositionBias, PositionedAttention, PositionedNeeds
from survfuse.ragged import Ragged


def position_biased_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
    *,
    isa: str = "auto",
) -> Attended:
    """Results of the accumulation type."""
    kind = accumulation_type(key.dtype)
    shape = (attention.total, query.shape[1])
    # without keys nothing runs: its results stand here already
    out = torch.zeros((*shape, value.shape[3]), dtype=kind)
    lse = torch.full(shape, -torch.inf, dtype=kind)
    if key.shape[1] and attention.total:
        tensors = (query, key, value, query_pos, key_pos)
        arguments, alive = _arguments(tensors, bias, attention, isa, backward=False)
        arguments |= {"out": address(out), "lse": address(lse)}
        native_core().position_biased_attention_forward(arguments)
        del alive
    return Attended(out, lse)


def position_biased_attention_backward(
    d_results: Attended,
    results: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
    needs: PositionedNeeds,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of `needs`, of the accumulation type; None where not needed."""
    kind = accumulation_type(key.dtype)
    tensors = (query, key, value, query_pos, key_pos)
    n_groups = key_pos.shape[1]
    # queries one bag behind the other, positions by the group that moved them
    shapes = PositionedNeeds(
        (attention.total, *query.shape[1:]),
        key.shape,
        value.shape,
        (attention.total, n_groups, 2),
        key_pos.shape,
        bias.parameters.shape,
    )
    gradients = PositionedNeeds(
        *(
            torch.zeros(shape, dtype=kind) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )
    )
    if key.shape[1] and attention.total:
        arguments, alive = _arguments(tensors, bias, attention, isa, backward=True)
        outs = (results.out, d_results.out)
        out, d_out = (t if t.stride(-1) == 1 else t.contiguous() for t in outs)
        lse, d_lse = (t.to(kind).contiguous() for t in (results.lse, d_results.lse))
        arguments |= {f"d_{name}": address(t) for name, t in gradients._asdict().items()}
        arguments |= {
            "out": _rows(out[None]),
            "d_out": _rows(d_out[None]),
            "lse": address(lse),
            "d_lse": address(d_lse),
        }
        native_core().position_biased_attention_backward(arguments)
        del alive
    d_query, d_query_pos = gradients.query, gradients.query_pos
    if d_query is not None:
        d_query = _by_stored_row(d_query, attention.ragged, query.shape[0])
    if d_query_pos is not None:
        d_query_pos = _by_stored_row(d_query_pos.sum(1), attention.ragged, query.shape[0])
    return gradients._replace(query=d_query, query_pos=d_query_pos)


def _by_stored_row(packed: Tensor, ragged: Ragged, n_rows: int) -> Tensor:
    """Gradients [total, ...] of packed rows as those of stored rows, bag by bag in order."""
    if n_rows == ragged.total and torch.equal(ragged.starts, ragged.packed().starts):
        return packed
    stored = packed.new_zeros((n_rows, *packed.shape[1:]))
    at = 0
    for start, length in zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True):
        stored[start : start + length] += packed[at : at + length]
        at += length
    return stored


def _rows(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """[B, n, H, d] as the launcher takes it."""
    return address(tensor), ELEMENT_TYPES[tensor.dtype], *tensor.stride()[:3]


def _arguments(
    tensors: tuple[Tensor, ...],
    bias: PositionBias,
    attention: PositionedAttention,
    isa: str,
    *,
    backward: bool,
) -> tuple[dict, list]:
    """The launcher's arguments, and the tensors that must outlive the call."""
    query, key, value, query_pos, key_pos = tensors
    kind = accumulation_type(key.dtype)
    made = {
        "query_pos": query_pos.to(kind).contiguous(),
        "key_pos": key_pos.to(kind).contiguous(),
        "parameters": bias.parameters.to(kind).contiguous(),
        "reach": None if bias.reach is None else bias.reach.to(kind).contiguous(),
        "starts": attention.starts.contiguous(),
        "lengths": attention.lengths.contiguous(),
    }
    arguments = {name: address(tensor) for name, tensor in made.items()}
    arguments |= {
        "query": _rows(query[None]),
        "key": _rows(key),
        "value": _rows(value),
        "depth": bias.depth,
        "width": bias.width,
        "table_size": 0 if bias.reach is None else bias.parameters.shape[1],
        "n_bags": key.shape[0],
        "n_heads": key.shape[2],
        "n_groups": key_pos.shape[1],
        "n_keys": key.shape[1],
        "dim": key.shape[3],
        "value_dim": value.shape[3],
        "scale": attention.scale,
        "dropout_p": 0.0 if attention.seed is None else attention.dropout_p,
        "seed": 0 if attention.seed is None else int(attention.seed),
        "workspace": 0,
        "n_threads": torch.get_num_threads(),
        "isa": CPU_ISAS.index(isa),
    }
    memory = workspace(native_core().position_biased_attention_workspace(arguments, backward))
    arguments["workspace"] = address(memory)
    return arguments, [*made.values(), *tensors, memory]
