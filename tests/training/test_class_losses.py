"""Losses of classes and levels against their formulas, and where labels are unknown."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from survfuse.training.class_losses import (
    balancing_weights,
    class_loss,
    class_probabilities,
    level_probabilities,
    ordinal_loss,
)


def test_class_loss_is_weighted_cross_entropy() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 2, -1, 1, 1, -1])
    weights = torch.tensor([0.5, 1.0, 2.0])
    known = label >= 0
    rows = functional.cross_entropy(logits[known], label[known], reduction="none")
    rows = rows * weights[label[known]]
    torch.testing.assert_close(class_loss(logits, label, class_weights=weights), rows.mean())
    torch.testing.assert_close(
        class_loss(logits, label, class_weights=weights, reduction="sum"), rows.sum()
    )
    assert class_loss(logits, label, reduction="none")[~known].tolist() == [0, 0]
    assert torch.autograd.gradcheck(lambda x: class_loss(x, label, class_weights=weights), logits)
    # the weight of a lone patient stays
    one = class_loss(logits[:1], label[:1], class_weights=weights)
    torch.testing.assert_close(one, 0.5 * class_loss(logits[:1], label[:1]))


def test_ordinal_loss_is_the_likelihood_of_its_probabilities() -> None:
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 1, 2, 3, 3, 0, -1, 2])
    probabilities = level_probabilities(logits)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8, dtype=torch.float64))
    hazards = logits.sigmoid()
    by_hand = torch.stack(
        [
            hazards[:, 0],
            (1 - hazards[:, 0]) * hazards[:, 1],
            (1 - hazards[:, 0]) * (1 - hazards[:, 1]) * hazards[:, 2],
            (1 - hazards).prod(1),
        ],
        dim=1,
    )
    torch.testing.assert_close(probabilities, by_hand)
    known = label >= 0
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = -by_hand[known, label[known]].log()
    torch.testing.assert_close(ordinal_loss(logits, label), rows.mean())
    rows = rows * weights[label[known]]
    found = ordinal_loss(logits, label, class_weights=weights)
    torch.testing.assert_close(found, rows.mean())
    assert torch.autograd.gradcheck(lambda x: ordinal_loss(x, label, class_weights=weights), logits)
    # two levels are one logit
    two = torch.randn(5, 1)
    target = torch.tensor([0, 1, 1, 0, 1])
    expected = functional.binary_cross_entropy_with_logits(two[:, 0], (target == 0).float())
    torch.testing.assert_close(ordinal_loss(two, target), expected)
    assert level_probabilities(torch.tensor([[800.0, -800.0]])).tolist() == [[1, 0, 0]]
    assert class_probabilities(torch.zeros(1, 4)).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("loss", [class_loss, ordinal_loss])
def test_unknown_rows_add_nothing_whatever_they_hold(loss) -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    broken = logits.detach().clone()
    broken[1] = float("nan")
    broken.requires_grad_()
    label = torch.tensor([0, -1, 1])
    loss(broken, label).backward()
    loss(logits, label).backward()
    torch.testing.assert_close(broken.grad, logits.grad)
    for rows in (0, 3):
        nobody = torch.randn(rows, 2, requires_grad=True)
        value = loss(nobody, torch.full((rows,), -1))
        value.backward()
        assert value.item() == 0
        assert nobody.grad.tolist() == torch.zeros(rows, 2).tolist()
    half = loss(logits.detach().bfloat16(), label)
    assert half.dtype == torch.float32


def test_wrong_arguments_of_the_losses_are_named() -> None:
    logits, label = torch.zeros(2, 3), torch.tensor([0, 1])
    for change, said in (
        ({"label": torch.tensor([0, 3])}, "label holds 3; with 3 classes"),
        ({"label": torch.tensor([0, -2])}, "label holds -2"),
        ({"label": torch.tensor([0])}, r"label has shape \(1,\)"),
        ({"label": torch.tensor([0.0, 1.0])}, "must be .* of torch.int64"),
        ({"class_weights": torch.ones(2)}, r"class_weights has shape \(2,\); it must be \(3,\)"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"logits": torch.zeros(2, 1)}, r"logits has shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            class_loss(**{"logits": logits, "label": label, **change})
    with pytest.raises(ValueError, match="label holds 4; with 4 classes"):
        ordinal_loss(logits, torch.tensor([0, 4]))


def test_balancing_weights_keep_the_size_of_the_loss() -> None:
    label = torch.tensor([0, 0, 0, 0, 1, -1, 1, 3])
    for kind, powers in (("inverse", -1.0), ("inverse_root", -0.5)):
        weights = balancing_weights(label, 4, kind)
        assert weights[2] == 0
        torch.testing.assert_close(weights[label[label >= 0]].mean(), torch.tensor(1.0))
        torch.testing.assert_close(weights[1] / weights[0], torch.tensor(0.5**powers))
    assert balancing_weights(label, 4, "none") is None
    assert balancing_weights(label, 2, (1.0, 3.0)).tolist() == [1, 3]
    with pytest.raises(ValueError, match="no known class"):
        balancing_weights(torch.tensor([-1]), 2, "inverse")
