"""HEALNet's training step on one long bag, against the same module with K and V formed.

All contenders of a shape race in one run, fp32 and bf16 together, so that every ratio is of one
machine state. The baseline is the plain fp32 module.
"""

from __future__ import annotations

import pytest
import torch

from survfuse import Ragged
from survfuse.batch import BagBatch
from survfuse.models import HEALNet, HEALNetConfig

from .plain_healnet import PlainHEALNet

CORE = pytest.mark.core


def make_models(dim: int, device: str, dtype: torch.dtype):
    """Ours and the plain module, `paper` preset, with the same weights."""
    torch.manual_seed(0)
    config = HEALNetConfig.from_preset("paper", modalities={"slides": ("bag", dim)})
    ours, plain = HEALNet(config), PlainHEALNet(config)
    plain.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), plain.to(device, dtype)


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(
    "n_rows",
    [
        pytest.param(50, marks=pytest.mark.smoke, id="50"),
        pytest.param(5_000, id="5k"),
        pytest.param(20_000, id="20k"),
        pytest.param(100_000, marks=CORE, id="100k"),
    ],
)
def bench_healnet(measure, device: str, n_rows: int, mode: str) -> None:
    dim = 1024
    bag = torch.randn(n_rows, dim, device=device)
    ragged = Ragged.from_lengths([n_rows], device=device)
    present = torch.ones(1, dtype=torch.bool, device=device)
    ways, outputs = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = make_models(dim, device, dtype)
        inputs = {"slides": BagBatch(bag.to(dtype), ragged, present)}
        suffix = "" if dtype == torch.float32 else ", bf16"
        ways["survfuse" + suffix] = lambda m=ours, i=inputs: (m, m(i).logits["survival"])
        ways["plain torch" + suffix] = lambda m=plain, i=inputs: (m, m(i))

    def run(way) -> object:
        if mode == "forward":
            with torch.no_grad():
                return way()
        model, logits = way()
        return torch.autograd.grad(logits.float().sum(), list(model.parameters()))

    def check() -> None:
        with torch.no_grad():
            outputs.update({name: way()[1].float() for name, way in ways.items()})
        exact = outputs["plain torch"]
        for name, logits in outputs.items():
            error = (logits - exact).norm() / exact.norm()
            assert error < (5e-2 if "bf16" in name else 1e-4), f"{name}: {error:.2e}"

    measure(
        "HEALNet step",
        mode,
        f"paper, N={n_rows} D={dim}",
        torch.float32,
        {name: (lambda w=way: run(w)) for name, way in ways.items()},
        baseline="plain torch",
        gbytes=1e-9 * bag.nbytes * (1 if mode == "forward" else 2) * 2,
        gflop={},
        check=check,
    )
