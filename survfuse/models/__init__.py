"""Survival models, one family per stem."""

from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import HEALNetConfig, ModalityConfig

__all__ = ["HEALNet", "HEALNetConfig", "ModalityConfig"]
