"""AMMASurv: samples and absence, order and positions, types, checkpoints, compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ammasurv_cases import MODALITIES, batch, lively, one, small
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from survfuse.batch import Modality, TableBatch
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import ABLATION, AMMASurvConfig
from survfuse.models.settings import ModalityConfig


@pytest.mark.parametrize("kind", ["exact", "nystrom", "auto"])
@pytest.mark.parametrize("preset", AMMASurvConfig.PRESETS)
def test_each_sample_of_a_batch_as_if_alone(preset: str, kind: str) -> None:
    blocks = AMMASurvConfig.from_preset(preset, modalities=MODALITIES).blocks
    model = lively(small(blocks=blocks, patch_attention_kind=kind, exact_limit=8))
    inputs = batch()
    together = model(inputs)
    for b in range(5):
        alone = model(one(inputs, b))
        torch.testing.assert_close(together.logits["survival"][b], alone.logits["survival"][0])
        torch.testing.assert_close(together.embeddings["gates"][b], alone.embeddings["gates"][0])


@pytest.mark.parametrize("blocks", ABLATION.values(), ids=ABLATION)
@pytest.mark.parametrize("kind", ["exact", "nystrom"])
def test_gradients_with_absent_samples(kind: str, blocks: tuple[str, ...]) -> None:
    """For every parameter, finite, whatever stands where a modality is absent."""
    model, inputs = lively(small(blocks=blocks, patch_attention_kind=kind)), batch()
    expected = model(inputs).logits["survival"]
    inputs["rna"].values[3:] = torch.nan
    inputs["cnv"].values[1:] = torch.nan
    stored = torch.cat([inputs["slide"].features, torch.full((3, 12), torch.nan).double()])
    inputs["slide"] = inputs["slide"]._replace(features=stored)
    found = model(inputs).logits["survival"]
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("left", ["slide", "rna", "cnv", "tables", "all"])
def test_modalities_absent_from_the_whole_batch(left: str) -> None:
    """Left out or denied by mask, rows or none: the same, with gradients for every parameter."""
    model, inputs = lively(small(blocks=ABLATION["symmetric"])), batch()
    gone = {"tables": ["rna", "cnv"], "all": ["rna", "cnv", "slide"]}.get(left, [left])
    denied = dict(inputs)
    for name in gone:
        denied[name] = inputs[name]._replace(present=torch.zeros(5, dtype=torch.bool))
        field = "features" if name == "slide" else "values"
        wild = torch.full_like(getattr(inputs[name], field), torch.nan)
        denied[name] = denied[name]._replace(**{field: wild})
    found = model(denied)
    found.logits["survival"].square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    if left == "all":
        assert torch.equal(found.embeddings["joint"], model.nothing.expand(5, -1))
        assert (found.embeddings["gates"] == 0).all()
        return
    rest = {name: item for name, item in inputs.items() if name not in gone}
    model.zero_grad()
    output = model(rest)
    torch.testing.assert_close(output.logits["survival"], found.logits["survival"])
    output.logits["survival"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("blocks", ABLATION.values(), ids=ABLATION)
def test_a_bag_that_is_denied_beside_one_that_shares_its_rows(blocks: tuple[str, ...]) -> None:
    model, inputs = lively(small(blocks=blocks)), batch([7, 9])
    slide = inputs["slide"]
    shared = slide.ragged.select([0, 1, 1])
    tables = {
        name: TableBatch(inputs[name].values[[0, 1, 1]], torch.ones(3) > 0)
        for name in ("rna", "cnv")
    }
    denied = slide._replace(ragged=shared, present=torch.tensor([False, False, True]))
    denied.features[:7] = torch.nan
    found = model({**tables, "slide": denied})
    alone = model(
        {
            **{k: TableBatch(t.values[2:], t.present[2:]) for k, t in tables.items()},
            "slide": denied._replace(ragged=shared.select([2]), present=denied.present[2:]),
        }
    )
    torch.testing.assert_close(found.logits["survival"][2:], alone.logits["survival"])
    absent = model(tables).logits["survival"][:2]
    torch.testing.assert_close(found.logits["survival"][:2], absent)
    assert model.patch_attention({**tables, "slide": denied})["slide"]["pool"].shape == (25,)


def test_a_sample_without_anything_gets_the_learned_vector() -> None:
    model, inputs = lively(small()), batch()
    output = model(inputs)
    torch.testing.assert_close(output.embeddings["joint"][4], model.nothing)
    assert output.embeddings["gates"][4].tolist() == [0.0, 0.0, 0.0]
    assert (output.embeddings["slide"][[1, 4]] == 0).all()
    assert model(one(inputs, 4)).logits["survival"].isfinite().all()
    output.logits["survival"][4].sum().backward()
    assert model.nothing.grad.any()
    assert not model.patch_projection.weight.grad.any()


def test_order_and_positions_of_patches() -> None:
    modalities = {**MODALITIES, "slide": ModalityConfig("bag", 12, axes=2)}
    model, inputs = lively(small(modalities=modalities)), batch([7, 0, 9])
    slide = inputs["slide"]._replace(coords=torch.randint(0, 9000, (16, 2)))
    logits = model({**inputs, "slide": slide}).logits["survival"]
    order = torch.cat([torch.randperm(7), 7 + torch.randperm(9)])
    turned = slide._replace(features=slide.features[order], coords=slide.coords[order])
    torch.testing.assert_close(model({**inputs, "slide": turned}).logits["survival"], logits)
    moved = slide._replace(coords=slide.coords.flip(0))
    assert (model({**inputs, "slide": moved}).logits["survival"] - logits)[0].abs().max() > 1e-6
    with pytest.raises(ValueError, match=r"inputs\['slide'\]\.coords is None"):
        model(inputs)
    coords = slide.coords.double()
    coords[:7] = torch.nan
    with pytest.raises(ValueError, match="coords of sample 0 of the batch are NaN"):
        model({**inputs, "slide": slide._replace(coords=coords)})
    denied = slide._replace(coords=coords, present=torch.tensor([False, False, True]))
    model({**inputs, "slide": denied}).logits["survival"].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    by_index = {**MODALITIES, "slide": ModalityConfig("bag", 12, axes=1)}
    model = lively(small(modalities=by_index))
    assert not torch.allclose(
        model(inputs).logits["survival"], model({**inputs, "slide": turned}).logits["survival"]
    )
    assert model({name: inputs[name] for name in ("rna",)}).logits["survival"].isfinite().all()


def test_bags_may_repeat_and_leave_gaps() -> None:
    for kind in ("exact", "nystrom"):
        model, inputs = lively(small(patch_attention_kind=kind)), batch([7, 2, 9])
        expected = model(inputs).logits["survival"][[2, 0, 2]]
        picked: dict[str, Modality] = {
            name: TableBatch(inputs[name].values[[2, 0, 2]], inputs[name].present[[2, 0, 2]])
            for name in ("rna", "cnv")
        }
        slide = inputs["slide"]
        picked["slide"] = slide._replace(ragged=slide.ragged.select([2, 0, 2]))
        torch.testing.assert_close(model(picked).logits["survival"], expected)


@pytest.mark.parametrize("kind", ["exact", "nystrom"])
def test_checkpoints_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither values nor gradients, with dropout; feed-forwards go by chunks."""
    monkeypatch.setattr("survfuse.models.ammasurv_layer._CHUNK", 5)
    dropouts = {"attention_dropout": 0.3, "readout_dropout": 0.0}
    config = small(blocks=ABLATION["symmetric"], patch_attention_kind=kind, **dropouts)
    model, inputs = lively(config).train(), batch()
    saving = AMMASurv(replace(config, checkpoint=True)).double().train()
    saving.load_state_dict(model.state_dict())
    results = []
    for net in (model, saving):
        torch.manual_seed(3)
        logits = net(inputs).logits["survival"]
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(results[0], results[1])
    empty = batch([0, 0])
    saving(empty).logits["survival"].sum().backward()


