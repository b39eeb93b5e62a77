"""AMMASurv: blocks, importance and landmarks against a dense transcription; inspection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ammasurv_cases import LENGTHS, MODALITIES, batch, lively, one, small
from ammasurv_transcription import plain, plain_landmarks
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import ABLATION, AMMASurvConfig
from survfuse.models.ammasurv_layer import Heads, self_attention_of_one_bag
from survfuse.ops import cross_attention


@pytest.mark.parametrize("blocks", ABLATION.values(), ids=ABLATION)
def test_every_set_of_blocks_against_a_dense_transcription(blocks: tuple[str, ...]) -> None:
    """Logits and masses of each sample, in a batch with every kind of absence."""
    model, inputs = lively(small(blocks=blocks)), batch()
    found, masses = model(inputs).logits["survival"], model.attention_mass(inputs)
    for b in range(4):
        expected, mass = plain(model, one(inputs, b))
        torch.testing.assert_close(found[b], expected)
        for i, by_side in enumerate(mass):
            sides = {"p": "patches", "g": "genes"}
            for letter, values in by_side.items():
                shares = masses[f"layer {i}"][sides[letter]]
                stacked = torch.stack([shares[name][b] for name in model.names])
                torch.testing.assert_close(stacked, values)


SETTINGS = {
    "plain softmax": {"learned_importance": False, "count_normalised": False},
    "counts": {"learned_importance": False},
    "importance": {"count_normalised": False},
    "contrast of the genes' attention": {"gene_temperature": 0.2},
    "gates of tokens": {"gate": "tokens", "gate_activation": "sigmoid"},
    "per layer": {"blocks": [["pp", "gg"], ["gp"], []], "depth": 3, "gate": "tokens"},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_settings_against_a_dense_transcription(changes: dict[str, object]) -> None:
    model, inputs = lively(small(**{"blocks": ABLATION["symmetric"], **changes})), batch()
    found = model(inputs).logits["survival"]
    for layer in model.layers:
        if layer.importance is None:
            layer.importance = torch.nn.Parameter(torch.zeros(3).double())
    for b in range(4):
        torch.testing.assert_close(found[b], plain(model, one(inputs, b))[0])


def test_landmarks_and_genes_share_one_softmax() -> None:
    """Landmarks: values by the Nystrom formula, weight by the mean over landmarks."""
    config = small(blocks=["pp", "pg"], depth=1, patch_attention_kind="nystrom")
    model = lively(config)
    layer, x = model.layers[0], torch.randn(11, 8).double()
    genes = torch.randn(1, 4, 8).double()
    inputs = batch([11])
    _, _, state = model._tokens(inputs)
    heads = layer.heads(genes)
    found = layer.patches.attended(list(layer.parts(x, heads, state)["p"].values()))
    out, lse = plain_landmarks(layer, x)
    query = layer.patches.project(layer.patches.norm(x)).query
    logits = torch.einsum("qhd,khd->qhk", query, heads.key[0]) / 2.0
    bias = layer.importance[model.tables] - torch.tensor([3.0, 3.0, 3.0, 1.0]).log()
    weights = torch.cat([(lse + layer.importance[0])[..., None], logits + bias], -1).softmax(-1)
    union = weights[..., :1] * out
    union = union + torch.einsum("qhk,khd->qhd", weights[..., 1:], heads.value[0])
    torch.testing.assert_close(found, layer.patches.output(union.flatten(1)))


def test_kinds_of_attention_of_patches() -> None:
    """Landmarks are exact for short bags; "auto" chooses by bag, not by batch."""
    inputs = batch()
    exact = lively(small(blocks=ABLATION["symmetric"], patch_attention_kind="exact"))
    models = {}
    for kind, changes in {
        "nystrom": {"landmarks": 9},
        "far": {"landmarks": 4},
        "auto": {"exact_limit": 8, "landmarks": 4},
    }.items():
        word = {"far": "nystrom"}.get(kind, kind)
        models[kind] = AMMASurv(replace(exact.config, patch_attention_kind=word, **changes))
        models[kind].double().eval().load_state_dict(exact.state_dict())
    expected = exact(inputs).logits["survival"]
    torch.testing.assert_close(models["nystrom"](inputs).logits["survival"], expected)
    far = models["far"](inputs).logits["survival"]
    assert (far - expected)[[0, 2]].abs().amin(0).max() > 1e-6
    mixed = models["auto"](inputs).logits["survival"]
    torch.testing.assert_close(mixed[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    torch.testing.assert_close(mixed[2], far[2])
    longer = replace(exact.config, patch_attention_kind="auto", exact_limit=3)
    all_long = AMMASurv(longer).double().eval()
    all_long.load_state_dict(exact.state_dict())
    shorter = batch([7, 0, 9])
    found = all_long(shorter).logits["survival"]
    torch.testing.assert_close(found, models["far"](shorter).logits["survival"])


def test_torchs_attention_of_one_bag() -> None:
    heads = Heads(*torch.randn(3, 9, 2, 4).unbind(0))
    out, _ = self_attention_of_one_bag(heads, 0.0)
    expected = cross_attention(*heads)
    torch.testing.assert_close(out, expected)


def test_counts_do_not_matter_where_they_are_subtracted() -> None:
    """Every patch twice changes nothing then, and shifts attention to the patches otherwise."""
    inputs, masses = batch([7, 0, 9]), {}
    for normalised in (True, False):
        model = lively(small(blocks=ABLATION["symmetric"], count_normalised=normalised))
        slide = inputs["slide"]
        twice = BagBatch(
            slide.features.repeat_interleave(2, 0), Ragged.from_lengths([14, 0, 18]), slide.present
        )
        doubled = {**inputs, "slide": twice}
        once, again = model(inputs).logits["survival"], model(doubled).logits["survival"]
        assert torch.allclose(once, again) == normalised
        masses[normalised] = [
            model.attention_mass(item)["layer 0"]["genes"]["slide"] for item in (inputs, doubled)
        ]
    torch.testing.assert_close(*masses[True])
    assert (masses[False][1] > masses[False][0])[[0, 2]].all()


def test_importance_moves_the_mass() -> None:
    model, inputs = lively(small(blocks=ABLATION["symmetric"])), batch()
    with torch.no_grad():
        for layer in model.layers:
            layer.importance.copy_(torch.tensor([30.0, 0.0, 0.0]))
    mass = model.attention_mass(inputs)["layer 1"]
    for side in ("patches", "genes"):
        shares = torch.stack([mass[side][name] for name in model.names], 1)
        torch.testing.assert_close(shares[[0, 2], 0], torch.ones(2).double())
    assert mass["genes"]["rna"][1] == 1.0
    assert sum(mass["genes"][name][3:].sum() for name in model.names) == 0.0
    assert mass["patches"]["slide"][[1, 4]].tolist() == [0.0, 0.0]
    importance = model.key_importance()["layer 0"]
    assert {name: float(beta) for name, beta in importance.items()} == {
        "slide": 30.0,
        "rna": 0.0,
        "cnv": 0.0,
    }
    bare = AMMASurv(small(learned_importance=False, blocks=[["gp"], []]))
    assert bare.key_importance() == {}
    single = {
        name: item._replace(
            **{k: getattr(item, k).float() for k in ("values", "features") if hasattr(item, k)}
        )
        for name, item in inputs.items()
    }
    masses = bare.attention_mass(single)
    assert list(masses["layer 0"]) == ["genes"]
    assert masses["layer 1"] == {}


@pytest.mark.parametrize("preset", AMMASurvConfig.PRESETS)
def test_patch_attention_are_weights(preset: str) -> None:
    model, inputs = AMMASurv.from_preset(preset, modalities=MODALITIES).double(), batch()
    found = model.patch_attention(inputs)["slide"]
    assert model.training
    assert {"pool", "layer 0 rna:a", "layer 1 cnv:cnv"} <= set(found)
    for name, weights in found.items():
        sums = torch.stack([part.sum() for part in weights.split(LENGTHS)])
        has = {"pool": [1.0, 0, 1, 1, 0]}.get(name, [1.0, 0, float("rna" in name), 0, 0])
        torch.testing.assert_close(sums, torch.tensor(has).double())
    model.eval()
    heads = model.layers[0].heads(model._tokens(inputs)[1])
    patches = model._tokens(inputs)[0][:7]
    key = model.layers[0].patches.project(model.layers[0].patches.norm(patches)).key
    weights = (torch.einsum("ghd,nhd->hgn", heads.query[0], key) / 8.0).softmax(-1).mean(0)
    torch.testing.assert_close(found["layer 0 rna:b"][:7], weights[1])


@pytest.mark.parametrize("kind", ["exact", "nystrom"])
def test_gradients_against_finite_differences(kind: str) -> None:
    modalities = {"slide": ("bag", 3), "rna": ("table", 3, {"a": (0, 1), "b": (2,)})}
    config = AMMASurvConfig(
        modalities,
        dim=4,
        depth=1,
        heads=1,
        head_dim=2,
        blocks=ABLATION["symmetric"],
        gene_hidden=(),
        pool_hidden=2,
        landmarks=3,
        patch_attention_kind=kind,
        patch_activation="none",
        ff_expansion=1,
    )
    model = lively(config)
    present, ragged = torch.ones(2) > 0, Ragged.from_lengths([5, 1])
    names, leaves = zip(*((k, v.detach().requires_grad_()) for k, v in model.named_parameters()))
    data = [torch.randn(6, 3).double(), torch.randn(2, 3).double()]

    def logits(features: Tensor, values: Tensor, *weights: Tensor) -> Tensor:
        inputs = {
            "slide": BagBatch(features, ragged, present),
            "rna": TableBatch(values, torch.tensor([True, False])),
        }
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model, named, (inputs,)).logits["survival"]

    data = [tensor.requires_grad_() for tensor in data]
    assert torch.autograd.gradcheck(logits, (*data, *leaves), fast_mode=True)
