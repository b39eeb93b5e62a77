"""How well each of two branches does alone, over all rows of a step and all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from survfuse.evaluation.concordance import concordance_index, follow_up_order
from survfuse.training.losses import risk_from_hazards

Kind = Literal["classes", "ordinal", "survival", "cox"]
KINDS: tuple[Kind, ...] = ("classes", "ordinal", "survival", "cox")
# what a step keeps of a sample: value of a, value of b, time, event, whether it counts
WIDTH = 5


class Scores(NamedTuple):
    """Scores of both branches, or why there are none."""

    a: float
    b: float
    undefined: str | None


def true_class_probability(logits: Tensor, label: Tensor, *, ordinal: bool) -> Tensor:
    """[B] probability of each sample's class; of any class where the label is -1.

    Args:
        logits: [B, K] class logits; ordinal, [B, K - 1] continuation logits:
            P(y = k | y >= k) = sigmoid(logit_k), and the last level takes the rest.
        label: [B] int64.
    """
    index = label.clamp(min=0)[:, None]
    if not ordinal:
        return logits.log_softmax(1).gather(1, index).squeeze(1).exp()
    # in front, nothing has been passed; behind, the last level has to be taken
    passed = functional.pad(functional.logsigmoid(-logits).cumsum(1), (1, 0))
    taken = functional.pad(functional.logsigmoid(logits), (0, 1))
    return (passed + taken).gather(1, index).squeeze(1).exp()


def sample_values(kind: Kind, logits: Tensor, label: Tensor | None) -> Tensor:
    """[B] what a branch's score is made of: probability of the true class, or risk."""
    if kind == "survival":
        return risk_from_hazards(logits)
    if kind == "cox":
        return logits[:, 0]
    return true_class_probability(logits, label, ordinal=kind == "ordinal")


def score(kind: Kind, rows: Tensor) -> Scores:
    """Scores over rows [n, WIDTH]: sums of probabilities, or Harrell's C of the risks."""
    rows = rows[rows[:, 4] > 0].cpu()
    if not len(rows):
        return Scores(float("nan"), float("nan"), "no sample with a known outcome was observed")
    if not bool(rows[:, :3].isfinite().all()):
        return Scores(float("nan"), float("nan"), "an output or a time is NaN or infinite")
    if kind in ("classes", "ordinal"):
        return Scores(*rows[:, :2].sum(0).tolist(), None)
    time, event = rows[:, 2].numpy(), rows[:, 3].numpy() > 0
    follow_up = follow_up_order(time, event)
    if not event.any() or follow_up.max() == follow_up[event].min():
        return Scores(float("nan"), float("nan"), "no pair of patients is comparable")
    a, b = (concordance_index(rows[:, i].numpy(), time=time, event=event) for i in (0, 1))
    return Scores(a, b, None)


def gather_rows(
    windows: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> list[Tensor]:
    """The rows of all processes of a group, task by task, in the order of ranks.

    Two collectives whatever the number of tasks; a process may have observed nothing.

    Args:
        windows: per task [n, WIDTH] fp64, the same tasks on every process.
        group: None for all processes; without torch.distributed, or alone, nothing is exchanged.
        device: where the collectives run.
    """
    if not dist.is_available() or not dist.is_initialized():
        return list(windows)
    n_ranks = dist.get_world_size(group)
    if n_ranks == 1:
        return list(windows)
    counts = torch.tensor([len(rows) for rows in windows], device=device)
    every = counts.new_empty(n_ranks, len(windows))
    dist.all_gather(list(every.unbind(0)), counts, group=group)
    lengths = every.tolist()
    longest = max(map(sum, lengths))
    if longest == 0:
        return list(windows)
    mine = torch.zeros(longest, WIDTH, dtype=torch.float64, device=device)
    mine[: int(counts.sum())] = torch.cat([rows.to(device) for rows in windows])
    parts = mine.new_empty(n_ranks, longest, WIDTH)
    dist.all_gather(list(parts.unbind(0)), mine, group=group)
    cut = [part[: sum(n)].split(n) for part, n in zip(parts, lengths, strict=True)]
    return [torch.cat([of_rank[task] for of_rank in cut]) for task in range(len(windows))]
