"""Metrics, intervals, curves and reports of survival models; needs no model and no torch."""

from survfuse.evaluation.class_predictions import ClassFold, ClassPredictions, ClassTable
from survfuse.evaluation.class_report import ClassReport, evaluate_classes
from survfuse.evaluation.comparison import Comparison, compare
from survfuse.evaluation.metrics import (
    brier_score,
    concordance_index,
    concordance_pairs,
    cumulative_dynamic_auc,
    integrated_brier_score,
    truncation_time,
    uno_concordance,
)
from survfuse.evaluation.predictions import FoldPredictions, PatientTable, Predictions
from survfuse.evaluation.report import Report, evaluate

__all__ = [
    "ClassFold",
    "ClassPredictions",
    "ClassReport",
    "ClassTable",
    "Comparison",
    "FoldPredictions",
    "PatientTable",
    "Predictions",
    "Report",
    "brier_score",
    "compare",
    "concordance_index",
    "concordance_pairs",
    "cumulative_dynamic_auc",
    "evaluate",
    "evaluate_classes",
    "integrated_brier_score",
    "truncation_time",
    "uno_concordance",
]
