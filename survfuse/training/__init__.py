"""Training: configurations, the loop, run folders, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from survfuse.training.config import TrainConfig
    from survfuse.training.config_files import ConfigError, load_config, parse_config
    from survfuse.training.gradient_coordination import (
        CoordinatedHead,
        Coordination,
        GradientCoordination,
    )
    from survfuse.training.inspection import explain
    from survfuse.training.losses import cox_loss, nll_loss, risk_from_hazards
    from survfuse.training.predictions import predict
    from survfuse.training.run import RunResult, fit, resume
    from survfuse.training.run_comparison import compare_runs

# imported when asked for: fit brings in models and data, a configuration needs neither
_HOMES = {
    "TrainConfig": "config",
    "RunResult": "run",
    "compare_runs": "run_comparison",
    "explain": "inspection",
    "fit": "run",
    "resume": "run",
    "ConfigError": "config_files",
    "load_config": "config_files",
    "parse_config": "config_files",
    "CoordinatedHead": "gradient_coordination",
    "Coordination": "gradient_coordination",
    "GradientCoordination": "gradient_coordination",
    "cox_loss": "losses",
    "nll_loss": "losses",
    "risk_from_hazards": "losses",
    "predict": "predictions",
}

__all__ = [
    "ConfigError",
    "CoordinatedHead",
    "Coordination",
    "GradientCoordination",
    "RunResult",
    "TrainConfig",
    "compare_runs",
    "cox_loss",
    "explain",
    "fit",
    "load_config",
    "nll_loss",
    "parse_config",
    "predict",
    "resume",
    "risk_from_hazards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
