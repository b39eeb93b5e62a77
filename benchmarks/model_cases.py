"""Which models are timed: their inputs, their plain twins, and what cannot be compared.

A twin takes the configuration and the weights of the model and computes the same in plain torch.
SNN is left out: it reads no patches, so a step does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.models import model_class
from survfuse.ragged import Ragged

from .plain_healnet import PlainHEALNet
from .plain_models import PlainMCAT, PlainMOTCat, PlainSurvPath
from .plain_pools import (
    PlainABMIL,
    PlainLateFusion,
    PlainMeanPool,
    PlainMultiModN,
    PlainPerceiver,
)
from .plain_subspace import PlainSubspaceFusion
from .plain_transformers import PlainAMMASurv, PlainCMTA, PlainTransMIL

OURS, PLAIN, REFERENCE = "survfuse", "plain torch", "survfuse reference"
SLIDE, GENES, TASK = "slide", "genes", "survival"
# patches of TCGA slides at 20x are so far apart, in pixels at 40x
PATCH_SIZE = 512
# of the area of a slide
TISSUE = 0.3


def gene_groups(kind: str | None) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Columns of a table and its groups: "families", "pathways" or "lists"; None is no table."""
    if kind == "families":
        return 1200, {f"family {i}": tuple(range(200 * i, 200 * i + 200)) for i in range(6)}
    if kind == "lists":
        return 280, {"tumor": tuple(range(60)), "microenvironment": tuple(range(60, 280))}
    if kind == "pathways":
        g = torch.Generator().manual_seed(0)
        drawn = (torch.randperm(4999, generator=g)[:15].tolist() for _ in range(331))
        return 4999, {f"pathway {i}": tuple(sorted(columns)) for i, columns in enumerate(drawn)}
    return 0, {}


@dataclass(frozen=True)
class ModelCase:
    """One model of one preset.

    Attributes:
        name: in tables.
        model: its registry name.
        twin: what computes the same in plain torch.
        preset: of its configuration.
        groups: of its gene table, see `gene_groups`.
        others: further ways, fields of the configuration that they change; None where the model
            passes no backend on.
        smoke: fields of the configuration that make a tiny race tiny.
        all_pairs: the ways that hold something for every pair of patches, or of a patch and one of
            as many points: their memory grows with the square.
        fixed_size: patches are first brought to a map of one size, so what follows takes the same
            for any number of them.
        same_up_to: patches up to which ours and the twin compute the same; None for any number.
        core: numbers of patches of the core set, by type.
    """

    name: str
    model: str
    twin: type[nn.Module]
    preset: str = "paper"
    groups: str | None = "families"
    others: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {REFERENCE: {"backend": "reference"}}
    )
    all_pairs: tuple[str, ...] = ()
    fixed_size: bool = False
    same_up_to: int | None = None
    smoke: Mapping[str, Any] = field(default_factory=dict)
    core: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def config(self, dim: int) -> Any:
        """The configuration of ours for patches of `dim` features."""
        modalities = {SLIDE: ("bag", dim)}
        columns, groups = gene_groups(self.groups)
        if groups:
            modalities[GENES] = ("table", columns, groups)
        made = model_class(self.model).config_class
        return made.from_preset(self.preset, modalities=modalities, outputs={TASK: 4})

    def models(self, dim: int, device: str, *, tiny: bool = False) -> dict[str, nn.Module]:
        """Every way by name, with the same weights: ours, the twin, then `others`."""
        config, ours = self.config(dim), model_class(self.model)
        if tiny:
            config = replace(config, **self.smoke)
        torch.manual_seed(0)
        model = ours(config)
        found: dict[str, nn.Module] = {OURS: model, PLAIN: self.twin(config)}
        for name, settings in self.others.items():
            found[name] = ours(replace(config, **settings))
        for other in found.values():
            other.load_state_dict(model.state_dict())
            other.to(device)
        return found

    def inputs(self, n_patches: int, dim: int, device: str) -> dict[str, Modality]:
        """One patient with random features and, by cells of smooth tissue, places of patches."""
        g = torch.Generator().manual_seed(1)
        present = torch.ones(1, dtype=torch.bool, device=device)
        inputs: dict[str, Modality] = {
            SLIDE: BagBatch(
                torch.randn(n_patches, dim, generator=g).to(device),
                Ragged.from_lengths([n_patches], device=device),
                present,
                tissue(n_patches).to(device) * PATCH_SIZE,
            )
        }
        columns, groups = gene_groups(self.groups)
        if groups:
            values = torch.randn(1, columns, generator=g).to(device)
            inputs[GENES] = TableBatch(values, present)
        return inputs


