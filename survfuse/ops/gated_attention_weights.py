"""`gated_attention_weights`: the softmax weights of `gated_attention_pool`, streamed.

Oracle: survfuse/reference/gated_attention_pool.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import reference
from survfuse.ops.backends import Selection, check_backend
from survfuse.ops.checks import check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ops.gated_attention_pool import GATE_SCHEMA, GATED_NEEDS, check_gated
from survfuse.ops.registration import (
    POOLING_SCHEMA,
    call_op,
    call_reference,
    check_ranges,
    check_ranges_eagerly,
    fake_gradients,
    gradients_like,
    make_pooling,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    unit_stride,
    without_autocast,
)
from survfuse.pooling import Gate, GatedNeeds, Pooling, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.tiled.gated_attention_weights import (
    gated_attention_weights_backward,
    gated_attention_weights_forward,
)


def gated_attention_weights(
    bag: Tensor,
    w_tanh: Tensor,
    b_tanh: Tensor | None,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_score: Tensor,
    b_score: Tensor | None,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    reduce: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The weight each patch has in each pool, without ever holding more than is returned.

    .. math:: p_{ik} = \exp(s_{ik} - lse_k)

    Args:
        bag, w_tanh, b_tanh, w_gate, b_gate, w_score, b_score, bias, ragged: those of the
            `gated_attention_pool` call.
        lse: [B, K] what that call returned.
        reduce: None; or "rows", the mean over the K pools.
        backend: None, "reference" or "tiled".

    Returns:
        The weights before dropout, packed per (bag, patch) in batch order: [total, K], or [total]
        for "rows". fp32 (fp64 for fp64); differentiable in the bag, every parameter, lse and bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.

    Determinism: bitwise.
    Cost: reads the bag once forward and once backward; 4 N D L and 8 N D L operations (12 N D L if
    the bag is trained).
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> x, w, score = torch.eye(2), torch.zeros(3, 2), torch.ones(1, 3)
        >>> lse = torch.full((1, 1), 2.0).log()
        >>> gated_attention_weights(x, w, None, w, None, score, None, lse, reduce="rows")
        tensor([0.5000, 0.5000])
    """
    gate = Gate(w_tanh, b_tanh, w_gate, b_gate, w_score, b_score)
    packed, bias, ragged = check_gated(bag, gate, bias, ragged)
    if reduce not in (None, "rows"):
        raise ValueError(f'reduce is {reduce!r}; it must be None or "rows"')
    check_tensor("lse", lse, shape=("B", w_score.shape[0]), device=bag.device)
    as_packed(packed, ragged, lse.shape[0])
    select_gated_weights_backend(backend, device=bag.device, dtype=bag.dtype)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.gated_attention_weights,
            packed,
            *gate,
            lse,
            bias=bias,
            ragged=ragged,
            reduce=reduce,
        )
    pooling = make_pooling(ragged, 1.0, None, None)
    group = 1 if reduce is None else w_score.shape[0]
    weights = call_op(
        "gated_attention_weights", _forward, packed, *gate, bias, lse, *pooling[:9], group
    )
    return weights if reduce is None else weights.reshape(ragged.total)


def select_gated_weights_backend(
    requested: str | None, *, device: torch.device, dtype: torch.dtype
) -> Selection:
    """The backend of gated_attention_weights; arguments and errors as of `select_backend`."""
    check_backend(requested)
    if requested is None:
        return Selection("tiled", "its only implementation beside the reference")
    if requested in ("native", "triton"):
        raise RuntimeError(
            f"backend={requested!r} cannot serve this call: only None, "
            '"reference" and "tiled" implement gated_attention_weights'
        )
    return Selection(requested, "asked for")


_INPUTS = f"{GATE_SCHEMA}, Tensor? bias, Tensor lse, {POOLING_SCHEMA}, SymInt group"
_N_INPUTS = len(GatedNeeds._fields) + 1  # with lse


@torch.library.custom_op(
    "survfuse::gated_attention_weights", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
@without_autocast
def _forward(bag, *arguments):
    gate, bias, lse = Gate(*arguments[:6]), *arguments[6:8]
    *pooling, group = arguments[8:]
    pooling = Pooling(*pooling)
    check_ranges(bag, pooling.ragged)
    return gated_attention_weights_forward(unit_stride(bag), gate, bias, lse, pooling, group)


@_forward.register_fake
def _(bag, *arguments):
    n_pools, total, group = arguments[4].shape[0], arguments[10], arguments[-1]
    return bag.new_empty((total, n_pools // group), dtype=accumulation_type(bag.dtype))


@torch.library.custom_op(
    "survfuse::gated_attention_weights_backward",
    mutates_args=(),
    schema=f"(Tensor d_weights, {_INPUTS}, {GATED_NEEDS}, bool needs_lse)"
    f" -> ({', '.join(['Tensor'] * _N_INPUTS)})",
)
@without_autocast
def _backward(d_weights, *arguments):
    bag, *gate, bias, lse = inputs = arguments[:_N_INPUTS]
    *pooling, group = arguments[_N_INPUTS:-_N_INPUTS]
    *needs, needs_lse = arguments[-_N_INPUTS:]
    gradients = gated_attention_weights_backward(
        d_weights,
        unit_stride(bag),
        Gate(*gate),
        bias,
        lse,
        Pooling(*pooling),
        group,
        GatedNeeds(*needs),
        needs_lse,
    )
    return gradients_like(gradients, inputs)


@_backward.register_fake
def _(d_weights, *arguments):
    return fake_gradients(arguments[:_N_INPUTS], arguments[-_N_INPUTS:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs)


def _differentiate(ctx, d_weights):
    _, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[:_N_INPUTS]
    return to_autograd(
        call_op("gated_attention_weights", _backward, d_weights, *inputs, *needs),
        needs,
        len(inputs),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("gated_attention_weights"))


@flop_formula(torch.ops.survfuse.gated_attention_weights)
def _forward_flops(bag_shape, w_tanh_shape, *shapes, **_) -> int:
    return 4 * shapes[9] * bag_shape[1] * w_tanh_shape[0]


@flop_formula(torch.ops.survfuse.gated_attention_weights_backward)
def _backward_flops(d_weights_shape, bag_shape, w_tanh_shape, *arguments, **_) -> int:
    # as if every parameter were trained
    passes = 12 if arguments[-_N_INPUTS] else 8
    return passes * arguments[9] * bag_shape[1] * w_tanh_shape[0]
