"""What all models of one bag and gene groups promise: absence, gradients, pieces, weights."""

from __future__ import annotations

import pytest
import torch
from healnet_cases import one_sample, without
from patch_gene_cases import (
    MODALITIES,
    SMALL,
    STAND_INS,
    VARIANTS,
    all_inputs,
    small,
    without_dropout,
)

from survfuse.batch import GraphBatch, TableBatch
from survfuse.models import ModalityConfig, model_class
from survfuse.models.cmta import CMTA
from survfuse.models.mcat import MCAT
from survfuse.models.motcat import MOTCat
from survfuse.models.survpath import SurvPath

each_variant = pytest.mark.parametrize(("cls", "changes"), VARIANTS.values(), ids=VARIANTS)
each_model = pytest.mark.parametrize("cls", SMALL)


@each_variant
def test_each_sample_of_a_batch_as_if_alone(cls, changes) -> None:
    model, inputs = small(cls, **changes).eval(), all_inputs()
    together = model(inputs)
    assert together.logits["survival"].shape == (3, 4)
    for b in range(3):
        alone = model(one_sample(inputs, b))
        for name in ("genes", "patches", "joint"):
            mine = together.embeddings[name][b : b + 1]
            torch.testing.assert_close(mine, alone.embeddings[name])
        torch.testing.assert_close(together.logits["survival"][b : b + 1], alone.logits["survival"])
    assert (together.logits["survival"][0] - together.logits["survival"][1]).abs().max() > 1e-4
    again = model(inputs).logits["survival"]
    assert torch.equal(again, together.logits["survival"])


@each_variant
@pytest.mark.parametrize("name", MODALITIES)
def test_absent_for_one_sample_is_left_out(cls, changes, name: str) -> None:
    """That sample is as if nobody had it, whatever is stored; the others do not change."""
    model, inputs = without_dropout(small(cls, **changes)).eval(), all_inputs()
    full = model(inputs).logits["survival"]
    gone = without(inputs, name, [2])
    if name == "slide":
        gone[name].features[15:] = torch.nan
    else:
        gone[name].values[2] = torch.nan
    partly = model(gone).logits["survival"]
    torch.testing.assert_close(partly[:2], full[:2])
    rest = {key: batch for key, batch in inputs.items() if key != name}
    torch.testing.assert_close(partly[2], model(rest).logits["survival"][2])
    assert (partly[2] - full[2]).abs().max() > 1e-5


@each_variant
@pytest.mark.parametrize("gone", [["slide"], ["rna"], ["rna", "cnv"], ["slide", "rna", "cnv"]])
def test_every_parameter_has_a_gradient(cls, changes, gone: list[str]) -> None:
    """Finite; zeros of what only absent modalities use; a sample without anything is defined."""
    model, inputs = small(cls, **changes), all_inputs()
    some = inputs
    for name in gone:
        some = without(some, name, [0, 2])
    output = model(some)
    loss = output.logits["survival"].square().sum() + sum(output.auxiliary.values())
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.zero_grad()
    absent = {key: without(inputs, key, [0, 1, 2])[key] for key in gone}
    output = model({**inputs, **absent})
    (output.logits["survival"].square().sum() + sum(output.auxiliary.values())).backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    used = {key for key in STAND_INS if grads[key].any()}
    expected = {"genes.stand_in"} if {"rna", "cnv"} <= set(gone) else set()
    assert used == (expected | {"missing_patches"} if "slide" in gone else expected)


@each_variant
def test_a_sample_without_anything_reads_what_was_learned(cls, changes) -> None:
    model, inputs = small(cls, **changes).eval(), all_inputs()
    for name in MODALITIES:
        inputs = without(inputs, name, [1])
    output = model(inputs).logits["survival"]
    empty = {name: without({name: x}, name, [0, 1, 2])[name] for name, x in inputs.items()}
    nothing = model(empty).logits["survival"]
    torch.testing.assert_close(nothing, output[1:2].expand(3, -1))


