"""From a batch of modalities to the tokens that models attend to: checked, encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, TableBatch
from survfuse.layers.fourier import (
    append_channels,
    coordinate_positions,
    fourier_channels,
    fourier_encode,
    grid_positions,
    index_positions,
)
from survfuse.layers.graph_encoding import random_walk_encoding
from survfuse.models.settings import ModalityConfig
from survfuse.ragged import Ragged

_BATCHES = {"bag": BagBatch, "table": TableBatch, "array": ArrayBatch, "graph": GraphBatch}


class PositionEncoding(NamedTuple):
    """Fourier channels of `survfuse.layers.fourier` for modalities whose `axes` are not 0."""

    bands: int = 2
    max_frequency: float = 2.0


class Tokens(NamedTuple):
    """Encoded tokens of one modality."""

    features: Tensor  # [T, C] with ragged; [B, N, C] dense; [B, C] one token per sample
    ragged: Ragged | None
    present: Tensor  # [B] bool
    shape: tuple[int, ...]  # of per-token results: (total,), (B, *axes), (B, F) or (B,)


def token_width(modality: ModalityConfig, positions: PositionEncoding | None = None) -> int:
    """Channels of one token as `encode_inputs` with these positions gives it."""
    own = 1 if modality.table_tokens == "features" else modality.channels
    encoded = 0 if positions is None else fourier_channels(modality.axes, positions.bands)
    return own + encoded + modality.walk_steps


def encode_inputs(
    inputs: Mapping[str, Modality],
    modalities: Mapping[str, ModalityConfig],
    positions: PositionEncoding | None = None,
) -> tuple[dict[str, Tokens], int]:
    """Check a batch and encode each modality once.

    Args:
        inputs: by modality name; a modality that no sample has may be left out.
        modalities: say what each modality must look like.
        positions: encodes the axes of the modalities; None leaves every position out.

    Returns:
        Tokens by name, without the modalities known on the host to be absent everywhere; and B.

    Raises:
        ValueError: an unknown name, no modality at all, a wrong shape or width, or batches of
            different sizes.
        TypeError: a batch of another kind than the configuration says.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs is {type(inputs).__name__}; it must map names of modalities to their batches"
        )
    if not inputs:
        raise ValueError(
            "inputs is empty; it must hold at least one modality, with present False where absent"
        )
    for name, batch in inputs.items():
        _check_batch(name, batch, modalities, positions)
    n_samples = next(iter(inputs.values())).present.shape[0]
    for name, batch in inputs.items():
        if batch.present.shape[0] != n_samples:
            raise ValueError(
                f"inputs[{name!r}] has {batch.present.shape[0]} samples and "
                f"inputs[{next(iter(inputs))!r}] has {n_samples}; they must be equal"
            )
    encoded = {}
    for name, modality in modalities.items():
        if name in inputs:
            tokens = _ENCODERS[modality.kind](inputs[name], modality, positions)
            if tokens is not None:
                encoded[name] = tokens
    return encoded, n_samples


def _check_batch(
    name: str,
    batch: Modality,
    modalities: Mapping[str, ModalityConfig],
    positions: PositionEncoding | None,
) -> None:
    if name not in modalities:
        raise ValueError(f"inputs has the modality {name!r}; the model knows {list(modalities)}")
    modality = modalities[name]
    expected = _BATCHES[modality.kind]
    if not isinstance(batch, expected):
        raise TypeError(
            f"inputs[{name!r}] is {type(batch).__name__}; a {modality.kind} must be "
            f"a {expected.__name__} of survfuse.batch"
        )
    packed = modality.kind in ("bag", "graph")
    tensors = ("features", "present") if packed else ("values", "present")
    for field in (*tensors, "edges") if modality.kind == "graph" else tensors:
        if not isinstance(getattr(batch, field), Tensor):
            found = type(getattr(batch, field)).__name__
            raise TypeError(f"inputs[{name!r}].{field} is {found}; it must be a tensor")
    if packed and not isinstance(batch.ragged, Ragged):
        found = type(batch.ragged).__name__
        raise TypeError(
            f"inputs[{name!r}].ragged is {found}; it must be a survfuse.Ragged "
            "(Ragged.from_lengths makes one)"
        )
    present = batch.present
    if present.dtype != torch.bool or present.dim() != 1:
        raise ValueError(
            f"inputs[{name!r}].present is {present.dtype} of shape {tuple(present.shape)}; "
            "it must be bool of shape [B]"
        )
    values = batch.features if packed else batch.values
    if not values.is_floating_point():
        raise TypeError(
            f"inputs[{name!r}] is {values.dtype}; it must be a floating type, for example "
            "torch.float32"
        )
    dims = modality.axes + 2 if modality.kind == "array" else 2
    if values.dim() != dims or values.shape[-1] != modality.channels:
        raise ValueError(
            f"inputs[{name!r}] has shape {tuple(values.shape)}; it must have {dims} dimensions, "
            f"the last of {modality.channels} channels"
        )
    rows = batch.ragged.n_bags if packed else values.shape[0]
    if rows != present.shape[0]:
        raise ValueError(
            f"inputs[{name!r}] has {rows} samples and present has {present.shape[0]}; "
            "they must be equal"
        )
    # on another device the values of the ranges stay there unread
    readable = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if packed and readable:
        batch.ragged.check(values.shape[0])
    if modality.kind == "bag" and modality.axes == 2 and positions and batch.coords is None:
        raise ValueError(
            f"inputs[{name!r}].coords is None; modality {name!r} has axes=2, which encodes the "
            "slide coordinates [T, 2] of its patches"
        )


