"""`survfuse compare` and `survfuse ablate`: several models on one cohort, in one table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from survfuse.cli.evaluate import print_markdown
from survfuse.cli.show import Display
from survfuse.cli.train import interrupt_on_termination

if TYPE_CHECKING:
    from survfuse.training.config import TrainConfig

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the table.")]
Resume = Annotated[
    bool, typer.Option("--resume", "-r", help="Go on with what is in the folder, after any stop.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder with the data files (data.folder).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Replace one value: section.key=value, repeatable."),
]
AllPairs = Annotated[
    bool, typer.Option("--all-pairs", help="Compare every pair, not only with the first.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the table only.")]


def compare_command(
    config: Annotated[Path, typer.Argument(help="The YAML file of cohort, folds and training.")],
    out: Out,
    models: Annotated[
        str | None, typer.Option("--models", help="Models to train, separated by commas.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="One more, as name or name:preset; repeatable."),
    ] = None,
    configs: Annotated[
        list[Path] | None,
        typer.Option("--config", "-c", help="A further YAML file to run; repeatable."),
    ] = None,
    resume: Resume = False,
    all_pairs: AllPairs = False,
    data: Data = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train several models on the same patients, folds and seeds, and compare them.

    \b
    Three models; the first is what the others are compared with:
        survfuse compare study.yaml --models healnet,mcat,mean_pool --out runs/three

    \b
    The model of the file against its released preset and another file:
        survfuse compare study.yaml -m healnet -m healnet:released -c other.yaml -o runs/more

    \b
    Go on after any stop, with the same words:
        survfuse compare study.yaml --models healnet,mcat,mean_pool --out runs/three --resume

    \b
    Settings of their own for several models, a file for each:
        survfuse compare one.yaml -c two.yaml -c three.yaml --out runs/tuned

    The model that the file names keeps its settings; others take those of their preset, under the
    same loss, optimiser and schedule. Without --models and --model it is the file's own model that
    is compared with the further files. --set and --data count for every file. Each run lies in
    <out>/<name>; the table is compare.md, .json and .csv. Differences are tested for survival;
    class tasks are put side by side.
    """
    from survfuse.training.config_files import ConfigError, load_config
    from survfuse.training.run_comparison import model_configs

    first = load_config(config, overrides=overrides or (), data=data)
    entries = [part.strip() for part in (models or "").split(",") if part.strip()]
    entries += model or []
    runs = model_configs(first, entries) if entries else {_title(first, config): first}
    for path in configs or ():
        further = load_config(path, overrides=overrides or (), data=data)
        name = _title(further, path)
        if name in runs:
            raise ConfigError(f'two runs are named "{name}"; give {path} a title of its own')
        runs[name] = further
    _train(runs, out, resume=resume, all_pairs=all_pairs, quiet=quiet)


def ablate_command(
    config: Annotated[Path, typer.Argument(help="The YAML file of a model that has an ablation.")],
    out: Out,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Entries to train, separated by commas; by default all."),
    ] = None,
    resume: Resume = False,
    all_pairs: AllPairs = False,
    data: Data = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train every variant of a model's ablation on the same patients, and compare them.

    A model's configuration class names its variants (`ABLATION`): settings that replace those of
    the file. The first is what the others are compared with.

    \b
        survfuse ablate study.yaml --out runs/ablation
        survfuse ablate study.yaml --out runs/ablation --resume
    """
    from survfuse.training.config_files import load_config
    from survfuse.training.run_comparison import ablation_configs

    base = load_config(config, overrides=overrides or (), data=data)
    names = [part.strip() for part in (only or "").split(",") if part.strip()]
    runs = ablation_configs(base, names or None)
    _train(runs, out, resume=resume, all_pairs=all_pairs, quiet=quiet)


def _title(config: TrainConfig, path: Path) -> str:
    return config.title or path.stem


def _train(
    runs: Mapping[str, TrainConfig], out: Path, *, resume: bool, all_pairs: bool, quiet: bool
) -> None:
    from survfuse.evaluation.model_comparison import models_markdown
    from survfuse.training.run_comparison import compare_runs

    interrupt_on_termination()
    try:
        with Display(quiet=quiet) as display:
            found = compare_runs(runs, out, resume=resume, all_pairs=all_pairs, progress=display)
    except KeyboardInterrupt:
        said = f"what was trained is in {out}; the same command with --resume goes on"
        print(f"\nstopped; {said if out.exists() else 'nothing was trained yet'}", file=sys.stderr)
        raise typer.Exit(130) from None
    notes = () if found.comparison is not None else found.notes
    print_markdown(
        models_markdown(found.reports, found.comparison, found.class_reports, notes=notes)
    )
    print(f"everything is in {out}")
