"""One linear readout per task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class TaskHeads(nn.Module):
    """`W_task norm(x) + b_task` for every task: {task: [B, out]} of [B, dim].

    What the numbers of a task mean is its loss's business: hazard logits of time bins, one Cox
    log-risk, class logits, or continuation logits of ordered levels.

    Args:
        dim: width of the input.
        outputs: number of logits by task.
        norm: normalise the input first (LayerNorm).
    """

    def __init__(self, dim: int, outputs: Mapping[str, int], *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else None
        self.tasks = nn.ModuleDict({task: nn.Linear(dim, out) for task, out in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [B, out] by task."""
        if self.norm is not None:
            x = self.norm(x)
        return {task: head(x) for task, head in self.tasks.items()}
