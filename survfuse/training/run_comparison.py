"""Several models on one cohort, with the same folds and seeds, in one table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from survfuse.data.names import unknown_name
from survfuse.evaluation.class_report import ClassReport
from survfuse.evaluation.comparison import Comparison, compare
from survfuse.evaluation.model_comparison import write_model_comparison
from survfuse.evaluation.report import Report
from survfuse.training.baselines import other_model
from survfuse.training.config import BASELINES, UNIMODAL, ModelConfig, TrainConfig
from survfuse.training.config_files import ConfigError, absolute_paths
from survfuse.training.folds import FoldPlan
from survfuse.training.run import RunResult, check_folder, plan_run, run_loaded
from survfuse.training.run_folder import RunFolder
from survfuse.training.run_folds import Progress
from survfuse.training.sources import LoadedCohort, load_cohort
from survfuse.training.tasks import class_tasks, survival_task

DIFFER = "a comparison needs the same patients in the same order, with the same outcomes"


class ComparedRuns(NamedTuple):
    """Finished runs of one cohort."""

    folder: Path
    runs: dict[str, RunResult]  # by name, in the order given
    comparison: Comparison | None  # of survival; None for runs that do not predict it

    @property
    def reports(self) -> list[Report]:
        """Survival of every run, in order; empty for runs that do not predict it."""
        return [run.report for run in self.runs.values() if run.predictions is not None]

    @property
    def class_reports(self) -> dict[str, list[ClassReport]]:
        """By class task, of every run that has it."""
        found: dict[str, list[ClassReport]] = {}
        for run in self.runs.values():
            for task, report in run.class_reports.items():
                found.setdefault(task, []).append(report)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reports say of the data; with the runs that say it, where not all do."""
        said: dict[str, list[str]] = {}
        for name, run in self.runs.items():
            for note in run.report.notes:
                said.setdefault(note, []).append(name)
        everyone = len(self.runs)
        shared = [note for note, names in said.items() if len(names) == everyone]
        own = [(note, names) for note, names in said.items() if len(names) < everyone]
        return (*shared, *(f"{'; '.join(names)}: {note}" for note, names in own))


def compare_runs(
    configs: Mapping[str, TrainConfig],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    all_pairs: bool = False,
    progress: Progress | None = None,
) -> ComparedRuns:
    """Train every configuration on one cohort and compare them, paired by patient and fold.

    Each run lies in `out/<name>`, without baselines of its own; `compare.md`, `.json` and `.csv`
    hold C with intervals and the differences, whose p-values are Holm-adjusted, and the metrics of
    class tasks with intervals, which are not compared in pairs.

    Args:
        configs: at least two, by the name they have in the table; the first is what the others are
            compared with. They may differ in anything but who is tested in which fold. The first
            one's `evaluation` sets resamples, level and their seed.
        out: folder of the runs.
        resume: go on with what is in `out`; runs that are not there yet are begun.
        all_pairs: compare every pair.
        progress: as in `fit`.

    Raises:
        ConfigError: fewer than two, two of one folder, only some predict survival, or they do not
            test the same patients in the same folds and seeds; says which and where.
        RunFolderError: `out` holds one of the runs already (without `resume`).
    """
    if len(configs) < 2:
        raise ConfigError(f"configs holds {len(configs)} run(s); a comparison needs at least two")
    prepared = _entitled(configs)
    _check_survival(prepared)
    folder = Path(out)
    for name, config in prepared.items():
        run = RunFolder(folder / _folder_name(name))
        check_folder(config, run, resume=resume and run.exists)
    loaded = _same_cohorts(prepared)
    runs = {}
    for name, config in prepared.items():
        runs[name] = run_loaded(
            config, RunFolder(folder / _folder_name(name)), loaded[name], progress
        )
    found = ComparedRuns(folder, runs, None)
    notes, settings = found.notes, next(iter(prepared.values())).evaluation
    if found.reports:
        comparison = compare(
            [run.predictions for run in runs.values()],
            against_first=not all_pairs,
            resamples=settings.bootstrap,
            level=settings.level,
            seed=settings.seed,
        )
        # what every report says of the data is said of the comparison too
        every = tuple(dict.fromkeys([*comparison.notes, *notes]))
        found = found._replace(comparison=dataclasses.replace(comparison, notes=every))
        notes = ()
    write_model_comparison(
        folder, found.reports, found.comparison, found.class_reports, notes=notes
    )
    return found


def model_configs(config: TrainConfig, models: list[str]) -> dict[str, TrainConfig]:
    """A configuration for each model, "<name>" or "<name>:<preset>".

    The model that `config` itself names, without a preset, keeps its settings.

    Raises:
        ConfigError: there is no such model or preset, or one is named twice.
    """
    found = {}
    for entry in models:
        name, _, preset = entry.partition(":")
        if entry in found:
            raise ConfigError(f'models names "{entry}" twice')
        if name not in BASELINES or name == UNIMODAL:
            valid = [model for model in BASELINES if model != UNIMODAL]
            raise ConfigError(f'models holds "{entry}": {unknown_name("model", name, valid)}')
        if entry == config.model.name:
            found[entry] = config
            continue
        try:
            found[entry] = other_model(config, ModelConfig(name=name, preset=preset or None))
        except ValueError as error:
            raise ConfigError(f'models holds "{entry}": {error}') from None
    return found


