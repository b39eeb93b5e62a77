"""Losses of survival models: discrete hazards and Cox's partial likelihood.

Formulas and conventions: docs/statistics.md, "Losses". `event` is True where the event was seen.
Everything stays on the device of its input and nothing waits for it. Half precision is computed
in fp32; fp64 stays fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def nll_loss(
    logits: Tensor,
    label: Tensor,
    event: Tensor,
    *,
    alpha: float = 0.0,
    class_weights: Tensor | None = None,
    weighted: Literal["likelihood", "loss"] = "likelihood",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Negative log-likelihood of discrete hazards.

    With h_k = sigmoid(logit_k), S_k = prod_{l <= k} (1 - h_l), S_{-1} = 1 and bin y:

        seen = -(log S_{y-1} + log h_y)  where the event was seen, else 0
        censored = -log S_y              where it was not, else 0
        loss = (1 - alpha) (seen + censored) + alpha seen

    so `alpha` moves weight from censored patients to events: (1 - alpha) censored + seen.

    Args:
        logits: [B, K] hazard logits.
        label: [B] int64 time bin in [0, K); -1 where unknown: such a patient adds nothing.
        event: [B] bool.
        alpha: in [0, 1]; 0 is the likelihood.
        class_weights: [K] weight of each time bin, used as given (see `class_weights_of`).
        weighted: what the weight of a patient's bin multiplies. "likelihood": only seen +
            censored, the term alpha adds stays unweighted, as HEALNet's released code does;
            "loss": the patient's whole loss. The same for alpha = 0.
        reduction: "mean" over the patients with a known bin, "sum", or "none" ([B]).

    Returns:
        A scalar, or [B].

    Raises:
        ValueError: a shape, dtype or setting is not as said; on the CPU also a label out of range.

    Precision: log h and log (1 - h) come from logsigmoid, so no logit makes the loss infinite
    before the dtype itself overflows.
    Source: Zadeh and Schmid (2021), IEEE TPAMI 43, 3126-3137; alpha and weights as in HEALNet,
    github.com/konst-int-i/healnet.
    """
    _check_nll(logits, label, event, alpha, class_weights, weighted, reduction)
    values = _at_least_float32(logits)
    known = label >= 0
    bin_index = label.clamp(min=0).unsqueeze(1)
    log_survival = functional.logsigmoid(-values).cumsum(dim=1)
    # S_{-1} = 1 in front, so that column y of `survived_before` is log S_{y-1}
    survived_before = functional.pad(log_survival, (1, 0))
    log_hazard = functional.logsigmoid(values).gather(1, bin_index).squeeze(1)
    before = survived_before.gather(1, bin_index).squeeze(1)
    through = log_survival.gather(1, bin_index).squeeze(1)
    seen = torch.where(event, -(before + log_hazard), 0.0)
    likelihood = torch.where(event, seen, -through)
    weight = None
    if class_weights is not None:
        weight = class_weights.to(values)[bin_index.squeeze(1)]
        if weighted == "likelihood":
            likelihood = likelihood * weight
    loss = (1.0 - alpha) * likelihood + alpha * seen
    if weight is not None and weighted == "loss":
        loss = loss * weight
    loss = torch.where(known, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / known.sum().clamp(min=1)


def class_weights_of(
    label: Tensor, n_bins: int, *, kind: Literal["inverse", "inverse_root"] = "inverse"
) -> Tensor:
    """Return [n_bins] fp32 weights 1 / count (or 1 / sqrt(count)) of each bin, summing to 1.

    Args:
        label: [n] int64 bins of the training patients, -1 where unknown.
        n_bins: number of bins. A bin without patients gets weight 0.
        kind: which function of the count.

    Raises:
        ValueError: no label is known, one is out of range, or `kind` is unknown.
    """
    if kind not in ("inverse", "inverse_root"):
        raise ValueError(f"kind is {kind!r}; it must be 'inverse' or 'inverse_root'")
    known = label[label >= 0]
    if known.numel() == 0:
        raise ValueError("label holds no known bin; class weights need at least one")
    if int(known.max()) >= n_bins:
        raise ValueError(
            f"label holds bin {int(known.max())}; with {n_bins} bins the last is {n_bins - 1}"
        )
    counts = torch.bincount(known, minlength=n_bins).to(torch.float64)
    power = -1.0 if kind == "inverse" else -0.5
    weights = torch.where(counts > 0, counts.clamp(min=1).pow(power), 0.0)
    return (weights / weights.sum()).to(torch.float32)


def risk_from_hazards(logits: Tensor) -> Tensor:
    """Return the risk score -sum_k S_k, [B]; higher = earlier event.

    Args:
        logits: [B, K] hazard logits.

    Raises:
        ValueError: `logits` is not 2-D.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be [patients, bins]")
    return -functional.logsigmoid(-_at_least_float32(logits)).cumsum(dim=1).exp().sum(dim=1)


def cox_loss(
    risk: Tensor, *, time: Tensor, event: Tensor, ties: Literal["efron", "breslow"] = "efron"
) -> Tensor:
    """Negative log partial likelihood, divided by the number of events.

    The risk set of an event at t holds everybody with time >= t, patients censored at t included.
    With A the sum of exp(risk) over the risk set and D over the d events at t:

        Breslow: sum over events of log A - risk_i
        Efron:   the l-th of the d events (l = 0 ... d-1) has log(A - (l / d) D) - risk_i

    Args:
        risk: [B] or [B, 1] log-risk, finite.
        time: [B] time of the event or of censoring, any float or integer dtype.
        event: [B] bool.
        ties: how events at equal times share a risk set.

    Returns:
        A scalar. Without an event in the batch: 0 * risk.sum(), which has a zero gradient.

    Raises:
        ValueError: a shape, dtype or device is not as said.

    Precision: running log-sum-exp, and D relative to A, so that neither log-risks of several
    hundred nor their differences overflow. fp64 in, fp64 throughout.
    Determinism: two scatter-adds of [B] values; on CUDA their order follows torch's setting
    `use_deterministic_algorithms`.
    Cost: one sort; B log B.
    Source: Cox (1972), J. R. Stat. Soc. B 34, 187-220; Efron (1977), J. Am. Stat. Assoc. 72,
    557-565.
    """
    values = _check_cox(risk, time, event, ties)
    if values.numel() == 0:
        return 0.0 * values.sum()
    order = torch.argsort(time, descending=True, stable=True)
    values, event = _at_least_float32(values)[order], event[order]
    since = -time[order] if time.dtype.is_floating_point else -time[order].to(torch.int64)
    # of every patient, the first and last position that share its time
    first = torch.searchsorted(since, since)
    last = torch.searchsorted(since, since, right=True) - 1
    log_at_risk = torch.logcumsumexp(values, dim=0)[last]
    terms = log_at_risk - values
    if ties == "efron":
        seen_so_far = event.cumsum(0)
        seen_before = seen_so_far[first] - event[first].to(seen_so_far.dtype)
        tied_events = seen_so_far[last] - seen_before
        place = seen_so_far - 1 - seen_before
        fraction = place.clamp(min=0).to(values.dtype) / tied_events.clamp(min=1)
        share = torch.where(event, (values - log_at_risk).exp(), 0.0)
        tied_share = torch.zeros_like(share).scatter_add(0, first, share)[first]
        terms = terms + torch.where(event, torch.log1p(-fraction * tied_share), 0.0)
    n_events = event.sum()
    loss = torch.where(event, terms, 0.0).sum() / n_events.clamp(min=1)
    return torch.where(n_events > 0, loss, 0.0 * values.sum())


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check_nll(
    logits: Tensor,
    label: Tensor,
    event: Tensor,
    alpha: float,
    class_weights: Tensor | None,
    weighted: str,
    reduction: str,
) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}; it must be "
            "[patients, bins] of floats"
        )
    n, n_bins = logits.shape
    _check_vector("label", label, n, logits, torch.int64)
    _check_vector("event", event, n, logits, torch.bool)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    if class_weights is not None and class_weights.shape != (n_bins,):
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}; it must be ({n_bins},)"
        )
    if weighted not in ("likelihood", "loss"):
        raise ValueError(f"weighted is {weighted!r}; it must be 'likelihood' or 'loss'")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    # reading values would make an accelerator wait; gather reports a bad label there itself
    if label.device.type == "cpu" and n and int(label.max()) >= n_bins:
        raise ValueError(
            f"label holds bin {int(label.max())}; with {n_bins} bins the last is {n_bins - 1}"
        )


def _check_cox(risk: Tensor, time: Tensor, event: Tensor, ties: str) -> Tensor:
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties is {ties!r}; it must be 'efron' or 'breslow'")
    values = risk.squeeze(1) if risk.dim() == 2 and risk.shape[1] == 1 else risk
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(
            f"risk has shape {tuple(risk.shape)} and dtype {risk.dtype}; it must be [patients] or "
            "[patients, 1] of floats"
        )
    _check_vector("time", time, values.shape[0], values, None)
    _check_vector("event", event, values.shape[0], values, torch.bool)
    if time.device.type == "cpu" and not torch.isfinite(time).all():
        raise ValueError("time must be finite")
    return values


def _check_vector(
    name: str, value: Tensor, n: int, like: Tensor, dtype: torch.dtype | None
) -> None:
    if value.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({n},)")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; it must be {dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device}")
