"""ABMIL and TransMIL against their definitions, bag by bag."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import build
from healnet_cases import LENGTHS, bag
from torch import Tensor
from torch.nn import functional

from survfuse import Ragged
from survfuse.batch import BagBatch
from survfuse.layers import streaming
from survfuse.models.abmil import ABMIL, ABMILConfig
from survfuse.models.transmil import TransMIL, TransMILConfig, to_squares


def attention_of(model: ABMIL, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The projected patches of one bag and their weights."""
    pool = model.pool.pool
    projected = functional.linear(rows, *model.pool.project.parameters()).relu()
    gated = pool.value(projected).tanh() * pool.gate(projected).sigmoid()
    return projected, pool.score(gated)[:, 0].softmax(0)


def test_abmil_is_the_weighted_mean_of_projected_patches() -> None:
    model, batch = build("abmil").eval(), bag(8)
    output = model({"plain": batch})
    weights = model.patch_attention({"plain": batch})["plain"]["pool"].split(LENGTHS)
    for b, rows in enumerate(batch.features.split(LENGTHS)):
        projected, expected = attention_of(model, rows)
        torch.testing.assert_close(weights[b], expected.detach())
        pooled = expected @ projected
        torch.testing.assert_close(output.embeddings["plain"][b], pooled)
        torch.testing.assert_close(
            output.logits["survival"][b], model.readout(pooled[None])["survival"][0]
        )


def test_abmil_reads_a_bag_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two patches, some of which hold parts of two bags, give what one piece gives."""
    model, batch = build("abmil").eval(), bag(8)
    found = []
    for rows in (2, 1000):
        monkeypatch.setattr(streaming, "_ROWS_ON_CPU", rows)
        monkeypatch.setattr(streaming, "_NUMBERS", 0)
        model.zero_grad()
        logits = model({"plain": batch}).logits["survival"]
        logits.square().sum().backward()
        weights = model.patch_attention({"plain": batch})["plain"]["pool"]
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        found.append([logits.detach(), weights, *gradients])
    for few, whole in zip(*found, strict=True):
        torch.testing.assert_close(few, whole)


def test_abmil_drops_in_training_only() -> None:
    batch = {"plain": bag(8)}
    for field in ("dropout", "attention_dropout"):
        model = build("abmil", **{"dropout": 0.0, field: 0.5}).train()
        assert not torch.equal(model(batch).logits["survival"], model(batch).logits["survival"])
    assert ABMILConfig.from_preset("paper", modalities={"slide": ("bag", 4)}).hidden == 128
    assert ABMILConfig.from_preset("clam", modalities={"slide": ("bag", 4)}).hidden == 256


def test_positions_enter_abmil() -> None:
    """A bag with slide coordinates is read with them, in any order of its patches."""
    model = ABMIL(ABMILConfig({"slide": {"kind": "bag", "channels": 8, "axes": 2}}, dim=6)).eval()
    batch = bag(8)._replace(coords=torch.rand(11, 2) * 9000)
    before = model({"slide": batch}).logits["survival"]
    moved = batch._replace(coords=batch.coords.flip(0))
    assert (model({"slide": moved}).logits["survival"] - before).abs().max() > 1e-5
    order = torch.cat([torch.randperm(6), torch.arange(6, 11)])
    turned = batch._replace(features=batch.features[order], coords=batch.coords[order])
    torch.testing.assert_close(model({"slide": turned}).logits["survival"], before)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 10, 16, 17])
def test_transmil_layer_by_layer(length: int) -> None:
    model, batch = build("transmil").eval(), bag(8, [length])
    rows = model.project(batch.features).relu()
    side = 1
    while side * side < length:
        side += 1
    rows = torch.cat([rows, rows[: side * side - length]])
    x = torch.cat([model.class_token, rows])
    x = x + model.first.attention(model.first.norm(x)[None])[0]
    square = x[1:].T.reshape(1, 8, side, side)
    weights, biases = model.square.kernels, model.square.biases
    for weight, bias in zip(weights, biases, strict=True):
        padding = weight.shape[-1] // 2
        encoded = functional.conv2d(square, weight, bias, padding=padding, groups=8)
        x = x + torch.cat([torch.zeros(1, 8), encoded[0].flatten(1).T])
    normed = model.last.norm(x)
    x = x + model.last.attention(normed[None])[0]
    output = model({"plain": batch})
    torch.testing.assert_close(output.embeddings["plain"][0], model.norm(x[0]))
    # the class token's weights, repeated patches added to those they repeat
    query, key, _ = model.last.attention.query_key_value(normed).view(-1, 3, 2, 4).unbind(1)
    weights = (torch.einsum("hd,nhd->hn", query[0], key[1:]) / 2.0).softmax(1).mean(0)
    expected = weights[:length].clone()
    expected[: side * side - length] += weights[length:]
    found = model.patch_attention({"plain": batch})["plain"]["class token"]
    torch.testing.assert_close(found, expected.detach())


def test_squares_repeat_the_first_patches_of_each_bag() -> None:
    squares = to_squares(Ragged.from_lengths([3, 0, 1, 5]))
    assert squares.sides == [2, 0, 1, 3]
    sequences = [part.tolist() for part in squares.rows.split([5, 1, 2, 10])]
    assert sequences == [[0, 1, 2, 3, 1], [0], [0, 4], [0, 5, 6, 7, 8, 9, 5, 6, 7, 8]]
    assert squares.ragged.lengths.tolist() == [5, 1, 2, 10]


def test_order_matters_to_transmil_and_its_kernel_must_be_odd() -> None:
    model, batch = build("transmil").eval(), bag(8, [9])
    turned = batch._replace(features=batch.features.flip(0))
    before, after = (model({"plain": b}).logits["survival"] for b in (batch, turned))
    assert (before - after).abs().max() > 1e-5
    with pytest.raises(ValueError, match="residual_kernel is 4; it must be odd"):
        TransMILConfig({"slide": ("bag", 4)}, residual_kernel=4)
    with pytest.raises(ValueError, match="landmarks is 0"):
        TransMILConfig({"slide": ("bag", 4)}, landmarks=0)


def test_transmil_presets_have_the_published_size() -> None:
    model = TransMIL.from_preset(
        "paper", modalities={"slide": ("bag", 1024)}, outputs={"survival": 2}
    )
    counted = sum(p.numel() for key, p in model.named_parameters() if key != "absent")
    # 1024 x 512 projection, class token, two layers, kernels, norm, two logits
    layer = 2 * 512 + 3 * 512 * 512 + 512 * 512 + 512 + 8 * 33
    square = 512 * (49 + 25 + 9 + 3)
    assert counted == 1025 * 512 + 512 + 2 * layer + square + 2 * 512 + 513 * 2


def test_a_long_bag_of_few_numbers_goes_through() -> None:
    """More rows than landmarks and than a tile of the ops, in two very unequal bags."""
    lengths = [3000, 7]
    features = torch.randn(3007, 8)
    batch = BagBatch(features, Ragged.from_lengths(lengths), torch.ones(2, dtype=torch.bool))
    for case in ("abmil", "transmil"):
        model = build(case).train()
        model({"plain": batch}).logits["survival"].square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
