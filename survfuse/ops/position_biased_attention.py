"""`position_biased_attention`: attention whose logits carry a small MLP of each pair's offset.

Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse import reference
from survfuse.attention import Attended
from survfuse.ops.backends import Selection, check_backend
from survfuse.ops.checks import check_dropout, check_scale
from survfuse.ops.flops import flop_formula
from survfuse.ops.position_bias import (
    check_bias,
    check_mlp,
    check_sides,
    make_bias,
    select_biased_backend,
)
from survfuse.ops.registration import (
    call_op,
    call_reference,
    check_ranges,
    check_ranges_eagerly,
    fake_gradients,
    gradients_like,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    unit_stride,
    without_autocast,
)
from survfuse.pooling import accumulation_type
from survfuse.position_bias import PositionBias, PositionedAttention, PositionedNeeds
from survfuse.ragged import Ragged
from survfuse.reference.dropout import draw_seed

_MODULES = {
    "tiled": "survfuse.tiled.position_biased_attention",
    "native": "survfuse.native.position_biased_attention",
    "triton": "survfuse.triton_kernels.position_biased_attention",
}


def position_biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    mlp: Sequence[tuple[Tensor, Tensor]],
    *,
    query_ragged: Ragged | None = None,
    bias: str = "exact",
    table_size: int = 256,
    table_range: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention biased by an MLP of the offset between a query's and a key's place.

    .. math::
        s_{ij} = \mathrm{scale}\; q_i \cdot k_j + \mathrm{mlp}(\mathrm{slog}(p_i - p_j)), \quad
        \mathrm{slog}(d) = \mathrm{sign}(d) \log(1 + |d|), \quad
        o_i = \sum_j \mathrm{softmax}_j(s_{ij})\, v_j

    The M keys of a bag lie at other places for each of G groups of heads, as deformable attention
    samples them. Neither the hidden layers nor the bias of all pairs are ever held. The gradient
    of slog at 0 is 1.

    Args:
        query: [B, Lq, H, d], or packed [T, H, d] with `query_ragged`; bf16, fp16, fp32, or fp64 on
            the CPU. Key and value have its type. Any strides, the last one other than 1 is copied.
        key: [B, M, H, d].
        value: [B, M, H, dv].
        query_pos: [B, Lq, 2], or [Lq, 2] for all bags, or packed [T, 2] beside packed queries. In
            any unit. fp32 (fp64 beside fp64 features): 16 bits would lose what lies between two
            patches. A NaN makes the results of all that it is paired with NaN; so may an infinite
            position by the MLP, while a table takes it for its edge.
        key_pos: [B, G, M, 2] in the same unit and type. G divides H, and head g * (H / G) + o
            reads group g.
        mlp: (weight [out, in], bias [out]) of each layer, with ReLU between them: in = 2 first,
            out = H / G last, one output for each head of a group. Kernels serve 1 to 3 hidden
            layers of up to 64 units; tiles of plain torch serve any other.
        query_ragged: the range of rows of each bag's packed queries. Rows in no bag are never read.
        bias: "exact" evaluates the MLP for each pair; "table" on a grid, evenly spaced in slog, and
            interpolates, which is what many thousand keys need.
        table_size: nodes n along each axis of the table, 2 to 16384. Its gradient keeps the hidden
            layers at every node: 8 n^2 bytes in fp32 for each unit, which for two layers of 64 are
            67 MB for n = 256 and 1.1 GB for 1024.
        table_range: the largest offset along an axis that the table covers, in the unit of the
            positions; None measures it, on the device. Beyond, the bias is that of the edge.
        scale: by default d ** -0.5.
        dropout_p: each weight is dropped with this probability, the rest scaled by 1 / (1 - p).
        backend: None, "reference", "tiled", "triton" or "native".

    Returns:
        [B, Lq, H, dv], or [total, H, dv] for packed queries, packed per (bag, query) in batch
        order; of the type of `query`, differentiable in all tensors, positions and MLP included.
        Without keys: zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums, offsets and MLP; error against fp64 at most twice that of plain
    torch in the type of the features. docs/math.md bounds what a table adds: it is exact in cells
    that no kink of the MLP crosses.
    Determinism: bitwise, always.
    Cost: for n pairs of query and key 2 n H (d + dv) + 2 n G P operations forward, P the parameters
    of the MLP, and 2 n H (3 d + 2 dv) + 6 n G P backward. A table replaces P by 4 for each head of
    a group and adds P for each of its nodes. Memory: inputs, results and one tile.
    vmap: by the fallback of torch, one call per sample; batch through `query_ragged`.

    Source: Dai et al., "Deformable convolutional networks", ICCV 2017, for sampling; Liu et al.,
    "Swin transformer V2", CVPR 2022, section 3.3, for the bias.

    Example:
        >>> query, key = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8)
        >>> mlp = [(torch.randn(16, 2), torch.zeros(16)), (torch.randn(2, 16), torch.zeros(2))]
        >>> key_pos = torch.rand(1, 1, 9, 2)
        >>> position_biased_attention(query, key, key, torch.rand(6, 2), key_pos, mlp).shape
        torch.Size([1, 6, 2, 8])
    """
    return position_biased_attention_with_lse(
        query,
        key,
        value,
        query_pos,
        key_pos,
        mlp,
        query_ragged=query_ragged,
        bias=bias,
        table_size=table_size,
        table_range=table_range,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )[0]


