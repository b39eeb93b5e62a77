"""Run a configuration: folds, baselines, report. It may stop anywhere and be resumed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from survfuse.data.splits import Split
from survfuse.evaluation.class_predictions import ClassPredictions
from survfuse.evaluation.class_report import ClassReport
from survfuse.evaluation.comparison import Comparison
from survfuse.evaluation.predictions import Predictions
from survfuse.evaluation.report import Report, evaluate
from survfuse.evaluation.report_files import write_report
from survfuse.training.baselines import baseline_configs, unimodal_by_patient
from survfuse.training.config import UNIMODAL, TrainConfig
from survfuse.training.config_files import (
    ConfigError,
    absolute_paths,
    dump_config,
    load_config,
)
from survfuse.training.device import bags_to_device, pick_device
from survfuse.training.folds import FoldPlan, plan_folds
from survfuse.training.identity import fingerprint, fingerprint_folds
from survfuse.training.missing import check_designs, score_missing
from survfuse.training.model import NEURAL, check_modality_names, check_model
from survfuse.training.predictions import gather_predictions
from survfuse.training.report import oracle_concordance, write_class_reports, write_reports
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
from survfuse.training.sources import LoadedCohort, load_cohort, shape_cohort
from survfuse.training.tasks import check_known, with_targets

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort
    from survfuse.data.prepared import PreparedCohort


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where everything lies.
        config: as it was run.
        predictions: of every seed and fold, for test and training rows; None for a run without a
            survival task.
        metrics: one record per seed, fold and epoch.
        report: metrics with intervals; of the first class task for a run without survival.
        comparison: the run's survival against each of its baselines'; None without any.
        oracles: simulated cohorts: C of the best possible risks on the test rows.
        baselines: the finished run of every baseline by name.
        class_predictions, class_reports: of every class task by name.
    """

    folder: Path
    config: TrainConfig
    predictions: Predictions | None
    metrics: list[dict[str, Any]]
    report: Report | ClassReport
    comparison: Comparison | None
    oracles: dict[str, float] | None
    baselines: dict[str, RunResult]
    class_predictions: dict[str, ClassPredictions] = field(default_factory=dict)
    class_reports: dict[str, ClassReport] = field(default_factory=dict)


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
        TypeError: `config` or `cohort` is something else.
        ConfigError, ValueError, FileNotFoundError: the configuration or data cannot be used.
        RunFolderError: `out` holds a run already (without `resume`), none (with it), or another
            process is training in it.
        TrainingError: the loss became NaN or infinite.
        KeyboardInterrupt: passed on; what was saved stays, and `resume` goes on from there.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(
            f"config is {config!r}; it must be a TrainConfig: load_config(path) reads one from a "
            "file, parse_config(values) makes one of a dictionary"
        )
    folder = RunFolder(out)
    config = absolute_paths(config, Path.cwd())
    check_folder(config, folder, resume=resume)
    if cohort is not None:
        loaded = _given_cohort(config, cohort, split)
    elif resume and read_json(folder.environment)["cohort"].get("given"):
        raise RunFolderError(
            f"{folder.path} was trained on a cohort given from Python and needs it again: "
            f"survfuse.training.resume({str(folder.path)!r}, cohort=...), with split=... if it was "
            "given one"
        )
    else:
        loaded = load_cohort(config)
    return run_loaded(config, folder, loaded, progress)


