"""`multi_scale_deformable_attention`: each query looks at a few points of every level of a pyramid.

Oracle: survfuse/reference/multi_scale_deformable_attention.py.
Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse import reference
from survfuse.deformable import Samples, SamplingNeeds
from survfuse.ops.backends import Selection, backend_obstacle, check_backend
from survfuse.ops.checks import check_coordinates, check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ops.registration import (
    call_op,
    call_reference,
    check_reference,
    fake_gradients,
    gradients_like,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    without_autocast,
)

_MODULES = {
    "tiled": "survfuse.tiled.multi_scale_deformable_attention",
    "native": "survfuse.native.multi_scale_deformable_attention",
    "triton": "survfuse.triton_kernels.multi_scale_deformable_attention",
}
# of an error: where the number of levels comes from
_LEVELS = ", with the levels of spatial_shapes"
Shapes = Tensor | Sequence[tuple[int, int]]


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""A weighted sum of bilinear samples from every level of a pyramid, per query and head.

    .. math::
        o_{qh} = \sum_{l, p} A_{qhlp}\;
                 \mathrm{bilinear}(V_{hl},\; loc_{qhlp} \cdot (W_l, H_l) - 0.5)

    Args:
        value: [B, S, H, d] the levels' pixels one behind another, row by row; bf16, fp16, fp32, or
            fp64. Any strides with a unit last one.
        spatial_shapes: [L, 2] (height, width) of each level, S pixels in all: int64, or pairs of
            numbers. A tensor on a GPU is not looked at on the host: what does not fit S is not
            sampled there. In compiled code backend="reference" does not compare it with S.
        sampling_locations: [B, Q, H, L, P, 2] (x, y) in units of the level's width and height;
            fp32 (fp64 beside an fp64 value), whatever the type of the value: 16 bits hold no
            position within a pixel of a large map. (0, 0) is a level's upper left corner; samples
            beyond its border fade to zero over half a pixel, as `grid_sample` with zero padding and
            `align_corners=False`. A NaN lies outside.
        attention_weights: [B, Q, H, L, P], any floating type.
        backend: None, "reference", "tiled", "triton" or "native".

    Returns:
        [B, Q, H * d], the type of the value; differentiable in value, locations and weights.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: coordinates, products and sums in fp32 (fp64); the gradient of the value is summed in
    fp32 and rounded once.
    Determinism: bitwise on the CPU. On a GPU the gradient of the value is added by atomics, in any
    order, unless `torch.use_deterministic_algorithms(True)` asks for sums in fixed point.
    Cost: 8 B Q H L P d operations forward and twice that backward; each sample gathers 4 d numbers.
    vmap: by the fallback of torch, one call per sample; batches are B.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, eq. 3.

    Example:
        >>> value = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
        >>> centre = torch.full((1, 1, 1, 1, 1, 2), 0.5)
        >>> weights = torch.ones(1, 1, 1, 1, 1)
        >>> multi_scale_deformable_attention(value, [(2, 2)], centre, weights)
        tensor([[[2.5000]]])
    """
    shapes = _check_value(value, spatial_shapes)
    n_batches, _, heads, _ = value.shape
    n_levels, beside = len(shapes), {"device": value.device, "beside": "the value"}
    points_shape = (n_batches, "Q", heads, n_levels, "P", 2)
    check_tensor(
        "sampling_locations", sampling_locations, shape=points_shape, note=_LEVELS, **beside
    )
    check_coordinates("sampling_locations", sampling_locations, value, "value")
    points_shape = tuple(sampling_locations.shape[:-1])
    _check_points("sampling_locations", sampling_locations)
    check_tensor("attention_weights", attention_weights, shape=points_shape, **beside)
    check_backend(backend)
    if backend == "reference":
        check_reference(shapes, "spatial_shapes")
        check_shapes_eagerly(shapes, value)
        return call_reference(
            reference.multi_scale_deformable_attention,
            value,
            shapes,
            sampling_locations,
            attention_weights,
        )
    return call_op(
        "multi_scale_deformable_attention",
        _forward,
        value,
        shapes,
        sampling_locations,
        attention_weights,
        None,
        backend or "",
    )[0]


