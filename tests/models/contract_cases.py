"""Every registered model at a tiny size, and a batch with every kind of absence for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import BagBatch, GraphBatch, Modality, ModelOutput, TableBatch
from survfuse.models import FusionModel, ModalityConfig, model_class

OUTPUTS = {"survival": 4, "grade": 2}
GROUPS = {"tumor": (0, 1, 2), "microenvironment": (2, 3)}
TABLE, BAG = ModalityConfig("table", 5, groups=GROUPS), ModalityConfig("bag", 6)
GRAPH = ModalityConfig("graph", 6, walk_steps=2)

_GENES = {"gene_widths": (6,), "dim": 8}
_ENCODERS = {**_GENES, "encoder_heads": 2, "bilinear_scale": 4}
_MCAT = {**_ENCODERS, "encoder_hidden": 6, "encoder_layers": 1, "piece_rows": 4}
_LATENTS = {"n_latents": 3, "latent_dim": 6, "cross_heads": 2, "cross_head_dim": 3}
_LATENTS |= {"latent_heads": 2, "latent_head_dim": 3}
SMALL: dict[str, dict[str, Any]] = {
    "healnet": _LATENTS,
    "ammasurv": {"dim": 8, "heads": 2, "head_dim": 4, "gene_hidden": (5,), "pool_hidden": 3},
    "subspace_fusion": {**_GENES, "heads": 2, "dim_head": 4, "patch_size": 256.0},
    "mcat": _MCAT,
    "motcat": {**_MCAT, "micro_batch": 4},
    "survpath": {**_GENES, "inner_dim": 6, "hidden": 5, "piece_rows": 4},
    "cmta": {**_ENCODERS, "patch_widths": (7,), "landmarks": 3},
    "perceiver": {**_LATENTS, "token_dim": 5, "expansion": 2},
    "multimodn": {"state_dim": 5, "encoder_widths": (6,), "decoder_widths": (4,)},
    "late_fusion": {"dim": 6, "rank": 3, "hidden": 12, "patch_dim": 7, "attention_hidden": 3},
    "abmil": {"dim": 8, "hidden": 4},
    "transmil": {"dim": 8, "heads": 2, "head_dim": 4, "landmarks": 3, "residual_kernel": 3},
    "snn": {"widths": (6, 5)},
    "mean_pool": {"width": 6},
}
_READS = {"abmil": ("slides",), "transmil": ("slides",), "snn": ("genes",)}


class Case(NamedTuple):
    """A model and what it is given."""

    model: str
    modalities: dict[str, ModalityConfig]
    settings: dict[str, Any]


def _case(model: str, bag: ModalityConfig = BAG, **settings: Any) -> Case:
    given = {"genes": TABLE, "slides": bag}
    reads = _READS.get(model, tuple(given))
    return Case(model, {name: given[name] for name in reads}, {**SMALL[model], **settings})


# one case per model; the further ones take another path through it
MODEL_CASES = {name: _case(name) for name in SMALL}
GRAPH_CASES = {
    f"{name} of a graph": _case(name, GRAPH)
    for name in SMALL
    if name not in ("ammasurv", "subspace_fusion", "snn")
}
CASES = {
    **MODEL_CASES,
    **GRAPH_CASES,
    "healnet with positions": _case("healnet", ModalityConfig("bag", 6, axes=2)),
    "healnet untied": _case("healnet", weight_sharing="none", latent_blocks=1),
    "ammasurv symmetric": _case("ammasurv", blocks=("pp", "pg", "gp", "gg")),
    "ammasurv landmarks": _case("ammasurv", patch_attention_kind="nystrom", landmarks=3),
    "subspace_fusion table": _case("subspace_fusion", bias="table", pool="attention"),
    "subspace_fusion fixed": _case("subspace_fusion", layout="fixed", map_side=3),
    "mcat bilinear": _case("mcat", fusion="bilinear", recompute=True),
    "survpath apart": _case("survpath", shared_qkv=False, recompute="all"),
    "cmta bilinear": _case("cmta", fusion="bilinear", alignment="cosine", recompute=False),
    "perceiver padded": _case("perceiver", padding="zero", weight_sharing="none"),
    "multimodn attention": _case("multimodn", pool="attention", patch_dim=7, attention_hidden=3),
    "late_fusion concat": _case("late_fusion", fusion="concat"),
}

# everything; no genes; no slide; nothing; one patch; a slide said to be there without patches
HAS_GENES = [True, False, True, False, True, True]
HAS_SLIDE = [True, True, False, False, True, True]
LENGTHS = [6, 5, 0, 0, 1, 0]
STARTS = [9, 2, 0, 0, 8, 0]
N_STORED = 17


def build(case: Case, **changes: Any) -> FusionModel:
    """The model of a case, of its first preset, with `changes` of its settings."""
    torch.manual_seed(0)
    cls = model_class(case.model)
    settings = {**case.settings, **changes}
    preset = next(iter(cls.config_class.PRESETS))
    return cls.from_preset(preset, modalities=case.modalities, outputs=OUTPUTS, **settings)


def undropped(case: Case) -> dict[str, float]:
    """Settings with which the model of a case drops nothing."""
    fields = vars(build(case).config)
    return {name: 0.0 for name in fields if name.endswith("dropout")}


def mixed(case: Case) -> dict[str, Modality]:
    """Six samples; every row that is no sample's holds NaN, and so do absent rows of the table."""
    torch.manual_seed(1)
    has_genes = torch.tensor(HAS_GENES)
    values = torch.randn(6, 5).masked_fill(~has_genes[:, None], torch.nan)
    ragged = Ragged.from_ranges(STARTS, LENGTHS)
    read = torch.zeros(N_STORED, dtype=torch.bool)
    for start, length in zip(STARTS, LENGTHS, strict=True):
        read[start : start + length] = True
    features = torch.randn(N_STORED, 6).masked_fill(~read[:, None], torch.nan)
    cell = torch.arange(N_STORED)
    coords = torch.stack([cell % 3, cell // 3], 1) * 256.0
    present = torch.tensor(HAS_SLIDE)
    given: dict[str, Modality] = {"genes": TableBatch(values, has_genes)}
    if case.modalities.get("slides", BAG).kind == "graph":
        edges = torch.tensor([[9, 10, 11, 12, 2, 3, 4], [10, 11, 12, 14, 3, 5, 6]])
        given["slides"] = GraphBatch(features, ragged, edges, present)
    else:
        given["slides"] = BagBatch(features, ragged, present, coords)
    return {name: given[name] for name in case.modalities}


def pick(inputs: dict[str, Modality], samples: list[int]) -> dict[str, Modality]:
    """The samples of a batch, in this order; a bag's rows stay where they are."""
    found: dict[str, Modality] = {}
    for name, batch in inputs.items():
        present = batch.present[samples]
        if isinstance(batch, TableBatch):
            found[name] = TableBatch(batch.values[samples], present)
        else:
            found[name] = batch._replace(ragged=batch.ragged.select(samples), present=present)
    return found


def nobody_has(inputs: dict[str, Modality], name: str) -> dict[str, Modality]:
    """The batch with a modality that no sample has, what is stored for it NaN."""
    batch = inputs[name]
    present = torch.zeros_like(batch.present)
    if isinstance(batch, TableBatch):
        gone: Modality = TableBatch(torch.full_like(batch.values, torch.nan), present)
    else:
        empty = Ragged.from_lengths([0] * len(present))
        features = torch.full_like(batch.features, torch.nan)
        gone = batch._replace(features=features, ragged=empty, present=present)
    return {**inputs, name: gone}


def loss(output: ModelOutput) -> Tensor:
    """A number that every logit and every auxiliary loss is part of."""
    total = sum(logits.square().sum() for logits in output.logits.values())
    return total + sum(output.auxiliary.values())


def assert_same(
    found: ModelOutput, expected: ModelOutput, samples: list[int] | None = None
) -> None:
    """The logits of `samples` of `expected`, to a few units of rounding."""
    for task, logits in expected.logits.items():
        wanted = logits if samples is None else logits[samples]
        torch.testing.assert_close(found.logits[task], wanted, rtol=1e-5, atol=1e-6)


def assert_equal(found: ModelOutput, expected: ModelOutput) -> None:
    """The same logits to the last bit."""
    for task, logits in expected.logits.items():
        assert torch.equal(found.logits[task], logits), task


def as_type(inputs: dict[str, Modality], dtype: torch.dtype) -> dict[str, Modality]:
    """The batch with tables and features of another type."""
    found: dict[str, Modality] = {}
    for name, batch in inputs.items():
        field = "values" if isinstance(batch, TableBatch) else "features"
        found[name] = batch._replace(**{field: getattr(batch, field).to(dtype)})
    return found
