"""MCAT against its definition in plain torch, and what it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from patch_gene_cases import MODALITIES, all_inputs, small, without_dropout
from torch._dynamo.testing import CompileCounter

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.layers.bilinear_fusion import BilinearFusion
from survfuse.layers.projected_attention import PatchProjection
from survfuse.layers.streaming import pieces
from survfuse.layers.token_encoder import TokenEncoder
from survfuse.models.mcat import MCAT, MCATConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_models import PlainMCAT


@pytest.mark.parametrize("heads", [1, 2])
def test_plain_baseline_computes_the_same(heads: int) -> None:
    model = without_dropout(small(MCAT, attention_heads=heads)).train()
    plain, inputs = PlainMCAT(model.config), all_inputs()
    plain.load_state_dict(model.state_dict())
    ours, theirs = model(inputs).logits["survival"], plain(inputs).logits["survival"]
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (key, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=key)


def test_weights_are_the_softmax_of_the_definition() -> None:
    model, inputs = small(MCAT).eval(), all_inputs()
    part, slide = model.attention, inputs["slide"]
    tokens = model.genes(inputs, 3).values[2]
    hidden = part.project(slide.features[15:21], Ragged.from_lengths([6]))
    logits = part.query(tokens) @ part.key(hidden).T / 16**0.5
    found = torch.stack(list(model.patch_attention(inputs)["slide"].values()), 1)[10:]
    torch.testing.assert_close(found, logits.softmax(1).T.detach())


def test_relu_and_dropout_of_projected_patches() -> None:
    """The layer that keeps its result alone has the values and gradients of two plain ones."""
    torch.manual_seed(0)
    layer, bag = PatchProjection(5, 40, dropout=0.5), torch.randn(30, 5)
    ragged = Ragged.from_lengths([30])
    out = layer(bag, ragged)
    plain = torch.nn.functional.linear(bag, layer.weight, layer.bias).relu()
    dropped = (out == 0) & (plain > 0)
    assert 0.3 < float(dropped.sum() / (plain > 0).sum()) < 0.7
    torch.testing.assert_close(out, torch.where(dropped, 0.0, 2.0 * plain))
    out.square().sum().backward()
    (expected,) = torch.autograd.grad(
        torch.where(dropped, 0.0, 2.0 * plain).square().sum(), layer.weight
    )
    torch.testing.assert_close(layer.weight.grad, expected)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        PatchProjection(5, 4, activation="tanh")


def test_pieces_are_the_batch_in_order() -> None:
    ragged = Ragged.from_ranges([30, 0, 5, 5], [20, 0, 25, 3])
    rows = torch.cat([torch.arange(s, s + n) for s, n in [(30, 20), (5, 25), (5, 3)]])
    for size in (1, 7, 20, 47, 48):
        found = []
        for part in pieces(ragged, size):
            part.check(50)
            assert part.total <= size
            spans = zip(part.starts.tolist(), part.lengths.tolist(), strict=True)
            found += [torch.arange(start, start + n) for start, n in spans]
        assert torch.equal(torch.cat(found), rows)


def test_an_absent_group_is_left_out_of_both_encoders() -> None:
    torch.manual_seed(0)
    encoder = TokenEncoder(8, layers=1, heads=2, hidden=8, dropout=0.0)
    tokens, usable = torch.randn(2, 3, 8), torch.tensor([[True, False, True], [True] * 3])
    alone = encoder(tokens[:1, [0, 2]], usable[:1, [0, 2]])
    torch.testing.assert_close(encoder(tokens, usable)[:1], alone)


def test_bilinear_fusion_is_a_gated_kronecker_product() -> None:
    torch.manual_seed(0)
    fusion = BilinearFusion(8, scale=4).eval()
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    sides = []
    for i, x in enumerate((a, b)):
        gate = torch.sigmoid(fusion.gate[i](torch.cat([a, b], 1)))
        sides.append(fusion.gated[i](gate * fusion.narrow[i](x)))
    ones = torch.ones(2, 1)
    products = [torch.kron(torch.cat([x, o]), torch.cat([y, o])) for x, y, o in zip(*sides, ones)]
    torch.testing.assert_close(fusion(a, b), fusion.encode(torch.stack(products)))
    with pytest.raises(ValueError, match="scale is 9; it must be at most dim 8"):
        BilinearFusion(8, scale=9)


def test_presets_have_the_published_sizes() -> None:
    paper = MCATConfig.from_preset("paper", modalities=MODALITIES)
    assert (paper.dim, paper.gene_widths, paper.encoder_hidden) == (256, (256,), 512)
    big = MCATConfig.from_preset("released:big", modalities=MODALITIES)
    assert big.gene_widths == (1024, 1024, 1024)
    with pytest.raises(ValueError, match="fusion is 'sum'"):
        MCATConfig(MODALITIES, fusion="sum")
    with pytest.raises(ValueError, match="piece_rows is 0"):
        MCATConfig(MODALITIES, piece_rows=0)


def test_compiles_to_one_graph_for_all_sizes() -> None:
    model, counter = small(MCAT).eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ([6, 2, 4], [7, 3, 9, 2], [30, 11, 8, 5, 3]):
        ragged = Ragged.from_lengths(lengths)
        present = torch.ones(len(lengths), dtype=torch.bool)
        inputs = {
            "rna": TableBatch(torch.randn(len(lengths), 6), present),
            "slide": BagBatch(torch.randn(ragged.total, 12), ragged, present),
            "cnv": TableBatch(torch.randn(len(lengths), 3), present),
        }
        torch.testing.assert_close(
            compiled(inputs).logits["survival"], model(inputs).logits["survival"]
        )
    assert counter.frame_count == 2
