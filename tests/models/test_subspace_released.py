"""Released weights of subspace fusion against an independent transcription."""

from __future__ import annotations

import pytest
import torch
from subspace_transcription import Released, released_state

from survfuse import Ragged
from survfuse.batch import BagBatch, TableBatch
from survfuse.models import SubspaceFusion
from survfuse.models.subspace_layout import fill_map

GENES = {"tumor_genes": 5, "immune_genes": ["A", "B", "C", "D", "E", "F", "G"]}


def _batch(lengths: list[int], width: int = 12) -> dict:
    ragged = Ragged.from_lengths(lengths)
    present = torch.ones(len(lengths), dtype=torch.bool)
    return {
        "slides": BagBatch(torch.randn(ragged.total, width), ragged, present),
        "genes": TableBatch(torch.randn(len(lengths), 12), present),
    }


@pytest.mark.parametrize("lengths", [[2500], [2500, 2500], [7, 3111]], ids=str)
def test_released_weights_give_what_the_released_network_gives(lengths: list[int]) -> None:
    state = released_state()
    model = SubspaceFusion.from_released(state, **GENES).eval()
    inputs = _batch(lengths)
    bags = inputs["slides"].features.split(lengths)
    patches = torch.stack([bag[fill_map(len(bag), 2500)] for bag in bags])
    genes = dict(zip(("tumor", "immune"), inputs["genes"].values.split([5, 7], 1)))
    with torch.no_grad():
        got = model(inputs)
    oracle = Released(state, heads=2)
    expected = oracle(patches, genes)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.logits["survival"], expected["logits"], **close)
    for ours, theirs in (("tumor", "tumor"), ("microenvironment", "immune")):
        torch.testing.assert_close(got.embeddings[ours], expected[f"feature_{theirs}"], **close)
        loss = 0.5 * oracle.consistency(expected, theirs)
        torch.testing.assert_close(got.auxiliary[f"consistency_{ours}"], loss, **close)


def test_bags_fill_a_map_as_released() -> None:
    assert fill_map(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    # halves go to the even side: 1.5 and 4.5 are the patches 2 and 4
    assert fill_map(6, 4).tolist() == [0, 2, 3, 4]
    assert fill_map(4, 4).tolist() == [0, 1, 2, 3]
    longest = fill_map(2501, 2500)
    assert longest.unique().numel() == 2500
    assert int(longest.max()) == 2500


def test_sizes_are_read_off_and_the_task_is_named() -> None:
    state = {k: v.double() for k, v in released_state(label_dim=3, dim=32, heads=4).items()}
    model = SubspaceFusion.from_released(state, **GENES, task="grade", label_dim=3)
    config = model.config
    assert (config.dim, config.heads, config.dim_head, config.gene_widths) == (32, 4, 8, (10, 8, 6))
    assert config.outputs == {"grade": 3}
    assert config.modalities["slides"].channels == 12
    assert model.readout.tasks["grade"].weight.dtype == torch.float64
    assert (config.released, config.layout, config.map_side) == (True, "fixed", 50)


def test_what_the_forward_pass_never_reads_may_be_missing() -> None:
    state = released_state()
    full = SubspaceFusion.from_released(state, **GENES).eval()
    unused = ("attn1d", "_fc2", "cls_token", "classifier_", "net_tumor.classifier")
    some = {k: v for k, v in state.items() if not any(word in k for word in unused)}
    assert len(some) < len(state)
    part = SubspaceFusion.from_released(some, **GENES).eval()
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), part.parameters()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.pop("classifier.bias"), ValueError, r"no 'classifier\.bias'"),
        (
            lambda s: s.update({"pathomic_net_tumor.layer4.weight": torch.zeros(1)}),
            ValueError,
            r"1 entries that the released model does not, the first 'pathomic_net_tumor\.layer4",
        ),
        (
            lambda s: s.update({"pathomic_net_immune.norm.bias": torch.zeros(3)}),
            ValueError,
            r"'pathomic_net_immune\.norm\.bias'\] has shape \(3,\); .* must be \(16,\)",
        ),
        (
            lambda s: s.update({"pathomic_net_immune.norm.bias": [1.0]}),
            TypeError,
            "must be a floating tensor",
        ),
        (
            lambda s: s.pop("pathomic_net_tumor.layer3.attn2d.to_q.weight"),
            ValueError,
            r"no entry 'pathomic_net_tumor\.layer3\.attn2d\.to_q\.weight'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, error, words) -> None:
    state = released_state()
    change(state)
    with pytest.raises(error, match=words):
        SubspaceFusion.from_released(state, **GENES)


def test_wrong_numbers_of_genes_and_labels_are_named() -> None:
    state = released_state()
    with pytest.raises(ValueError, match=r"omic_net_tumor\.encoder\.0\.0\.weight'\] has shape"):
        SubspaceFusion.from_released(state, tumor_genes=6, immune_genes=7)
    with pytest.raises(ValueError, match=r"'classifier\.weight'\] has shape \(4, 32\)"):
        SubspaceFusion.from_released(state, **GENES, label_dim=3)
    with pytest.raises(TypeError, match="state_dict is list"):
        SubspaceFusion.from_released([], **GENES)
