"""From the public code's weights of subspace fusion to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from survfuse.layers.deformable_released import read_released
from survfuse.models.settings import ModalityConfig
from survfuse.models.subspace_config import RELEASED_ARITHMETIC, SubspaceFusionConfig

# ours: the released suffix of the two networks of a branch
_SUFFIX = {"tumor": "tumor", "microenvironment": "immune"}
# modules of a branch. ours: theirs, `{}` being the suffix
_MODULES = {
    **{f"genes.{i}.0": f"omic_net_{{}}.encoder.{i}.0" for i in range(4)},
    "project": "pathomic_net_{}._fc1.0",
    "fuse": "pathomic_net_{}.fusion_layer.fusion_layer",
    "attention_norm": "pathomic_net_{}.layer3.norm",
    "norm": "pathomic_net_{}.norm",
    "pooler": "pathomic_net_{}.pooler.dense",
    "output": "pathomic_net_{}.multimodal_projection",
}
_ATTENTION = "pathomic_net_{}.layer3.attn2d."
_READOUT = "classifier"
# modules that the released forward pass of maps never reads, or whose results nothing reads
_UNUSED = re.compile(
    r"(omic_net_\w+?\.(classifier\..+|output_range|output_shift)"
    r"|pathomic_net_\w+?\.(cls_token|_fc2\..+|layer3\.attn1d\..+)"
    r"|classifier_(tumor|immune)\..+|output_range|output_shift)$"
)
# what the released model has where we learn what stands for an absent modality
_OWN = ("absent_genes", "absent_patch")


def released_config(
    state_dict: Mapping[str, Tensor],
    *,
    n_genes: Mapping[str, int],
    outputs: Mapping[str, int],
    backend: str | None,
) -> SubspaceFusionConfig:
    """Our configuration of a released model; sizes are read off its weights."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is {type(state_dict).__name__}; it must map names to tensors, as "
            "module.state_dict() does"
        )
    suffix = _SUFFIX["tumor"]
    _, sizes = read_released(state_dict, _ATTENTION.format(suffix))
    project = _take(state_dict, f"pathomic_net_{suffix}._fc1.0.weight")
    widths = [
        _take(state_dict, f"omic_net_{suffix}.encoder.{i}.0.weight").shape[0] for i in range(3)
    ]
    n_tumor, n_immune = n_genes["tumor"], n_genes["microenvironment"]
    groups = {
        "tumor": tuple(range(n_tumor)),
        "microenvironment": tuple(range(n_tumor, n_tumor + n_immune)),
    }
    modalities = {
        "slides": ModalityConfig("bag", project.shape[-1]),
        "genes": ModalityConfig("table", n_tumor + n_immune, groups=groups),
    }
    return SubspaceFusionConfig(
        modalities,
        outputs,
        dim=sizes["dim"],
        gene_widths=tuple(widths),
        heads=sizes["heads"],
        dim_head=sizes["dim_head"],
        offset_groups=sizes["offset_groups"],
        kernel_size=sizes["kernel_size"],
        backend=backend,
        **RELEASED_ARITHMETIC,
    )


def convert_released(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], task: str
) -> dict[str, Tensor]:
    """The released weights under our keys.

    Args:
        state_dict: of the released model.
        own: state dict of ours.
        task: the one output.

    Raises:
        TypeError: an entry is no floating tensor.
        ValueError: an entry is missing, unknown or of another shape; it is named.
    """
    names = {f"readout.tasks.{task}.{part}": f"{_READOUT}.{part}" for part in ("weight", "bias")}
    for branch, suffix in _SUFFIX.items():
        for ours, theirs in _MODULES.items():
            for part in ("weight", "bias"):
                names[f"branches.{branch}.{ours}.{part}"] = f"{theirs.format(suffix)}.{part}"
        prefix = f"branches.{branch}.attention."
        for key in own:
            if key.startswith(prefix):
                names[key] = _ATTENTION.format(suffix) + key.removeprefix(prefix)
    converted = {}
    for key, value in own.items():
        if key.endswith(_OWN):
            converted[key] = value
            continue
        found = _take(state_dict, names[key])
        if found.shape != value.shape:
            raise ValueError(
                f"state_dict[{names[key]!r}] has shape {tuple(found.shape)}; beside the other "
                f"weights and arguments it must be {tuple(value.shape)}"
            )
        converted[key] = found
    left = [k for k in state_dict if k not in names.values() and not _UNUSED.match(k)]
    if left:
        raise ValueError(
            f"state_dict has {len(left)} entries that the released model does not, the first "
            f"{left[0]!r}"
        )
    return converted


def _take(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict has no {key!r}, which the released model has")
    value = state_dict[key]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"state_dict[{key!r}] is {found}; it must be a floating tensor")
    return value
