"""`survfuse demo`: train HEALNet on the simulated cohort, measure the kernel, save figures."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from survfuse.cli.show import Display, print_result

# of the bag of the kernel measurement; simulated slides have no fewer
FEWEST_PATCHES = 1024
# configs/demo.yaml says the same; a test keeps them equal
CONFIG: dict[str, Any] = {
    "title": "HEALNet",
    "data": {
        "source": "simulated",
        "simulation": {"variant": "short", "n_train": 6000, "n_inner": 1000, "n_test": 1000},
    },
    "protocol": "honest",
    "model": {
        "name": "healnet",
        "preset": "paper",
        "settings": {
            "depth": 1,
            "n_latents": 1,
            "latent_dim": 16,
            "cross_heads": 1,
            "cross_head_dim": 16,
            "attention_dropout": 0.5,
            "ff_dropout": 0.1,
            "modalities": {"slides": {"axes": 0}},
        },
    },
    "loss": {"name": "cox"},
    "optimizer": {"name": "adamw", "lr": 8e-3, "weight_decay": 0.5},
    "schedule": {"name": "cosine"},
    "training": {
        "epochs": 20,
        "batch_size": 128,
        "patience": None,
        "seeds": [1],
        "threads": 1,
    },
    "evaluation": {"baselines": ["only:genes", "only:slides", "mean_pool"]},
}


def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")] = Path("demo"),
    patches: Annotated[
        int, typer.Option(help="Patches of the long bag of the kernel measurement.")
    ] = 99_856,
    small: Annotated[
        bool, typer.Option("--small", help="A tenth of the patients and patches: one minute.")
    ] = False,
) -> None:
    """Everything once, on a simulated cohort: no data, no GPU, under five minutes on two cores.

    \b
        survfuse demo --out demo

    Trains HEALNet on 6000 simulated patients whose best possible risk is known, beside each single
    modality and a plain network on the same patients; prints C-indices with intervals and what
    share of the possible they reach; measures attention over one long bag against plain torch; and
    saves Kaplan-Meier and concordance figures.
    """
    from survfuse.training.config_files import parse_config
    from survfuse.training.run import fit
    from survfuse.training.run_folder import RunFolder

    began = time.monotonic()
    fewest = FEWEST_PATCHES * (10 if small else 1)
    if patches < fewest:
        raise ValueError(f"--patches is {patches}; it must be at least {fewest}")
    config = parse_config(demo_config(small=small))
    try:
        with Display() as display:
            # called again, it goes on where it stopped
            result = fit(config, out, resume=RunFolder(out).exists, progress=display)
        print_result(result)
        print_kernels(patches // 10 if small else patches)
    except KeyboardInterrupt:
        said = "the same command goes on from here"
        if not RunFolder(out).exists:
            said = "nothing was trained yet"
        print(f"\nstopped; {said}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"figures are in {out / 'figures'}; {time.monotonic() - began:.0f} s in all")


def demo_config(*, small: bool = False) -> dict[str, Any]:
    """The configuration of the demo; `small` takes a tenth of the patients."""
    import copy

    config = copy.deepcopy(CONFIG)
    if small:
        sizes = config["data"]["simulation"]
        for name in ("n_train", "n_inner", "n_test"):
            sizes[name] //= 10
        config["protocol"] = {"name": "honest", "min_inner_events": 5}
    return config


def print_kernels(patches: int) -> None:
    """Measure attention to one long bag by this package and by plain torch, and print both."""
    measured = {}
    for kind in ("survfuse", "torch", "healnet"):
        measured[kind] = measure(kind, patches)
    ours, plain, healnet = (measured[kind] for kind in ("survfuse", "torch", "healnet"))
    error = largest_error(ours["outputs"], plain["outputs"])
    n = ours["patches"]
    print(
        f"\n6 queries attend to one bag of {n:,} x 1024 patches, fp32, forward and backward:\n"
        f"  survfuse                 {ours['seconds']:7.3f} s   "
        f"{ours['extra_bytes'] / 1e6:8.1f} MB beyond the bag\n"
        f"  torch (Linear + SDPA)    {plain['seconds']:7.3f} s   "
        f"{plain['extra_bytes'] / 1e6:8.1f} MB beyond the bag\n"
        f"  {plain['seconds'] / ours['seconds']:.1f} times as fast; output and gradients agree to "
        f"{error:.1e}\n"
        f"a training step of HEALNet's paper preset on that bag: {healnet['seconds']:.2f} s, "
        f"{healnet['extra_bytes'] / 1e6:.0f} MB beyond the bag of "
        f"{healnet['bag_bytes'] / 1e6:.0f} MB"
    )


def measure(kind: str, patches: int) -> dict[str, Any]:
    """Run `survfuse.cli.demo_kernel` in a process of its own.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        command = [sys.executable, "-m", "survfuse.cli.demo_kernel", kind, str(result)]
        command += ["--patches", str(patches), "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the measurement of {kind} attention failed: {last}")
        return torch.load(result, weights_only=True)


def largest_error(ours: list, plain: list) -> float:
    """The largest difference relative to the size of each result.

    Raises:
        RuntimeError: they disagree, so that no time of either may be shown.
    """
    error = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(ours, plain)
    )
    if not error < 1e-3:
        raise RuntimeError(
            f"survfuse and plain torch disagree by {error:.1e}; "
            "no speed is shown for a wrong result"
        )
    return error
