"""`MultiScaleDeformableAttention` against Deformable DETR's module, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from survfuse.layers import MSDeformAttnFunction, MultiScaleDeformableAttention

SHAPES = [(4, 6), (2, 3), (1, 1)]
N_ROWS = 31
STARTS, META = torch.tensor([0, 24, 30]), torch.zeros(2, N_ROWS, device="meta")


def make_module(**options) -> MultiScaleDeformableAttention:
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(24, n_levels=3, n_heads=4, n_points=2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            # some start at zero, where nobody would see them being mixed up
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def make_inputs(sides: int = 2, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    query = torch.randn(2, queries, 24, generator=g)
    reference = 0.2 + 0.6 * torch.rand(2, queries, 3, sides, generator=g)
    return query, reference, torch.randn(2, N_ROWS, 24, generator=g)


def golden(state: dict[str, np.ndarray], query, reference, pixels, mask=None) -> np.ndarray:
    """Deformable DETR's module in loops over numpy numbers: eq. 2 and 3 of the paper."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    n_batches, n_queries, width = query.shape
    heads, points = 4, 2
    value = linear("value_proj", pixels)
    if mask is not None:
        value[mask] = 0
    value = value.reshape(n_batches, -1, heads, width // heads)
    offsets = linear("sampling_offsets", query).reshape(n_batches, n_queries, heads, 3, points, 2)
    logits = linear("attention_weights", query).reshape(n_batches, n_queries, heads, 3 * points)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros((n_batches, n_queries, heads, width // heads))
    for b, q, h, level, p in np.ndindex(n_batches, n_queries, heads, 3, points):
        height, columns = SHAPES[level]
        size = np.array([columns, height])
        ref, offset = reference[b, q, level], offsets[b, q, h, level, p]
        if len(ref) == 2:
            location = ref + offset / size
        else:
            location = ref[:2] + offset / points * ref[2:] * 0.5
        x, y = location * size - 0.5
        first = sum(a * c for a, c in SHAPES[:level])
        for row in range(height):
            for column in range(columns):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                pixel = value[b, first + row * columns + column, h]
                out[b, q, h] += weights[b, q, h, level * points + p] * share * pixel
    return linear("output_proj", out.reshape(n_batches, n_queries, width))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sides", [2, 4])
def test_golden_output_of_a_released_state(sides: int, masked: bool) -> None:
    module, inputs = make_module(), make_inputs(sides)
    state = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    mask = torch.rand(2, N_ROWS, generator=torch.Generator().manual_seed(2)) < 0.3
    mask = mask if masked else None
    expected = golden(
        state, *(t.double().numpy() for t in inputs), None if mask is None else mask.numpy()
    )
    got = module(*inputs, SHAPES, input_padding_mask=mask)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-5, rtol=1e-5)


def test_names_and_shapes_of_a_released_state() -> None:
    """Of Deformable DETR's encoder, layer 0; mmcv's and Hugging Face's are called the same."""
    released = {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    module = MultiScaleDeformableAttention()
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == released
    module.load_state_dict({name: torch.randn(shape) for name, shape in released.items()})


def test_initialisation() -> None:
    module = MultiScaleDeformableAttention(16, n_levels=2, n_heads=4, n_points=3)
    offsets = module.sampling_offsets.bias.detach().view(4, 2, 3, 2)
    right, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for level in range(2):
        for point in range(3):
            torch.testing.assert_close(offsets[0, level, point], right * (point + 1))
            torch.testing.assert_close(offsets[1, level, point], down * (point + 1))
    for parameter in (
        module.sampling_offsets.weight,
        module.attention_weights.weight,
        module.value_proj.bias,
    ):
        assert not parameter.any()
    assert module.value_proj.weight.any()


def test_every_parameter_and_input_gets_a_gradient() -> None:
    module = make_module()
    inputs = [tensor.requires_grad_() for tensor in make_inputs(4)]
    module(*inputs, SHAPES).square().sum().backward()
    for tensor in (*inputs, *module.parameters()):
        assert bool(tensor.grad.abs().sum() > 0)


def test_backends_agree_and_16_bits_run() -> None:
    inputs = make_inputs()
    expected = make_module(backend="reference")(*inputs, SHAPES)
    for backend in (None, "tiled"):
        torch.testing.assert_close(make_module(backend=backend)(*inputs, SHAPES), expected)
    narrow = make_module().bfloat16()(*(t.bfloat16() for t in inputs), SHAPES)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - expected).norm() < 0.05 * expected.norm()


def test_autocast_runs() -> None:
    module, inputs = make_module(), make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*inputs, SHAPES)
    expected = module(*inputs, SHAPES)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_the_extension_s_function() -> None:
    g = torch.Generator().manual_seed(3)
    value = torch.randn(3, N_ROWS, 2, 8, generator=g, requires_grad=True)
    locations = torch.rand(3, 7, 2, 3, 2, 2, generator=g, requires_grad=True)
    weights = torch.rand(3, 7, 2, 3, 2, generator=g, requires_grad=True)
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 24, 30])
    # no batch is a multiple of 64, which the extension asks for
    out = MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    assert out.shape == (3, 7, 16)
    assert all(
        g.abs().sum() > 0 for g in torch.autograd.grad(out.sum(), (value, locations, weights))
    )
    for wrong in (locations.int(), locations > 0):
        with pytest.raises(TypeError, match=r"sampling_locations is torch.*; it must be bf16"):
            MSDeformAttnFunction.apply(value, shapes, starts, wrong, weights, 64)
    with pytest.raises(TypeError, match="value_level_start_index is list; it must be a tensor"):
        MSDeformAttnFunction.apply(value, shapes, [0, 24, 30], locations, weights, 64)
    with pytest.raises(TypeError, match="value_spatial_shapes is None; it must be int64"):
        MSDeformAttnFunction.apply(value, None, starts, locations, weights, 64)
    with pytest.raises(ValueError, match=r"value_spatial_shapes is .* value has 31 rows"):
        MSDeformAttnFunction.apply(value, shapes + 1, starts, locations, weights, 64)
    narrow = MSDeformAttnFunction.apply(value.half(), shapes, starts, locations.half(), weights, 64)
    assert narrow.dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"value_level_start_index is \[0, 23, 30\].*\[0, 24, 30\]"
    ):
        MSDeformAttnFunction.apply(value, shapes, torch.tensor([0, 23, 30]), locations, weights, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 30}, "d_model is 30 and n_heads 8"),
        ({"n_levels": 0}, "n_levels is 0"),
        ({"n_points": 0}, "n_points is 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": "4"}, "n_heads is '4'; it must be a positive integer"),
        ({"n_levels": None}, "n_levels is None; it must be a positive integer"),
        ({"d_model": 16.0}, "d_model is 16.0; it must be a positive integer"),
        ({"n_points": True}, "n_points is True; it must be a positive integer"),
        ({"backend": "nativ"}, "backend is 'nativ'"),
    ],
)
def test_refused_sizes(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleDeformableAttention(**arguments)


def test_parameters_are_floating() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.int32; it must be bf16"):
        MultiScaleDeformableAttention(dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": torch.zeros(2, 5, 23)}, ValueError, r"query has shape.*\[B, Q, 24\]"),
        ({"query": None}, TypeError, "query is NoneType"),
        ({"input_flatten": torch.zeros(2, 24)}, ValueError, r"input_flatten.*\[B, S, 24\]"),
        ({"reference_points": torch.zeros(2, 5, 3, 3)}, ValueError, "reference_points has shape"),
        ({"reference_points": torch.zeros(2, 5, 3, 2).int()}, TypeError, "points is torch.int32"),
        ({"reference_points": torch.ones(2, 5, 3, 2) > 0}, TypeError, "points is torch.bool"),
        ({"query": torch.zeros(2, 5, 24).double()}, TypeError, "query is .*64 and the layer .*32"),
        ({"input_flatten": torch.zeros(2, N_ROWS, 24).half()}, TypeError, "input_flatten is .*16"),
        ({"query": torch.zeros(1, 5, 24)}, ValueError, "they must hold the same batches"),
        *(
            ({name: torch.zeros(shape, device="meta")}, ValueError, f"{name} is on meta and the")
            for name, shape in (
                ("query", (2, 5, 24)),
                ("input_flatten", (2, N_ROWS, 24)),
                ("reference_points", (2, 5, 3, 2)),
            )
        ),
        (
            {"input_spatial_shapes": SHAPES[:2]},
            ValueError,
            "input_spatial_shapes is .*, 30 pixels in all; input_flatten has 31 rows",
        ),
        (
            {"input_spatial_shapes": torch.tensor(SHAPES[:2])},
            ValueError,
            "input_spatial_shapes is .*, 30 pixels in all; input_flatten has 31 rows",
        ),
        (
            {"input_spatial_shapes": [(31, 1)]},
            ValueError,
            "input_spatial_shapes has 1 levels; the layer has n_levels = 3",
        ),
        ({"input_padding_mask": META > 0}, ValueError, "input_padding_mask is on meta and"),
        *(
            (
                {"input_spatial_shapes": shapes, "input_level_start_index": STARTS},
                TypeError,
                "input_spatial_shapes is .*; it must .* pairs of whole numbers",
            )
            for shapes in (None, "ab", [(4, 6), (2,)])
        ),
        ({"input_level_start_index": [0, 24, 30]}, TypeError, "input_level_start_index is list"),
        ({"input_level_start_index": "foo"}, TypeError, "start_index is str; it must be a tensor"),
        ({"input_level_start_index": STARTS.int()}, TypeError, "start_index is torch.int32"),
        ({"input_level_start_index": STARTS.to("meta")}, ValueError, "start_index is on meta"),
        ({"input_level_start_index": STARTS[:2]}, ValueError, r"start_index .* must be \[3\]"),
        ({"input_padding_mask": torch.zeros(2, N_ROWS)}, TypeError, "must be a bool tensor"),
        ({"input_padding_mask": torch.zeros(2, 3) > 0}, ValueError, r"must be \[2, 31\]"),
        ({"input_level_start_index": torch.tensor([0, 1, 2])}, ValueError, r"\[0, 24, 30\]"),
    ],
)
def test_refused_inputs(changed: dict, error: type, message: str) -> None:
    query, reference, pixels = make_inputs()
    arguments = {
        "query": query,
        "reference_points": reference,
        "input_flatten": pixels,
        "input_spatial_shapes": SHAPES,
    }
    with pytest.raises(error, match=message):
        make_module()(**(arguments | changed))
