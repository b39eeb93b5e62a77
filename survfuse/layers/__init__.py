"""Modules shared by models."""

from survfuse.layers.cross_attention import CrossAttention
from survfuse.layers.deformable_cross_attention import (
    DeformableAttended,
    DeformableCrossAttention,
)
from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.layers.latent_attention import BagCrossAttention, LatentSelfAttention
from survfuse.layers.multi_scale_deformable_attention import (
    MSDeformAttnFunction,
    MultiScaleDeformableAttention,
)
from survfuse.layers.nystrom_attention import NystromSelfAttention
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork

__all__ = [
    "BagCrossAttention",
    "CrossAttention",
    "DeformableAttended",
    "DeformableCrossAttention",
    "GatedAttentionPool",
    "GatedFeedForward",
    "LatentSelfAttention",
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttention",
    "NystromSelfAttention",
    "SelfNormalizingNetwork",
]