def tissue(n_patches: int) -> Tensor:
    """Cells (x, y) of a slide that is covered by smooth pieces of tissue: [n_patches, 2]."""
    side = int((n_patches / TISSUE) ** 0.5) + 1
    g = torch.Generator().manual_seed(2)
    coarse = torch.randn(1, 1, 7, 7, generator=g)
    height = functional.interpolate(coarse, (side, side), mode="bicubic")[0, 0].flatten()
    cell = height.topk(n_patches).indices.sort().values
    return torch.stack([cell % side, cell // side], 1)


def logits_of(model: nn.Module, inputs: Mapping[str, Modality]) -> tuple[Tensor, Tensor]:
    """The logits [B, out], and the sum of the auxiliary losses."""
    out = model(inputs)
    if isinstance(out, Tensor):
        return out, out.new_zeros(())
    return out.logits[TASK], sum(out.auxiliary.values(), out.logits[TASK].new_zeros(()))


def hazard_loss(logits: Tensor) -> Tensor:
    """Negative log-likelihood of discrete hazards of events that were seen in the third bin."""
    logits = logits.float()
    through = functional.logsigmoid(-logits[:, :2]).sum(1)
    return -(through + functional.logsigmoid(logits[:, 2])).mean()


NO_BACKEND: dict[str, dict[str, Any]] = {}
# the core set of all models is to take a quarter of an hour on two cores
LIGHT = {"fp32": (5_000, 20_000, 100_000), "bf16": (20_000,)}
HEAVY = {"fp32": (5_000, 20_000)}
CASES = (
    ModelCase("HEALNet", "healnet", PlainHEALNet, core=LIGHT),
    ModelCase("Perceiver", "perceiver", PlainPerceiver, core=LIGHT),
    ModelCase("MCAT", "mcat", PlainMCAT, core=LIGHT),
    ModelCase(
        "MOTCat",
        "motcat",
        PlainMOTCat,
        others={"survfuse, POT": {"solver": "pot"}},
        core=LIGHT,
    ),
    ModelCase("SurvPath", "survpath", PlainSurvPath, groups="pathways", core=LIGHT),
    ModelCase("CMTA", "cmta", PlainCMTA, smoke={"landmarks": 16}, core=HEAVY),
    ModelCase(
        "TransMIL", "transmil", PlainTransMIL, groups=None, smoke={"landmarks": 16}, core=HEAVY
    ),
    ModelCase("ABMIL", "abmil", PlainABMIL, groups=None, core=LIGHT),
    ModelCase("LateFusion", "late_fusion", PlainLateFusion, core=LIGHT),
    ModelCase("MultiModN", "multimodn", PlainMultiModN, preset="attention", core=LIGHT),
    ModelCase(
        "MeanPool", "mean_pool", PlainMeanPool, preset="default", others=NO_BACKEND, core=LIGHT
    ),
    ModelCase(
        "AMMASurv, genes to patches",
        "ammasurv",
        PlainAMMASurv,
        preset="genes_to_patches",
        core=LIGHT,
    ),
    ModelCase(
        "AMMASurv",
        "ammasurv",
        PlainAMMASurv,
        others={
            "survfuse, exact": {"patch_attention_kind": "exact"},
            REFERENCE: {"patch_attention_kind": "exact", "backend": "reference"},
        },
        all_pairs=(REFERENCE,),
        same_up_to=4096,
        core={"fp32": (5_000,)},
    ),
    ModelCase(
        "SubspaceFusion",
        "subspace_fusion",
        PlainSubspaceFusion,
        groups="lists",
        all_pairs=(PLAIN, REFERENCE),
        core={"fp32": (2_000, 5_000)},
    ),
    ModelCase(
        "SubspaceFusion, released",
        "subspace_fusion",
        PlainSubspaceFusion,
        preset="released",
        groups="lists",
        smoke={"map_side": 12},
        fixed_size=True,
        core={"fp32": (5_000, 20_000, 100_000)},
    ),
)
