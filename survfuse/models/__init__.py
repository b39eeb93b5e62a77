"""Survival models, one family per stem."""

from survfuse.models.abmil import ABMIL, ABMILConfig
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.models.base import FusionModel
from survfuse.models.cmta import CMTA
from survfuse.models.cmta_config import CMTAConfig
from survfuse.models.config import ModelConfig
from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import HEALNetConfig
from survfuse.models.late_fusion import LateFusion, LateFusionConfig
from survfuse.models.mcat import MCAT, MCATConfig
from survfuse.models.mean_pool import MeanPool, MeanPoolConfig
from survfuse.models.motcat import MOTCat, MOTCatConfig
from survfuse.models.multimodn import MultiModN, MultiModNConfig
from survfuse.models.perceiver import Perceiver
from survfuse.models.perceiver_config import PerceiverConfig
from survfuse.models.registry import MODELS, model_class
from survfuse.models.settings import ModalityConfig
from survfuse.models.snn import SNN, SNNConfig
from survfuse.models.subspace_config import SubspaceFusionConfig
from survfuse.models.subspace_fusion import SubspaceFusion
from survfuse.models.survpath import SurvPath, SurvPathConfig
from survfuse.models.transmil import TransMIL, TransMILConfig

__all__ = [
    "ABMIL",
    "CMTA",
    "MCAT",
    "MODELS",
    "SNN",
    "ABMILConfig",
    "AMMASurv",
    "AMMASurvConfig",
    "CMTAConfig",
    "FusionModel",
    "HEALNet",
    "HEALNetConfig",
    "LateFusion",
    "LateFusionConfig",
    "MCATConfig",
    "MOTCat",
    "MOTCatConfig",
    "MeanPool",
    "MeanPoolConfig",
    "ModalityConfig",
    "ModelConfig",
    "MultiModN",
    "MultiModNConfig",
    "Perceiver",
    "PerceiverConfig",
    "SNNConfig",
    "SubspaceFusion",
    "SubspaceFusionConfig",
    "SurvPath",
    "SurvPathConfig",
    "TransMIL",
    "TransMILConfig",
    "model_class",
]
