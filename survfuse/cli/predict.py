"""`survfuse predict`: a trained run on patients it has never seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.training.config import TrainConfig
    from survfuse.training.external import ExternalScores


def predict_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of a neural model.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The table to write, e.g. predictions.csv.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A YAML file whose data section names the patients."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder with the data files; alone: as the run reads its own."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Replace one value of it: data.cohort=blca, repeatable."),
    ] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of an interval.")] = 2000,
    level: Annotated[float, typer.Option(help="Coverage of an interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score new patients with every model of a run, its preprocessing frozen: external validation.

    \b
    Patients of another file:
        survfuse predict runs/kirp --config external.yaml --out predictions.csv

    \b
    Laid out as the run's own data, in another folder:
        survfuse predict runs/kirp --data /data/hospital --set data.cohort=ours -o predictions.csv

    Writes one row per model and patient, and beside it <name>_patients.csv with the mean risk of
    every patient over the models. Patients without outcome are scored like the others. Where
    outcomes are known, C of every model and of the mean is printed with its interval. Class tasks
    give the probability of every class; classes of the new patients are not read. Tables are
    matched by column name; a modality the new patients lack is absent, and gene groups are those
    the models were trained with.
    """
    from survfuse.data.atomic import atomic_path, check_target
    from survfuse.training.external import external_scores, trained_on
    from survfuse.training.predictions import predict
    from survfuse.training.sources import load_cohort

    check_target(out)
    cohort = load_cohort(_config(run, config, data, overrides or []), external=True).cohort
    frame = predict(run, cohort, device=device)
    scores = external_scores(frame, resamples=resamples, level=level, seed=seed)
    means = out.with_name(f"{out.stem}_patients.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, table in ((out, frame), (means, scores.patients)):
        with atomic_path(path) as temporary:
            table.to_csv(temporary, index=False)
    known = trained_on(run, set(cohort.patient_ids))
    if known:
        print(
            f"warning: {len(known)} patients bear names of patients the run learned from, such as "
            f"{min(known)}; if they are the same, this is no external validation",
            file=sys.stderr,
        )
    _print(run, cohort, scores)
    print(f"{out}: {len(frame)} rows; {means}: {len(scores.patients)} patients")


def _config(run: Path, config: Path | None, data: Path | None, overrides: list[str]) -> TrainConfig:
    """What names the patients."""
    from survfuse.training.config_files import ConfigError, load_config
    from survfuse.training.run_folder import RunFolder, RunFolderError

    folder = RunFolder(run)
    if not folder.exists:
        raise RunFolderError(f"{run} holds no run")
    if config is None and data is None and not overrides:
        raise ConfigError("name new patients with --config, --data or --set data.cohort=...")
    return load_config(config or folder.config, overrides=overrides, data=data)


def _print(run: Path, cohort: Cohort, scores: ExternalScores) -> None:
    from survfuse.evaluation.report_files import interval_text
    from survfuse.training.run_folder import RunFolder, read_json

    n = len(scores.patients)
    print(f"{cohort.name}: {n} patients, {scores.n_known} with a known outcome")
    for name in read_json(RunFolder(run).environment)["cohort"]["modalities"]:
        there = int(cohort.present(name).sum()) if name in cohort.modalities else 0
        print(f"  {name}: present in {there} of {len(cohort)} rows")
    for name, interval in scores.concordance.items():
        print(f"{name}: C {interval_text(interval)}")
    if "risk" not in scores.patients:
        print("no C: the models predict classes only")
    elif not scores.concordance:
        print("no C: no patient outlived one with the event")