def multi_scale_deformable_attention_from_offsets(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The same from what a network's layers give: the softmax and the locations are inside.

    .. math::
        A_{qh} = \mathrm{softmax}_{lp}(logits_{qh}), \quad
        loc_{qhlp} = ref_{ql} + offset_{qhlp} / (W_l, H_l)
        \;\text{ or }\; ref_{ql} + offset_{qhlp} \cdot (w, h)_{ql} / (2 P)

    Nothing of the size of the weights is written beside the gradients of the inputs.

    Args:
        value, spatial_shapes, backend: as above.
        reference_points: [B, Q, L, 2] (x, y), or [B, Q, L, 4] boxes (x, y, width, height), in units
            of the level's width and height; fp32 (fp64 beside an fp64 value).
        sampling_offsets: [B, Q, H, L, P, 2], the same type: in pixels, or beside boxes in half
            sides over P.
        attention_logits: [B, Q, H, L, P] or [B, Q, H, L * P], any floating type.

    Returns:
        [B, Q, H * d], the type of the value; differentiable in everything but the shapes.

    Raises:
        TypeError, ValueError, RuntimeError: as above.

    Example:
        >>> value = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
        >>> centre = torch.full((1, 1, 1, 2), 0.5)
        >>> offsets = torch.tensor([0.5, 0.0]).expand(1, 1, 1, 1, 1, 2)
        >>> logits = torch.zeros(1, 1, 1, 1)
        >>> multi_scale_deformable_attention_from_offsets(value, [(2, 2)], centre, offsets, logits)
        tensor([[[3.]]])
    """
    shapes = _check_value(value, spatial_shapes)
    n_batches, _, heads, _ = value.shape
    n_levels, beside = len(shapes), {"device": value.device, "beside": "the value"}
    offsets_shape = (n_batches, "Q", heads, n_levels, "P", 2)
    check_tensor("sampling_offsets", sampling_offsets, shape=offsets_shape, note=_LEVELS, **beside)
    check_coordinates("sampling_offsets", sampling_offsets, value, "value")
    _check_points("sampling_offsets", sampling_offsets)
    _, n_queries, *_, n_points, _ = sampling_offsets.shape
    sides = 4 if isinstance(reference_points, Tensor) and reference_points.shape[-1:] == (4,) else 2
    reference_shape = (n_batches, n_queries, n_levels, sides)
    note = "" if sides == 4 else ", or hold 4 numbers each for boxes"
    check_tensor("reference_points", reference_points, shape=reference_shape, note=note, **beside)
    check_coordinates("reference_points", reference_points, value, "value")
    logits_shape = (n_batches, n_queries, heads, n_levels, n_points)
    if isinstance(attention_logits, Tensor) and attention_logits.dim() == 4:
        check_tensor(
            "attention_logits",
            attention_logits,
            shape=(*logits_shape[:3], n_levels * n_points),
            **beside,
        )
        attention_logits = attention_logits.unflatten(3, (n_levels, n_points))
    note = ", or flat [B, Q, H, L * P]"
    check_tensor("attention_logits", attention_logits, shape=logits_shape, note=note, **beside)
    check_backend(backend)
    if backend == "reference":
        check_reference(shapes, "spatial_shapes")
        check_shapes_eagerly(shapes, value)
        return call_reference(
            reference.multi_scale_deformable_attention_from_offsets,
            value,
            shapes,
            reference_points,
            sampling_offsets,
            attention_logits,
        )
    inputs = (value, shapes, sampling_offsets, attention_logits, reference_points)
    return call_op("multi_scale_deformable_attention", _forward, *inputs, backend or "")[0]


def _check_value(value: Tensor, spatial_shapes: Shapes) -> Tensor:
    """The shapes as a tensor beside the value, which is [B, S, H, d]."""
    check_value(value)
    return read_shapes(spatial_shapes, value).to(value.device)


def check_value(value: Tensor) -> None:
    """Raise unless `value` is [B, S, H, d] with a head and a channel."""
    if not isinstance(value, Tensor):
        raise TypeError(f"value is {type(value).__name__}; it must be a tensor")
    check_tensor("value", value, shape=("B", "S", "H", "d"), device=value.device)
    if value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}; it needs a head and a channel")


def read_shapes(
    spatial_shapes: Shapes, value: Tensor, names: tuple[str, str] = ("spatial_shapes", "value")
) -> Tensor:
    """The shapes as an int64 tensor [L, 2], where they lie; `names` are those of the arguments."""
    name, stored = names
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dtype != torch.int64:
            raise TypeError(f"{name} is {spatial_shapes.dtype}; it must be int64")
        shapes = spatial_shapes
    else:
        shapes = _shapes_of_pairs(name, spatial_shapes)
    if shapes.dim() != 2 or shapes.shape[0] == 0 or shapes.shape[1] != 2:
        raise ValueError(f"{name} has shape {tuple(shapes.shape)}; it must be [L, 2], L at least 1")
    if shapes.is_meta and not value.is_meta:
        raise ValueError(f"{name} is on meta and {stored} on {value.device}; it must hold numbers")
    if not isinstance(spatial_shapes, Tensor):
        # known to the host: wrong ones need not wait for a kernel
        check_shapes_eagerly(shapes, value, names)
    return shapes


def _shapes_of_pairs(name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    try:
        shapes = torch.as_tensor(pairs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is {pairs!r}; it must be int64 [L, 2] or pairs of whole numbers"
        ) from error
    kind = shapes.dtype
    if shapes.numel() and (kind.is_floating_point or kind.is_complex or kind == torch.bool):
        raise TypeError(f"{name} is {pairs!r}; it must hold pairs of whole numbers")
    return shapes.to(torch.int64)


def check_shapes_eagerly(
    shapes: Tensor, value: Tensor, names: tuple[str, str] = ("spatial_shapes", "value")
) -> None:
    """The check of the op where no op stands between; a graph being compiled holds no values."""
    if not torch.compiler.is_compiling():
        _check_shapes(shapes, value.shape[1], names)


def _check_shapes(
    shapes: Tensor, n_rows: int, names: tuple[str, str] = ("spatial_shapes", "value")
) -> None:
    """On the CPU, raise unless the levels are as large as the value."""
    if shapes.device.type != "cpu":
        return
    listed, (name, stored) = shapes.tolist(), names
    if any(side < 0 for pair in listed for side in pair):
        raise ValueError(f"{name} is {listed}; a height or width is at least 0")
    n_pixels = sum(height * width for height, width in listed)
    if n_pixels != n_rows:
        raise ValueError(
            f"{name} is {listed}, {n_pixels} pixels in all; {stored} has {n_rows} rows, and "
            "they must be as many"
        )


def _check_points(name: str, points: Tensor) -> None:
    if points.shape[4] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; P must be at least 1")


def select_deformable_backend(
    requested: str | None, *, device: torch.device, dtype: torch.dtype
) -> Selection:
    """The backend of multi-scale deformable attention; arguments as in `select_backend`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve the call; the message says why.
    """
    check_backend(requested)
    if requested is not None:
        obstacle = backend_obstacle(requested, device=device, dtype=dtype, has_cuda_kernel=True)
        if obstacle:
            raise RuntimeError(f"backend={requested!r} cannot serve this call: {obstacle}")
        return Selection(requested, "asked for")
    obstacles = []
    for backend, reason in (
        ("native", f"the C++ kernels of this {'GPU' if device.type == 'cuda' else 'processor'}"),
        *([("triton", "the fused kernels of this GPU")] if device.type == "cuda" else []),
    ):
        obstacle = backend_obstacle(backend, device=device, dtype=dtype, has_cuda_kernel=True)
        if obstacle is None:
            return Selection(backend, "; ".join([reason, *obstacles]))
        obstacles.append(f"no {backend} kernel: {obstacle}")
    return Selection("tiled", "; ".join(obstacles))


_INPUTS = (
    "Tensor value, Tensor shapes, Tensor points, Tensor weights, Tensor? reference, str backend"
)
_NEEDS = ", ".join(f"bool needs_{name}" for name in SamplingNeeds._fields)


def _implementation(backend: str, value: Tensor):
    chosen = select_deformable_backend(backend or None, device=value.device, dtype=value.dtype)
    return importlib.import_module(_MODULES[chosen.backend])


def _prepared(value: Tensor, *samples: Tensor | None) -> tuple[Tensor, Samples]:
    """A value with a unit last stride, and the rest contiguous."""
    value = value if value.stride(-1) == 1 or value.numel() == 0 else value.contiguous()
    return value, Samples(*(None if tensor is None else tensor.contiguous() for tensor in samples))


@torch.library.custom_op(
    "survfuse::multi_scale_deformable_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)
@without_autocast
def _forward(value, shapes, points, weights, reference_points, backend):
    _check_shapes(shapes, value.shape[1])
    module = _implementation(backend, value)
    out, lse = module.multi_scale_deformable_attention_forward(
        *_prepared(value, shapes, points, weights, reference_points)
    )
    return out, points.new_empty(0) if lse is None else lse


@_forward.register_fake
def _(value, shapes, points, weights, reference_points, backend):
    out = value.new_empty((*points.shape[:2], value.shape[2] * value.shape[3]))
    lse_shape = (0,) if reference_points is None else points.shape[:3]
    return out, points.new_empty(lse_shape)


@torch.library.custom_op(
    "survfuse::multi_scale_deformable_attention_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor lse, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _backward(d_out, lse, value, shapes, points, weights, reference_points, backend, *needs):
    module = _implementation(backend, value)
    gradients = module.multi_scale_deformable_attention_backward(
        d_out.contiguous(),
        None if reference_points is None else lse,
        *_prepared(value, shapes, points, weights, reference_points),
        SamplingNeeds(*needs),
    )
    return gradients_like(gradients, (value, points, weights, reference_points))


@_backward.register_fake
def _(d_out, lse, value, shapes, points, weights, reference_points, backend, *needs):
    return fake_gradients((value, points, weights, reference_points), needs)


def _save(ctx, inputs, output):
    save_call(ctx, inputs, output)


def _differentiate(ctx, d_out, d_lse):
    (_, lse), inputs = saved_call(ctx)
    # the shapes lie between the value and the points
    value, _, *rest = ctx.needs_input_grad[:5]
    gradients = to_autograd(
        call_op("multi_scale_deformable_attention", _backward, d_out, lse, *inputs, value, *rest),
        (value, *rest),
        4,
    )
    return gradients[0], None, *gradients[1:], None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("multi_scale_deformable_attention"))


@flop_formula(torch.ops.survfuse.multi_scale_deformable_attention)
def _forward_flops(value_shape, shapes_shape, points_shape, *_, **__) -> int:
    samples = 1
    for size in points_shape[:-1]:
        samples *= size
    return 8 * samples * value_shape[3]


@flop_formula(torch.ops.survfuse.multi_scale_deformable_attention_backward)
def _backward_flops(d_out_shape, lse_shape, *arguments, **_) -> int:
    return 2 * _forward_flops(*arguments[:3])
