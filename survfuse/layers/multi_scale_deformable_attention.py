"""`MultiScaleDeformableAttention`: Deformable DETR's module, without its extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from survfuse.ops import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_from_offsets,
)
from survfuse.ops.backends import check_backend
from survfuse.ops.checks import check_dtype, check_layer_input, check_size, check_tensor
from survfuse.ops.multi_scale_deformable_attention import (
    check_shapes_eagerly,
    check_value,
    read_shapes,
)
from survfuse.pooling import accumulation_type


class MultiScaleDeformableAttention(nn.Module):
    r"""Drop-in for `MSDeformAttn` of Deformable DETR and what descends from it.

    .. math:: W_o\, \mathrm{concat}_h \sum_{l, p} A_{hlp}\, (W_v x)_h[ref_l + offset_{hlp}] + b_o

    Parameters have the names, shapes and initialisation of Deformable DETR's module, which those of
    mmcv, Mask2Former, DINO, GroundingDINO and Hugging Face share, so their checkpoints load. No
    extension is built, batches need no `im2col_step`, and heads may have any width. The softmax and
    the locations are computed inside the kernel.

    Calls are those of Deformable DETR. What mmcv and Hugging Face do otherwise:

    ======================  =========================  ==================  =========================
    what                    here                       mmcv                Hugging Face
    ======================  =========================  ==================  =========================
    sizes, in order         d_model, n_levels,         embed_dims,         (config, num_heads,
                            n_heads, n_points          num_heads,          n_points)
                                                       num_levels,
                                                       num_points
    queries                 `query`                    `query`             `hidden_states`
    pixels                  `input_flatten`            `value`             `encoder_hidden_states`
    True in the mask        padding                    padding             a valid pixel
    batches                 first                      second, unless      first
                                                       `batch_first`
    position embeddings     added by the caller        `query_pos`         `position_embeddings`
    dropout, residual sum   the caller's               inside              the caller's
    result                  a tensor                   a tensor            (tensor, weights)
    ======================  =========================  ==================  =========================

    mmcv's order of levels and heads is the other one, and a state that has as many of both loads
    either way: give them by name.

    Args:
        d_model: width of queries, inputs and results; a multiple of `n_heads`.
        n_levels: levels of the pyramid L.
        n_heads: heads H.
        n_points: samples P of each head on each level.
        device, dtype: of the parameters.
        backend: of the op; None for the fastest that can serve the call.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, eq. 3.

    Example:
        >>> attention = MultiScaleDeformableAttention(16, n_levels=2, n_heads=4)
        >>> shapes = [(4, 4), (2, 2)]
        >>> pyramid, centres = torch.randn(1, 4 * 4 + 2 * 2, 16), torch.rand(1, 9, 2, 2)
        >>> attention(torch.randn(1, 9, 16), centres, pyramid, shapes).shape
        torch.Size([1, 9, 16])
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("d_model", d_model),
            ("n_levels", n_levels),
            ("n_heads", n_heads),
            ("n_points", n_points),
        ):
            check_size(name, size)
        if d_model % n_heads:
            raise ValueError(
                f"d_model is {d_model} and n_heads {n_heads}; the first must be a multiple of the "
                "second"
            )
        check_backend(backend)
        check_dtype(dtype)
        self.d_model, self.n_levels, self.n_heads = d_model, n_levels, n_heads
        self.n_points, self.backend = n_points, backend
        samples, options = n_heads * n_levels * n_points, {"device": device, "dtype": dtype}
        self.sampling_offsets = nn.Linear(d_model, samples * 2, **options)
        self.attention_weights = nn.Linear(d_model, samples, **options)
        self.value_proj = nn.Linear(d_model, d_model, **options)
        self.output_proj = nn.Linear(d_model, d_model, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, its point p at p + 1 pixels, all alike."""
        angles = torch.arange(self.n_heads, dtype=torch.float64) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1)[:, None]
        bias = (direction[:, None, None] * steps).expand(-1, self.n_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | list[tuple[int, int]],
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of `query` to a few points around its reference points.

        Args:
            query: [B, Q, d_model].
            reference_points: [B, Q, L, 2] (x, y) in [0, 1], or [B, Q, L, 4] boxes (x, y, width,
                height). 16-bit ones are widened: what they have lost is lost.
            input_flatten: [B, S, d_model] the levels' pixels, one level behind another.
            input_spatial_shapes: [L, 2] (height, width): int64, or pairs of numbers.
            input_level_start_index: [L] int64, the first row of each level. It follows from the
                shapes and is only compared with them, on the CPU.
            input_padding_mask: [B, S] bool, True where a pixel is padding and counts as zero.

        Returns:
            [B, Q, d_model].

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        """
        self._check(query, reference_points, input_flatten, input_padding_mask)
        names = ("input_spatial_shapes", "input_flatten")
        shapes = _shapes(input_spatial_shapes, input_flatten, names, input_level_start_index)
        if len(shapes) != self.n_levels:
            raise ValueError(
                f"input_spatial_shapes has {len(shapes)} levels; the layer has n_levels = "
                f"{self.n_levels}"
            )
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        kind, grid = accumulation_type(value.dtype), (self.n_heads, self.n_levels, self.n_points)
        out = multi_scale_deformable_attention_from_offsets(
            value.unflatten(-1, (self.n_heads, -1)),
            shapes,
            reference_points.to(kind),
            self.sampling_offsets(query).to(kind).unflatten(-1, (*grid, 2)),
            self.attention_weights(query).unflatten(-1, grid),
            backend=self.backend,
        )
        return self.output_proj(out)

    def _check(self, query, reference_points, pixels, mask) -> None:
        weight, width = self.value_proj.weight, self.d_model
        check_layer_input("query", query, shape=("B", "Q", width), weight=weight)
        check_layer_input("input_flatten", pixels, shape=("B", "S", width), weight=weight)
        if pixels.shape[0] != query.shape[0]:
            raise ValueError(
                f"input_flatten has shape {tuple(pixels.shape)} and query {tuple(query.shape)}; "
                "they must hold the same batches"
            )
        sides = (
            4 if isinstance(reference_points, Tensor) and reference_points.shape[-1:] == (4,) else 2
        )
        check_tensor(
            "reference_points",
            reference_points,
            shape=(*query.shape[:2], self.n_levels, sides),
            device=weight.device,
            beside="the layer",
            note="" if sides == 4 else ", or hold 4 numbers each for boxes",
        )
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"input_padding_mask is {found}; it must be a bool tensor")
        if mask.device != pixels.device:
            raise ValueError(
                f"input_padding_mask is on {mask.device} and input_flatten on {pixels.device}; "
                "move one of them"
            )
        if mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"input_padding_mask has shape {tuple(mask.shape)}; it must be "
                f"{list(pixels.shape[:2])}"
            )


