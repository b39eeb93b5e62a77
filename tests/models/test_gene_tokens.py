"""Gene groups as tokens."""

from __future__ import annotations

import pytest
import torch

from survfuse.batch import TableBatch
from survfuse.layers import SelfNormalizingNetwork
from survfuse.models.gene_tokens import GeneTokens, gene_groups
from survfuse.models.settings import parse_modalities

MODALITIES = parse_modalities(
    {"rna": ("table", 5, {"a": (0, 2), "b": (2, 3, 4)}), "slide": ("bag", 7), "cnv": ("table", 2)}
)


def tokens() -> GeneTokens:
    torch.manual_seed(0)
    return GeneTokens(MODALITIES, [6, 4]).eval()


def inputs() -> dict[str, TableBatch]:
    present = torch.tensor([True, True, False])
    return {
        "rna": TableBatch(torch.randn(3, 5), present),
        "cnv": TableBatch(torch.randn(3, 2), present.roll(1)),
    }


def test_groups_of_all_tables_in_order() -> None:
    assert gene_groups(MODALITIES) == [
        ("rna", "a", (0, 2)),
        ("rna", "b", (2, 3, 4)),
        ("cnv", "cnv", (0, 1)),
    ]
    with pytest.raises(ValueError, match="holds no table"):
        GeneTokens({"slide": MODALITIES["slide"]}, [4])


def test_a_token_reads_its_columns_and_no_other() -> None:
    module, given = tokens(), inputs()
    found = module(given, 3)
    assert found.values.shape == (3, 3, 4)
    assert found.present.tolist() == [[True, True, False], [True, True, True], [False, False, True]]
    values = given["rna"].values.clone()
    values[:, 0] += 1.0
    changed = module({**given, "rna": given["rna"]._replace(values=values)}, 3).values
    assert not torch.equal(changed[:2, 0], found.values[:2, 0])
    assert torch.equal(changed[:, 1:], found.values[:, 1:])
    for i, (table, _, columns) in enumerate(gene_groups(MODALITIES)):
        there = given[table].present
        expected = module.networks[i](given[table].values[there][:, list(columns)])
        torch.testing.assert_close(found.values[there, i], expected)


def test_dropout_is_drawn_for_every_group() -> None:
    torch.manual_seed(0)
    module = GeneTokens(MODALITIES, [400], dropout=0.25)
    with torch.no_grad():
        for network in module.networks:
            network[0][0].weight.zero_()
    present = torch.tensor([True])
    given = {name: TableBatch(torch.ones(1, n), present) for name, n in (("rna", 5), ("cnv", 2))}
    kept = module(given, 1).values[0] > 0
    assert ((kept.float().mean(1) - 0.75).abs() < 0.1).all()
    assert all(not torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert module.eval()(given, 1).values.unique().numel() == 1


def test_absent_rows_may_hold_anything_and_absent_tables_give_zero_gradients() -> None:
    module, given = tokens(), inputs()
    given["rna"].values[2] = float("nan")
    found = module(given, 3)
    assert (found.values[2, :2] == 0).all()
    found.values.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    module.zero_grad()
    alone = module({"rna": given["rna"]}, 3)
    assert not alone.present[:, 2].any()
    alone.values.sum().backward()
    assert all((p.grad == 0).all() for p in module.networks[2].parameters())


def test_activations_stay_standardised_through_many_layers() -> None:
    torch.manual_seed(0)
    out = SelfNormalizingNetwork(256, [256] * 8)(torch.randn(512, 256)).detach()
    assert abs(float(out.mean())) < 0.1
    assert abs(float(out.std()) - 1) < 0.1
    with pytest.raises(ValueError, match="widths is empty"):
        SelfNormalizingNetwork(4, [])
    with pytest.raises(ValueError, match="activation is 'relu'"):
        SelfNormalizingNetwork(4, [4], activation="relu")
