"""Attention of six queries to one long bag, measured in a process of its own.

`python -m survfuse.cli.demo_kernel KIND RESULT --patches N --threads T` runs one kind of attention
and writes its times, its peak memory beyond the bag, and what it computed to RESULT. A process of
its own makes the peak honest: nothing that ran before counts.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

WIDTH, QUERIES, HEAD = 1024, 6, 256
KINDS = ("survfuse", "torch", "healnet")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("result")
    parser.add_argument("--patches", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    bag = long_bag(options.patches)
    make = {"survfuse": _survfuse, "torch": _torch, "healnet": _healnet}[options.kind]
    # what libraries load on their first call belongs to no bag
    make(bag[:64])()
    step = make(bag)
    reset_peak()
    before = peak_bytes()
    outputs = step()
    first_peak = peak_bytes()
    seconds = []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    torch.save(
        {
            "seconds": statistics.median(seconds),
            "extra_bytes": first_peak - before,
            "bag_bytes": bag.numel() * bag.element_size(),
            "patches": bag.shape[0],
            "outputs": outputs,
        },
        options.result,
    )
    return 0


def long_bag(patches: int) -> Tensor:
    """One slide of the long simulated variant, [N, 1024] fp32, the same in every process."""
    from survfuse.data.simulate import simulate_cohort

    simulation = simulate_cohort(
        variant="long",
        n_patients=(1, 0, 0),
        n_patches=(patches, patches),
        dtype=torch.float32,
        seed=0,
    )
    return simulation.cohort.modalities["slides"].bags[0]


def reset_peak() -> None:
    """Forget what making the bag took, where the system can: Linux, for a process's own peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory this process held since `reset_peak`, or ever where that does nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return usage if sys.platform == "darwin" else usage * 1024


def _parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    return {
        "query": draw(1, QUERIES, 1, HEAD, scale=1.0),
        "w_k": draw(1, HEAD, WIDTH, scale=WIDTH**-0.5),
        "w_v": draw(1, HEAD, WIDTH, scale=WIDTH**-0.5),
    }


def _survfuse(bag: Tensor) -> Callable[[], list[Tensor]]:
    from survfuse.ops import tokens_attend_bag

    parameters = _parameters()

    def forward() -> Tensor:
        return tokens_attend_bag(parameters["query"], bag, *_weights(parameters))

    return lambda: _step(forward, parameters)


def _torch(bag: Tensor) -> Callable[[], list[Tensor]]:
    parameters = _parameters()

    def forward() -> Tensor:
        w_k, w_v = _weights(parameters)
        key, value = (functional.linear(bag, weight[0])[None, None] for weight in (w_k, w_v))
        query = parameters["query"].transpose(1, 2)
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return lambda: _step(forward, parameters)


def _weights(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return parameters["w_k"], parameters["w_v"]


def _step(forward: Callable[[], Tensor], parameters: dict[str, Tensor]) -> list[Tensor]:
    """Forward and backward; the output and every gradient."""
    out = forward()
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator))
    found = [out.detach()]
    for tensor in parameters.values():
        found.append(tensor.grad)
        tensor.grad = None
    return found


def _healnet(bag: Tensor) -> Callable[[], list[Tensor]]:
    """A training step of HEALNet's paper preset on the bag."""
    from survfuse.batch import BagBatch
    from survfuse.models.healnet import HEALNet
    from survfuse.models.healnet_config import HEALNetConfig
    from survfuse.models.settings import ModalityConfig
    from survfuse.ragged import Ragged

    torch.manual_seed(0)
    modalities = {"slides": ModalityConfig("bag", WIDTH)}
    model = HEALNet(HEALNetConfig.from_preset("paper", modalities=modalities))
    batch = BagBatch(bag, Ragged.from_lengths([bag.shape[0]]), torch.ones(1, dtype=torch.bool))

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        logits = model({"slides": batch}).logits["survival"]
        logits.sum().backward()
        return [logits.detach()]

    return step


if __name__ == "__main__":
    sys.exit(main())
