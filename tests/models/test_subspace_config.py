"""Configuration of subspace fusion: presets, round trip, groups of genes, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from subspace_cases import MODALITIES, small

from survfuse.models import ModalityConfig, SubspaceFusion, SubspaceFusionConfig
from survfuse.training.config_files import from_plain


def test_presets() -> None:
    paper = SubspaceFusionConfig.from_preset("paper", modalities=MODALITIES)
    released = SubspaceFusionConfig.from_preset("released", modalities=MODALITIES)
    sizes = ("dim", "gene_widths", "heads", "dim_head", "gene_dropout", "attention_dropout")
    expected = (128, (64, 48, 32), 8, 64, 0.1, 0.1)
    for config in (paper, released):
        assert tuple(getattr(config, name) for name in sizes) == expected
    assert (paper.layout, paper.consistency, paper.released) == ("grid", "offsets", False)
    assert (released.layout, released.map_side, released.released) == ("fixed", 50, True)
    attention = SubspaceFusion(paper).branches["tumor"].attention
    assert (attention.downsample, attention.offset_scale, attention.kernel_size) == (4, 4.0, 6)
    assert (attention.offset_groups, attention.dropout) == (8, 0.1)
    with pytest.raises(ValueError, match=r"name is 'fast'; it must be one of \['paper', 'releas"):
        SubspaceFusionConfig.from_preset("fast", modalities=MODALITIES)


def test_round_trip() -> None:
    config = small(outputs={"survival": 4, "grade": 3}, tumor=("genes/tumor",))
    assert SubspaceFusionConfig(**config.to_dict()) == config
    # lists, as YAML has them
    plain = config.to_dict() | {"tumor": ["genes/tumor"], "gene_widths": [6]}
    assert from_plain(SubspaceFusionConfig, plain) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 3}, "dim is 3; it must be an integer of at least 4"),
        ({"heads": 0}, "heads is 0"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"offset_scale": 0.0}, "offset_scale is 0.0; it must be greater than 0"),
        ({"patch_size": -1.0}, "patch_size is -1.0"),
        ({"gene_dropout": 1.0}, "gene_dropout is 1.0"),
        ({"pool": "max"}, r"pool is 'max'; it must be one of \['mean', 'attention', 'genes'\]"),
        ({"pool_temperature": 0}, "pool_temperature is 0; it must be greater than 0"),
        ({"pool": "genes", "pool_heads": 0}, "pool_heads is 0; it must be an integer of at least"),
        ({"layout": "map"}, "layout is 'map'"),
        ({"without_coords": "guess"}, "without_coords is 'guess'"),
        ({"bias": "none"}, "bias is 'none'"),
        ({"consistency_weight": -0.5}, "consistency_weight is -0.5; it must be at least 0"),
        ({"released": True}, "released is True with layout 'grid'; the released arithmetic"),
        ({"consistency": "released"}, "consistency is 'released' with layout 'grid'"),
        ({"tumor": "tumor"}, "tumor is 'tumor'; it must be a tuple"),
        ({"microenvironment": ()}, "microenvironment is empty"),
        ({"gene_widths": (4, 0)}, r"gene_widths is \(4, 0\)"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_wrong_values_are_named(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


BAG = MODALITIES["slides"]
TABLE = MODALITIES["genes"]


@pytest.mark.parametrize(
    ("modalities", "words"),
    [
        ({"genes": TABLE, "a": BAG, "b": BAG}, r"holds the bags \['a', 'b'\]"),
        (
            {"genes": TABLE, "a": BAG, "scan": ModalityConfig("array", 1, axes=2)},
            "modality 'scan' is of kind 'array'; subspace fusion reads one bag and tables",
        ),
        (
            {"genes": ModalityConfig("table", 4), "a": BAG},
            r"tumor names the gene group 'tumor', which none of the tables has; the groups are "
            r"\['genes/genes'\]\. survfuse\.data\.subspaces",
        ),
        ({"x": TABLE, "y": TABLE, "a": BAG}, "'tumor', which several of the tables has"),
        (
            {"genes": TABLE, "cnv": ModalityConfig("table", 3), "a": BAG},
            "table 'cnv' feeds no branch",
        ),
    ],
)
def test_modalities_that_do_not_fit_are_told_when_a_model_is_built(modalities, words) -> None:
    config = replace(small(), modalities=modalities)
    with pytest.raises(ValueError, match=words):
        SubspaceFusion(config)


def test_only_its_configuration_builds_a_model() -> None:
    with pytest.raises(TypeError, match="config is dict; it must be a SubspaceFusionConfig"):
        SubspaceFusion(small().to_dict())


def test_groups_are_set_behind_a_preset() -> None:
    modalities = {"genes": ModalityConfig("table", 4, groups={"a": (0,), "b": (1, 2)}), "s": BAG}
    model = SubspaceFusion.from_preset(
        "paper", modalities=modalities, tumor=("a",), microenvironment=("b",), dim=8, heads=2
    )
    assert model.branches["microenvironment"].genes[0][0].in_features == 2
