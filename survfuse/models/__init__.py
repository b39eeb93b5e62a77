"""Survival models, one family per stem."""

from survfuse.models.base import FusionModel
from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import HEALNetConfig
from survfuse.models.mean_pool import MeanPool, MeanPoolConfig
from survfuse.models.registry import MODELS, model_class
from survfuse.models.settings import ModalityConfig
from survfuse.models.subspace_config import SubspaceFusionConfig
from survfuse.models.subspace_fusion import SubspaceFusion

__all__ = [
    "MODELS",
    "FusionModel",
    "HEALNet",
    "HEALNetConfig",
    "MeanPool",
    "MeanPoolConfig",
    "ModalityConfig",
    "SubspaceFusion",
    "SubspaceFusionConfig",
    "model_class",
]