@pytest.mark.parametrize("name", ["attention", "ff", "gene", "readout"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model = AMMASurv(small(**{"readout_dropout": 0.0, f"{name}_dropout": 0.5})).double()
    inputs = batch()
    assert not torch.equal(model(inputs).logits["survival"], model(inputs).logits["survival"])
    model.eval()
    assert torch.equal(model(inputs).logits["survival"], model(inputs).logits["survival"])


@pytest.mark.parametrize("preset", AMMASurvConfig.PRESETS)
def test_sixteen_bit_bags(preset: str) -> None:
    """Features in bf16 under fp32 or bf16 parameters, and under autocast."""
    blocks = AMMASurvConfig.from_preset(preset, modalities=MODALITIES).blocks
    for kind in ("exact", "nystrom"):
        model = AMMASurv(small(blocks=blocks, patch_attention_kind=kind)).eval()
        inputs = batch()
        for name in ("rna", "cnv"):
            inputs[name] = inputs[name]._replace(values=inputs[name].values.float())
        slide = inputs["slide"]
        inputs["slide"] = slide._replace(features=slide.features.float())
        exact = model(inputs).logits["survival"]
        inputs["slide"] = slide._replace(features=slide.features.bfloat16())
        close = {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(model(inputs).logits["survival"], exact, **close)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            automatic = model(inputs).logits["survival"]
        torch.testing.assert_close(automatic.float(), exact, **close)
        automatic.float().square().sum().backward()
        model.bfloat16()
        logits = model(inputs).logits["survival"]
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), exact, **close)
        logits.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiles_to_one_graph_for_all_sizes() -> None:
    config = small(blocks=ABLATION["symmetric"], depth=1, patch_attention_kind="nystrom")
    model, counter = lively(config), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for lengths in ([6, 7, 5], [7, 5, 9, 8], [30, 11, 8, 5, 6]):
            inputs = batch(lengths)
            torch.testing.assert_close(
                compiled(inputs).logits["survival"], model(inputs).logits["survival"]
            )
    assert counter.frame_count <= 2


def test_effect_of_withholding_and_gradient_importance() -> None:
    model, inputs = lively(small()), batch()

    def score(logits: Tensor) -> Tensor:
        return logits.sum(1)

    effects = model.modality_effect(inputs, score=score)
    assert effects["slide"][[1, 4]].tolist() == [0.0, 0.0]
    assert effects["slide"][[0, 2, 3]].abs().min() > 0
    importance = model.gradient_importance(inputs, "rna", score=score)
    assert importance.shape == (5, 6)
    assert importance[3:].eq(0).all()
    assert importance[:3].abs().max() > 0
