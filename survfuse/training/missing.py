"""Test patients with modalities withheld: what a trained model does without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from survfuse.data.withhold import withhold_rows
from survfuse.evaluation.comparison import compare
from survfuse.evaluation.intervals import Difference
from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.evaluation.report import Report, evaluate
from survfuse.evaluation.report_files import interval_text
from survfuse.training.baselines import unimodal_by_patient
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import ConfigError
from survfuse.training.fold_models import load_fold
from survfuse.training.folds import FoldPlan
from survfuse.training.predictions import fold_name, make_predictions, score_rows
from survfuse.training.run_folder import RunFolder, write_json, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from survfuse.data.cohort import Cohort

COMPLETE = "complete"
NOTE = (
    "Test patients who have every modality, scored by the models as trained with modalities "
    "withheld; `complete` withholds nothing. The comparator is the mean training rank of the "
    "single-modality models of what is left (baselines `only:<modality>`)."
)


class Design(NamedTuple):
    """The model under one design, and beside the comparator where its models were trained."""

    report: Report
    comparator: Report | None
    difference: Difference | None  # model minus comparator


def check_designs(config: TrainConfig, cohort: Cohort, plans: Sequence[FoldPlan]) -> None:
    """Raise unless every design of `evaluation.missing` can be scored in every fold.

    Raises:
        ConfigError: a design names an unknown modality, or no test patient has all modalities.
    """
    for design in config.evaluation.missing:
        for plan in plans:
            rows = complete_rows(cohort, plan.split.test)
            if not cohort.event[rows].any():
                raise ConfigError(
                    f"evaluation.missing is set, but of the patients tested in seed {plan.seed} "
                    f"fold {plan.fold} none has every modality and the event"
                )
            withheld(design, cohort, rows, config.evaluation.seed)


def complete_rows(cohort: Cohort, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows that have every modality."""
    rows = np.asarray(rows, dtype=np.int64)
    return rows[np.logical_and.reduce([cohort.present(name)[rows] for name in cohort.modalities])]


