"""A training step of every model on one long bag: ours, plain torch, and everything formed.

A step is forward, loss and backward of all parameters over a frozen bag, in training mode. All
ways of a model have the same weights; their logits, in evaluation mode, are compared before
anything is timed. bf16 is what the training loop does for it: a bag in 16 bits, parameters in 32,
the model under autocast.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from survfuse.batch import Modality

from .harness import MODEL_OP, peak_memory
from .model_cases import CASES, OURS, PLAIN, SLIDE, ModelCase, hazard_loss, logits_of
from .peers import free_memory
from .shapes import DTYPES

LENGTHS = {"2k": 2_000, "5k": 5_000, "20k": 20_000, "100k": 100_000}
DIM, SMOKE_DIM, SMOKE_PATCHES = 1024, 32, 60
# largest relative error of the logits
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
# a way is judged by what these parts of the bag take it, and tried if this share of the memory
# that is free, and so many seconds, would do
PARTS = (16, 8)
FEWEST_JUDGED = 4_000
MEMORY_SHARE = 0.7
MOST_SECONDS = {"cpu": 60.0, "cuda": 5.0}
Inputs = Mapping[str, Modality]


def races() -> Iterator[pytest.param]:
    """(case, patches, type, width) with their marks."""
    for case in CASES:
        yield pytest.param(
            case, SMOKE_PATCHES, "fp32", SMOKE_DIM, marks=pytest.mark.smoke, id=f"{case.name} tiny"
        )
        for kind in DTYPES:
            for label, n in LENGTHS.items():
                marks = [pytest.mark.core] if n in case.core.get(kind, ()) else []
                yield pytest.param(
                    case, n, kind, DIM, marks=marks, id=f"{case.name} {label} {kind}"
                )


@pytest.mark.parametrize(("case", "n_patches", "kind", "dim"), list(races()))
def bench_models(
    measure, device: str, case: ModelCase, n_patches: int, kind: str, dim: int
) -> None:
    models = case.models(dim, device, tiny=n_patches == SMOKE_PATCHES)
    left_out = {}
    for name in [name for name in models if name != OURS]:
        if kind == "bf16" and name != PLAIN:
            # what forms the weights is there for its memory, which fp32 shows
            del models[name]
            continue
        reason = missing(name) or obstacle(name, models[name], case, n_patches, kind, dim, device)
        if reason is not None:
            left_out[name] = (True, reason)
            del models[name]
    inputs = stored(case.inputs(n_patches, dim, device), kind)
    measure(
        MODEL_OP + case.name,
        "both",
        f"{case.preset}, N={n_patches} D={dim}",
        DTYPES[kind],
        {name: (lambda m=model: step(m, inputs, kind)) for name, model in models.items()},
        baseline=PLAIN,
        # read forward, and once more for the gradient of what it is multiplied with
        gbytes=2e-9 * inputs[SLIDE].features.nbytes,
        gflop={},
        check=lambda: check(case, models, inputs, kind, dim, device),
        left_out=left_out,
    )


def stored(inputs: Inputs, kind: str) -> Inputs:
    """The inputs with the bag in its type."""
    bag = inputs[SLIDE]
    return {**inputs, SLIDE: bag._replace(features=bag.features.to(DTYPES[kind]))}


def forward(model: nn.Module, inputs: Inputs, kind: str) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary losses, as the training loop has them."""
    device = inputs[SLIDE].features.device.type
    with torch.autocast(device, torch.bfloat16, enabled=kind == "bf16"):
        return logits_of(model, inputs)


def step(model: nn.Module, inputs: Inputs, kind: str) -> tuple[Tensor | None, ...]:
    """The gradients of all parameters."""
    logits, auxiliary = forward(model, inputs, kind)
    loss = hazard_loss(logits) + auxiliary.float()
    # a twin may have parameters for what is absent, which have no part in a complete sample
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def check(
    case: ModelCase,
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    kind: str,
    dim: int,
    device: str,
) -> None:
    """Raise unless all ways give the logits of the plain module in fp32, or of ours without it."""
    if case.same_up_to is not None and inputs[SLIDE].ragged.total > case.same_up_to:
        inputs = stored(case.inputs(case.same_up_to, dim, device), kind)
    exact = evaluated(models.get(PLAIN, models[OURS]), stored(inputs, "fp32"), "fp32")
    for name, model in models.items():
        error = float((evaluated(model, inputs, kind) - exact).norm() / exact.norm())
        assert error < TOLERANCE[kind], f"{case.name}, {name}: relative error {error:.1e}"


@torch.no_grad()
def evaluated(model: nn.Module, inputs: Inputs, kind: str) -> Tensor:
    """The logits in evaluation mode."""
    model.eval()
    logits = forward(model, inputs, kind)[0].float()
    model.train()
    return logits


def missing(name: str) -> str | None:
    """Why a way cannot be had at all."""
    if name.endswith("POT") and importlib.util.find_spec("ot") is None:
        return "POT is not installed"
    return None


def obstacle(
    name: str,
    model: nn.Module,
    case: ModelCase,
    n_patches: int,
    kind: str,
    dim: int,
    device: str,
) -> str | None:
    """Why a way is not tried on so many patches: what parts of them took says what all will."""
    if n_patches < FEWEST_JUDGED:
        return None
    took: list[float] = []
    for part in PARTS:
        inputs = stored(case.inputs(n_patches // part, dim, device), kind)
        # the first call warms up; the quicker one is nearer to what a step takes
        calls = [measured_once(model, inputs, kind, device) for _ in range(2)]
        took.append(min(seconds for _, seconds in calls))
    needed, seconds = calls[-1][0], took[-1]
    if not case.fixed_size:
        needed *= PARTS[-1] ** (2 if name in case.all_pairs else 1)
        seconds = extrapolated(*took)
    if needed > MEMORY_SHARE * free_memory(device):
        return f"would need about {needed / 1e9:.0f} GB"
    if seconds > MOST_SECONDS[device]:
        return f"a step would take about {seconds / 60:.0f} minutes"
    return None


def measured_once(model: nn.Module, inputs: Inputs, kind: str, device: str) -> tuple[float, float]:
    """Bytes at the highest point of a step, and its seconds."""
    begin = time.perf_counter()
    peak = peak_memory(lambda: step(model, inputs, kind), device)
    return peak, time.perf_counter() - begin


def extrapolated(first: float, second: float) -> float:
    """Seconds of the whole if PARTS took so many: they grow on as they did, linearly at least."""
    doubling = PARTS[0] / PARTS[1]
    growth = min(max(second / max(first, 1e-9), doubling), doubling**2)
    return second * growth ** math.log(PARTS[1], doubling)