def check_folder(config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
    """Raise unless a run of `config` can begin in a folder, or go on in it.

    Raises:
        RunFolderError: it holds a run already (without `resume`), none, or another (with it).
    """
    if resume and not folder.exists:
        raise RunFolderError(f"{folder.path} holds no run to resume (no {folder.config.name})")
    if not resume and folder.exists:
        raise RunFolderError(
            f"{folder.path} holds a run already; resume it or choose another folder"
        )
    if resume and (difference := _first_difference(config, load_config(folder.config))):
        raise RunFolderError(f"{folder.path} was begun with another configuration: {difference}")


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


class RunPlan(NamedTuple):
    """What a run does."""

    device: torch.device
    folds: list[FoldPlan]
    baselines: dict[str, TrainConfig]
    first: PreparedCohort  # for the first fold


def plan_run(config: TrainConfig, loaded: LoadedCohort) -> RunPlan:
    """Plan a run, and refuse whatever must neither wait for the end of the training nor leave a
    folder behind.

    Raises:
        ConfigError, ValueError, FileNotFoundError: the configuration does not fit the data or this
            machine.
    """
    device = pick_device(config.training.device)
    folds = plan_folds(config, loaded.cohort, loaded.split)
    check_known(config, loaded.cohort, [plan.split for plan in folds])
    _check_restarts(config, folds)
    baselines = baseline_configs(config, list(loaded.cohort.modalities))
    check_designs(config, loaded.cohort, folds)
    if not config.data.modalities:
        # of a choice of modalities the others may keep their settings
        check_modality_names(config, loaded.cohort.modalities)
    first = prepare(config, loaded.cohort, folds[0].split)
    check_model(config, first)
    for name, baseline in baselines.items():
        given = first
        if name.startswith("only:"):
            reduced = loaded.cohort.only(baseline.data.modalities)
            given = prepare(baseline, reduced, folds[0].split)
        try:
            check_model(baseline, given)
        except ConfigError as error:
            hint = ""
            if name.startswith("only:") and baseline.model.name == config.model.name:
                hint = "; evaluation.single_models names another model for a modality alone"
            raise ConfigError(f'baseline "{name}": {error}{hint}') from None
    return RunPlan(device, folds, baselines, first)


def _check_restarts(config: TrainConfig, folds: list[FoldPlan]) -> None:
    bare = [plan.fold for plan in folds if not len(plan.split.validation)]
    if config.training.restarts > 1 and bare:
        raise ConfigError(
            f"training.restarts is {config.training.restarts}, but fold {bare[0]} has no "
            "validation rows (too few events, see protocol.min_inner_events), and nothing else "
            "tells which restart to keep: it must be 1"
        )


def _given_cohort(config: TrainConfig, cohort: Cohort, split: Split | None) -> LoadedCohort:
    from survfuse.data.cohort import Cohort

    if not isinstance(cohort, Cohort):
        raise TypeError(f"cohort is {cohort!r}; it must be a survfuse.data.Cohort")
    if split is None and config.protocol.split == "given":
        raise ConfigError(
            'protocol.split is "given": pass split= beside cohort=, or set protocol.split to '
            '"patients", "sites", "rows" or "published"'
        )
    if np.isnan(cohort.time).any():
        raise ValueError(
            f"cohort {cohort.name!r} holds rows without outcome; it can be scored, not trained on"
        )
    shaped = with_targets(config, shape_cohort(config.data, cohort))
    return LoadedCohort(shaped, split, None, given=True)


def run_loaded(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedCohort,
    progress: Progress | None = None,
    *,
    threads: int | None = None,
) -> RunResult:
    """Begin a run on a cohort that was read, or go on with it; `check_folder` said which.

    Args:
        config, folder, progress: as in `fit`, paths absolute.
        loaded: its cohort.
        threads: CPU threads; None takes the configuration's.
    """
    plan = plan_run(config, loaded)
    with folder.lock():
        folder.remove_leftovers()
        return _locked_run(config, folder, loaded, plan, progress or _silent, threads)


def _locked_run(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedCohort,
    plan: RunPlan,
    progress: Progress,
    threads: int | None,
) -> RunResult:
    device, plans = plan.device, plan.folds
    environment = _check_or_write_head(folder, config, loaded, plan, threads)
    cohort = loaded.cohort
    if config.model.name in NEURAL:
        cohort = bags_to_device(cohort, device)
    with _threads(environment["threads"]):
        run_folds(config, folder, cohort, plans, device, progress)
    predictions, class_predictions = gather_predictions(config, folder, loaded.cohort, plans)
    metrics = read_metrics(folder.metrics)
    if metrics:
        write_metrics_table(metrics, folder.metrics_table)
    baselines = _train_baselines(config, folder, loaded, plan, progress, environment["threads"])
    if config.evaluation.missing:
        trained = {name: result.predictions for name, result in baselines.items()}
        with _threads(environment["threads"]):
            score_missing(folder, config, cohort, plans, device, trained)
    class_reports = write_class_reports(folder, config, loaded.cohort, class_predictions)
    report, comparison, oracles = next(iter(class_reports.values()), None), None, None
    if predictions is not None:
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
        folder.path,
        config,
        predictions,
        metrics,
        report,
        comparison,
        oracles,
        baselines,
        class_predictions,
        class_reports,
    )


