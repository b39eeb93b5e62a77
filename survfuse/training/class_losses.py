"""Losses of classes and of ordered levels, and what their logits say of a patient.

Formulas and conventions: docs/statistics.md, "Losses". A label of -1 is unknown and adds nothing.
Half precision is computed in fp32; fp64 stays fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from survfuse.training.losses import nll_loss


def class_loss(
    logits: Tensor,
    label: Tensor,
    *,
    class_weights: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy: w_y (log sum_k exp(logit_k) - logit_y), over the patients with a known class.

    The mean divides by the number of patients, not by their weights: by their weights, a batch of
    one class, and so any batch of one, would not be weighted at all.

    Args:
        logits: [B, K], at least two classes.
        label: [B] int64 class; -1 where unknown.
        class_weights: [K] weight of each class, used as given (see `balancing_weights`).
        reduction: "mean" over the patients with a known class, "sum", or "none" ([B]).

    Returns:
        A scalar, or [B]. Without a known class: 0, with a zero gradient.

    Raises:
        ValueError: a shape, dtype or setting is not as said; on the CPU also a label out of range.
    """
    _check(logits, label, logits.shape[-1], class_weights, reduction)
    values = _of_the_known(logits, label)
    loss = functional.cross_entropy(values, label.clamp(min=0), reduction="none")
    return _reduced(loss, label, class_weights, reduction)


def ordinal_loss(
    logits: Tensor,
    label: Tensor,
    *,
    class_weights: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Negative log-likelihood of ordered levels by their continuation ratios.

    With P(y = k | y >= k) = sigmoid(logit_k) for all levels but the last, which takes the rest:

        loss = -log sigmoid(logit_y) - sum over k < y of log(1 - sigmoid(logit_k))

    It is `nll_loss` with levels for time bins and every event seen.

    Args:
        logits: [B, K - 1] for K levels.
        label: [B] int64 level; -1 where unknown.
        class_weights: [K] weight of each level, used as given.
        reduction: as in `class_loss`.

    Returns:
        A scalar, or [B]. Without a known level: 0, with a zero gradient.

    Raises:
        ValueError: as `class_loss`.

    Source: Tutz (1991), Comput. Stat. Data Anal. 11, 275-295; with networks, Shi, Cao and Raschka
    (2023), Pattern Anal. Appl. 26, 941-955 (CORN, of P(y > k | y >= k)).
    """
    last = logits.shape[-1]
    _check(logits, label, last + 1, class_weights, reduction)
    # a patient of the last level is one who got through all the others, as if censored after them
    values = _of_the_known(logits, label)
    loss = nll_loss(values, label.clamp(max=last - 1), label < last, reduction="none")
    return _reduced(loss, label, class_weights, reduction)


def class_probabilities(logits: Tensor) -> Tensor:
    """[B, K] of the logits of `class_loss`, in fp64."""
    return logits.double().softmax(dim=-1)


def level_probabilities(logits: Tensor) -> Tensor:
    """[B, K] of the K - 1 logits of `ordinal_loss`, in fp64; the rows sum to 1.

    P(y = k) = sigmoid(logit_k) prod over j < k of (1 - sigmoid(logit_j)); the last level's is the
    product alone.

    Example:
        >>> level_probabilities(torch.zeros(1, 2)).tolist()
        [[0.5, 0.25, 0.25]]
    """
    values = logits.double()
    passed = functional.logsigmoid(-values).cumsum(dim=-1)
    reached = functional.pad(passed[..., :-1], (1, 0))
    stops = reached + functional.logsigmoid(values)
    return torch.cat([stops, passed[..., -1:]], dim=-1).exp()


def balancing_weights(
    label: Tensor,
    n_classes: int,
    kind: Literal["none", "inverse", "inverse_root"] | Sequence[float],
) -> Tensor | None:
    """Return [n_classes] fp32 weights of classes, None for "none".

    "inverse" is 1 / count and "inverse_root" 1 / sqrt(count), scaled so that the mean weight of the
    patients with a known class is 1, and the loss keeps its size. A class without patients gets
    weight 0. Numbers are taken as they are.

    Args:
        label: [n] int64 classes of the training patients, -1 where unknown.
        n_classes: number of classes.
        kind: which weights.

    Raises:
        ValueError: no class is known.
    """
    if kind == "none":
        return None
    if not isinstance(kind, str):
        return torch.tensor(kind, dtype=torch.float32)
    known = label[label >= 0]
    if known.numel() == 0:
        raise ValueError("label holds no known class; class weights need at least one")
    counts = torch.bincount(known, minlength=n_classes).to(torch.float64)
    power = -1.0 if kind == "inverse" else -0.5
    weights = torch.where(counts > 0, counts.clamp(min=1).pow(power), 0.0)
    return (weights * counts.sum() / (weights @ counts)).to(torch.float32)


def _of_the_known(logits: Tensor, label: Tensor) -> Tensor:
    """The logits in fp32 or fp64, zeros where the label is unknown: those may hold anything."""
    values = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    return torch.where((label >= 0)[:, None], values, 0.0)


def _reduced(loss: Tensor, label: Tensor, class_weights: Tensor | None, reduction: str) -> Tensor:
    known = label >= 0
    if class_weights is not None:
        loss = loss * class_weights.to(loss)[label.clamp(min=0)]
    loss = torch.where(known, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / known.sum().clamp(min=1)


def _check(
    logits: Tensor, label: Tensor, n_classes: int, class_weights: Tensor | None, reduction: str
) -> None:
    if logits.dim() != 2 or n_classes < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}; it must be "
            "[patients, classes], or [patients, levels - 1], of floats, for at least two"
        )
    if label.shape != logits.shape[:1] or label.dtype != torch.int64:
        raise ValueError(
            f"label has shape {tuple(label.shape)} and dtype {label.dtype}; it must be "
            f"({logits.shape[0]},) of torch.int64"
        )
    if label.device != logits.device:
        raise ValueError(f"label is on {label.device}; it must be on {logits.device}")
    if class_weights is not None and class_weights.shape != (n_classes,):
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}; it must be ({n_classes},)"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    # reading values would make an accelerator wait; gather reports a bad label there itself
    if label.device.type == "cpu" and len(label):
        low, high = int(label.min()), int(label.max())
        if low < -1 or high >= n_classes:
            raise ValueError(
                f"label holds {low if low < -1 else high}; with {n_classes} classes it must be "
                f"from 0 to {n_classes - 1}, or -1 where unknown"
            )
