"""What each process of the test of coordinated data parallel training runs; imported when spawned.

Two tasks, a diagnosis and a survival. On its own no process can compare two patients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from survfuse.training import CoordinatedHead, GradientCoordination, nll_loss

N, WIDTH = 6, 3
# rows of each rank in two micro-batches of one step, and one in a step of which a rank sees nothing
STEPS = {0: [[0, 1], [2]], 1: [[3], [4, 5]]}
LONE = [1, 3]


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH)
        self.tasks = nn.ModuleDict(
            {"diagnosis": nn.Linear(2 * WIDTH, 3), "survival": nn.Linear(2 * WIDTH, 4)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        a, b = self.a(x), self.b(x)
        joint = torch.cat([a, b], 1)
        return a.detach(), b.detach(), {task: head(joint) for task, head in self.tasks.items()}


def make() -> tuple[TwoBranches, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = TwoBranches()
    data = {
        "x": torch.randn(N, 4),
        "label": torch.tensor([0, 1, 2, 0, -1, 1]),
        "bin": torch.tensor([3, 0, 3, 1, 2, 3]),
        "time": torch.tensor([9.0, 1.0, 8.0, 4.0, 6.0, 9.0]),
        # rank 0 sees one event at its earliest time, rank 1 none
        "event": torch.tensor([False, True, False, False, False, False]),
    }
    return model, data


def observe(model: nn.Module, coordination: GradientCoordination, data: dict, rows: list) -> Tensor:
    """Forward of some rows, and their loss as a sum."""
    x, label, time_bin, time, event = (values[rows] for values in data.values())
    a, b, logits = model(x)
    coordination.observe("diagnosis", a, b, label=label)
    coordination.observe("survival", a, b, time=time, event=event)
    diagnosis = nn.functional.cross_entropy(
        logits["diagnosis"], label, ignore_index=-1, reduction="sum"
    )
    return diagnosis + nll_loss(logits["survival"], time_bin, event, reduction="sum")


def coordinated(model: TwoBranches, mode: str) -> GradientCoordination:
    heads = {
        "diagnosis": CoordinatedHead(
            "classes", model.tasks["diagnosis"].weight, model.tasks["diagnosis"].bias
        ),
        "survival": CoordinatedHead(
            "survival", model.tasks["survival"].weight, model.tasks["survival"].bias
        ),
    }
    return GradientCoordination(heads, branches=("a", "b"), mode=mode)


def one_step(mode: str, rank: int, n_ranks: int) -> dict[str, Any]:
    """Gradients and record of a step over all rows, then of one that rank 1 sees nothing of."""
    inner, data = make()
    coordination = coordinated(inner, mode)
    found: dict[str, Any] = {}
    for name in ("all", "lone"):
        if name == "all":
            batches = STEPS[rank] if n_ranks == 2 else [rows for r in STEPS.values() for rows in r]
        else:
            batches = [LONE] if rank == 0 else []
        inner.zero_grad()
        loss = sum((observe(inner, coordination, data, rows) for rows in batches), torch.zeros(()))
        if batches:
            loss.backward()
        for parameter in inner.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if n_ranks == 2:
                dist.all_reduce(parameter.grad)
        records = coordination.coordinate()
        found[name] = {
            "gradients": {k: p.grad.clone() for k, p in inner.named_parameters()},
            "records": {task: record._asdict() for task, record in records.items()},
        }
    # nobody saw anything
    found["none"] = {task: record.skipped for task, record in coordination.coordinate().items()}
    return found


def parallel_steps(mode: str, rank: int) -> dict[str, Tensor]:
    """Weights after three steps of DistributedDataParallel with coordination."""
    inner, data = make()
    model, coordination = DistributedDataParallel(inner), coordinated(inner, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        first, second = STEPS[rank]
        with model.no_sync():
            observe(model, coordination, data, first).backward()
        observe(model, coordination, data, second).backward()
        coordination.coordinate()
        optimizer.step()
    return inner.state_dict()


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    found = {
        mode: {"step": one_step(mode, rank, 2), "parallel": parallel_steps(mode, rank)}
        for mode in ("projection", "released")
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
