"""Coordinate the gradients of two branches that share a classifier, between backward and step.

Derivation: docs/math.md, "Gradient coordination". Use: docs/training.md, same title.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from survfuse.training.branch_scores import (
    KINDS,
    WIDTH,
    Kind,
    gather_rows,
    sample_values,
    score,
)
from survfuse.training.gradient_conflict import MODES, Mode, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CoordinatedHead:
    """A task's classifier over two branches whose features lie side by side.

    Attributes:
        kind: what its outputs are: "classes" logits; "ordinal", continuation logits of ordered
            levels; "survival", hazard logits; "cox", one log-risk.
        weight: [out, D], the parameter of the model itself.
        bias: [out]; None for none.
        columns: (first, end) columns of either branch, equally many and disjoint; None takes the
            two halves.

    Raises:
        TypeError, ValueError: a value is not as said.
    """

    kind: Kind
    weight: Tensor
    bias: Tensor | None = None
    columns: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {list(KINDS)}")
        if not isinstance(self.weight, Tensor):
            raise TypeError(f"weight is {type(self.weight).__name__}; it must be a Parameter")
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"weight has shape {shape} and dtype {self.weight.dtype}; it must be "
                "[out, columns] of floats"
            )
        out, width = shape
        if (out != 1 and self.kind == "cox") or (out < 2 and self.kind == "classes") or out == 0:
            must = {"cox": "1", "classes": "at least 2"}.get(self.kind, "at least 1")
            raise ValueError(f"weight has {out} rows; for kind {self.kind!r} it must have {must}")
        if self.bias is not None and tuple(self.bias.shape) != (out,):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}; it must be ({out},)")
        if self.columns is None:
            if width % 2:
                raise ValueError(
                    f"weight has {width} columns, which have no two halves; columns must say which "
                    "belong to either branch"
                )
            halves = ((0, width // 2), (width // 2, width))
            object.__setattr__(self, "columns", halves)
        (a, b), (c, d) = self.columns
        inside = min(a, c) >= 0 and max(b, d) <= width
        if not inside or b - a < 1 or b - a != d - c or not (b <= c or d <= a):
            raise ValueError(
                f"columns is {self.columns}; it must hold two disjoint (first, end) of "
                f"equally many columns of {width}"
            )

    def branches_of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches' columns of [out, D], as views."""
        (a, b), (c, d) = self.columns
        return values[:, a:b], values[:, c:d]


class Coordination(NamedTuple):
    """What one call did to one task."""

    scores: dict[str, float]  # by branch; NaN where undefined
    ratio: float  # of the first branch's score to the second's
    conflicts: int  # rows of the weight whose gradients conflict
    modified: int  # rows of which a branch's gradient was changed, or both
    strength: float  # mean of |change| / |gradient| over changed gradients; 0 without any
    skipped: str | None  # why nothing was done


