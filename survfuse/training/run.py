"""Run a configuration: folds, baselines, report. It may stop anywhere and be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from survfuse.data.splits import Split
from survfuse.evaluation.comparison import Comparison
from survfuse.evaluation.predictions import Predictions
from survfuse.evaluation.report import Report
from survfuse.training.config import ModelConfig, TrainConfig
from survfuse.training.config_files import ConfigError, dump_config, load_config
from survfuse.training.device import bags_to_device, pick_device
from survfuse.training.folds import FoldPlan, plan_folds
from survfuse.training.model import NEURAL, check_model
from survfuse.training.predictions import make_predictions
from survfuse.training.report import oracle_concordance, write_reports
from survfuse.training.run_folder import (
    RunFolder,
    RunFolderError,
    describe_environment,
    read_json,
    read_metrics,
    write_json,
    write_metrics_table,
)
from survfuse.training.run_folds import Progress, prepare, run_folds
from survfuse.training.sources import LoadedCohort, load_cohort

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where everything lies.
        config: as it was run.
        predictions: of every seed and fold, for test and training rows.
        metrics: one record per seed, fold and epoch.
        report: metrics with intervals.
        comparison: the run against each of its baselines; None without any.
        oracles: simulated cohorts: C of the best possible risks on the test rows.
        baselines: the finished run of every baseline by name.
    """

    folder: Path
    config: TrainConfig
    predictions: Predictions
    metrics: list[dict[str, Any]]
    report: Report
    comparison: Comparison | None
    oracles: dict[str, float] | None
    baselines: dict[str, RunResult]