def ablation_configs(config: TrainConfig, names: list[str] | None = None) -> dict[str, TrainConfig]:
    """A configuration for each entry of the model's `ABLATION`, in its order.

    An entry is settings that are merged over `model.settings`, or a tuple of blocks.

    Args:
        config: names the model.
        names: entries to take, in this order; None takes all.

    Raises:
        ConfigError: the model has no ablation, or not such an entry.
    """
    from survfuse.models.registry import MODELS, model_class

    kind = model_class(config.model.name).config_class if config.model.name in MODELS else None
    ablation: Mapping[str, Any] = {} if kind is None else kind.ABLATION
    if not ablation:
        raise ConfigError(f"model.name is {config.model.name}, which names no ablation")
    for name in names or ():
        if name not in ablation:
            raise ConfigError(
                f'the ablation of {config.model.name} has no "{name}"; it has {", ".join(ablation)}'
            )
    found = {}
    for name in names or ablation:
        entry = ablation[name]
        changed = dict(entry) if isinstance(entry, Mapping) else {"blocks": list(entry)}
        model = dataclasses.replace(config.model, settings={**config.model.settings, **changed})
        found[name] = dataclasses.replace(config, model=model)
    return found


def _entitled(configs: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """Each under the name it has in the table, without baselines of its own."""
    folders: dict[str, str] = {}
    for name in configs:
        other = folders.setdefault(_folder_name(name), name)
        if other != name:
            raise ConfigError(f"{name} and {other} would lie in the same folder; rename one")
    return {
        name: absolute_paths(
            dataclasses.replace(
                config,
                title=name,
                evaluation=dataclasses.replace(config.evaluation, baselines=(), figures=False),
            ),
            Path.cwd(),
        )
        for name, config in configs.items()
    }


def _check_survival(configs: Mapping[str, TrainConfig]) -> None:
    """Raise unless all of the runs predict survival, or none."""
    predicts = {name: survival_task(config) is not None for name, config in configs.items()}
    if len(set(predicts.values())) > 1:
        one, other = (
            next(name for name, survival in predicts.items() if survival is wanted)
            for wanted in (True, False)
        )
        raise ConfigError(
            f"{one} predicts survival and {other} does not; give all a task of kind survival, or "
            "none"
        )


def _folder_name(name: str) -> str:
    return name.replace(":", "-").replace("/", "-").replace(" ", "-")


def _same_cohorts(configs: Mapping[str, TrainConfig]) -> dict[str, LoadedCohort]:
    """The cohort of each run, read once for runs that read it alike.

    Raises:
        ConfigError: two differ in patients, outcomes or classes, or in who is tested when.
    """
    read: list[tuple[TrainConfig, LoadedCohort]] = []
    found: dict[str, LoadedCohort] = {}
    first: tuple[str, LoadedCohort, list[FoldPlan]] | None = None
    for name, config in configs.items():
        same = [loaded for other, loaded in read if _reads_alike(config, other)]
        loaded = same[0] if same else load_cohort(config)
        if not same:
            read.append((config, loaded))
        # as if it had been read for this run alone, which `survfuse train --resume` will do
        targets = {task: loaded.cohort.targets[task] for task in class_tasks(config)}
        loaded = loaded._replace(cohort=dataclasses.replace(loaded.cohort, targets=targets))
        plans = plan_run(config, loaded).folds
        if first is None:
            first = name, loaded, plans
        else:
            _check_same(first, (name, loaded, plans))
        found[name] = loaded
    return found


def _reads_alike(config: TrainConfig, read: TrainConfig) -> bool:
    """Whether a cohort that was read for one run holds all that another asks for."""
    tasks = class_tasks(read)
    return (
        (config.data, config.protocol.rows) == (read.data, read.protocol.rows)
        and all(tasks.get(name) == task for name, task in class_tasks(config).items())
    )  # fmt: skip


def _check_same(
    a: tuple[str, LoadedCohort, list[FoldPlan]], b: tuple[str, LoadedCohort, list[FoldPlan]]
) -> None:
    (name_a, loaded_a, plans_a), (name_b, loaded_b, plans_b) = a, b
    one, other = loaded_a.cohort, loaded_b.cohort
    if one.unit_ids != other.unit_ids or one.patient_ids != other.patient_ids:
        raise ConfigError(
            f"{name_a} and {name_b} have other patients: {one.name} has {len(one)} rows and "
            f"{other.name} {len(other)}, {len(set(one.unit_ids) & set(other.unit_ids))} in common; "
            f"{DIFFER}"
        )
    if not (np.array_equal(one.time, other.time) and np.array_equal(one.event, other.event)):
        raise ConfigError(f"{name_a} and {name_b} have other outcomes; {DIFFER}")
    for task in sorted(set(one.targets) & set(other.targets)):
        ours, theirs = one.targets[task], other.targets[task]
        if ours.classes != theirs.classes or not np.array_equal(ours.labels, theirs.labels):
            raise ConfigError(f"{name_a} and {name_b} have other classes of task {task}; {DIFFER}")
    keys = [[(plan.seed, plan.fold) for plan in plans] for plans in (plans_a, plans_b)]
    if keys[0] != keys[1]:
        raise ConfigError(
            f"{name_a} has the seeds and folds {keys[0]}, {name_b} {keys[1]}; "
            "training.seeds and protocol.split must agree"
        )
    for plan_a, plan_b in zip(plans_a, plans_b):
        if set(map(int, plan_a.split.test)) != set(map(int, plan_b.split.test)):
            raise ConfigError(
                f"{name_a} and {name_b} test other patients in seed {plan_a.seed} fold "
                f"{plan_a.fold}; protocol.split, n_folds and fold_seed must agree"
            )