def _encode_bag(
    batch: BagBatch, modality: ModalityConfig, positions: PositionEncoding | None
) -> Tokens | None:
    features, ragged = batch.features, batch.ragged
    if ragged.total == 0:
        return None
    # a bag without rows says nothing, whatever `present` says
    present = batch.present & (ragged.lengths > 0)
    if positions is not None and modality.axes:
        if modality.axes == 1:
            places = index_positions(ragged, dtype=_position_type(features))
        else:
            places = coordinate_positions(batch.coords, ragged)
            check_places(places, ragged, present)
        features, ragged = append_channels(features, ragged, _encode(places, positions))
    features, ragged = _without_denied(features, ragged, present)
    return Tokens(features, ragged, present, (ragged.total,))


def _without_denied(features: Tensor, ragged: Ragged, present: Tensor) -> tuple[Tensor, Ragged]:
    """The bags, with zeros in the rows of those that `present` alone denies.

    Such rows may hold anything, and a NaN in them would reach the gradients of what is multiplied
    with it. They are rare, because an absent bag has length 0: only then is the batch copied. On
    another device their lengths are not read for it, and rows that hold NaN must have length 0.
    """
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return features, ragged
    if not bool((ragged.lengths > 0)[~present].any()):
        return features, ragged
    there = present.repeat_interleave(ragged.lengths, output_size=ragged.total)
    rows = features.index_select(0, ragged.rows())
    return torch.where(there[:, None], rows, 0.0), ragged.packed()


def check_places(places: Tensor, ragged: Ragged, present: Tensor) -> None:
    """Raise where a patch has no position, on the CPU.

    A slide without coordinates beside others that have them carries NaN.
    """
    if places.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool(places.isnan().any()):
        unknown = places.isnan().any(-1)
        bag = ragged.bags()
        samples = sorted(set(bag[unknown & present[bag]].tolist()))
        if samples:
            raise ValueError(
                f"coords of sample {samples[0]} of the batch are NaN: its slide was read without "
                "coordinates, and axes=2 encodes them; leave the slide out or set axes to 0"
            )


def _encode_graph(
    batch: GraphBatch, modality: ModalityConfig, positions: PositionEncoding | None
) -> Tokens | None:
    features, ragged = batch.features, batch.ragged
    if ragged.total == 0:
        return None
    present = batch.present & (ragged.lengths > 0)
    if modality.walk_steps:
        walks = random_walk_encoding(
            batch.edges, ragged, steps=modality.walk_steps, dtype=_position_type(features)
        )
        features, ragged = append_channels(features, ragged, walks)
    features, ragged = _without_denied(features, ragged, present)
    return Tokens(features, ragged, present, (ragged.total,))


def _encode_table(
    batch: TableBatch, modality: ModalityConfig, positions: PositionEncoding | None
) -> Tokens:
    # an absent row may hold anything: it is replaced before any product, not multiplied away
    values = torch.where(batch.present[:, None], batch.values, 0.0)
    features = values[..., None] if modality.table_tokens == "features" else values[:, None]
    if positions is not None and modality.axes:
        features = _append_grid(features, features.shape[1:2], positions)
    if modality.table_tokens == "one":
        return Tokens(features[:, 0], None, batch.present, (values.shape[0],))
    return Tokens(features, None, batch.present, tuple(values.shape))


def _encode_array(
    batch: ArrayBatch, modality: ModalityConfig, positions: PositionEncoding | None
) -> Tokens | None:
    sizes = batch.values.shape[1:-1]
    if sizes.numel() == 0:
        return None
    present = batch.present.reshape(-1, *[1] * (modality.axes + 1))
    features = torch.where(present, batch.values, 0.0).flatten(1, -2)
    if positions is not None:
        features = _append_grid(features, sizes, positions)
    return Tokens(features, None, batch.present, tuple(batch.values.shape[:-1]))


_ENCODERS = {
    "bag": _encode_bag,
    "graph": _encode_graph,
    "table": _encode_table,
    "array": _encode_array,
}


def _append_grid(features: Tensor, sizes: tuple[int, ...], positions: PositionEncoding) -> Tensor:
    """[B, N, C] with the encoded positions of a grid of N cells behind the channels."""
    grid = grid_positions(sizes, dtype=_position_type(features), device=features.device)
    channels = _encode(grid, positions).reshape(1, features.shape[1], -1).to(features.dtype)
    return torch.cat([features, channels.expand(features.shape[0], -1, -1)], dim=-1)


def _encode(places: Tensor, positions: PositionEncoding) -> Tensor:
    return fourier_encode(places, bands=positions.bands, max_frequency=positions.max_frequency)


def _position_type(features: Tensor) -> torch.dtype:
    # positions in a 16-bit type would merge neighbouring patches of a long bag before the sines
    return torch.float64 if features.dtype == torch.float64 else torch.float32