def position_biased_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    mlp: Sequence[tuple[Tensor, Tensor]],
    *,
    query_ragged: Ragged | None = None,
    bias: str = "exact",
    table_size: int = 256,
    table_range: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `position_biased_attention`, and the logsumexp of the logits before dropout.

    Returns:
        out, and lse: the shape of out without its last dimension, fp32 (fp64 for fp64); -inf
        without keys. Both are differentiable, so that results over several key sets can be merged
        (`merge_attention`).
    """
    sides = check_sides(query, key, value, query_pos, key_pos, query_ragged)
    packed, positions, query_ragged = sides
    check_mlp(mlp, query.shape[-2] // key_pos.shape[1], key.device)
    check_bias(bias, table_size, table_range)
    if scale is not None:
        check_scale(scale)
    check_dropout(dropout_p)
    check_backend(backend)
    if backend == "reference":
        check_ranges_eagerly(packed, query_ragged, "query_ragged")
        return call_reference(
            reference.position_biased_attention_with_lse,
            query,
            key,
            value,
            query_pos,
            key_pos,
            mlp,
            query_ragged=None if query.dim() == 4 else query_ragged,
            bias=bias,
            table_size=table_size,
            table_range=table_range,
            scale=scale,
            dropout_p=dropout_p,
        )
    kind = accumulation_type(key.dtype)
    size = table_size if bias == "table" else None
    made = make_bias(mlp, kind, size, table_range, (positions, key_pos, query_ragged))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed(key.device) if dropout_p > 0 else None
    attention = PositionedAttention(*query_ragged, scale, dropout_p, seed)
    out, lse = _call(packed, key, value, positions, key_pos, made, attention, backend or "")
    if query.dim() == 4:
        return out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
    return out, lse


def _call(query, key, value, query_pos, key_pos, bias, attention, backend) -> Attended:
    parameters, reach, depth, width = bias
    *ranges, scale, dropout_p, seed = attention
    tensors = (query, key, value, query_pos, key_pos, parameters, reach)
    options = (depth, width, scale, dropout_p, seed, backend)
    return Attended(*call_op("position_biased_attention", _forward, *tensors, *ranges, *options))


_N_TENSORS = len(PositionedNeeds._fields)
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_pos, Tensor key_pos, "
    "Tensor bias_parameters, Tensor? reach, Tensor starts, Tensor lengths, SymInt total, "
    "SymInt max_length, int depth, int width, float scale, float dropout_p, Tensor? seed, "
    "str backend"
)
_NEEDS = ", ".join(f"bool needs_{name}" for name in PositionedNeeds._fields)


def _arguments_of_backend(arguments: Sequence) -> tuple:
    """A registered op's inputs as backends take them, and the module of the chosen one."""
    query, key, value, query_pos, key_pos, parameters, reach, *ranges = arguments[:11]
    depth, width, scale, dropout_p, seed, backend = arguments[11:]
    bias = PositionBias(parameters.contiguous(), reach, depth, width)
    attention = PositionedAttention(*ranges, scale, dropout_p, seed)
    chosen = choose_for_bias(key, value, depth, width, reach is not None, backend or None)
    tensors = (
        *(unit_stride(tensor) for tensor in (query, key, value)),
        *(tensor.contiguous() for tensor in (query_pos, key_pos)),
    )
    return importlib.import_module(_MODULES[chosen.backend]), (*tensors, bias, attention)


