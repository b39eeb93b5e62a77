"""`gated_attention_pool`: pooling of ragged bags by gated attention (ABMIL).

Oracle: survfuse/reference/gated_attention_pool.py.  Math: docs/math.md, "Gated attention pooling".
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from survfuse import reference
from survfuse.native.core import native_core
from survfuse.ops.backends import Selection, backend_obstacle, check_backend
from survfuse.ops.checks import check_bag, check_bias, check_dropout, check_tensor
from survfuse.ops.flops import flop_formula
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
from survfuse.pooling import Gate, GatedBag, GatedNeeds, Pooling, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed
from survfuse.tiled.tiles import multiplies_bf16

_MODULES = {
    "tiled": "survfuse.tiled.gated_attention_pool",
    "native": "survfuse.native.gated_attention_pool",
    "triton": "survfuse.triton_kernels.gated_attention_pool",
}


def gated_attention_pool(
    bag: Tensor,
    w_tanh: Tensor,
    b_tanh: Tensor | None,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_score: Tensor,
    b_score: Tensor | None,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> GatedBag:
    r"""K weighted means of each bag, weighted by gated attention of L hidden units.

    .. math::
        s_{ik} = w_k \cdot (\tanh(W_t x_i + b_t) \odot \sigma(W_g x_i + b_g)) + b_k + bias_i, \quad
        z_k = \sum_i \mathrm{softmax}_i(s_{ik})\, x_i

    Args:
        bag: [T, D] packed, or dense [B, N, D]; bf16, fp16, fp32, or fp64 on the CPU. Any row
            stride; a last stride other than 1 is copied.
        w_tanh, w_gate: [L, D] weights of the two branches. Parameters may be fp32 over a 16-bit
            bag; where a backend multiplies 16-bit numbers, they are rounded to the bag's type.
        b_tanh, b_gate: [L] their biases, or None.
        w_score: [K, L] one row per pool.
        b_score: [K], or None. It moves `lse` and not the weights.
        bias: [T] added to the logit of that patch in every pool. -inf excludes the patch, which
            may then hold anything, NaN included.
        ragged: the range of rows of each bag; None is one bag (or a dense `bag`). Rows in no bag
            are never read.
        dropout_p: each attention weight is dropped with this probability, the rest scaled by
            1 / (1 - p).
        backend: None, "reference", "tiled", "triton" or "native".

    Returns:
        pooled [B, K, D] of the type of `w_score`, and lse [B, K], the logsumexp of the logits
        before dropout, fp32 (fp64 for fp64). Both are differentiable in the bag, every parameter
        and the bias. A bag of no rows, or with every bias -inf, gives zeros, lse -inf, and zero
        gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) sums; error against fp64 at most twice that of plain torch in the type of
    the bag.
    Determinism: bitwise, always.
    Cost: the hidden layer is computed tile by tile and never held, so it is computed again in the
    backward: 4 N D L operations forward, 8 N D L backward (12 N D L if the bag is trained), and
    2 N D K each way (4 N D K) for the pooling. Reads the bag once forward and once backward.
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Source: Ilse et al., "Attention-based deep multiple instance learning", ICML 2018, eq. 9.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> w, score = torch.zeros(3, 2), torch.ones(1, 3)
        >>> gated_attention_pool(x, w, None, w, None, score, None).pooled
        tensor([[[0.5000, 0.5000]]])
    """
    gate = Gate(w_tanh, b_tanh, w_gate, b_gate, w_score, b_score)
    packed, bias, ragged = check_gated(bag, gate, bias, ragged)
    check_dropout(dropout_p)
    check_backend(backend)
    seed = draw_seed(bag.device) if dropout_p > 0 and backend != "reference" else None
    pooling = make_pooling(ragged, 1.0, None, None, dropout_p, seed)
    if backend == "reference":
        check_ranges_eagerly(packed, ragged)
        return call_reference(
            reference.gated_attention_pool,
            packed,
            *gate,
            bias=bias,
            ragged=ragged,
            dropout_p=dropout_p,
        )
    pooled, lse = call_op(
        "gated_attention_pool", _forward, packed, *gate, bias, *pooling, backend or ""
    )
    return GatedBag(pooled.to(w_score.dtype), lse)


def check_gated(
    bag: Tensor, gate: Gate, bias: Tensor | None, ragged: Ragged | None
) -> tuple[Tensor, Tensor | None, Ragged]:
    """The packed bag, bias as [T] and the ranges, after every check on shapes and devices."""
    check_bag(bag)
    for name in ("w_tanh", "w_gate", "w_score"):
        tensor = getattr(gate, name)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
    device, width = bag.device, bag.shape[-1]
    check_tensor("w_tanh", gate.w_tanh, shape=("L", width), device=device)
    n_hidden = gate.w_tanh.shape[0]
    check_tensor("w_gate", gate.w_gate, shape=(n_hidden, width), device=device)
    check_tensor("w_score", gate.w_score, shape=("K", n_hidden), device=device)
    for name in ("w_tanh", "w_score"):
        weight = getattr(gate, name)
        if weight.shape[0] == 0:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must hold a row")
    for name in ("b_tanh", "b_gate", "b_score"):
        tensor = getattr(gate, name)
        size = gate.w_score.shape[0] if name == "b_score" else n_hidden
        if tensor is not None:
            check_tensor(name, tensor, shape=(size,), device=device)
    if bias is not None:
        bias = check_bias(bias, bag)
    packed, ragged = as_packed(bag, ragged)
    return packed, bias, ragged


def select_gated_backend(
    requested: str | None, *, device: torch.device, dtype: torch.dtype
) -> Selection:
    """The backend of a gated operation; arguments as in `select_backend`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve the call; the message says why.
    """
    check_backend(requested)
    if requested is None:
        return _fastest(device, dtype)
    obstacle = _obstacle(requested, device, dtype)
    if obstacle:
        raise RuntimeError(f"backend={requested!r} cannot serve this call: {obstacle}")
    return Selection(requested, "asked for")


def _fastest(device: torch.device, dtype: torch.dtype) -> Selection:
    if device.type == "cuda":
        obstacle = _obstacle("triton", device, dtype)
        if obstacle is None:
            return Selection("triton", "the fused kernels of this GPU")
        return Selection("tiled", f"no Triton: {obstacle}")
    obstacle = _obstacle("native", device, dtype)
    if obstacle is not None:
        return Selection("tiled", f"no native kernel: {obstacle}")
    if native_core().machine_info()["cpu_isa"] == "plain":
        return Selection("tiled", "no vector instructions of this processor are in the C++ kernels")
    if dtype == torch.bfloat16 and multiplies_bf16():
        return Selection("tiled", "bf16: oneDNN multiplies with AMX")
    return Selection("native", "the C++ kernels of this processor")


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend not in ("reference", *_MODULES):
        return f"there is no {backend} kernel of gated attention"
    return backend_obstacle(backend, device=device, dtype=dtype)


GATE_SCHEMA = (
    "Tensor bag, Tensor w_tanh, Tensor? b_tanh, Tensor w_gate, Tensor? b_gate, Tensor w_score, "
    "Tensor? b_score"
)
GATED_NEEDS = ", ".join(f"bool needs_{name}" for name in GatedNeeds._fields)
_INPUTS = (
    f"{GATE_SCHEMA}, Tensor? bias, {POOLING_SCHEMA}, float dropout_p, Tensor? seed, str backend"
)


def _implementation(backend: str, bag: Tensor):
    chosen = select_gated_backend(backend or None, device=bag.device, dtype=bag.dtype)
    return importlib.import_module(_MODULES[chosen.backend])


@torch.library.custom_op(
    "survfuse::gated_attention_pool", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
@without_autocast
def _forward(bag, *arguments):
    gate, bias, pooling = Gate(*arguments[:6]), arguments[6], Pooling(*arguments[7:-1])
    check_ranges(bag, pooling.ragged)
    module = _implementation(arguments[-1], bag)
    return module.gated_attention_pool_forward(unit_stride(bag), gate, bias, pooling)


@_forward.register_fake
def _(bag, *arguments):
    n_bags, n_pools = arguments[7].shape[0], arguments[4].shape[0]
    kind = accumulation_type(bag.dtype)
    pooled = bag.new_empty((n_bags, n_pools, bag.shape[1]), dtype=kind)
    return pooled, bag.new_empty((n_bags, n_pools), dtype=kind)


@torch.library.custom_op(
    "survfuse::gated_attention_pool_backward",
    mutates_args=(),
    schema=f"(Tensor d_pooled, Tensor d_lse, Tensor pooled, Tensor lse, {_INPUTS}, {GATED_NEEDS})"
    f" -> ({', '.join(['Tensor'] * len(GatedNeeds._fields))})",
)
@without_autocast
def _backward(*arguments):
    d_results, results = GatedBag(*arguments[:2]), GatedBag(*arguments[2:4])
    n_inputs = len(GatedNeeds._fields)
    bag, *gate, bias = inputs = arguments[4 : 4 + n_inputs]
    *pooling, backend = arguments[4 + n_inputs : -n_inputs]
    gradients = _implementation(backend, bag).gated_attention_pool_backward(
        d_results,
        results,
        unit_stride(bag),
        Gate(*gate),
        bias,
        Pooling(*pooling),
        GatedNeeds(*arguments[-n_inputs:]),
    )
    return gradients_like(gradients, inputs)


@_backward.register_fake
def _(*arguments):
    return fake_gradients(arguments[4:12], arguments[-8:])


def _save(ctx, inputs, output):
    save_call(ctx, inputs, output)


def _differentiate(ctx, *d_results):
    results, inputs = saved_call(ctx)
    needs = ctx.needs_input_grad[: len(GatedNeeds._fields)]
    return to_autograd(
        call_op("gated_attention_pool", _backward, *d_results, *results, *inputs, *needs),
        needs,
        len(inputs),
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("gated_attention_pool"))


@flop_formula(torch.ops.survfuse.gated_attention_pool)
def _forward_flops(bag_shape, w_tanh_shape, *shapes, **_) -> int:
    n_pools, total = shapes[3][0], shapes[8]
    return 2 * total * bag_shape[1] * (2 * w_tanh_shape[0] + n_pools)


@flop_formula(torch.ops.survfuse.gated_attention_pool_backward)
def _backward_flops(*arguments, **_) -> int:
    (_, width), (n_hidden, _), (n_pools, _) = arguments[4], arguments[5], arguments[9]
    total, needs_bag = arguments[14], arguments[-8]
    # as if every parameter were trained
    per_row = 12 * n_hidden + 4 * n_pools if needs_bag else 8 * n_hidden + 2 * n_pools
    return total * width * per_row
