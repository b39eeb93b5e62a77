"""SurvPath against its definition in plain torch, and its asymmetric softmax."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from healnet_cases import without
from patch_gene_cases import all_inputs, small, without_dropout
from torch._dynamo.testing import CompileCounter

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.models.survpath import SurvPath

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_models import PlainSurvPath


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "light", "all"])
def test_plain_baseline_computes_the_same(heads: int, recompute: str) -> None:
    model = without_dropout(small(SurvPath, heads=heads, recompute=recompute))
    plain, inputs = PlainSurvPath(model.config), all_inputs()
    plain.load_state_dict(model.state_dict())
    ours, theirs = model(inputs).logits["survival"], plain(inputs).logits["survival"]
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (key, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:  # of what is there for absent modalities it has none
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=key)
    apart = replace(model.config, shared_qkv=False)
    with pytest.raises(ValueError, match="shared_qkv is False"):
        PlainSurvPath(apart)(inputs)


def test_recomputing_keeps_less() -> None:
    def kept(recompute: str) -> int:
        """Bytes that are held for the backward, parameters and inputs among them."""
        model, found = small(SurvPath, recompute=recompute), {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)
            return x

        held: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(inputs)
        return sum(found.values())

    inputs = all_inputs()
    assert kept("all") < kept("light") < kept("none")


def test_an_absent_pathway_takes_no_weight() -> None:
    """It is no key of a logit 0 beside the others: the sample is as if it had never been known."""
    tables = {"rna": ("table", 6, {"a": (0, 1), "b": (1, 2, 3)}), "slide": ("bag", 12)}
    model, inputs = small(SurvPath).eval(), all_inputs()
    fewer = small(SurvPath, modalities=tables).eval()
    own = fewer.state_dict()
    state = {k: v for k, v in model.state_dict().items() if k in own}
    state["genes.stand_in"] = own["genes.stand_in"]
    fewer.load_state_dict(state)
    gone = without(inputs, "cnv", [0, 1, 2])
    inputs.pop("cnv")
    torch.testing.assert_close(model(gone).logits["survival"], fewer(inputs).logits["survival"])


def test_patch_attention_is_the_softmax_over_patches() -> None:
    model, inputs = small(SurvPath).eval(), all_inputs()
    query, _, _ = model._token_heads(model.genes(inputs, 3).values[2:])
    rows = torch.nn.functional.linear(
        inputs["slide"].features[15:21], model.project.weight, model.project.bias
    )
    key = model.qkv(model.norm(rows))[:, 8:16]
    expected = (query[0, :, 0] @ key.T / 8**0.5).softmax(1).T.detach()
    found = torch.stack(list(model.patch_attention(inputs)["slide"].values()), 1)[10:]
    torch.testing.assert_close(found, expected)


def test_compiles_to_one_graph_for_all_sizes() -> None:
    model, counter = small(SurvPath).eval(), CompileCounter()
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
