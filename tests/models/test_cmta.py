"""CMTA: the alignment, the encoder of a sequence, the attention across."""

from __future__ import annotations

import pytest
import torch
from healnet_cases import without
from patch_gene_cases import MODALITIES, all_inputs, small, without_dropout

from survfuse import Ragged
from survfuse.layers.nystrom_encoder import NystromEncoder
from survfuse.models.cmta import CMTA, CMTAConfig


@pytest.mark.parametrize("kind", ["l1", "mse", "cosine", "kl"])
def test_only_samples_with_both_sides_are_aligned(kind: str) -> None:
    model, inputs = small(CMTA, alignment=kind).eval(), all_inputs()
    each = []
    for b in range(3):
        alone = inputs
        for other in {0, 1, 2} - {b}:
            alone = without(alone, "slide", [other])
        each.append(model(alone).auxiliary["alignment"])
    whole = model(inputs).auxiliary["alignment"]
    assert whole > 0
    torch.testing.assert_close(whole, torch.stack(each).mean())
    no_genes = without(without(inputs, "rna", [0]), "cnv", [0])
    torch.testing.assert_close(model(no_genes).auxiliary["alignment"], torch.stack(each[1:]).mean())
    nothing = model(without(inputs, "slide", [0, 1, 2])).auxiliary["alignment"]
    assert float(nothing) == 0.0


def test_alignment_is_weighted_and_may_be_left_out() -> None:
    inputs = all_inputs()
    one, two = (small(CMTA, alignment_weight=w).eval()(inputs).auxiliary for w in (1.0, 2.0))
    torch.testing.assert_close(two["alignment"], 2.0 * one["alignment"])
    assert small(CMTA, alignment="none")(inputs).auxiliary == {}
    with pytest.raises(ValueError, match="alignment is 'l2'"):
        CMTAConfig(MODALITIES, alignment="l2")
    with pytest.raises(ValueError, match="alignment_weight is -1"):
        CMTAConfig(MODALITIES, alignment_weight=-1)


def test_encoded_class_tokens_are_constants_to_the_alignment() -> None:
    """What only the encoders' class tokens depend on has no gradient from it."""
    model = without_dropout(small(CMTA))
    model(all_inputs()).auxiliary["alignment"].backward()
    # the class token of the last layer reaches the loss through the target alone
    assert not model.fusion[0].weight.grad
    assert model.patch_decoder.norm.weight.grad.any()
    assert model.gene_decoder.class_token.grad.any()


def test_sequences_do_not_see_one_another_and_rows_keep_their_places() -> None:
    torch.manual_seed(0)
    encoder = NystromEncoder(8, heads=2, landmarks=3, dropout=0.0, square=True)
    lengths = [5, 0, 11]
    x = torch.randn(16, 8)
    tokens, rows = encoder(x, Ragged.from_lengths(lengths), lengths)
    assert (tokens.shape, rows.shape) == ((3, 8), (16, 8))
    for b, part in enumerate(x.split(lengths)):
        token, own = encoder(part, Ragged.from_lengths([len(part)]), [len(part)])
        torch.testing.assert_close(tokens[b : b + 1], token)
        torch.testing.assert_close(rows.split(lengths)[b], own)


def test_patch_attention_is_the_softmax_of_the_encoded_sides() -> None:
    model, inputs = small(CMTA).eval(), all_inputs()
    slide = inputs["slide"]._replace(ragged=Ragged.from_ranges([15], [6]))
    one = {
        name: batch._replace(values=batch.values[2:])
        for name, batch in inputs.items()
        if name != "slide"
    }
    one = {name: batch._replace(present=batch.present[2:]) for name, batch in one.items()}
    one["slide"] = slide._replace(present=slide.present[2:])
    found = torch.stack(list(model.patch_attention(one)["slide"].values()), 1)
    tokens = model.genes(one, 1)
    genes = model._encode_genes(tokens)[1]
    ragged = Ragged.from_lengths([6])
    hidden = model.project.rest(model.project.first(slide.features, slide.ragged))
    patches = model.patch_encoder(hidden, ragged, [6])[1]
    part = model.genes_read
    expected = (part.query(genes) @ part.key(patches).T / 16**0.5).softmax(1).T
    torch.testing.assert_close(found, expected.detach())
