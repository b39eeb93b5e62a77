"""Subspace fusion: absence per sample, gradients, places of patches, maps, losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from subspace_cases import CONFIGS, LENGTHS, MODALITIES, batch, one_sample, slides, small, without
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.models import ModalityConfig, SubspaceFusion, model_class
from survfuse.models.subspace_config import BRANCHES

ALL = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)


def _loss(output) -> Tensor:
    return output.logits["survival"].square().sum() + sum(output.auxiliary.values())


@ALL
def test_each_sample_of_a_batch_as_if_alone(changes: dict) -> None:
    model, inputs = SubspaceFusion(small(**changes)).eval(), batch()
    together = model(inputs)
    assert together.logits["survival"].shape == (3, 4)
    assert {name: e.shape for name, e in together.embeddings.items()} == dict.fromkeys(
        BRANCHES, (3, 16)
    )
    for b in range(3):
        alone = model(one_sample(inputs, b)).logits["survival"]
        torch.testing.assert_close(together.logits["survival"][b : b + 1], alone)
    assert torch.equal(together.logits["survival"], model(inputs).logits["survival"])


@ALL
@pytest.mark.parametrize("name", MODALITIES)
def test_absent_samples_are_selected_away(name: str, changes: dict) -> None:
    """What is stored there is NaN, and the others are as they were; gradients are finite."""
    model, inputs = SubspaceFusion(small(**changes)).eval(), batch()
    gone = without(inputs, name, [0])
    full, partly = model(inputs).logits["survival"], model(gone).logits["survival"]
    torch.testing.assert_close(partly[1:], full[1:])
    assert float((partly[0] - full[0]).abs().max().detach()) > 1e-4
    rest = {key: item for key, item in one_sample(inputs, 0).items() if key != name}
    torch.testing.assert_close(partly[:1], model(rest).logits["survival"])
    _loss(model(gone)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for branch in model.branches.values():
        learned = branch.absent_genes if name == "genes" else branch.absent_patch
        assert learned.grad.abs().max() > 0


@ALL
def test_every_parameter_learns(changes: dict) -> None:
    torch.manual_seed(1)
    model = SubspaceFusion(small(**changes, gene_dropout=0.0))
    inputs = without(without(batch([40, 30, 23, 12]), "genes", [1]), "slides", [3])
    _loss(model(inputs)).backward()
    # adding to all logits of a softmax changes none of its weights
    idle = ("gated_pool.score.bias", "rel_pos_bias.mlp.2.bias")
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert bool(parameter.grad.abs().max() > 0) or key.endswith(idle), key


@ALL
@pytest.mark.parametrize("said", ["left out", "by mask"])
@pytest.mark.parametrize("name", MODALITIES)
def test_a_modality_absent_from_the_whole_batch(name: str, said: str, changes: dict) -> None:
    model, inputs = SubspaceFusion(small(**changes)), without(batch(), name, [0, 1, 2])
    if said == "left out":
        del inputs[name]
    _loss(model(inputs)).backward()
    for branch in model.branches.values():
        seen = {"genes": branch.genes[0][0].weight, "slides": branch.project.weight}
        for key, weight in seen.items():
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert bool(weight.grad.any()) == (key != name)
    assert all(p.grad is not None for p in model.parameters())


@ALL
def test_a_sample_without_anything(changes: dict) -> None:
    model, inputs = SubspaceFusion(small(**changes)).eval(), batch()
    nothing = without(without(inputs, "genes", [1]), "slides", [1])
    all_gone = without(without(inputs, "genes", [0, 1, 2]), "slides", [0, 1, 2])
    some, none = model(nothing).logits["survival"], model(all_gone).logits["survival"]
    torch.testing.assert_close(none, some[1:2].expand(3, -1))
    assert none.isfinite().all()
    assert all(float(loss.detach()) == 0.0 for loss in model(all_gone).auxiliary.values())


def test_an_empty_bag_is_an_absent_one_and_a_denied_bag_too() -> None:
    model, inputs = SubspaceFusion(small()).eval(), batch([40, 0, 23])
    absent = model(inputs).logits["survival"]
    said = inputs["slides"]._replace(present=torch.ones(3, dtype=torch.bool))
    assert torch.equal(model({**inputs, "slides": said}).logits["survival"], absent)
    denied = inputs["slides"]._replace(present=torch.tensor([True, False, False]))
    gone = model(without(inputs, "slides", [2])).logits["survival"]
    torch.testing.assert_close(model({**inputs, "slides": denied}).logits["survival"], gone)
    for maps in (model.patch_attention, model.patch_maps):
        found = maps({**inputs, "slides": denied})["slides"]["tumor"]
        assert found.shape == (63,)
        assert not found[40:].any()
        assert found[:40].any()


@pytest.mark.parametrize("pool", ["mean", "attention", "genes"])
def test_order_of_patches_and_ranges_do_not_matter(pool: str) -> None:
    model, inputs = SubspaceFusion(small(pool=pool)).eval(), batch()
    bag = inputs["slides"]
    before = model(inputs).logits["survival"]
    order = torch.cat([torch.randperm(40), torch.tensor([40]), 41 + torch.randperm(23)])
    shuffled = bag._replace(features=bag.features[order], coords=bag.coords[order])
    torch.testing.assert_close(model({**inputs, "slides": shuffled}).logits["survival"], before)
    # bags that repeat, in another order, among rows of nobody that hold NaN
    features = torch.cat([torch.full((5, 9), torch.nan), bag.features])
    coords = torch.cat([torch.full((5, 2), torch.nan), bag.coords])
    ragged = Ragged.from_ranges(bag.ragged.starts + 5, bag.ragged.lengths).select([2, 0, 2])
    picked = BagBatch(features, ragged, bag.present, coords)
    genes = TableBatch(inputs["genes"].values[[2, 0, 2]], inputs["genes"].present)
    found = model({"genes": genes, "slides": picked})
    torch.testing.assert_close(found.logits["survival"], before[[2, 0, 2]])


def test_places_matter_on_the_grid_and_not_on_the_square() -> None:
    inputs = batch([40])
    moved = inputs["slides"]._replace(coords=inputs["slides"].coords.flip(0))
    for layout, matters in (("grid", True), ("square", False), ("fixed", False)):
        model = SubspaceFusion(small(layout=layout, map_side=6)).eval()
        with torch.no_grad():
            pair = [model({**inputs, "slides": bag}) for bag in (inputs["slides"], moved)]
        apart = (pair[0].embeddings["tumor"] - pair[1].embeddings["tumor"]).abs().max()
        assert (float(apart) > 1e-6) == matters, layout


def test_patches_that_a_fixed_map_does_not_show_have_no_part() -> None:
    model, inputs = SubspaceFusion(small(layout="fixed", map_side=5)).eval(), batch([40, 12])
    bag = inputs["slides"]
    features = bag.features.requires_grad_()
    output = model(inputs)
    _loss(output).backward()
    read = features.grad.abs().sum(1) > 0
    assert [int(part.sum()) for part in read.split([40, 12])] == [25, 12]
    hidden = torch.where(read[:, None], features.detach(), torch.nan)
    again = model({**inputs, "slides": bag._replace(features=hidden)})
    assert torch.equal(again.logits["survival"], output.logits["survival"])
    for maps in (model.patch_attention, model.patch_maps):
        found = maps(inputs)["slides"]["tumor"]
        assert found.shape == (52,)
        assert not found[~read].any()


def test_branches_read_their_own_genes_only() -> None:
    model, inputs = SubspaceFusion(small()).eval(), batch()
    before = model(inputs).embeddings
    values = inputs["genes"].values.clone()
    values[:, [0, 2, 4]] += 1.0
    after = model({**inputs, "genes": inputs["genes"]._replace(values=values)}).embeddings
    assert torch.equal(before["microenvironment"], after["microenvironment"])
    assert float((before["tumor"] - after["tumor"]).abs().max().detach()) > 1e-4


def test_columns_of_the_heads_belong_to_branches() -> None:
    config = small(outputs={"survival": 4, "grade": 3})
    model = SubspaceFusion(config).eval()
    output = model(batch())
    columns = model.branch_columns()
    for task, head in model.readout.tasks.items():
        parts = [output.embeddings[b] @ head.weight[:, columns[b]].T for b in BRANCHES]
        torch.testing.assert_close(sum(parts) + head.bias, output.logits[task])


def test_genes_of_two_tables_and_groups() -> None:
    modalities = {
        "rna": ModalityConfig("table", 4, groups={"a": (0, 1), "b": (1, 2)}),
        "protein": ModalityConfig("table", 2),
        "slides": MODALITIES["slides"],
    }
    config = replace(
        small(), modalities=modalities, tumor=("a", "b"), microenvironment=("rna/b", "protein")
    )
    assert config.gene_columns() == {
        "tumor": {"rna": (0, 1, 2)},
        "microenvironment": {"rna": (1, 2), "protein": (0, 1)},
    }
    model = SubspaceFusion(config).eval()
    inputs = batch()
    there = torch.ones(3, dtype=torch.bool)
    inputs = {"slides": inputs["slides"], "rna": TableBatch(torch.randn(3, 4), there)}
    half = {**inputs, "protein": TableBatch(torch.full((3, 2), torch.nan), ~there)}
    torch.testing.assert_close(model(half).logits, model(inputs).logits)
    zeros = {**inputs, "protein": TableBatch(torch.zeros(3, 2), there)}
    torch.testing.assert_close(model(zeros).logits, model(inputs).logits)


@pytest.mark.parametrize("changes", [CONFIGS["paper"], CONFIGS["gated"]], ids=["paper", "gated"])
def test_sixteen_bit_bags_and_autocast(changes: dict) -> None:
    model, inputs = SubspaceFusion(small(**changes)).eval(), batch()
    expected = model(inputs).logits["survival"]
    half = inputs["slides"]._replace(features=inputs["slides"].features.bfloat16())
    got = model({**inputs, "slides": half}).logits["survival"]
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs)
        _loss(output).backward()
    torch.testing.assert_close(output.logits["survival"].float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_against_finite_differences() -> None:
    config = small(dim=4, gene_widths=(3,), dim_head=2, backend="reference")
    model = SubspaceFusion(config).double().eval()
    inputs = without(batch([7, 5], dtype=torch.float64), "genes", [1])
    bag, genes = inputs["slides"], inputs["genes"]
    branch = "branches.tumor."
    names = ["genes.0.0.weight", "project.weight", "fuse.weight", "attention_norm.weight"]
    names += ["attention.to_offsets.0.weight", "attention.to_k.weight", "absent_genes"]
    named = dict(model.named_parameters())
    weights = [named[branch + name].detach().clone() for name in names]

    def outputs(features: Tensor, values: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        changed = {
            "slides": bag._replace(features=features),
            "genes": genes._replace(values=values),
        }
        given = {branch + name: weight for name, weight in zip(names, weights, strict=True)}
        found = torch.func.functional_call(model, given, (changed,))
        return found.logits["survival"], *found.auxiliary.values()

    leaves = [bag.features, genes.values.nan_to_num(), *weights]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True, atol=1e-4)


@ALL
def test_attention_and_maps_of_patches(changes: dict) -> None:
    model = SubspaceFusion(small(**changes, attention_dropout=0.5)).train()
    inputs = without(batch([40, 30, 23]), "slides", [1])
    attention, maps = model.patch_attention(inputs), model.patch_maps(inputs)
    assert model.training
    for name in BRANCHES:
        received = attention["slides"][name]
        assert received.shape == maps["slides"][name].shape == (63,)
        assert float(received.min()) >= 0.0
        assert [float(part.sum()) for part in received.split([40, 23])] == pytest.approx([1.0] * 2)
    assert torch.equal(maps["slides"]["tumor"], model.patch_maps(inputs)["slides"]["tumor"])
    assert model.patch_attention({"genes": inputs["genes"]}) == {}
    assert model.patch_maps({"genes": inputs["genes"]}) == {}


def test_patch_maps_are_gradient_times_input_of_one_branch() -> None:
    """Moving a patch by t times what sets it apart changes the score by t times its share."""
    model = SubspaceFusion(small(outputs={"survival": 4, "grade": 3})).double().eval()
    inputs = batch([25], dtype=torch.float64)
    options = {"task": "grade", "score": lambda logits: logits[:, 2]}
    maps = model.patch_maps(inputs, **options, signed=True)["slides"]
    sizes = model.patch_maps(inputs, **options)["slides"]
    step = 1e-6
    for name, branch in model.branches.items():
        project, slopes = branch.project_patches, []
        for patch in (7, 19):

            def raised(bag: Tensor, places, project=project, patch=patch) -> Tensor:
                patches = project(bag, places)
                moved = torch.zeros_like(patches)
                moved[patch] = step * (patches[patch] - patches.mean(0))
                return patches + moved

            before = model(inputs).logits["grade"][0, 2]
            branch.project_patches = raised
            slopes.append((model(inputs).logits["grade"][0, 2] - before).detach() / step)
            branch.project_patches = project
        found = maps[name][[7, 19]]
        torch.testing.assert_close(found, torch.stack(slopes), rtol=1e-4, atol=1e-7)
        assert torch.equal(sizes[name], maps[name].abs())
    with pytest.raises(ValueError, match="task is 'stage'"):
        model.patch_maps(inputs, task="stage")


def test_the_registry_and_the_base_class_know_it() -> None:
    cls = model_class("subspace_fusion")
    model = cls.from_preset("paper", modalities=MODALITIES, dim=8, heads=2, dim_head=4)
    effects = model.modality_effect(batch(), score=lambda logits: logits.sum(1))
    assert effects["genes"].shape == (3,)
    assert float(effects["slides"].abs().min()) > 0
    importance = model.gradient_importance(batch(), "genes", score=lambda logits: logits.sum(1))
    assert importance.shape == (3, 7)


@pytest.mark.parametrize("name", MODALITIES)
def test_a_model_of_one_modality(name: str) -> None:
    """As single-modality baselines are built: it has no weights for the other."""
    model = SubspaceFusion(replace(small(), modalities={name: MODALITIES[name]}))
    inputs = without({name: batch()[name]}, name, [1])
    output = model(inputs)
    _loss(output).backward()
    assert output.logits["survival"].isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = model.patch_maps(inputs)
    assert list(maps) == (["slides"] if name == "slides" else [])


def test_coordinates_that_are_not_there() -> None:
    inputs = batch()
    bare = {**inputs, "slides": inputs["slides"]._replace(coords=None)}
    with pytest.raises(ValueError, match=r"inputs\['slides'\]\.coords of sample 0 .*without_coord"):
        SubspaceFusion(small())(bare)
    coords = inputs["slides"].coords.clone()
    coords[41:] = torch.nan
    some = {**inputs, "slides": inputs["slides"]._replace(coords=coords)}
    with pytest.raises(ValueError, match="of sample 2 of the batch are missing"):
        SubspaceFusion(small())(some)
    model = SubspaceFusion(small(without_coords="square")).eval()
    square = SubspaceFusion(small(layout="square")).eval()
    square.load_state_dict(model.state_dict())
    together = model(some).logits["survival"]
    torch.testing.assert_close(together[:2], model(inputs).logits["survival"][:2])
    torch.testing.assert_close(together[2], square(inputs).logits["survival"][2])
    torch.testing.assert_close(model(bare).logits, square(inputs).logits)


def test_points_follow_the_tissue() -> None:
    """Two distant pieces have as many points as both alone."""
    model = SubspaceFusion(small()).eval()
    bag = slides([LENGTHS[0]])
    near, far = bag.coords.clone(), bag.coords.clone()
    near[20:] += 256.0 * 12
    far[20:] += 256.0 * 400
    branch = model.branches["tumor"]
    genes = branch.encode_genes({}, 1).values
    found = []
    for coords in (near, far):
        places, _ = model._lay_out({"slides": bag._replace(coords=coords)})
        found.append(branch(bag.features, places, genes).attended.point_ragged.total)
    assert found[0] == found[1]
