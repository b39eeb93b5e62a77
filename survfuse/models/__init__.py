"""Survival models, one family per stem."""

from survfuse.models.abmil import ABMIL, ABMILConfig
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.models.base import FusionModel
from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import HEALNetConfig
from survfuse.models.late_fusion import LateFusion, LateFusionConfig
from survfuse.models.mean_pool import MeanPool, MeanPoolConfig
from survfuse.models.multimodn import MultiModN, MultiModNConfig
from survfuse.models.perceiver import Perceiver
from survfuse.models.perceiver_config import PerceiverConfig
from survfuse.models.registry import MODELS, model_class
from survfuse.models.settings import ModalityConfig
from survfuse.models.snn import SNN, SNNConfig
from survfuse.models.subspace_config import SubspaceFusionConfig
from survfuse.models.subspace_fusion import SubspaceFusion
from survfuse.models.transmil import TransMIL, TransMILConfig

__all__ = [
    "ABMIL",
    "MODELS",
    "SNN",
    "ABMILConfig",
    "AMMASurv",
    "AMMASurvConfig",
    "FusionModel",
    "HEALNet",
    "HEALNetConfig",
    "LateFusion",
    "LateFusionConfig",
    "MeanPool",
    "MeanPoolConfig",
    "ModalityConfig",
    "MultiModN",
    "MultiModNConfig",
    "Perceiver",
    "PerceiverConfig",
    "SNNConfig",
    "SubspaceFusion",
    "SubspaceFusionConfig",
    "TransMIL",
    "TransMILConfig",
    "model_class",
]
