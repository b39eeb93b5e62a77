"""Calls of multi-scale deformable attention that its backends are tested with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from survfuse import ops

FORMS = ("locations", "points", "boxes")


@dataclass(frozen=True)
class Case:
    """Sizes of a call, and where its samples lie."""

    name: str
    shapes: tuple[tuple[int, int], ...] = ((5, 7), (3, 4), (2, 2))
    batch: int = 2
    queries: int = 9
    heads: int = 2
    dim: int = 8
    points: int = 3
    shift: float = 0.0  # of the logits
    where: str = "around"  # "around" the levels, "far" outside, on "borders", on "integers", "nan"


CASES = (
    Case("three levels"),
    Case("one level", shapes=((6, 5),), points=4),
    Case("seven levels", shapes=((5, 7), (1, 1), (4, 4), (1, 6), (3, 1), (2, 2), (2, 5)), points=1),
    Case("single pixels", shapes=((1, 1), (1, 1))),
    Case("a level without pixels", shapes=((3, 4), (0, 5), (2, 2))),
    Case("no queries", queries=0),
    Case("no batch", batch=0),
    Case("one of everything", shapes=((1, 1),), batch=1, queries=1, heads=1, dim=1, points=1),
    Case("batch of 257", batch=257, queries=2, heads=1, shapes=((2, 3),)),
    Case("odd width", dim=13, points=5),
    Case("width 32", dim=32, points=4),
    Case("width 64", dim=64, queries=5),
    Case("width 256", dim=256, queries=3, heads=1),
    Case("far outside", where="far"),
    Case("on borders", where="borders", shapes=((4, 8), (2, 2), (1, 1)), points=2),
    Case("on integers", where="integers", shapes=((4, 8), (2, 2), (1, 1)), points=2),
    Case("NaN positions", where="nan"),
    Case("logits far from zero", shift=500.0),
    Case("many queries", queries=131, heads=3, dim=24, batch=1),
)


@dataclass(frozen=True)
class Call:
    """The tensors of one call, in the order of the op, without the shapes."""

    form: str
    shapes: tuple[tuple[int, int], ...]
    tensors: dict[str, Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """In another type; coordinates stay in fp32 beside 16 bits."""
        wide = dtype if torch.finfo(dtype).bits >= 32 else torch.float32
        narrow = ("value", "attention_weights", "attention_logits")
        tensors = {
            name: tensor.detach().to(device, dtype if name in narrow else wide).requires_grad_()
            for name, tensor in self.tensors.items()
        }
        return Call(self.form, self.shapes, tensors)

    def run(self, backend: str | None) -> Tensor:
        """By the op of the form."""
        return OPS[self.form](spatial_shapes=self.shapes, **self.tensors, backend=backend)


OPS: dict[str, Callable] = {
    "locations": ops.multi_scale_deformable_attention,
    "points": ops.multi_scale_deformable_attention_from_offsets,
    "boxes": ops.multi_scale_deformable_attention_from_offsets,
}


def make_call(case: Case, form: str = "locations") -> Call:
    """In fp64."""
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n_rows, n_levels = sum(h * w for h, w in case.shapes), len(case.shapes)
    value = random(case.batch, n_rows, case.heads, case.dim)
    grid = (case.batch, case.queries, case.heads, n_levels, case.points)
    locations = _locations(case, grid, g)
    if form == "locations":
        weights = random(*grid).flatten(3).softmax(-1).reshape(grid)
        tensors = {"sampling_locations": locations, "attention_weights": weights}
        return Call(form, case.shapes, {"value": value, **tensors})
    sides = 2 if form == "points" else 4
    reference = torch.rand(*grid[:2], n_levels, sides, generator=g, dtype=torch.float64)
    size = torch.tensor(case.shapes, dtype=torch.float64).flip(-1)[:, None]
    step = 1 / size.clamp(min=1)
    if form == "boxes":
        reference[..., 2:] = 0.2 + 0.5 * reference[..., 2:]
        step = reference[:, :, None, :, None, 2:] * (0.5 / case.points)
    if case.where in ("borders", "integers"):
        # powers of two, so that nothing is rounded
        reference = (reference * 4).round() / 4
        reference[..., 2:] = 0.5
        step = step if form == "points" else reference[:, :, None, :, None, 2:] * 0.5 / case.points
    offsets = (locations - reference[:, :, None, :, None, :2]) / step
    if case.where == "nan" and case.queries > 2:
        reference[:, 0, 0, -1], reference[:, 1] = torch.nan, torch.inf
    names = ("reference_points", "sampling_offsets", "attention_logits")
    logits = random(*grid) + case.shift
    named = dict(zip(names, (reference, offsets, logits), strict=True))
    return Call(form, case.shapes, {"value": value, **named})


def _locations(case: Case, grid: tuple[int, ...], g: torch.Generator) -> Tensor:
    around = torch.rand(*grid, 2, generator=g, dtype=torch.float64) * 1.6 - 0.3
    if case.where == "far":
        return around * 1e6 - 3e5
    size = torch.tensor(case.shapes, dtype=torch.float64).flip(-1)[:, None]
    if case.where == "borders":
        # a pixel's extent: -1 and the size are the last places without a sample
        steps = torch.randint(0, 5, (*grid, 2), generator=g)
        pixel = torch.stack([size * 0 - 1, size * 0 - 0.5, size * 0, size - 1, size], -1)
        pixel = pixel.expand(*grid, 2, 5).gather(-1, steps[..., None])[..., 0]
        return (pixel + 0.5) / size
    if case.where == "integers":
        return ((around * size).round() + 0.5) / size
    if case.where == "nan":
        lost = torch.rand(*grid, 2, generator=g) < 0.2
        return torch.where(lost, torch.nan, around)
    return around


def plain_deformable_attention(call: Call) -> Tensor:
    """As anybody would write it: `grid_sample` on every level, in the types given."""
    t = call.tensors
    value = t["value"]
    if call.form == "locations":
        locations, weights = t["sampling_locations"], t["attention_weights"]
    else:
        reference, offsets = t["reference_points"], t["sampling_offsets"]
        weights = t["attention_logits"].flatten(3).softmax(-1).reshape(offsets.shape[:-1])
        size = offsets.new_tensor(call.shapes).flip(-1).clamp(min=1)[:, None]
        step = 1 / size
        if call.form == "boxes":
            step = reference[:, :, None, :, None, 2:] * (0.5 / offsets.shape[4])
        locations = reference[:, :, None, :, None, :2] + offsets * step
    n_batches, n_queries, heads, _, n_points, _ = locations.shape
    out, start = 0.0, 0
    for level, (height, width) in enumerate(call.shapes):
        pixels = value[:, start : start + height * width]
        start += height * width
        if height * width == 0:
            continue
        maps = pixels.permute(0, 2, 3, 1).reshape(n_batches * heads, -1, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = grid_sample(maps.to(grid.dtype), grid, align_corners=False).to(value.dtype)
        shares = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, n_queries, n_points)
        out = out + (sampled * shares).sum(-1)
    return out.unflatten(0, (n_batches, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
