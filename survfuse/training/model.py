"""Build the model that a configuration names for the modalities a cohort has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from survfuse.data.names import unknown_name
from survfuse.models.registry import MODELS, model_class
from survfuse.models.settings import ModalityConfig
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import ConfigError, from_plain
from survfuse.training.linear import check_linear
from survfuse.training.loop_coordination import check_branches
from survfuse.training.tasks import outputs_of

if TYPE_CHECKING:
    from survfuse.data.prepared import PreparedCohort

NEURAL = tuple(MODELS)
# what follows from the data and the tasks
_FIXED = {"outputs": "the tasks, loss.name and protocol.n_bins"}


def build_model(config: TrainConfig, prepared: PreparedCohort) -> torch.nn.Module:
    """A freshly initialised model, on the CPU.

    The same seed gives the same weights, whatever device the model goes to later.

    Args:
        config: names the model; the tasks and the loss decide its outputs.
        prepared: gives the modalities, their widths and gene groups, and the numbers of time bins
            and classes.

    Raises:
        ConfigError: a setting of the model is wrong, or it has no branches to coordinate.
    """
    outputs = outputs_of(config, prepared)
    model = model_class(config.model.name)
    kind = model.config_class
    try:
        preset = kind.from_preset(
            (config.model.preset or next(iter(kind.PRESETS))).lower(),
            modalities=_modalities(prepared),
            outputs=outputs,
        )
        settings = dict(config.model.settings)
        for fixed, source in _FIXED.items():
            if fixed in settings:
                raise ConfigError(
                    f"model.settings.{fixed} is {settings[fixed]!r}; it follows from {source} and "
                    "cannot be set"
                )
        modalities = _modality_settings(preset.modalities, settings.pop("modalities", {}))
        values = {**_fields(preset), **settings, "modalities": modalities}
        built = model(from_plain(kind, values, prefix="model.settings"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    check_branches(config, built)
    return built


def check_model(config: TrainConfig, prepared: PreparedCohort) -> None:
    """Raise if the model that a configuration names cannot be built.

    Raises:
        ConfigError: a setting of the model is wrong.
    """
    if config.model.name in NEURAL:
        build_model(config, prepared)
    else:
        check_linear(config, prepared)


def _modalities(prepared: PreparedCohort) -> dict[str, Any]:
    """Kind and width of every modality, a table's groups, an array's axes."""
    found: dict[str, Any] = {}
    for name, (kind, width) in prepared.channels().items():
        if kind == "array":
            # how many axes it has is in the data, not in its channels
            axes = prepared.cohort.modality(name).values.dim() - 2
            found[name] = ModalityConfig("array", width, axes=axes)
        elif kind == "table":
            groups = prepared.groups(name)
            found[name] = (kind, width, {g: tuple(c) for g, c in groups.items() if len(c)})
        else:
            found[name] = (kind, width)
    return found


def _modality_settings(preset: Any, given: Any) -> dict[str, dict[str, Any]]:
    """The preset's modalities with the fields that `model.settings.modalities` replaces."""
    merged = {name: dataclasses.asdict(item) for name, item in preset.items()}
    if not isinstance(given, dict):
        raise ConfigError(
            f"model.settings.modalities is {given!r}; it must map names of modalities to settings"
        )
    for name, fields in given.items():
        # a modality this run is not given, for example in a single-modality baseline
        if name not in merged:
            continue
        if not isinstance(fields, dict):
            raise ConfigError(
                f"model.settings.modalities.{name} is {fields!r}; it must be a section"
            )
        for fixed in ("kind", "channels", "groups"):
            if fixed in fields:
                raise ConfigError(
                    f"model.settings.modalities.{name}.{fixed} cannot be set; it follows from the "
                    "data"
                )
        unknown = [field for field in fields if field not in merged[name]]
        if unknown:
            raise ConfigError(
                f"model.settings.modalities.{name}: "
                f"{unknown_name('setting', unknown[0], merged[name])}"
            )
        merged[name].update(fields)
    return merged


def check_modality_names(config: TrainConfig, known: Iterable[str]) -> None:
    """Raise if the model's settings name a modality that the data do not have.

    Raises:
        ConfigError: names it and the nearest there is.
    """
    given = config.model.settings.get("modalities")
    for name in given if isinstance(given, dict) else ():
        if name not in known:
            raise ConfigError(
                f"model.settings.modalities.{name}: {unknown_name('modality', name, known)}"
            )


def _fields(config: Any) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