def fit(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    cohort: Cohort | None = None,
    split: Split | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train and test a model as a configuration says.

    Args:
        config: what to run.
        out: the run folder; made if it does not exist.
        resume: go on with the run in `out`. Finished folds are kept, the fold that was under way
            goes on from its last checkpoint, and the result on a CPU is bit-identical to that of a
            run nobody stopped.
        cohort: trained on instead of what `config.data` names.
        split: the split of `cohort` for `protocol.split` "given".
        progress: called with a dictionary for every event: "kind" is "fold" (a model begins),
            "epoch" (with its metrics) or "baseline".

    Raises:
        ConfigError, ValueError, FileNotFoundError: the configuration or data cannot be used.
        RunFolderError: `out` holds a run already (without `resume`), none (with it), or another
            process is training in it.
        TrainingError: the loss became NaN or infinite.
        KeyboardInterrupt: passed on; what was saved stays, and `resume` goes on from there.
    """
    folder = RunFolder(out)
    if resume and not folder.exists:
        raise RunFolderError(f"{folder.path} holds no run to resume (no {folder.config.name})")
    if not resume and folder.exists:
        raise RunFolderError(
            f"{folder.path} holds a run already; resume it or choose another folder"
        )
    if resume and (difference := _first_difference(config, load_config(folder.config))):
        raise RunFolderError(f"{folder.path} was begun with another configuration: {difference}")
    if cohort is None:
        loaded = load_cohort(config)
    else:
        chosen = cohort.only(config.data.modalities) if config.data.modalities else cohort
        loaded = LoadedCohort(chosen, split, None)
    return _run(config, folder, loaded, progress or _silent)


def resume(
    folder: str | os.PathLike[str],
    *,
    cohort: Cohort | None = None,
    split: Split | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Go on with the run in `folder`, with the configuration it was started with.

    Args:
        folder: the run folder.
        cohort, split, progress: as in `fit`; a run on a cohort of one's own needs it again.

    Raises:
        RunFolderError: there is no run in it, or its data changed since.
    """
    run = RunFolder(folder)
    if not run.exists:
        raise RunFolderError(f"{run.path} holds no run to resume (no {run.config.name})")
    config = load_config(run.config)
    return fit(config, folder, resume=True, cohort=cohort, split=split, progress=progress)


def baseline_config(config: TrainConfig, name: str, modalities: list[str]) -> TrainConfig:
    """The configuration of a baseline: the same data, protocol and seeds, another model.

    Args:
        config: the run it is compared with.
        name: one of `survfuse.training.config.BASELINES`, or "only:<modality>".
        modalities: those the cohort has.

    Raises:
        ConfigError: "only:<modality>" names another.
    """
    model, data = ModelConfig(name=name), config.data
    if name.startswith("only:"):
        modality = name.partition(":")[2]
        if modality not in modalities:
            raise ConfigError(
                f'evaluation.baselines holds "{name}"; the modalities are {", ".join(modalities)}'
            )
        model, data = config.model, dataclasses.replace(data, modalities=(modality,))
    return dataclasses.replace(
        config,
        data=data,
        model=model,
        evaluation=dataclasses.replace(config.evaluation, baselines=(), figures=False),
        title=name,
    )


def fingerprint(cohort: Cohort) -> str:
    """A hash of who is in a cohort, their outcomes, and what is known of them.

    Of bags only the lengths are hashed: reading every patch of a large store would take minutes.
    """
    digest = hashlib.sha256()
    for ids in (cohort.unit_ids, cohort.patient_ids):
        digest.update("\n".join(ids).encode())
    arrays = [cohort.time, cohort.event]
    for name, source in cohort.modalities.items():
        digest.update(f"{name} {source.kind} {source.channels}".encode())
        arrays.append(source.present)
        for attribute in ("values", "n_patches"):
            values = getattr(source, attribute, None)
            if isinstance(values, torch.Tensor):
                values = values.numpy()
            if values is not None:
                arrays.append(values)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _run(
    config: TrainConfig, folder: RunFolder, loaded: LoadedCohort, progress: Progress
) -> RunResult:
    device = pick_device(config.training.device)
    plans = plan_folds(config, loaded.cohort, loaded.split)
    # a wrong name or setting must neither wait for the end of the training nor leave a folder
    inner = {
        name: baseline_config(config, name, list(loaded.cohort.modalities))
        for name in config.evaluation.baselines
    }
    check_model(config, prepare(config, loaded.cohort, plans[0].split))
    with folder.lock():
        folder.remove_leftovers()
        return _locked_run(config, folder, loaded, plans, inner, device, progress)


def _locked_run(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedCohort,
    plans: list[FoldPlan],
    inner: dict[str, TrainConfig],
    device: torch.device,
    progress: Progress,
) -> RunResult:
    environment = _check_or_write_head(folder, config, loaded.cohort, device)
    cohort = loaded.cohort
    if config.model.name in NEURAL:
        cohort = bags_to_device(cohort, device)
    with _threads(environment["threads"]):
        run_folds(config, folder, cohort, plans, device, progress)
    folds = [Predictions.load(folder.fold(plan.seed, plan.fold).path).folds[0] for plan in plans]
    predictions = make_predictions(config, folds)
    predictions.save(folder.path)
    metrics = read_metrics(folder.metrics)
    if metrics:
        write_metrics_table(metrics, folder.metrics_table)
    baselines = {}
    for name, baseline in inner.items():
        progress({"kind": "baseline", "name": name})
        reduced = loaded
        if name.startswith("only:"):
            reduced = loaded._replace(cohort=loaded.cohort.only(baseline.data.modalities))
        baselines[name] = _run(baseline, folder.baseline(name), reduced, progress)
    oracles = None
    if loaded.oracle is not None:
        oracles = oracle_concordance(loaded.cohort, plans, loaded.oracle)
    report, comparison = write_reports(
        folder,
        config,
        loaded.cohort,
        predictions,
        oracles=oracles,
        baselines={name: result.report for name, result in baselines.items()},
        baseline_predictions={name: result.predictions for name, result in baselines.items()},
    )
    return RunResult(
        folder.path, config, predictions, metrics, report, comparison, oracles, baselines
    )


def _check_or_write_head(
    folder: RunFolder, config: TrainConfig, cohort: Cohort, device: torch.device
) -> dict[str, Any]:
    """Write what identifies the run, or make sure that it is still the same run."""
    found = fingerprint(cohort)
    if folder.exists:
        environment = read_json(folder.environment)
        if environment["cohort"]["fingerprint"] != found:
            raise RunFolderError(
                f"the data of the run in {folder.path} changed since it began; train into a new "
                "folder"
            )
        return environment
    environment = describe_environment(str(device), threads=config.training.threads)
    environment["cohort"] = {**cohort.summary(), "fingerprint": found}
    write_json(folder.environment, environment)
    # last: a folder with a configuration is a run
    dump_config(config, folder.config)
    return environment


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with as many threads as the run began with: sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_difference(new: TrainConfig, old: TrainConfig) -> str:
    """The first setting in which two configurations differ, "" for none."""
    for section, values in new.to_dict().items():
        before = old.to_dict()[section]
        if values != before and isinstance(values, dict):
            key = next(key for key in values if values[key] != before[key])
            return f"{section}.{key} is {values[key]!r}, it was {before[key]!r}"
        if values != before:
            return f"{section} is {values!r}, it was {before!r}"
    return ""


def _silent(event: dict[str, Any]) -> None:
    """Progress for nobody."""
