"""The bias of `position_biased_attention`: its checks, its form for backends, who can serve it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse.ops.backends import Selection, backend_obstacle
from survfuse.ops.checks import check_coordinates, check_integer, check_number, check_tensor
from survfuse.ops.registration import autocast_off
from survfuse.position_bias import PositionBias
from survfuse.ragged import Ragged, as_packed_heads
from survfuse.reference.position_biased_attention import (
    make_table,
    packed_positions,
    table_reach,
)

# a tile of a wider head does not stay in the registers of a program
_MAX_TRITON_HEAD = 256
# nodes are numbered in 32 bits
_MAX_TABLE = 16384
_MAX_KERNEL_DEPTH, _MIN_WIDTH, _MAX_KERNEL_WIDTH = 3, 16, 64


def check_sides(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    query_ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Ragged]:
    """Queries and their positions packed, and the ranges, after every check of both sides."""
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
    beside = {"device": key.device, "beside": "the key"}
    check_tensor("key", key, shape=("B", "M", "H", "d"), **beside)
    n_bags, n_keys, heads, head_dim = key.shape
    if heads == 0 or head_dim == 0:
        raise ValueError(f"key has shape {tuple(key.shape)}; it needs a head and a channel")
    tail = (heads, head_dim)
    if query.dim() == 4:
        check_tensor("query", query, shape=("B", "Lq", *tail), **beside)
    else:
        note = ", or dense [B, Lq, H, d]"
        check_tensor("query", query, shape=("T", *tail), note=note, **beside)
    check_tensor("value", value, shape=(n_bags, n_keys, heads, "dv"), **beside)
    for name, tensor in (("query", query), ("value", value)):
        if tensor.dtype != key.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and key {key.dtype}; they must have one type"
            )
    packed, query_ragged = as_packed_heads("query", query, query_ragged, n_bags)
    if query.dim() == 4:
        shared = isinstance(query_pos, Tensor) and query_pos.dim() == 2
        shape = (query.shape[1], 2) if shared else (*query.shape[:2], 2)
    else:
        shape = (query.shape[0], 2)
    check_tensor("query_pos", query_pos, shape=shape, **beside)
    check_tensor("key_pos", key_pos, shape=(n_bags, "G", n_keys, 2), **beside)
    n_groups = key_pos.shape[1]
    if n_groups == 0 or heads % n_groups:
        raise ValueError(
            f"key_pos has shape {tuple(key_pos.shape)}; its {n_groups} groups must divide the "
            f"{heads} heads"
        )
    for name, tensor in (("query_pos", query_pos), ("key_pos", key_pos)):
        check_coordinates(name, tensor, key, "key")
    return packed, packed_positions(query, query_pos), query_ragged


def check_mlp(mlp: Sequence[tuple[Tensor, Tensor]], n_out: int, device: torch.device) -> None:
    """Raise unless `mlp` is the layers of a network from 2 numbers to `n_out`."""
    if not isinstance(mlp, tuple | list) or not mlp:
        found = "empty" if isinstance(mlp, tuple | list) else type(mlp).__name__
        raise TypeError(f"mlp is {found}; it must be a tuple of (weight, bias) pairs")
    size = 2
    for index, layer in enumerate(mlp):
        if not isinstance(layer, tuple | list) or len(layer) != 2:
            several = isinstance(layer, tuple | list)
            found = f"{len(layer)} of them" if several else type(layer).__name__
            raise TypeError(f"mlp[{index}] is {found}; it must be a pair (weight, bias)")
        weight, shift = layer
        last = index == len(mlp) - 1
        beside = {"device": device, "beside": "the key"}
        check_tensor(f"mlp[{index}] weight", weight, shape=("out", size), **beside)
        out = weight.shape[0]
        if last and out != n_out:
            raise ValueError(
                f"mlp[{index}] weight has shape {tuple(weight.shape)}; the last layer needs one "
                f"output for each head of a group, [{n_out}, {size}]"
            )
        if out == 0:
            raise ValueError(
                f"mlp[{index}] weight has shape {tuple(weight.shape)}; a layer needs a unit"
            )
        check_tensor(f"mlp[{index}] bias", shift, shape=(out,), **beside)
        size = out


def check_bias(bias: str, table_size: int, table_range: float | None) -> None:
    """Raise unless these name a bias."""
    if bias not in ("exact", "table"):
        raise ValueError(f'bias is {bias!r}; it must be "exact" or "table"')
    check_integer("table_size", table_size)
    if not 2 <= table_size <= _MAX_TABLE:
        raise ValueError(f"table_size is {table_size}; it must be from 2 to {_MAX_TABLE}")
    if table_range is not None:
        check_number("table_range", table_range)
        if not 0.0 < table_range < math.inf:
            raise ValueError(f"table_range is {table_range}; it must be positive and finite")


def make_bias(
    mlp: Sequence[tuple[Tensor, Tensor]],
    kind: torch.dtype,
    table_size: int | None,
    table_range: float | None,
    sides: tuple[Tensor, Tensor, Ragged],
) -> PositionBias:
    """The bias as backends take it, differentiable in the MLP.

    Args:
        mlp: its layers.
        kind: the type of its arithmetic.
        table_size: nodes along an axis; None keeps the MLP.
        table_range: as the op takes it.
        sides: packed positions of the queries, those of the keys, and the ranges of the queries.
    """
    mlp = [(weight.to(kind), shift.to(kind)) for weight, shift in mlp]
    if table_size is None:
        return pack_mlp(mlp)
    query_pos, key_pos, ragged = sides
    reach = table_reach(query_pos, key_pos, ragged, table_range)
    with autocast_off(reach.device):
        return PositionBias(make_table(mlp, table_size, reach), reach, 0, 0)


def pack_mlp(mlp: Sequence[tuple[Tensor, Tensor]]) -> PositionBias:
    """All layers as one vector, hidden ones padded with zeros to one power of two."""
    hidden = mlp[:-1]
    width = _MIN_WIDTH if hidden else 0
    for weight, _ in hidden:
        while width < weight.shape[0]:
            width *= 2
    parts, size = [], 2
    for index, (weight, shift) in enumerate(mlp):
        out = width if index < len(hidden) else weight.shape[0]
        rows, columns = out - weight.shape[0], size - weight.shape[1]
        parts.append(torch.nn.functional.pad(weight, (0, columns, 0, rows)).reshape(-1))
        parts.append(torch.nn.functional.pad(shift, (0, rows)))
        size = out
    return PositionBias(torch.cat(parts), None, len(hidden), width)


def select_biased_backend(
    requested: str | None,
    built: tuple[str, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    hidden: tuple[int, int] | None,
) -> Selection:
    """The backend of a call.

    Args:
        requested: the caller's `backend`; None picks the fastest that can serve the call.
        built: the backends this op has, beside the reference.
        device, dtype: of the key.
        head_dim: the wider of key's and value's.
        hidden: how many hidden layers the MLP has, and their width; None with a table.

    Raises:
        RuntimeError: the named backend cannot serve the call; the message says why.
    """
    wanted = requested or ("triton" if device.type == "cuda" else "native")
    obstacle = _obstacle(wanted, built, device, dtype, head_dim, hidden)
    if obstacle is None:
        return Selection(wanted, "asked for" if requested else _REASONS[wanted])
    if requested:
        raise RuntimeError(f"backend={requested!r} cannot serve this call: {obstacle}")
    return Selection("tiled", obstacle)


_REASONS = {
    "triton": "the fused kernels of this GPU",
    "native": "the C++ kernels of this processor",
}


def _obstacle(backend, built, device, dtype, head_dim, hidden) -> str | None:
    if backend == "reference":
        return None
    if backend not in built:
        return f"there is no {backend} kernel of position-biased attention"
    if backend == "tiled":
        return None
    obstacle = backend_obstacle(backend, device=device, dtype=dtype)
    if obstacle is not None:
        return obstacle
    if hidden is not None:
        depth, width = hidden
        if not 1 <= depth <= _MAX_KERNEL_DEPTH or width > _MAX_KERNEL_WIDTH:
            return (
                f"its mlp has {depth} hidden layers of up to {width} units, kernels serve 1 to "
                f"{_MAX_KERNEL_DEPTH} of up to {_MAX_KERNEL_WIDTH}"
            )
    if backend != "triton":
        return None
    if head_dim > _MAX_TRITON_HEAD:
        return f"heads have {head_dim} channels, Triton's hold {_MAX_TRITON_HEAD}"
    needed = triton_shared_bytes(dtype, hidden)
    if device.type == "cuda" and torch.version.hip is None and needed > _shared_bytes(device):
        return (
            f"an fp32 mlp of {hidden[0]} layers of {hidden[1]} units takes {needed // 2**10} KB of "
            f"shared memory, this GPU has {_shared_bytes(device) // 2**10}; 16 bits take less"
        )
    return None


def triton_shared_bytes(dtype: torch.dtype, hidden: tuple[int, int] | None) -> int:
    """What Triton's kernels take at most of what a block may have, where that is much; else 0."""
    if dtype != torch.float32 or hidden is None or hidden[1] <= 32:
        return 0
    return {1: 0, 2: 128 * 2**10, 3: 224 * 2**10}[hidden[0]]


def _shared_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
