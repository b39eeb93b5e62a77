"""Fused asymmetric attention over very long patch bags, and the survival models built on it."""

from survfuse.ragged import Ragged

__all__ = ["Ragged", "__version__"]
__version__ = "0.1.0"
