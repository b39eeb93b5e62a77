"""The plain baseline model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, TableBatch
from survfuse.models.inputs import encode_inputs
from survfuse.models.mean_pool import MeanPool, MeanPoolConfig, _mean
from survfuse.models.settings import ModalityConfig


def bag(lengths: list[int], width: int = 5) -> BagBatch:
    ragged = Ragged.from_lengths(lengths)
    return BagBatch(torch.randn(sum(lengths), width), ragged, ragged.lengths > 0)


def model() -> MeanPool:
    return MeanPool(MeanPoolConfig({"rna": ("table", 3), "slides": ("bag", 5)}, width=8)).eval()


def mean_of(kind: str, batch: Modality, axes: int = 0) -> Tensor:
    tokens, _ = encode_inputs({"x": batch}, {"x": ModalityConfig(kind, 5, axes=axes)})
    return _mean(tokens["x"], None)


def test_pools_are_plain_means() -> None:
    slides = bag([4, 0, 3])
    expected = torch.stack(
        [slides.features[:4].mean(0), torch.zeros(5), slides.features[4:].mean(0)]
    )
    torch.testing.assert_close(mean_of("bag", slides), expected)
    graph = GraphBatch(*slides[:2], torch.empty(2, 0, dtype=torch.int64), slides.present)
    torch.testing.assert_close(mean_of("graph", graph), expected)
    values = torch.randn(2, 3, 4, 5)
    values[1] = float("nan")
    found = mean_of("array", ArrayBatch(values, torch.tensor([True, False])), axes=2)
    torch.testing.assert_close(found[0], values[0].mean((0, 1)))
    assert (found[1] == 0).all()


def test_encodings_of_other_models_are_not_read() -> None:
    """A mean of positions or walks says nothing, and a table is a row whatever its tokens."""
    modalities = {
        "rna": ModalityConfig("table", 3, axes=1, table_tokens="features"),
        "slides": ModalityConfig("bag", 5, axes=2),
    }
    net = MeanPool(MeanPoolConfig(modalities, width=8)).eval()
    plain = model()
    plain.load_state_dict(net.state_dict())
    rna = TableBatch(torch.randn(2, 3), torch.tensor([True, False]))
    inputs = {"rna": rna, "slides": bag([4, 3])}
    assert torch.equal(net(inputs).logits["survival"], plain(inputs).logits["survival"])


def test_an_absent_modality_adds_nothing_whatever_it_holds() -> None:
    net, slides = model(), bag([4, 3])
    rna = TableBatch(torch.randn(2, 3), torch.tensor([True, False]))
    wild = TableBatch(rna.values.clone(), rna.present)
    wild.values[1] = float("nan")
    plain = net({"rna": rna, "slides": slides})
    found = net({"rna": wild, "slides": slides})
    torch.testing.assert_close(found.logits["survival"], plain.logits["survival"])
    assert (found.embeddings["rna"][1] == 0).all()
    net({"rna": wild, "slides": slides}).logits["survival"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_a_sample_does_not_depend_on_its_batch_or_on_the_order_of_patches() -> None:
    net, slides = model(), bag([4, 3])
    rna = TableBatch(torch.randn(2, 3), torch.ones(2, dtype=torch.bool))
    both = net({"rna": rna, "slides": slides}).logits["survival"]
    turned = slides.features[4:].flip(0)
    one = BagBatch(turned, Ragged.from_lengths([3]), torch.ones(1, dtype=torch.bool))
    alone = net({"rna": TableBatch(rna.values[1:], rna.present[1:]), "slides": one}).logits[
        "survival"
    ]
    torch.testing.assert_close(alone[0], both[1])


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"modalities is \{\}"):
        MeanPoolConfig({})
    with pytest.raises(ValueError, match="width is 0"):
        MeanPoolConfig({"rna": ("table", 3)}, width=0)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        MeanPoolConfig({"rna": ("table", 3)}, dropout=1.0)
    with pytest.raises(ValueError, match="name is 'paper'"):
        MeanPoolConfig.from_preset("paper", modalities={"rna": ("table", 3)})
    with pytest.raises(ValueError, match="backend is 'fast'"):
        MeanPoolConfig({"rna": ("table", 3)}, backend="fast")
    with pytest.raises(TypeError, match=r"inputs\['rna'\] is tuple"):
        model()({"rna": (), "slides": ()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bags_of_other_types(dtype: torch.dtype) -> None:
    slides = bag([4, 3])
    rna = TableBatch(torch.randn(2, 3), torch.tensor([True, True]))
    narrow = slides._replace(features=slides.features.to(dtype))
    logits = model()({"rna": rna, "slides": narrow}).logits["survival"]
    assert logits.dtype == torch.float32
    net = model().double()
    wide = {"rna": rna._replace(values=rna.values.double()), "slides": narrow}
    assert net(wide).logits["survival"].dtype == torch.float64
