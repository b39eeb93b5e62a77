"""`survfuse train`: a configuration file into a run folder."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from survfuse.cli.show import Display, print_plan, print_result


def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file that says what to run.")
    ] = None,
    config_option: Annotated[
        Path | None, typer.Option("--config", "-c", help="The same file, named as an option.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; by default runs/<file name>.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", "-r", help="Go on with the run in this folder, after any stop."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with the data files (data.folder).")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Replace one value: section.key=value, repeatable."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read configuration and data, say what would run, stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")] = False,
) -> None:
    """Train and test a model on every fold and seed, with its baselines, and write a report.

    \b
    Train on the simulated cohort:
        survfuse train configs/demo.yaml --out runs/demo

    \b
    The same with another value, without touching the file:
        survfuse train configs/demo.yaml -o runs/nll -s loss.name=nll

    \b
    Look before a long run: cohort, folds, events, what the protocol leaks:
        survfuse train configs/tcga_kirp_honest.yaml --data /data/public --check

    \b
    Go on after Ctrl-C, a crash or a lost node; the result is the same to the last bit on a CPU:
        survfuse train --resume runs/demo

    Every setting is described in docs/training.md. The run folder holds the resolved
    configuration, metrics.jsonl and .csv, predictions.csv, report.md and figures.
    """
    from survfuse.training.config_files import ConfigError, load_config
    from survfuse.training.run import fit
    from survfuse.training.run import resume as resume_run
    from survfuse.training.run_folder import RunFolder

    interrupt_on_termination()
    if config is not None and config_option is not None:
        raise ConfigError(f"{config} and --config {config_option} are both given; give one")
    config = config or config_option
    folder = resume
    if resume is not None:
        if config is not None or overrides or data is not None or out is not None or check:
            raise ConfigError("--resume takes everything from the run folder; give nothing else")
        run = None
    elif config is None:
        raise ConfigError("name a configuration file, or a run folder with --resume")
    else:
        run = load_config(config, overrides=overrides or (), data=data)
        folder = out or Path("runs") / config.stem
    if check:
        print_plan(run)
        return
    try:
        with Display(quiet=quiet) as display:
            if run is None:
                result = resume_run(folder, progress=display)
            else:
                result = fit(run, folder, progress=display)
    except KeyboardInterrupt:
        if RunFolder(folder).exists:
            said = (
                f"what was trained is in {folder}. Go on with:\n  survfuse train --resume {folder}"
            )
        else:
            said = "nothing was trained yet"
        print(f"\nstopped; {said}", file=sys.stderr)
        raise typer.Exit(130) from None
    print_result(result)


def interrupt_on_termination() -> None:
    """Let a job scheduler's SIGTERM end a run as cleanly as Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