def choose_for_bias(
    key: Tensor, value: Tensor, depth: int, width: int, table: bool, backend: str | None
) -> Selection:
    """The backend that serves such a bias and heads of this size and type on this device.

    Raises:
        RuntimeError: the named one cannot; the message says why.
    """
    return select_biased_backend(
        backend,
        tuple(_MODULES),
        device=key.device,
        dtype=key.dtype,
        head_dim=max(key.shape[-1], value.shape[-1]),
        hidden=None if table else (depth, width),
    )


@torch.library.custom_op(
    "survfuse::position_biased_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)
@without_autocast
def _forward(*arguments):
    module, call = _arguments_of_backend(arguments)
    query, attention = call[0], call[-1]
    check_ranges(query, attention.ragged, "query_ragged")
    out, lse = module.position_biased_attention_forward(*call)
    return out.to(query.dtype), lse


@_forward.register_fake
def _(query, key, value, *arguments):
    total = arguments[6]
    out = query.new_empty((total, query.shape[1], value.shape[3]))
    return out, query.new_empty(out.shape[:2], dtype=accumulation_type(key.dtype))


@torch.library.custom_op(
    "survfuse::position_biased_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, {_INPUTS}, {_NEEDS})"
    f" -> ({', '.join(['Tensor'] * _N_TENSORS)})",
)
@without_autocast
def _backward(*arguments):
    d_results, results = Attended(*arguments[:2]), Attended(*arguments[2:4])
    module, call = _arguments_of_backend(arguments[4:-_N_TENSORS])
    needs = PositionedNeeds(*arguments[-_N_TENSORS:])
    gradients = module.position_biased_attention_backward(d_results, results, *call, needs)
    return gradients_like(gradients, arguments[4 : 4 + _N_TENSORS])


@_backward.register_fake
def _(*arguments):
    return fake_gradients(arguments[4 : 4 + _N_TENSORS], arguments[-_N_TENSORS:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs, output)


def _differentiate(ctx, *d_results):
    results, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:_N_TENSORS]
    return to_autograd(
        call_op("position_biased_attention", _backward, *d_results, *results, *inputs, *needs),
        needs,
        len(inputs),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("position_biased_attention"))


def _bias_flops(key_pos, parameters, reach, total: int, depth: int, width: int, heads: int) -> int:
    pairs = total * key_pos[2]
    if reach is not None:
        return 8 * pairs * heads
    n_out = heads // key_pos[1]
    sizes = [2, *[width] * depth, n_out]
    return 2 * pairs * key_pos[1] * sum(a * b for a, b in itertools.pairwise(sizes))


@flop_formula(torch.ops.survfuse.position_biased_attention)
def _forward_flops(query, key, value, query_pos, key_pos, parameters, reach, *options, **_) -> int:
    total, depth, width = options[2], options[4], options[5]
    bias = _bias_flops(key_pos, parameters, reach, total, depth, width, query[1])
    return 2 * total * key[1] * query[1] * (query[2] + value[3]) + bias


@flop_formula(torch.ops.survfuse.position_biased_attention_backward)
def _backward_flops(*arguments, **_) -> int:
    query, key, value, _, key_pos, parameters, reach = arguments[4:11]
    total, depth, width = arguments[13], arguments[15], arguments[16]
    bias = _bias_flops(key_pos, parameters, reach, total, depth, width, query[1])
    return 2 * total * key[1] * query[1] * (3 * query[2] + 2 * value[3]) + 3 * bias
