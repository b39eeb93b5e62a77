"""The native core, if it was built, and what its launchers share."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

ELEMENT_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}
CPU_ISAS = ("auto", "plain", "avx2", "avx512", "avx512bf16")


@functools.cache
def native_core() -> ModuleType | None:
    """survfuse._native, or None where the package was installed with SURVFUSE_BUILD=none."""
    try:
        from survfuse import _native
    except ImportError:
        return None
    return _native


def address(tensor: Tensor | None) -> int:
    """Pointer to the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def workspace(n_bytes: int) -> Tensor:
    """Uninitialised bytes for a launcher."""
    return torch.empty(n_bytes, dtype=torch.uint8)