class MSDeformAttnFunction:
    """The autograd function of Deformable DETR's extension, by its name and arguments.

    `apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
    im2col_step)` is `survfuse.ops.multi_scale_deformable_attention`: on any device, in any floating
    type, for any batch. 16-bit locations are widened: what they have lost is lost.

    Example:
        >>> value, shapes = torch.ones(1, 4, 1, 8), torch.tensor([[2, 2]])
        >>> centre, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> starts = torch.tensor([0])
        >>> MSDeformAttnFunction.apply(value, shapes, starts, centre, weights, 64).shape
        torch.Size([1, 1, 8])
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        """Out [B, Q, H * d]; `im2col_step` changes nothing.

        Args:
            value: [B, S, H, d].
            value_spatial_shapes: [L, 2] int64 (height, width).
            value_level_start_index: [L] int64, compared with the shapes on the CPU; or None.
            sampling_locations: [B, Q, H, L, P, 2] (x, y) in [0, 1].
            attention_weights: [B, Q, H, L, P].
            im2col_step: how many batches the extension took at once.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or device; it is named.
        """
        check_value(value)
        names = ("value_spatial_shapes", "value")
        shapes = _shapes(value_spatial_shapes, value, names, value_level_start_index)
        if isinstance(sampling_locations, Tensor) and sampling_locations.is_floating_point():
            sampling_locations = sampling_locations.to(accumulation_type(value.dtype))
        return multi_scale_deformable_attention(
            value, shapes, sampling_locations, attention_weights
        )


def _shapes(
    spatial_shapes: Tensor | list[tuple[int, int]],
    rows: Tensor,
    names: tuple[str, str],
    starts: Tensor | None,
) -> Tensor:
    """The shapes as a tensor; what is known to the host, the first rows too, is compared."""
    shapes = read_shapes(spatial_shapes, rows, names)
    if isinstance(spatial_shapes, Tensor):
        check_shapes_eagerly(shapes, rows, names)
    if starts is not None:
        _check_starts(names[0].replace("spatial_shapes", "level_start_index"), starts, shapes, rows)
    return shapes


def _check_starts(name: str, starts: Tensor, shapes: Tensor, rows: Tensor) -> None:
    """Raise unless levels lie one behind another; values of a GPU are not looked at."""
    if not isinstance(starts, Tensor):
        raise TypeError(f"{name} is {type(starts).__name__}; it must be a tensor")
    if starts.dtype != torch.int64:
        raise TypeError(f"{name} is {starts.dtype}; it must be int64")
    if starts.shape != shapes.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(starts.shape)}; it must be [{len(shapes)}], the levels of "
            "the shapes"
        )
    if starts.is_meta and not rows.is_meta:
        raise ValueError(f"{name} is on meta and the pixels on {rows.device}; move one of them")
    if torch.compiler.is_compiling() or not starts.device.type == shapes.device.type == "cpu":
        return
    areas = shapes.prod(-1)
    expected = (areas.cumsum(0) - areas).tolist()
    if starts.tolist() != expected:
        raise ValueError(
            f"{name} is {starts.tolist()}; levels lie one behind another, so it must be {expected}"
        )
