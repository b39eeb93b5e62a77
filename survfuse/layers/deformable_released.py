"""Weights of a released deformable cross-attention: what they say about the layer they fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

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
        ValueError: an entry is missing, unknown, or no convolution; it is named.
    """
    state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    for name in _NAMES:
        if name not in state:
            raise ValueError(f"state_dict has no entry {prefix + name!r}")
    unknown = sorted(set(state) - set(_NAMES))
    if unknown:
        raise ValueError(f"state_dict has an entry {prefix + unknown[0]!r} that is no weight")
    for name in _CONVOLUTIONS:
        if state[name].dim() != 4 or 0 in state[name].shape:
            raise ValueError(
                f"state_dict entry {prefix + name!r} has shape {tuple(state[name].shape)}; it must "
                "be that of a convolution, [out, in, k, k]"
            )
    dim, inner = state["to_out.weight"].shape[:2]
    per_group, _, kernel_size, _ = state["to_offsets.0.weight"].shape
    groups = inner // per_group
    heads = groups * state["rel_pos_bias.mlp.2.weight"].shape[0]
    return state, {
        "dim": dim,
        "heads": heads,
        "dim_head": inner // heads,
        "offset_groups": groups,
        "kernel_size": kernel_size,
        "group_queries": state["to_q.weight"].shape[1] * groups == dim,
        "group_key_values": state["to_k.weight"].shape[1] * groups == dim,
    }
