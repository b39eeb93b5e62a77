"""Modules shared by models."""

from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.latent_attention import BagCrossAttention, LatentSelfAttention

__all__ = ["BagCrossAttention", "GatedFeedForward", "LatentSelfAttention"]