def withheld(
    design: str, cohort: Cohort, rows: NDArray[np.int64], seed: int
) -> dict[str, NDArray[np.bool_]]:
    """By modality, which of `rows` lose it: [n] bool.

    "half" draws one half of the patients, who lose their tables; the others lose all else. Of two
    modalities of one kind, the first counts as the table.

    Raises:
        ConfigError: an unknown modality, or "half" where all modalities are of one kind.
    """
    names = list(cohort.modalities)
    nobody = np.zeros(len(rows), dtype=bool)
    if design == COMPLETE:
        return dict.fromkeys(names, nobody)
    if design != "half":
        kept = design.partition(":")[2].split("+")
        unknown = [name for name in kept if name not in names]
        if unknown:
            raise ConfigError(
                f'evaluation.missing holds "{design}"; the modalities are {", ".join(names)}'
            )
        return {name: nobody | (name not in kept) for name in names}
    tables = [name for name in names if cohort.modalities[name].kind == "table"]
    if len(tables) in (0, len(names)):
        if len(names) != 2:
            raise ConfigError(
                'evaluation.missing holds "half", which withholds tables from one half of the '
                f"patients and all else from the other; the modalities are {', '.join(names)}"
            )
        tables = names[:1]
    patients = sorted({cohort.patient_ids[row] for row in rows})
    order = np.random.default_rng(seed).permutation(len(patients))
    first = {patients[i] for i in order[: len(patients) // 2]}
    lose_tables = np.array([cohort.patient_ids[row] in first for row in rows], dtype=bool)
    return {name: lose_tables if name in tables else ~lose_tables for name in names}


def score_missing(
    folder: RunFolder,
    config: TrainConfig,
    cohort: Cohort,
    plans: Sequence[FoldPlan],
    device: torch.device,
    baselines: Mapping[str, Predictions],
) -> dict[str, Design]:
    """Score every design with the finished models of a run, and write `missing.json` and `.md`.

    Predictions go to `missing/<design>/`, for `survfuse evaluate`.

    Args:
        folder: the run, all folds of which are finished.
        config: its configuration.
        cohort: the cohort it was trained on.
        plans: its folds.
        device: where to compute.
        baselines: predictions of its baselines by name; with all of "only:<modality>" the model is
            compared with their mean rank.

    Returns:
        By design, "complete" first.
    """
    singles = {name: baselines.get(f"only:{name}") for name in cohort.modalities}
    comparable = len(singles) > 1 and None not in singles.values()
    settings = {
        "resamples": config.evaluation.bootstrap,
        "level": config.evaluation.level,
        "seed": config.evaluation.seed,
    }
    designs = {}
    for name in (COMPLETE, *config.evaluation.missing):
        predictions = _score_design(name, folder, config, cohort, plans, device)
        path = folder.path / "missing" / name.replace(":", "-")
        path.mkdir(parents=True, exist_ok=True)
        predictions.save(path)
        report, comparator, difference = evaluate(predictions, **settings), None, None
        if comparable:
            other = _comparator(name, singles, cohort, plans, predictions, config.evaluation.seed)
            comparator = evaluate(other, **settings)
            pairs = compare([predictions, other], **settings).pairs
            difference = pairs[0].difference
        designs[name] = Design(report, comparator, difference)
    write_json(folder.path / "missing.json", _as_dict(designs))
    write_text(folder.path / "missing.md", missing_markdown(designs))
    return designs


def _score_design(
    name: str,
    folder: RunFolder,
    config: TrainConfig,
    cohort: Cohort,
    plans: Sequence[FoldPlan],
    device: torch.device,
) -> Predictions:
    folds = []
    for plan in plans:
        files = folder.fold(plan.seed, plan.fold)
        rows = complete_rows(cohort, plan.split.test)
        masks = withheld(name, cohort, rows, config.evaluation.seed)
        less = withhold_rows(cohort.subset(rows), masks)
        loaded = load_fold(files, config, less, device)
        scored = score_rows(loaded.model, config, loaded.prepared, np.arange(len(rows)), device)
        test = scored.survival
        train = Predictions.load(files.path).folds[0].train
        edges = loaded.prepared.edges if test.logits is not None else None
        folds.append(FoldPredictions(fold_name(plan.seed, plan.fold), test, train, edges))
    made = make_predictions(config, folds)
    return dataclasses.replace(made, model=f"{config.label}, {name}")


def _comparator(
    name: str,
    singles: Mapping[str, Predictions],
    cohort: Cohort,
    plans: Sequence[FoldPlan],
    scored: Predictions,
    seed: int,
) -> Predictions:
    """The single-modality models of what is left, on the rows that were scored."""
    folds = []
    for k, (plan, fold) in enumerate(zip(plans, scored.folds)):
        rows = complete_rows(cohort, plan.split.test)
        masks = {n: np.zeros(len(cohort), dtype=bool) for n in cohort.modalities}
        for modality, mask in withheld(name, cohort, rows, seed).items():
            masks[modality][rows] = mask
        reduced = {
            n: dataclasses.replace(one, head="risk", folds=[_only_rows(one.folds[k], fold.test)])
            for n, one in singles.items()
        }
        folds += unimodal_by_patient(reduced, withhold_rows(cohort, masks)).folds
    model = f"single modalities, {name}"
    return dataclasses.replace(next(iter(singles.values())), model=model, head="risk", folds=folds)


def _only_rows(fold: FoldPredictions, wanted: PatientTable) -> FoldPredictions:
    position = {unit: k for k, unit in enumerate(fold.test.unit_ids)}
    risk = fold.test.risk[[position[unit] for unit in wanted.unit_ids]]
    test = dataclasses.replace(wanted, risk=risk, logits=None)
    return dataclasses.replace(fold, test=test, edges=None)


def missing_markdown(designs: Mapping[str, Design]) -> str:
    """A line for each design."""
    lines = [
        "# With modalities withheld",
        "",
        "| test patients have | patients | Harrell's C | single modalities | difference |",
        "|---|---|---|---|---|",
    ]
    for name, design in designs.items():
        other = "-" if design.comparator is None else interval_text(design.comparator.concordance)
        d = design.difference
        change = "-" if d is None else f"{d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        own = interval_text(design.report.concordance)
        lines.append(f"| {name} | {design.report.n_patients} | {own} | {other} | {change} |")
    return "\n".join([*lines, "", NOTE]) + "\n"


def _as_dict(designs: Mapping[str, Design]) -> dict[str, Any]:
    return {
        name: {
            "patients": design.report.n_patients,
            "events": design.report.n_events,
            "concordance": design.report.concordance._asdict(),
            "single_modalities": None
            if design.comparator is None
            else design.comparator.concordance._asdict(),
            "difference": None if design.difference is None else design.difference._asdict(),
        }
        for name, design in designs.items()
    }