def _train_baselines(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedCohort,
    plan: RunPlan,
    progress: Progress,
    threads: int,
) -> dict[str, RunResult]:
    """Every baseline by name, each finished in its folder below the run."""
    baselines = {}
    for name, baseline in plan.baselines.items():
        progress({"kind": "baseline", "name": name})
        reduced = loaded
        if name.startswith("only:"):
            reduced = loaded._replace(cohort=loaded.cohort.only(baseline.data.modalities))
        # with the threads of the run, wherever it is resumed
        baselines[name] = run_loaded(
            baseline, folder.baseline(name), reduced, progress, threads=threads
        )
    if UNIMODAL in config.evaluation.baselines:
        baselines[UNIMODAL] = _unimodal(config, folder, loaded.cohort, baselines)
    return baselines


def _unimodal(
    config: TrainConfig, folder: RunFolder, cohort: Cohort, baselines: dict[str, RunResult]
) -> RunResult:
    """The baseline that is made of those of single modalities; nothing of it is trained."""
    singles = {name: baselines[f"only:{name}"].predictions for name in cohort.modalities}
    predictions = unimodal_by_patient(singles, cohort)
    settings = config.evaluation
    report = evaluate(
        predictions, resamples=settings.bootstrap, level=settings.level, seed=settings.seed
    )
    path = folder.baseline(UNIMODAL).path
    path.mkdir(parents=True, exist_ok=True)
    predictions.save(path)
    write_report(report, path)
    config = dataclasses.replace(config, title=UNIMODAL)
    return RunResult(path, config, predictions, [], report, None, None, {})


def _check_or_write_head(
    folder: RunFolder,
    config: TrainConfig,
    loaded: LoadedCohort,
    plan: RunPlan,
    threads: int | None,
) -> dict[str, Any]:
    """Write what identifies the run, or make sure that it is still the same run."""
    found, folds = fingerprint(loaded.cohort), fingerprint_folds(plan.folds)
    if folder.exists:
        environment = read_json(folder.environment)
        for what, before, now in (
            ("data", environment["cohort"]["fingerprint"], found),
            ("folds", environment["cohort"]["folds"], folds),
        ):
            if before != now:
                raise RunFolderError(
                    f"the {what} of the run in {folder.path} changed since it began; train into a "
                    "new folder"
                )
        if environment["device"] != str(plan.device):
            raise RunFolderError(
                f"the run in {folder.path} began on {environment['device']} and would go on on "
                f"{plan.device}; set training.device in {folder.config.name}, or train into a new "
                "folder"
            )
        return environment
    threads = threads or config.training.threads
    environment = describe_environment(str(plan.device), threads=threads)
    environment["cohort"] = {
        **loaded.cohort.summary(),
        "fingerprint": found,
        "folds": folds,
        "given": loaded.given,
    }
    write_json(folder.environment, environment)
    # last: a folder with a configuration is a run
    comment = "the cohort was given from Python; no data.source was read" if loaded.given else None
    dump_config(config, folder.config, comment=comment)
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
    path, values, before = [], new.to_dict(), old.to_dict()
    if values == before:
        return ""
    while isinstance(values, dict) and isinstance(before, dict):
        # of two settings dictionaries one may lack a key that is None in the other
        every = {**values, **before}
        key = next(key for key in every if values.get(key, ...) != before.get(key, ...))
        path.append(key)
        values, before = values.get(key), before.get(key)
    return f"{'.'.join(path)} is {values!r}, it was {before!r}"


def _silent(event: dict[str, Any]) -> None:
    """Progress for nobody."""