@each_model
def test_bags_may_repeat_and_an_empty_one_is_absent(cls) -> None:
    model, inputs = small(cls).eval(), all_inputs()
    expected = model(inputs).logits["survival"][[2, 0, 2]]
    picked = {
        name: TableBatch(batch.values[[2, 0, 2]], batch.present)
        if isinstance(batch, TableBatch)
        else batch._replace(ragged=batch.ragged.select([2, 0, 2]))
        for name, batch in inputs.items()
    }
    torch.testing.assert_close(model(picked).logits["survival"], expected)
    absent = without(inputs, "slide", [1])
    empty = {**absent, "slide": absent["slide"]._replace(present=inputs["slide"].present)}
    assert torch.equal(model(empty).logits["survival"], model(absent).logits["survival"])
    # rows of a bag that `present` denies
    denied = inputs["slide"]._replace(present=torch.tensor([True, False, True]))
    found = model({**inputs, "slide": denied}).logits["survival"]
    torch.testing.assert_close(found, model(absent).logits["survival"])


@each_variant
def test_pieces_and_recomputing_change_nothing(cls, changes) -> None:
    """Neither results nor gradients, against one piece that is kept."""
    whole = {"recompute": "none" if cls is SurvPath else False}
    if cls is not CMTA:
        whole["piece_rows"] = 1000
    inputs, found = all_inputs(), []
    for settings in (changes, {**changes, **whole}):
        model = without_dropout(small(cls, **settings)).eval()
        model(inputs).logits["survival"].square().sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("cls", [MCAT, SurvPath, CMTA])
def test_recomputing_drops_the_same_numbers(cls) -> None:
    inputs, found = all_inputs(), []
    for recompute in ("none", "light", "all") if cls is SurvPath else (False, True):
        model = small(cls, recompute=recompute)
        torch.manual_seed(5)
        model(inputs).logits["survival"].square().sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    for other in found[1:]:
        for key in other:
            torch.testing.assert_close(found[0][key], other[key], rtol=1e-4, atol=1e-6, msg=key)


@each_variant
def test_patch_attention_is_a_weight_per_gene_group(cls, changes) -> None:
    model, inputs = small(cls, **changes), all_inputs()
    inputs = without(without(inputs, "rna", [2]), "slide", [1])
    found = model.patch_attention(inputs)
    assert model.training
    assert list(found) == ["slide"]
    assert list(found["slide"]) == ["a", "b", "cnv"]
    for name, weights in found["slide"].items():
        assert weights.shape == (15,)
        assert (weights >= 0).all()
        sums = [float(part.sum()) for part in weights.split([9, 6])]
        assert sums == pytest.approx([1.0, 0.0 if name != "cnv" else 1.0], abs=1e-5)
    assert model.patch_attention({"rna": inputs["rna"]}) == {}
    denied = inputs["slide"]._replace(present=torch.tensor([False, False, True]))
    weights = model.patch_attention({**inputs, "slide": denied})["slide"]["cnv"]
    assert [float(part.sum()) for part in weights.split([9, 6])] == pytest.approx([0.0, 1.0])


@each_model
def test_genes_alone_and_graphs(cls) -> None:
    inputs = all_inputs()
    tables = {name: value for name, value in MODALITIES.items() if name != "slide"}
    model = small(cls, modalities=tables)
    output = model({name: inputs[name] for name in tables})
    output.logits["survival"].sum().backward()
    assert output.logits["survival"].isfinite().all()
    assert all(p.grad is not None for p in model.parameters())
    assert model.patch_attention({"rna": inputs["rna"]}) == {}
    graph = small(cls, modalities={**tables, "cells": ModalityConfig("graph", 12, walk_steps=2)})
    slide = inputs.pop("slide")
    edges = torch.tensor([[4, 5, 15], [5, 6, 16]])
    inputs["cells"] = GraphBatch(slide.features, slide.ragged, edges, slide.present)
    assert graph(inputs).logits["survival"].isfinite().all()


