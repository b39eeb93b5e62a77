"""The models that a configuration can name."""

from __future__ import annotations

import importlib

from survfuse.models.base import FusionModel

# name -> (module, class); imported when asked for
MODELS = {
    "healnet": ("survfuse.models.healnet", "HEALNet"),
    "ammasurv": ("survfuse.models.ammasurv", "AMMASurv"),
    "subspace_fusion": ("survfuse.models.subspace_fusion", "SubspaceFusion"),
    "mcat": ("survfuse.models.mcat", "MCAT"),
    "motcat": ("survfuse.models.motcat", "MOTCat"),
    "survpath": ("survfuse.models.survpath", "SurvPath"),
    "cmta": ("survfuse.models.cmta", "CMTA"),
    "perceiver": ("survfuse.models.perceiver", "Perceiver"),
    "multimodn": ("survfuse.models.multimodn", "MultiModN"),
    "late_fusion": ("survfuse.models.late_fusion", "LateFusion"),
    "abmil": ("survfuse.models.abmil", "ABMIL"),
    "transmil": ("survfuse.models.transmil", "TransMIL"),
    "snn": ("survfuse.models.snn", "SNN"),
    "mean_pool": ("survfuse.models.mean_pool", "MeanPool"),
}


def model_class(name: str) -> type[FusionModel]:
    """The class of the model `name`.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; it must be one of {list(MODELS)}")
    module, cls = MODELS[name]
    return getattr(importlib.import_module(module), cls)