class GradientCoordination:
    """Let no branch of a two-branch classifier pull a class against the other.

    Of every row of the classifier's weight the gradient has two parts, one per branch. Where they
    point apart (negative cosine), the part of the branch that scores lower is changed; see
    `survfuse.training.gradient_conflict.resolve`. A branch's score is that of its own logits
    `f W_branch^T + b / 2`: the sum of true-class probabilities, or the concordance of its risk,
    over everything observed since the last call.

    Call `observe` after each forward, `coordinate` between backward and step. All operations are
    homogeneous in the gradient, so a scaled loss (`torch.amp.GradScaler`) may be unscaled before or
    after; a gradient that is NaN or infinite is left as it is, for the scaler to drop the step.

    Where torch.distributed is initialised, what was observed is gathered over `group` and all its
    processes decide alike. Each must call `coordinate` equally often, with gradients already
    averaged, as DistributedDataParallel leaves them; it may have observed nothing.

    Args:
        heads: what is coordinated, by task.
        branches: names of the first and the second branch.
        mode: "projection", the changed gradient has no part left along the other's, and on equal
            scores both are projected; "released", as the public code of the paper: reflected and
            shortened, and nothing on equal scores.
        group: the processes whose samples are scored together; None for all.

    Raises:
        ValueError: an argument is not as said.

    Cost: two small products per observed sample; per call one wait for the device, and fp64
    arithmetic on [out, D]. Nothing is random.
    Source: Zhang et al. (2024), MICCAI, arXiv 2406.13979, and its public code.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(2).repeat(1, 2))
        >>> heads = {"grade": CoordinatedHead("classes", weight)}
        >>> coordination = GradientCoordination(heads, branches=("tumor", "immune"))
        >>> certain, vague = torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> coordination.observe("grade", certain, vague, label=torch.tensor([0]))
        >>> weight.grad = torch.tensor([[1.0, 0.0, -1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
        >>> coordination.coordinate()["grade"].modified
        1
        >>> weight.grad
        tensor([[1., 0., 0., 1.],
                [1., 0., 1., 1.]])
    """

    def __init__(
        self,
        heads: Mapping[str, CoordinatedHead],
        *,
        branches: tuple[str, str],
        mode: Mode = "projection",
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(heads, Mapping) or not heads:
            raise ValueError(f"heads is {heads!r}; it must map at least one task to its head")
        for task, head in heads.items():
            if not isinstance(head, CoordinatedHead):
                raise ValueError(
                    f"heads[{task!r}] is a {type(head).__name__}; it must be a CoordinatedHead"
                )
        names = tuple(branches)
        if len(names) != 2 or names[0] == names[1] or not all(isinstance(n, str) for n in names):
            raise ValueError(f"branches is {branches!r}; it must hold two different names")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {list(MODES)}")
        self.heads = dict(heads)
        self.branches = names
        self.mode = mode
        self.group = group
        self._window: dict[str, list[Tensor]] = {task: [] for task in heads}
        self._totals = _Totals()

    @torch.no_grad()
    def observe(
        self,
        task: str,
        features_a: Tensor,
        features_b: Tensor,
        *,
        label: Tensor | None = None,
        time: Tensor | None = None,
        event: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Keep how both branches alone would answer for a batch, until `coordinate`.

        Args:
            task: one of the heads.
            features_a, features_b: [B, d], what the head was given for either branch.
            label: [B] int64 classes or levels, -1 where unknown; "classes" and "ordinal".
            time: [B] follow-up; "survival" and "cox".
            event: [B] bool, True where the event was seen; "survival" and "cox".
            valid: [B] bool, False for a sample that counts in no score, such as one that lacks the
                input of a branch. It may hold anything. None: all count.

        Raises:
            ValueError: the task is none of the heads, or an argument is missing or not as said.
        """
        if task not in self.heads:
            raise ValueError(f"task is {task!r}; it must be one of {list(self.heads)}")
        head = self.heads[task]
        n = _check_features(head, features_a, features_b)
        valid = features_a.new_ones(n, dtype=torch.bool) if valid is None else valid
        _check_rows("valid", valid, n, torch.bool)
        rows = features_a.new_zeros(n, WIDTH, dtype=torch.float64)
        if head.kind in ("classes", "ordinal"):
            _check_label(head, label, n)
            valid = valid & (label >= 0)
        else:
            _check_rows("time", time, n, None)
            _check_rows("event", event, n, torch.bool)
            rows[:, 2], rows[:, 3] = time, event
        for column, logits in enumerate(_branch_logits(head, features_a, features_b)):
            rows[:, column] = sample_values(head.kind, logits, label)
        # a sample that does not count may have left NaN; its row is never read
        rows[:, 4] = valid
        self._window[task].append(rows)

    @torch.no_grad()
    def coordinate(self) -> dict[str, Coordination]:
        """Change the gradients of all heads in place, by what was observed since the last call."""
        device = next(iter(self.heads.values())).weight.device
        empty = torch.zeros(0, WIDTH, dtype=torch.float64, device=device)
        windows = [torch.cat([empty, *(r.to(device) for r in w)]) for w in self._window.values()]
        self.clear()
        gathered = gather_rows(windows, self.group, device)
        records = {}
        for (task, head), rows in zip(self.heads.items(), gathered, strict=True):
            record, strengths = self._coordinate_head(head, rows)
            if record.skipped is not None:
                _LOG.info("gradients of task %s are not coordinated: %s", task, record.skipped)
            self._totals.add(record, strengths)
            records[task] = record
        return records

    def clear(self) -> None:
        """Forget what was observed, as after a step that is not taken."""
        for window in self._window.values():
            window.clear()

    def summary(self) -> dict[str, float | int]:
        """Totals since the last `reset`.

        Returns:
            steps (calls times tasks), skipped of them, conflicts and modified rows, and strength,
            the mean over all changed gradients.
        """
        totals = self._totals
        return {
            "steps": totals.steps,
            "skipped": totals.skipped,
            "conflicts": totals.conflicts,
            "modified": totals.modified,
            "strength": totals.strength / totals.changed if totals.changed else 0.0,
        }

    def reset(self) -> None:
        """Begin new totals."""
        self._totals = _Totals()

    def state_dict(self) -> dict[str, Any]:
        """The totals: all there is between two steps.

        Raises:
            RuntimeError: something was observed and not yet coordinated.
        """
        if any(self._window.values()):
            raise RuntimeError(
                "state_dict was called between observe and coordinate; save between two steps, or "
                "clear() first"
            )
        return vars(self._totals).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the totals of `state_dict`.

        Raises:
            ValueError: they are not such totals.
        """
        if set(state) != set(vars(_Totals())):
            raise ValueError(f"state has {sorted(state)}; it must have {sorted(vars(_Totals()))}")
        self.clear()
        self._totals = _Totals(**state)

    def _coordinate_head(
        self, head: CoordinatedHead, rows: Tensor
    ) -> tuple[Coordination, list[float]]:
        """What was done, and the strength of every change."""
        scores = score(head.kind, rows)
        first, second = self.branches
        known = {first: scores.a, second: scores.b}
        ratio = scores.a / scores.b if scores.b > 0 else float("nan")
        reason = scores.undefined
        if reason is None:
            if head.weight.grad is None:
                reason = "the weight has no gradient"
            elif not bool(head.weight.grad.isfinite().all()):
                reason = "the gradient is NaN or infinite"
        if reason is not None:
            return Coordination(known, ratio, 0, 0, 0.0, reason), []
        weaker = "a" if scores.a < scores.b else "b" if scores.b < scores.a else None
        grad_a, grad_b = head.branches_of(head.weight.grad)
        found = resolve(grad_a, grad_b, mode=self.mode, weaker=weaker)
        changed = torch.cat([found.changed_a, found.changed_b])
        strengths = torch.cat([found.strength_a, found.strength_b])[changed].tolist()
        if strengths:
            grad_a.copy_(found.a)
            grad_b.copy_(found.b)
        conflicts = int(found.conflict.sum())
        modified = int((found.changed_a | found.changed_b).sum())
        mean = sum(strengths) / len(strengths) if strengths else 0.0
        return Coordination(known, ratio, conflicts, modified, mean, None), strengths


@dataclass
class _Totals:
    steps: int = 0
    skipped: int = 0
    conflicts: int = 0
    modified: int = 0
    changed: int = 0  # gradients: of a modified row one or both
    strength: float = 0.0  # summed over them

    def add(self, record: Coordination, strengths: list[float]) -> None:
        self.steps += 1
        self.skipped += record.skipped is not None
        self.conflicts += record.conflicts
        self.modified += record.modified
        self.changed += len(strengths)
        self.strength += sum(strengths)


def _branch_logits(head: CoordinatedHead, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[B, out] of either branch alone, in fp32 (fp64 of an fp64 weight)."""
    kind = torch.promote_types(head.weight.dtype, torch.float32)
    # autocast would round the product
    with torch.autocast(a.device.type, enabled=False):
        half = 0.0 if head.bias is None else head.bias.to(kind) / 2
        w_a, w_b = head.branches_of(head.weight.to(kind))
        return a.to(kind) @ w_a.T + half, b.to(kind) @ w_b.T + half


def _check_features(head: CoordinatedHead, a: Tensor, b: Tensor) -> int:
    (first, end), _ = head.columns
    for name, features in (("features_a", a), ("features_b", b)):
        shape = tuple(features.shape)
        if len(shape) != 2 or shape[1] != end - first or not features.is_floating_point():
            raise ValueError(
                f"{name} has shape {shape} and dtype {features.dtype}; it must be "
                f"[samples, {end - first}] of floats"
            )
    if a.shape != b.shape:
        raise ValueError(
            f"features_b has {b.shape[0]} samples and features_a {a.shape[0]}; they must agree"
        )
    return a.shape[0]


def _check_rows(name: str, value: Tensor | None, n: int, dtype: torch.dtype | None) -> None:
    if value is None:
        raise ValueError(f"{name} is None; this kind of task needs it")
    if tuple(value.shape) != (n,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({n},)")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; it must be {dtype}")


def _check_label(head: CoordinatedHead, label: Tensor | None, n: int) -> None:
    _check_rows("label", label, n, torch.int64)
    n_classes = head.weight.shape[0] + (head.kind == "ordinal")
    # reading values would make an accelerator wait; gather reports a bad label there itself
    if label.device.type == "cpu" and n and int(label.max()) >= n_classes:
        raise ValueError(
            f"label holds class {int(label.max())}; with {n_classes} classes the last is "
            f"{n_classes - 1}"
        )
