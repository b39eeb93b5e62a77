"""From the public HEALNet package's weights and arguments to ours.

The released module keeps one list per fusion layer: for modality m its cross-attention at 2m and
the feed-forward behind it at 2m + 1, and last a list of self-attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from survfuse.models.healnet_config import RELEASED_ARITHMETIC, HEALNetConfig
from survfuse.models.settings import ModalityConfig

_FEED_FORWARD = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "expand.weight": "fn.net.0.weight",
    "expand.bias": "fn.net.0.bias",
    "contract.weight": "fn.net.2.weight",
    "contract.bias": "fn.net.2.bias",
}
_CROSS_ATTENTION = {
    "query_norm.weight": "norm.weight",
    "query_norm.bias": "norm.bias",
    "bag_norm.weight": "norm_context.weight",
    "bag_norm.bias": "norm_context.bias",
    "query.weight": "fn.to_q.weight",
    "output.weight": "fn.to_out.0.weight",
    "output.bias": "fn.to_out.0.bias",
}
_SELF_ATTENTION = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "query.weight": "fn.to_q.weight",
    "key_value.weight": "fn.to_kv.weight",
    "output.weight": "fn.to_out.0.weight",
    "output.bias": "fn.to_out.0.bias",
}
_KEY_VALUE = "fn.to_kv.weight"


def released_config(
    *,
    n_modalities: int,
    channel_dims: Sequence[int],
    num_spatial_axes: Sequence[int],
    names: Sequence[str] | None,
    kinds: Sequence[str] | None,
    tied: bool,
    settings: Mapping[str, Any],
) -> HEALNetConfig:
    """Our configuration of a released model; see `HEALNet.from_released`."""
    if settings["latent_blocks"] not in (0, 1):
        raise ValueError(
            f"self_per_cross_attn is {settings['latent_blocks']}; it must be 0 or 1, because the "
            "released forward pass fails with more"
        )
    return HEALNetConfig(
        _modalities(n_modalities, channel_dims, num_spatial_axes, names, kinds),
        weight_sharing="after_first" if tied else "none",
        **RELEASED_ARITHMETIC,
        **settings,
    )


def convert_released(
    state_dict: Mapping[str, Tensor], config: HEALNetConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The released weights under our keys.

    Args:
        state_dict: of the released model.
        config: from `released_config`.
        shapes: of the state dict of our model with that configuration.

    Raises:
        ValueError: keys that are missing, left over or of another shape, or tied layers that
            differ.
    """
    tied = config.weight_sharing == "after_first"
    n_sets = min(config.depth, 2) if tied else config.depth
    taken: set[str] = set()
    converted = {"latents": _take(state_dict, "latents", taken)}
    for i in range(n_sets):
        layer = _convert_layer(state_dict, i, config, taken)
        # the feed-forward of modality 0 stands for all of a tied layer
        if tied and i > 0:
            _check_shared_feed_forward(layer, len(config.modalities))
        for key, value in layer.items():
            if f"layers.{i}.{key}" in shapes:
                converted[f"layers.{i}.{key}"] = value
    for i in range(n_sets, config.depth):
        _check_tied_layer(state_dict, i, config, taken)
    for task in config.outputs:
        for ours, theirs in (("norm", "to_logits.1"), (f"tasks.{task}", "to_logits.2")):
            for part in ("weight", "bias"):
                converted[f"readout.{ours}.{part}"] = _take(state_dict, f"{theirs}.{part}", taken)
    left = [key for key in state_dict if key not in taken]
    if left:
        raise ValueError(
            f"state_dict has {len(left)} keys the arguments do not describe, the first "
            f"{left[0]!r}; the arguments must be those the released model was built with"
        )
    for key, shape in shapes.items():
        if converted[key].shape != shape:
            raise ValueError(
                f"state_dict holds weights for {key} of shape {tuple(converted[key].shape)}; "
                f"the arguments describe {tuple(shape)}"
            )
    return converted