@each_model
def test_wrong_modalities_are_refused(cls) -> None:
    name = cls.__name__
    with pytest.raises(ValueError, match=rf"data\.modalities holds the bags or graphs .*{name}"):
        small(cls, modalities={**MODALITIES, "other": ("bag", 3)})
    with pytest.raises(ValueError, match=rf"data\.modalities holds no table; {name} needs"):
        small(cls, modalities={"slide": ("bag", 3)})
    scan = ModalityConfig("array", 3, axes=2)
    with pytest.raises(ValueError, match=r"data\.modalities holds the array 'scan'"):
        small(cls, modalities={**MODALITIES, "scan": scan})
    with pytest.raises(ValueError, match=r"gene_widths is \(\); it must hold"):
        small(cls, gene_widths=())
    with pytest.raises(ValueError, match="name is 'x'; it must be one of"):
        cls.from_preset("x", modalities=MODALITIES)
    heads = "heads" if cls is SurvPath else "encoder_heads"
    with pytest.raises(ValueError, match=f"{heads} is 3; it must divide"):
        small(cls, **{heads: 3})


@each_model
def test_presets_and_settings(cls) -> None:
    assert model_class(cls.__name__.lower()) is cls
    presets = tuple(cls.config_class.PRESETS)
    assert presets[:2] == ("paper", "released")
    for preset in presets:
        config = cls.config_class.from_preset(preset, modalities=MODALITIES, outputs={"cox": 1})
        assert config.gene_activation == ("selu" if preset == "paper" else "elu")
        assert config.outputs == {"cox": 1}
    model = small(cls, "released", outputs={"survival": 4, "grade": 3})
    assert {k: v.shape[1] for k, v in model(all_inputs()).logits.items()} == {
        "survival": 4,
        "grade": 3,
    }
    assert cls.config_class(**vars(model.config)) == model.config


def test_groups_of_one_name_are_told_apart() -> None:
    model = small(MCAT, modalities={**MODALITIES, "cnv": ("table", 3, {"a": (0, 1)})})
    assert list(model.patch_attention(all_inputs())["slide"]) == ["rna/a", "rna/b", "cnv/a"]


@each_model
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_types(cls, kind: torch.dtype) -> None:
    """fp64 throughout; bf16 bags beside fp32 parameters."""
    model, inputs = without_dropout(small(cls)).eval(), all_inputs()
    expected = model(inputs).logits["survival"]
    slide = inputs["slide"]._replace(features=inputs["slide"].features.to(kind))
    if kind == torch.float64:
        model = model.double()
    output = model({**inputs, "slide": slide}).logits["survival"]
    assert output.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    tolerance = 1e-5 if kind == torch.float64 else 0.05
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_variant
def test_autocast(cls, changes) -> None:
    """Close to fp32, and pieces that are computed a second time see the same types."""
    model, inputs = without_dropout(small(cls, **changes)), all_inputs()
    expected = model(inputs).logits["survival"]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs)
        model.patch_attention(inputs)
    torch.testing.assert_close(output.logits["survival"].float(), expected, rtol=0.1, atol=0.1)
    output.logits["survival"].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@each_variant
def test_a_trained_bag_gets_its_gradient(cls, changes) -> None:
    model, inputs = without_dropout(small(cls, **changes)).eval().double(), all_inputs()
    slide = inputs["slide"]
    features = slide.features.double().requires_grad_()

    def total(rows: torch.Tensor) -> torch.Tensor:
        return model({**inputs, "slide": slide._replace(features=rows)}).logits["survival"].sum()

    total(features).backward()
    assert not features.grad[[1, 2, 3, 13, 14, 21]].any()
    if cls is MOTCat:
        return  # its plan is a constant to the gradient
    step = torch.zeros_like(features)
    step[15, 3] = 1e-6
    with torch.no_grad():
        slope = (total(features + step) - total(features - step)) / 2e-6
    torch.testing.assert_close(features.grad[15, 3], slope, rtol=1e-4, atol=1e-8)
