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


def rounds_products(dtype: torch.dtype, isa: str) -> bool:
    """Whether the kernel multiplies bf16 pairs, and so rounds rows, weights and gradients."""
    chosen = native_core().machine_info()["cpu_isa"] if isa == "auto" else isa
    return dtype == torch.bfloat16 and chosen == "avx512bf16"


def row_type(dtype: torch.dtype, kind: torch.dtype) -> torch.dtype:
    """The type in which engines that add up in `kind` read and write rows of type `dtype`.

    They know `kind` itself and 16 bits: fp64 rows beside fp32 sums, and fp32 rows beside fp64 sums,
    are converted for them.
    """
    return dtype if dtype.itemsize == 2 else kind


def coverage(starts: Tensor, lengths: Tensor, n_rows: int) -> tuple[bool, bool]:
    """Whether bags share rows, and whether they cover every row exactly once."""
    order = starts.argsort()
    first, count = starts[order], lengths[order]
    first, count = first[count > 0], count[count > 0]
    overlapping = bool((first[1:] < (first + count)[:-1]).any())
    return overlapping, not overlapping and int(count.sum()) == n_rows


def launch_on_device(launcher: str, arguments: dict, device: torch.device) -> None:
    """Call a CUDA launcher on the device's current stream."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(native_core(), launcher)(arguments | {"stream": stream})