def _modalities(
    n_modalities: int,
    channel_dims: Sequence[int],
    num_spatial_axes: Sequence[int],
    names: Sequence[str] | None,
    kinds: Sequence[str] | None,
) -> dict[str, ModalityConfig]:
    names = [f"modality_{m}" for m in range(n_modalities)] if names is None else list(names)
    kinds = ["array"] * n_modalities if kinds is None else list(kinds)
    given = {"channel_dims": channel_dims, "num_spatial_axes": num_spatial_axes}
    for name, values in {**given, "names": names, "kinds": kinds}.items():
        if len(values) != n_modalities:
            raise ValueError(
                f"{name} has {len(values)} entries; it must have n_modalities = {n_modalities}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"names is {names}; they must differ")
    modalities = {}
    for name, kind, channels, axes in zip(names, kinds, channel_dims, num_spatial_axes):
        if kind != "array" and (kind not in ("bag", "table") or axes != 1):
            raise ValueError(
                f"kinds has {kind!r} for {axes} spatial axes; it must be 'array', or with one "
                "axis 'bag' or 'table'"
            )
        modalities[name] = ModalityConfig(kind, channels, axes=axes)
    return modalities


def _convert_layer(
    state_dict: Mapping[str, Tensor], i: int, config: HEALNetConfig, taken: set[str]
) -> dict[str, Tensor]:
    """One fusion layer with a feed-forward per modality, keys relative to the layer."""
    layer: dict[str, Tensor] = {}

    def copy(ours: str, theirs: str, key_map: dict[str, str]) -> None:
        for key, released in key_map.items():
            layer[f"{ours}.{key}"] = _take(state_dict, f"layers.{i}.{theirs}.{released}", taken)

    n_modalities = len(config.modalities)
    for m in range(n_modalities):
        copy(f"attention.{m}", f"{2 * m}", _CROSS_ATTENTION)
        stacked = _take(state_dict, f"layers.{i}.{2 * m}.{_KEY_VALUE}", taken)
        inner = config.cross_heads * config.cross_head_dim
        if stacked.dim() != 2 or stacked.shape[0] != 2 * inner:
            raise ValueError(
                f"state_dict['layers.{i}.{2 * m}.{_KEY_VALUE}'] has shape {tuple(stacked.shape)}; "
                f"its first size must be 2 * x_heads * cross_dim_head = {2 * inner}"
            )
        per_head = stacked.unflatten(0, (2, config.cross_heads, config.cross_head_dim))
        layer[f"attention.{m}.key_weight"], layer[f"attention.{m}.value_weight"] = per_head
        copy(f"feed_forward.{m}", f"{2 * m + 1}", _FEED_FORWARD)
    for block in range(config.latent_blocks):
        last = 2 * n_modalities
        copy(f"latent_attention.{block}", f"{last}.{2 * block}", _SELF_ATTENTION)
        copy(f"latent_feed_forward.{block}", f"{last}.{2 * block + 1}", _FEED_FORWARD)
    return layer


def _take(state_dict: Mapping[str, Tensor], key: str, taken: set[str]) -> Tensor:
    if key not in state_dict:
        raise ValueError(
            f"state_dict has no {key!r}; the arguments describe a model that has it. "
            "They must be those the released model was built with"
        )
    taken.add(key)
    return state_dict[key]


def _check_shared_feed_forward(layer: Mapping[str, Tensor], n_modalities: int) -> None:
    for key in _FEED_FORWARD:
        first = layer[f"feed_forward.0.{key}"]
        for m in range(1, n_modalities):
            if not torch.equal(first, layer[f"feed_forward.{m}.{key}"]):
                raise ValueError(
                    "weight_tie_layers is True, but the feed-forwards of modalities 0 and "
                    f"{m} differ in layer 1; tied released models share them behind layer 0"
                )


def _check_tied_layer(
    state_dict: Mapping[str, Tensor], i: int, config: HEALNetConfig, taken: set[str]
) -> None:
    first = _convert_layer(state_dict, 1, config, taken)
    for key, value in _convert_layer(state_dict, i, config, taken).items():
        if not torch.equal(first[key], value):
            raise ValueError(
                f"weight_tie_layers is True, but {key} differs between layers 1 and {i}; "
                "it must be False for these weights"
            )
