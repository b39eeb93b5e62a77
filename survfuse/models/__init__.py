"""Survival models, one family per stem."""

from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.models.base import FusionModel
from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import HEALNetConfig
from survfuse.models.mean_pool import MeanPool, MeanPoolConfig
from survfuse.models.registry import MODELS, model_class
from survfuse.models.settings import ModalityConfig

__all__ = [
    "MODELS",
    "AMMASurv",
    "AMMASurvConfig",
    "FusionModel",
    "HEALNet",
    "HEALNetConfig",
    "MeanPool",
    "MeanPoolConfig",
    "ModalityConfig",
    "model_class",
]
