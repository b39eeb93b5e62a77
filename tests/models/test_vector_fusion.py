"""SNN, late fusion and MultiModN against their definitions."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import build, inputs_of
from healnet_cases import MODALITIES, without
from torch import Tensor

from survfuse.batch import TableBatch
from survfuse.models.late_fusion import LateFusion, LateFusionConfig
from survfuse.models.multimodn import MultiModN, MultiModNConfig
from survfuse.models.settings import ModalityConfig
from survfuse.models.snn import SNN, SNNConfig

TWO = {"genes": ("table", 7), "plain": ("bag", 8)}
SIZES = {"dim": 6, "hidden": 5, "patch_dim": 9, "attention_hidden": 3, "table_widths": (5,)}


def test_snn_reads_the_columns_of_all_tables() -> None:
    model, inputs = build("snn").eval(), inputs_of("snn")
    with torch.no_grad():
        model.absent.normal_()
    columns = torch.cat([batch.values for batch in inputs.values()], 1)
    expected = model.readout(model.network(columns))["survival"]
    torch.testing.assert_close(model(inputs).logits["survival"], expected)
    # a table that is absent has the learned columns
    columns[0, :7] = model.absent[:7]
    expected = model.readout(model.network(columns))["survival"]
    found = model(without(inputs, "genes", [0])).logits["survival"]
    torch.testing.assert_close(found, expected)


def test_snn_presets_and_what_it_refuses() -> None:
    tables = {"rna": ("table", 4, {"a": (0, 1)}), "cnv": ("table", 3)}
    paper = SNN.from_preset("paper", modalities=tables)
    assert paper.config.widths == (256, 256)
    assert paper.network[0][0].in_features == 7
    released = SNNConfig.from_preset("released", modalities=tables)
    assert (released.widths, released.activation) == ((256,) * 4, "elu")
    big = SNNConfig.from_preset("released:big", modalities=tables)
    assert big.widths == (1024, 1024, 1024, 256)
    with pytest.raises(ValueError, match=r"'slide' is a bag; SNN reads tables only.*data\.modal"):
        SNNConfig({"rna": ("table", 4), "slide": ("bag", 4)})
    with pytest.raises(ValueError, match=r"'rna' has axes=1 .*SNN encodes no positions"):
        SNNConfig({"rna": ModalityConfig("table", 4, axes=1)})
    with pytest.raises(ValueError, match=r"widths is \(\); it must hold the width of at least"):
        SNNConfig(tables, widths=())
    with pytest.raises(ValueError, match=r"widths is \(3, 0\)"):
        SNNConfig(tables, widths=(3, 0))
    assert SNNConfig(tables, widths=[3, 2]).widths == (3, 2)


def test_kronecker_of_two_by_hand() -> None:
    model = LateFusion(LateFusionConfig(TWO, fusion="kronecker", rank=3, **SIZES)).eval()
    given = inputs_of("multimodn")
    output = model({name: given[name] for name in TWO})
    first, second = output.embeddings["genes"], output.embeddings["plain"]
    together, fuse = torch.cat([first, second], 1), model.fuse

    def factor(m: int, vector: Tensor) -> Tensor:
        gated = fuse.gate[m](together).sigmoid() * fuse.reduce[m](vector).relu()
        return torch.cat([torch.ones(3, 1), fuse.factor[m](gated).relu()], 1)

    product = torch.einsum("bi,bj->bij", factor(0, first), factor(1, second)).flatten(1)
    mixed = fuse.mix(product).relu()
    joint = fuse.join(torch.cat([mixed, together], 1)).relu()
    torch.testing.assert_close(output.embeddings["joint"], joint)


def test_products_are_those_of_the_modalities_that_are_there() -> None:
    """Without the second, only its constant 1 meets the first: [1, o] x [1, 0]."""
    model = LateFusion(LateFusionConfig(TWO, fusion="kronecker", rank=3, **SIZES)).eval()
    given = inputs_of("multimodn")
    inputs = without({name: given[name] for name in TWO}, "plain", [0, 1, 2])
    seen = []
    model.fuse.mix.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(inputs)
    product = seen[0].unflatten(1, (4, 4))
    assert product[:, :, 1:].eq(0).all()
    assert product[:, 0, 0].eq(1).all()
    assert product[:, 1:, 0].abs().max() > 0
    assert output.embeddings["plain"].eq(0).all()


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_plain_fusions_by_hand(fusion: str) -> None:
    model = LateFusion(LateFusionConfig(TWO, fusion=fusion, **SIZES)).eval()
    given = inputs_of("multimodn")
    output = model({name: given[name] for name in TWO})
    vectors = [output.embeddings[name] for name in TWO]
    joined = torch.cat(vectors, 1) if fusion == "concat" else vectors[0] + vectors[1]
    torch.testing.assert_close(output.embeddings["joint"], model.fuse(joined))


@pytest.mark.parametrize("fusion", ["concat", "add", "bilinear", "kronecker"])
def test_one_modality_is_fused_with_nothing(fusion: str) -> None:
    one = {"genes": ("table", 7)}
    model = LateFusion(LateFusionConfig(one, fusion=fusion, rank=3, **SIZES)).eval()
    inputs = {"genes": inputs_of("snn")["genes"]}
    assert model(inputs).logits["survival"].shape == (3, 4)


def test_products_have_a_limit_that_presets_keep() -> None:
    def tables(n: int) -> dict[str, tuple[str, int]]:
        return {f"t{i}": ("table", 2) for i in range(n)}

    with pytest.raises(ValueError, match="of 4 modalities at rank 32, which is 1185921 products"):
        LateFusionConfig(tables(4), fusion="kronecker")
    with pytest.raises(ValueError, match="lower rank, or choose 'bilinear'"):
        LateFusionConfig(tables(12), fusion="bilinear")
    for n, fusion in ((1, "kronecker"), (3, "kronecker"), (4, "bilinear"), (12, "concat")):
        for preset in LateFusionConfig.PRESETS:
            config = LateFusionConfig.from_preset(preset, modalities=tables(n))
            assert config.fusion == fusion
    assert config.dim == 32
    with pytest.raises(ValueError, match="fusion is 'product'"):
        LateFusionConfig(tables(2), fusion="product")


def test_multimodn_steps_by_hand() -> None:
    tables = {"a": ("table", 3), "b": ("table", 2)}
    model = MultiModN(MultiModNConfig(tables, state_dim=4, state_change=0.5)).eval()
    a = TableBatch(torch.randn(2, 3), torch.tensor([True, True]))
    b = TableBatch(torch.randn(2, 2), torch.tensor([True, False]))
    output = model({"a": a, "b": b})
    states = [model.initial_state.expand(2, -1)]
    for step, batch in zip(model.steps, (a, b), strict=True):
        features = step.features(batch.values)
        updated = step.update(torch.cat([features, states[-1]], 1))
        states.append(torch.where(batch.present[:, None], updated, states[-1]))
    for k, state in enumerate(states):
        torch.testing.assert_close(output.embeddings[f"state_{k}"], state)
    assert torch.equal(output.embeddings["state_2"][1], output.embeddings["state_1"][1])
    torch.testing.assert_close(output.logits["survival"], model.decode(states[2])["survival"])
    changes = [(states[k + 1] - states[k]).square().mean() for k in range(2)]
    torch.testing.assert_close(output.auxiliary["state_change"], 0.5 * sum(changes) / 2)
    assert "state_change" not in MultiModN(MultiModNConfig(tables))({"a": a}).auxiliary


def test_multimodn_reads_a_bag_by_its_mean_or_its_pool() -> None:
    given = inputs_of("multimodn")
    plain = {"plain": given["plain"]}
    model = build("multimodn").eval()
    step = model.steps[list(MODALITIES).index("plain")]
    means = torch.stack([rows.mean(0) for rows in plain["plain"].features.split([6, 1, 4])])
    before = model.initial_state.expand(3, -1)
    expected = step.update(torch.cat([step.features(means), before], 1))
    torch.testing.assert_close(model(plain).embeddings["state_6"], expected)
    pooled = build("multimodn, attention").eval()
    assert pooled.steps[list(MODALITIES).index("plain")].pool is not None
    assert pooled.steps[list(MODALITIES).index("genes")].pool is None
    config = MultiModNConfig.from_preset("attention", modalities=MODALITIES)
    assert config.pool == "attention"
    with pytest.raises(ValueError, match="pool is 'max'"):
        MultiModNConfig(MODALITIES, pool="max")
    with pytest.raises(ValueError, match="state_change is -1; it must be at least 0"):
        MultiModNConfig(MODALITIES, state_change=-1)
