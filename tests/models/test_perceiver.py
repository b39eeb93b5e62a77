"""The Perceiver against attention to the one sequence that it never forms."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import CASES, build, inputs_of
from healnet_cases import LENGTHS, without
from torch import Tensor
from torch.nn import functional

from survfuse.models.inputs import encode_inputs
from survfuse.models.perceiver import Perceiver, PerceiverConfig

CHOICES = [case for case in CASES if case.startswith("perceiver")]


def common_tokens(model: Perceiver, inputs: dict, b: int) -> dict[str, Tensor]:
    """The tokens of sample b, of one width, by modality."""
    encoded, _ = encode_inputs(inputs, model.config.modalities, model.positions)
    found = {}
    for m, name in enumerate(model.config.modalities):
        tokens = encoded.get(name)
        if tokens is None or not tokens.present[b]:
            continue
        if tokens.ragged is None:
            rows = tokens.features[b].reshape(-1, tokens.features.shape[-1])
        else:
            start = int(tokens.ragged.starts[b])
            rows = tokens.features[start : start + int(tokens.ragged.lengths[b])]
        rows, code = model.common.norms[m](rows), model.common.codes[m].expand(len(rows), -1)
        if model.common.maps is not None:
            found[name] = model.common.maps[m](rows) + code
        else:
            gap = model.common.width - rows.shape[1] - code.shape[1]
            found[name] = torch.cat([functional.pad(rows, (0, gap)), code], 1)
    return found


def union(attention: torch.nn.Module, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The update of one sample's latents by the concatenated tokens, and their weights."""
    query = attention.query(attention.query_norm(latents)).unflatten(1, (2, 3))
    key = torch.einsum("hdc,nc->nhd", attention.key_weight, tokens)
    value = torch.einsum("hdc,nc->nhd", attention.value_weight, tokens)
    weights = (torch.einsum("qhd,nhd->qhn", query, key) / 3**0.5).softmax(-1)
    out = torch.einsum("qhn,nhd->qhd", weights, value)
    return attention.output(out.flatten(1)), weights


@pytest.mark.parametrize("case", CHOICES)
def test_attention_to_all_modalities_is_that_to_one_sequence(case: str) -> None:
    model, inputs = build(case).eval(), inputs_of(case)
    inputs = without(without(inputs, "genes", [0]), "slide", [2])
    found = model(inputs).embeddings["latent_array"]
    maps = model.patch_attention(inputs)
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    for b in range(3):
        tokens = common_tokens(model, inputs, b)
        latents = model.latents
        for i in range(model.config.depth):
            layer = model.layers[min(i, len(model.layers) - 1)]
            update, weights = union(layer.attention, latents, torch.cat(list(tokens.values())))
            shares = weights.split([len(rows) for rows in tokens.values()], -1)
            share = dict(zip(tokens, shares, strict=True))["cells"]
            within = (share / share.sum(-1, keepdim=True)).mean((0, 1))
            place = slice(int(starts[b]), int(starts[b]) + LENGTHS[b])
            torch.testing.assert_close(maps["cells"][f"layer {i}"][place], within.detach())
            latents = latents + update
            latents = latents + layer.feed_forward(latents)
            for attention, feed_forward in zip(
                layer.latent_attention, layer.latent_feed_forward, strict=True
            ):
                latents = latents + attention(latents[None])[0]
                latents = latents + feed_forward(latents)
        torch.testing.assert_close(found[b], latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CHOICES)
def test_gradients_are_those_of_one_sequence(case: str) -> None:
    """Of the maps, codes and norms too, which only reach the ops as parts of products."""
    model, inputs = build(case, depth=1, latent_blocks=0).double().eval(), inputs_of(case)
    for name, batch in inputs.items():
        field = "features" if hasattr(batch, "ragged") else "values"
        inputs[name] = batch._replace(**{field: getattr(batch, field).double()})
    weight = torch.randn(3, *model.latents.shape, dtype=torch.float64)
    (model(inputs).embeddings["latent_array"] * weight).sum().backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attention, total = model.layers[0].attention, 0.0
    for b in range(3):
        tokens = torch.cat(list(common_tokens(model, inputs, b).values()))
        latents = model.latents + union(attention, model.latents, tokens)[0]
        latents = latents + model.layers[0].feed_forward(latents)
        total = total + (latents * weight[b]).sum()
    total.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[key], parameter.grad, msg=key)


def test_a_sample_without_anything_keeps_the_blocks_among_its_latents() -> None:
    model, inputs = build("perceiver").eval(), inputs_of("perceiver")
    for name in inputs:
        inputs = without(inputs, name, [1])
    latents = model.latents[None]
    for i in range(model.config.depth):
        layer = model.layers[min(i, len(model.layers) - 1)]
        latents = latents + layer.latent_attention[0](latents)
        latents = latents + layer.latent_feed_forward[0](latents)
    torch.testing.assert_close(model(inputs).embeddings["latent_array"][1], latents[0])


def test_weights_are_shared_as_said() -> None:
    for sharing, sets in (("all_layers", 1), ("after_first", 2), ("none", 3)):
        model = build("perceiver", depth=3, weight_sharing=sharing)
        assert len(model.layers) == sets


def test_dropout_and_wrong_settings() -> None:
    inputs = inputs_of("perceiver")
    for field in ("attention_dropout", "ff_dropout"):
        model = build("perceiver", **{field: 0.5}).train()
        assert not torch.equal(model(inputs).logits["survival"], model(inputs).logits["survival"])
    for field, wrong in (("padding", "repeat"), ("weight_sharing", "all"), ("absorb", "maybe")):
        with pytest.raises(ValueError, match=f"{field} is {wrong!r}"):
            build("perceiver", **{field: wrong})
    with pytest.raises(ValueError, match="token_dim is 0"):
        build("perceiver", token_dim=0)


def test_presets() -> None:
    config = PerceiverConfig.from_preset("paper", modalities={"slide": ("bag", 1024)})
    assert (config.n_latents, config.latent_dim, config.depth) == (25, 119, 2)
    config = PerceiverConfig.from_preset("imagenet", modalities={"slide": ("bag", 1024)})
    assert (config.n_latents, config.latent_dim, config.depth) == (512, 1024, 8)
    assert config.latent_blocks == 6
