"""HEALNet: modalities, absence per sample, gradients, attention maps, errors."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from healnet_cases import CONFIGS, LENGTHS, MODALITIES, all_inputs, bag, one_sample, small, without
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from survfuse import Ragged
from survfuse.batch import ArrayBatch, BagBatch, TableBatch
from survfuse.models import HEALNet, HEALNetConfig, ModalityConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_healnet import PlainHEALNet


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_each_sample_of_a_batch_as_if_alone(changes: dict[str, object]) -> None:
    model, inputs = HEALNet(small(**changes)).eval(), all_inputs()
    together = model(inputs)
    assert together.logits["survival"].shape == (3, 4)
    assert together.embeddings["latents"].shape == (3, 10)
    for b in range(3):
        alone = model(one_sample(inputs, b))
        torch.testing.assert_close(together.logits["survival"][b : b + 1], alone.logits["survival"])
    assert (together.logits["survival"][0] - together.logits["survival"][1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_absent_is_left_out_bit_by_bit(name: str, changes: dict[str, object]) -> None:
    """Absent for one sample, in training mode: its latents are those without the modality."""
    model, inputs = HEALNet(small(**changes)).train(), all_inputs()
    full = model(inputs).embeddings["latent_array"]
    partly = model(without(inputs, name, [2])).embeddings["latent_array"]
    rest = {key: batch for key, batch in inputs.items() if key != name}
    missing = model(rest).embeddings["latent_array"]
    assert torch.equal(partly[2], missing[2])
    torch.testing.assert_close(partly[:2], full[:2])
    assert (full[2] - missing[2]).abs().max() > 1e-4
    alone = model(one_sample(rest, 2)).embeddings["latent_array"]
    torch.testing.assert_close(partly[2:], alone)


@pytest.mark.parametrize("name", MODALITIES)
def test_gradients_with_absent_samples(name: str) -> None:
    """Finite everywhere, none from the absent samples, and what is stored there does not matter."""
    model, inputs = HEALNet(small(weight_sharing="none")), all_inputs()
    gone = without(inputs, name, [0, 2])
    if isinstance(gone[name], TableBatch | ArrayBatch):
        gone[name].values[[0, 2]] = torch.nan
    else:
        outside = torch.ones(gone[name].features.shape[0], dtype=torch.bool)
        outside[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = False
        gone[name].features[outside] = torch.nan
    model(gone).logits["survival"].square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
    j = list(MODALITIES).index(name)
    assert model.layers[0].attention[j].value_weight.grad.abs().max() > 0


@pytest.mark.parametrize("said", ["left out", "by mask"])
def test_a_modality_absent_from_the_whole_batch_has_zero_gradient(said: str) -> None:
    model, inputs = HEALNet(small(weight_sharing="none")), all_inputs()
    for name in ("genes", "slide", "scan", "cells"):
        inputs = without(inputs, name, [0, 1, 2])
        if said == "left out":
            del inputs[name]
    model(inputs).logits["survival"].square().sum().backward()
    for j, name in enumerate(MODALITIES):
        for layer in model.layers:
            gradients = [p.grad for p in layer.attention[j].parameters()]
            gradients += [p.grad for p in layer.feed_forward[j].parameters()]
            assert all(gradient is not None for gradient in gradients)
            seen = any(bool(gradient.any()) for gradient in gradients)
            assert seen == (name in ("panel", "plain"))


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_sample_without_anything_gets_the_readout_of_the_latents(blocks: int) -> None:
    model, inputs = HEALNet(small(latent_blocks=blocks)), all_inputs()
    for name in MODALITIES:
        inputs = without(inputs, name, [1])
    output = model(inputs)
    assert torch.equal(output.embeddings["latent_array"][1], model.latents)
    torch.testing.assert_close(
        output.logits["survival"][1], model.readout(model.latents.mean(0))["survival"]
    )
    nothing = {
        name: without({name: batch}, name, [0, 1, 2])[name] for name, batch in inputs.items()
    }
    output = model(nothing)
    torch.testing.assert_close(
        output.logits["survival"], output.logits["survival"][:1].expand(3, -1)
    )
    output.logits["survival"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.latents.grad.any()


def test_an_empty_bag_is_an_absent_one() -> None:
    model, inputs = HEALNet(small()), all_inputs()
    absent = without(inputs, "plain", [1])
    empty = {**absent, "plain": absent["plain"]._replace(present=torch.ones(3) > 0)}
    assert torch.equal(model(empty).logits["survival"], model(absent).logits["survival"])


def test_bags_may_repeat_and_leave_gaps() -> None:
    model, inputs = HEALNet(small()).eval(), all_inputs()
    expected = model(inputs).logits["survival"][[2, 0, 2]]
    picked = {}
    for name, batch in inputs.items():
        if isinstance(batch, TableBatch | ArrayBatch):
            picked[name] = type(batch)(batch.values[[2, 0, 2]], batch.present)
        else:
            picked[name] = batch._replace(ragged=batch.ragged.select([2, 0, 2]))
    torch.testing.assert_close(model(picked).logits["survival"], expected)


def test_order_of_patches_and_nodes() -> None:
    """Without encodings, with slide coordinates and on graphs order is nothing; indices see it."""
    modalities = {**MODALITIES, "placed": ModalityConfig("bag", 4, axes=2)}
    model, inputs = HEALNet(replace(small(), modalities=modalities)).eval(), all_inputs()
    inputs["placed"] = bag(4)._replace(coords=torch.randint(0, 9000, (11, 2)))
    before = model(inputs).logits["survival"]
    order = torch.cat([torch.randperm(6), torch.tensor([6]), 7 + torch.randperm(4)])
    place = torch.empty_like(order)
    place[order] = torch.arange(11)
    for name in ("plain", "cells", "placed"):
        batch = inputs[name]._replace(features=inputs[name].features[order])
        if name == "cells":
            batch = batch._replace(edges=place[batch.edges])
        if name == "placed":
            batch = batch._replace(coords=batch.coords[order])
        inputs[name] = batch
    torch.testing.assert_close(model(inputs).logits["survival"], before)
    slide = inputs["slide"]
    inputs["slide"] = slide._replace(features=slide.features.flip(0).roll(4, 0))
    assert (model(inputs).logits["survival"] - before).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r"inputs\['placed'\]\.coords is None"):
        model({"placed": inputs["placed"]._replace(coords=None)})


def test_gradients_against_finite_differences() -> None:
    modalities = {
        "genes": ModalityConfig("table", 3),
        "slide": ModalityConfig("bag", 4, axes=1),
        "plain": ModalityConfig("bag", 3),
    }
    config = HEALNetConfig(
        modalities,
        depth=2,
        n_latents=2,
        latent_dim=4,
        cross_heads=2,
        cross_head_dim=2,
        latent_heads=1,
        latent_head_dim=2,
        latent_blocks=1,
        temperature=0.5,
        output_slope=0.01,
        backend="reference",
    )
    model = HEALNet(config).double()
    present, ragged = torch.tensor([True, False]), Ragged.from_lengths([3, 2])
    leaves = {name: value.detach() for name, value in model.named_parameters()}
    data = [torch.randn(2, 3), torch.randn(5, 4), torch.randn(5, 3)]
    data = [tensor.double().requires_grad_() for tensor in data]

    def logits(*tensors: Tensor) -> Tensor:
        table, slide, plain, *weights = tensors
        inputs = {
            "genes": TableBatch(table, present),
            "slide": BagBatch(slide, ragged, ~present | True),
            "plain": BagBatch(plain, ragged, present | True),
        }
        named = dict(zip(leaves, weights, strict=True))
        return torch.func.functional_call(model, named, (inputs,)).logits["survival"]

    weights = [value.clone().requires_grad_() for value in leaves.values()]
    assert torch.autograd.gradcheck(logits, (*data, *weights), fast_mode=True)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_attention_maps_are_weights(changes: dict[str, object]) -> None:
    model, inputs = HEALNet(small(attention_dropout=0.5, **changes)), all_inputs()
    inputs = without(without(without(inputs, "slide", [1]), "scan", [0]), "genes", [2])
    model.layers[0].eval()
    maps = model.attention_maps(inputs)
    assert model.training
    assert not model.layers[0].training
    depth = model.config.depth
    assert maps["slide"].shape == (depth, 10)
    assert maps["scan"].shape == (depth, 3, 4, 2)
    assert maps["panel"].shape == (depth, 3, 5)
    assert maps["genes"].tolist() == [[1.0, 1.0, 0.0]] * depth
    ones = torch.ones(depth)
    for name, lengths in {"slide": [6, 0, 4], "plain": LENGTHS, "cells": LENGTHS}.items():
        for part in maps[name].split(lengths, dim=1):
            if part.shape[1]:
                torch.testing.assert_close(part.sum(1), ones)
    torch.testing.assert_close(maps["scan"].sum((2, 3)), ones[:, None] * torch.tensor([0.0, 1, 1]))
    torch.testing.assert_close(maps["panel"].sum(2), ones[:, None].expand(-1, 3))
    # rows of a bag that `present` denies
    denied = inputs["plain"]._replace(present=torch.tensor([True, False, True]))
    shares = model.attention_maps({**inputs, "plain": denied})["plain"].split(LENGTHS, dim=1)
    assert [float(part.sum()) for part in shares] == pytest.approx([depth, 0.0, depth])
    del inputs["plain"]
    assert "plain" not in model.attention_maps(inputs)


def test_attention_maps_are_the_mean_over_latents_and_heads() -> None:
    config = replace(small(depth=1), modalities={"plain": ModalityConfig("bag", 8)})
    model, batch = HEALNet(config).eval(), bag(8, [5])
    attention = model.layers[0].attention[0]
    query = attention.query(attention.query_norm(model.latents)).view(3, 2, 4)
    key = torch.einsum("nd,hed->nhe", attention.bag_norm(batch.features), attention.key_weight)
    weights = (torch.einsum("qhe,nhe->qhn", query, key) / 2.0).softmax(-1)
    found = model.attention_maps({"plain": batch})["plain"]
    torch.testing.assert_close(found[0], weights.mean((0, 1)))


def test_effect_of_withholding_and_gradient_importance() -> None:
    model, inputs = HEALNet(small()), all_inputs()
    inputs = without(inputs, "plain", [0])

    def score(logits: Tensor) -> Tensor:
        return logits.sum(1)

    effects = model.modality_effect(inputs, score=score)
    assert list(effects) == list(inputs)
    rest = {name: batch for name, batch in inputs.items() if name != "plain"}
    expected = score(model(inputs).logits["survival"]) - score(model(rest).logits["survival"])
    torch.testing.assert_close(effects["plain"], expected.detach())
    assert effects["plain"][0] == 0.0
    assert effects["plain"][1:].abs().min() > 0

    importance = model.gradient_importance(inputs, "genes", score=score)
    values, step = inputs["genes"].values, 1e-3
    raised = values.clone()
    raised[:, 2] += step
    higher = model({**inputs, "genes": inputs["genes"]._replace(values=raised)}).logits["survival"]
    slope = (score(higher) - score(model(inputs).logits["survival"])) / step
    torch.testing.assert_close(
        importance[:, 2], slope.detach() * values[:, 2], rtol=0.05, atol=2e-3
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    absent = without(inputs, "genes", [1])
    absent["genes"].values[1] = torch.nan
    lacking = model.gradient_importance(absent, "genes", score=score)
    assert lacking[1].eq(0).all()
    assert lacking.isfinite().all()
    with pytest.raises(ValueError, match=r"one of the tables in inputs: \['genes', 'panel'\]"):
        model.gradient_importance(inputs, "slide", score=score)


def test_dropout_acts_in_training_only() -> None:
    config = replace(small(attention_dropout=0.5), modalities={"genes": MODALITIES["genes"]})
    model = HEALNet(config)
    inputs = {"genes": all_inputs()["genes"]}
    first, second = model(inputs).logits["survival"], model(inputs).logits["survival"]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(inputs).logits["survival"], model(inputs).logits["survival"])
    for name in ("slide", "panel"):
        config = replace(small(attention_dropout=0.5), modalities={name: MODALITIES[name]})
        model, inputs = HEALNet(config), {name: all_inputs()[name]}
        assert not torch.equal(model(inputs).logits["survival"], model(inputs).logits["survival"])
    model = HEALNet(small(ff_dropout=0.5))
    assert not torch.equal(
        model(all_inputs()).logits["survival"], model(all_inputs()).logits["survival"]
    )


def test_one_token_drops_like_the_general_attention() -> None:
    """Averaged over many draws, dropped values have the mean of the undropped ones."""
    config = replace(small(attention_dropout=0.5), modalities={"genes": MODALITIES["genes"]})
    attention = HEALNet(config).layers[0].attention[0]
    attention.output = nn.Identity()
    attention.output.weight = attention.value_weight
    token = torch.randn(1, 7)
    latents = torch.zeros(1, 20000, 10)
    dropped = attention.train().one_token(latents, token)[0]
    kept = attention.eval().one_token(latents, token)[0, 0]
    torch.testing.assert_close(dropped.mean(0), kept, rtol=0.05, atol=1e-2)
    head = dropped.unflatten(1, (2, 4))
    ratio = (head / kept.unflatten(0, (2, 4))).round(decimals=3)
    # a head keeps or loses its token as a whole
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(ratio.amin(2), ratio.amax(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bit_bags(dtype: torch.dtype) -> None:
    """Features in bf16 under fp32 or bf16 parameters, and under autocast."""
    model, inputs = HEALNet(small()).eval(), all_inputs()
    exact = model(inputs).logits["survival"]
    for name in ("slide", "plain", "cells"):
        inputs[name] = inputs[name]._replace(features=inputs[name].features.bfloat16())
    model = model.to(dtype)
    tolerance = {"rtol": 0.05, "atol": 0.05}
    logits = model(inputs).logits["survival"]
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), exact, **tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = model(inputs).logits["survival"]
    torch.testing.assert_close(automatic.float(), exact, **tolerance)
    model(inputs).logits["survival"].float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["softmax", "sdpa"])
def test_plain_baseline_computes_the_same(attention: str) -> None:
    modalities = {name: MODALITIES[name] for name in ("genes", "slide", "plain")}
    config = replace(small(weight_sharing="none", output_slope=0.01), modalities=modalities)
    model, inputs = HEALNet(config), {name: all_inputs()[name] for name in modalities}
    plain = PlainHEALNet(config, attention=attention)
    plain.load_state_dict(model.state_dict())
    ours, theirs = model(inputs).logits["survival"], plain(inputs)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (key, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=key)


def test_wrong_inputs_are_refused() -> None:
    model, inputs = HEALNet(small()), all_inputs()
    genes, plain = inputs["genes"], inputs["plain"]
    with pytest.raises(ValueError, match="inputs is empty"):
        model({})
    with pytest.raises(ValueError, match="inputs has the modality 'rna'; the model knows"):
        model({"rna": genes})
    with pytest.raises(TypeError, match=r"inputs\['genes'\] is BagBatch.*a TableBatch"):
        model({"genes": plain})
    with pytest.raises(ValueError, match="the last of 7 channels"):
        model({"genes": genes._replace(values=torch.randn(3, 8))})
    with pytest.raises(ValueError, match=r"inputs\['plain'\] has shape \(11, 12\)"):
        model({"plain": bag(12)})
    with pytest.raises(ValueError, match="it must be bool of shape"):
        model({"genes": genes._replace(present=torch.ones(3))})
    with pytest.raises(ValueError, match="has 3 samples and present has 2"):
        model({"genes": genes._replace(present=torch.ones(2) > 0)})
    with pytest.raises(
        ValueError, match=r"inputs\['plain'\] has 2 samples and inputs\['genes'\] has 3"
    ):
        model({"genes": genes, "plain": bag(8, [2, 2])})
    with pytest.raises(ValueError, match="ragged: bag 2 is rows 7 to 11"):
        model({"plain": plain._replace(features=plain.features[:9])})


def test_coordinates_a_slide_does_not_have_are_refused() -> None:
    config = replace(small(depth=1), modalities={"slide": ModalityConfig("bag", 8, axes=2)})
    model, batch = HEALNet(config), bag(8)
    coords = torch.rand(11, 2)
    coords[6:7] = torch.nan
    with pytest.raises(ValueError, match="coords of sample 1 of the batch are NaN"):
        model({"slide": batch._replace(coords=coords)})
    absent = batch._replace(coords=coords, present=torch.tensor([True, False, True]))
    assert model({"slide": absent}).logits["survival"].isfinite().all()


def test_raw_inputs_are_named() -> None:
    model, inputs = HEALNet(small()), all_inputs()
    genes, plain, cells = inputs["genes"], inputs["plain"], inputs["cells"]
    cases = [
        (genes, "inputs is TableBatch; it must map names"),
        ({"genes": genes.values}, r"inputs\['genes'\] is Tensor; a table must be a TableBatch"),
        ({"genes": genes, "plain": plain.features}, r"inputs\['plain'\] is Tensor; a bag must be"),
        ({"genes": genes._replace(present=[True] * 3)}, r"\.present is list; it must be a tensor"),
        ({"genes": genes._replace(values=genes.values.numpy())}, r"\.values is ndarray; it must"),
        ({"plain": plain._replace(features=[1.0])}, r"\.features is list; it must be a tensor"),
        (
            {"plain": plain._replace(ragged=[30, 0])},
            r"\.ragged is list; it must be a survfuse\.Rag",
        ),
        ({"cells": cells._replace(edges=[[0], [1]])}, r"\.edges is list; it must be a tensor"),
    ]
    for wrong, message in cases:
        with pytest.raises(TypeError, match=message):
            model(wrong)


def test_compiles_to_one_graph_for_all_sizes() -> None:
    """No graph break, and after the second shape neither bag lengths nor batch size recompile."""
    names = ("genes", "slide", "plain")
    config = replace(small(depth=1), modalities={name: MODALITIES[name] for name in names})
    model, counter = HEALNet(config).eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ([6, 2, 4], [7, 3, 9, 2], [30, 11, 8, 5, 3]):
        present = torch.ones(len(lengths), dtype=torch.bool)
        inputs = {"slide": bag(12, lengths), "plain": bag(8, lengths)}
        inputs["genes"] = TableBatch(torch.randn(len(lengths), 7), present)
        torch.testing.assert_close(
            compiled(inputs).logits["survival"], model(inputs).logits["survival"]
        )
    assert counter.frame_count == 2


def test_a_model_without_tasks_returns_the_latents() -> None:
    output = HEALNet(small(outputs={}))(all_inputs())
    assert output.logits == {}
    assert output.embeddings["latent_array"].shape == (3, 3, 10)


def test_several_tasks_share_the_latents() -> None:
    output = HEALNet(small(outputs={"survival": 4, "grade": 2}))(all_inputs())
    assert {task: tuple(x.shape) for task, x in output.logits.items()} == {
        "survival": (3, 4),
        "grade": (3, 2),
    }
