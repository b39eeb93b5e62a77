"""Weights of a released deformable cross-attention: what they say about the layer they fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from survfuse.ops.checks import FLOATS

_NAMES = (
    "to_offsets.0.weight",
    "to_offsets.0.bias",
    "to_offsets.2.weight",
    "rel_pos_bias.mlp.0.0.weight",
    "rel_pos_bias.mlp.0.0.bias",
    "rel_pos_bias.mlp.1.0.weight",
    "rel_pos_bias.mlp.1.0.bias",
    "rel_pos_bias.mlp.2.weight",
    "rel_pos_bias.mlp.2.bias",
    "to_q.weight",
    "to_k.weight",
    "to_v.weight",
    "to_out.weight",
    "to_out.bias",
)
_CONVOLUTIONS = ("to_offsets.0.weight", "to_q.weight", "to_k.weight", "to_out.weight")


def read_released(
    state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, int | bool]]:
    """The entries behind `prefix` and the arguments of the layer whose weights they are.

    Raises:
        TypeError: `state_dict` is none, or an entry is no floating tensor.
        ValueError: an entry is missing, unknown, or does not fit the others; it is named.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is {type(state_dict).__name__}; it must map names to tensors, as "
            "module.state_dict() does"
        )
    state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    for name in _NAMES:
        if name not in state:
            raise ValueError(f"state_dict has no entry {prefix + name!r}{_hint(state_dict, name)}")
    unknown = sorted(set(state) - set(_NAMES))
    if unknown:
        raise ValueError(f"state_dict has an entry {prefix + unknown[0]!r} that is no weight")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"state_dict entry {prefix + name!r} is {found}; it must be a floating tensor"
            )
    sizes = _sizes({prefix + name: tensor.shape for name, tensor in state.items()}, prefix)
    return state, sizes


def _hint(state_dict: Mapping[str, Tensor], name: str) -> str:
    """What may have been meant, or what there is."""
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            return f"; its entry {key!r} is a mapping itself, which may be the one meant"
        if key.endswith(f".{name}"):
            return f"; with prefix={key.removesuffix(name)!r} there is one"
    names = list(state_dict)
    return f"; it has {', '.join(map(repr, names[:4])) or 'none'}{', ...' * (len(names) > 4)}"


def _sizes(shapes: Mapping[str, torch.Size], prefix: str) -> dict[str, int | bool]:
    def check(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(
                f"state_dict entry {prefix + name!r} has shape {tuple(shapes[prefix + name])}; "
                f"it must be {wanted}"
            )

    for name in _CONVOLUTIONS:
        shape = shapes[prefix + name]
        check(name, len(shape) == 4 and 0 not in shape, "that of a convolution, [out, in, k, k]")
    dim, inner = shapes[f"{prefix}to_out.weight"][:2]
    per_group, _, kernel_size, _ = shapes[f"{prefix}to_offsets.0.weight"]
    # what counts the channels and groups of all others is compared first
    check("to_out.bias", shapes[f"{prefix}to_out.bias"] == (dim,), f"[{dim}], as to_out.weight")
    check(
        "to_offsets.0.weight",
        inner % per_group == 0,
        f"[C, 1, k, k], C a divisor of the {inner} channels of to_out.weight",
    )
    groups, last = inner // per_group, shapes[f"{prefix}rel_pos_bias.mlp.2.weight"]
    check(
        "rel_pos_bias.mlp.2.weight",
        len(last) == 2 and last[0] > 0 and per_group % last[0] == 0,
        f"[H / G, {dim // 4}], H / G a divisor of the {per_group} channels of a group",
    )
    check("to_out.weight", dim % groups == 0, f"[dim, ...], dim a multiple of {groups} groups")
    heads = groups * last[0]
    return {
        "dim": dim,
        "heads": heads,
        "dim_head": inner // heads,
        "offset_groups": groups,
        "kernel_size": kernel_size,
        "group_queries": shapes[f"{prefix}to_q.weight"][1] * groups == dim,
        "group_key_values": shapes[f"{prefix}to_k.weight"][1] * groups == dim,
    }
