"""Which implementation serves a call: the one place where device and backend are chosen."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from survfuse.native.core import ELEMENT_TYPES, native_core
from survfuse.tiled.tiles import multiplies_bf16

BACKENDS = ("reference", "tiled", "triton", "native")


class Selection(NamedTuple):
    """A backend and why it was taken."""

    backend: str
    reason: str


def select_backend(
    requested: str | None, *, device: torch.device, dtype: torch.dtype, n_rows: int
) -> Selection:
    """The backend of an op that streams a bag.

    Args:
        requested: the caller's `backend`; None picks the fastest that can serve the call.
        device: that of the bag.
        dtype: that of the bag.
        n_rows: query rows per bag, which decide between two CPU backends.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve the call; the message says why.
    """
    check_backend(requested)
    if requested is None:
        return _fastest(device, dtype, n_rows)
    obstacle = backend_obstacle(requested, device=device, dtype=dtype)
    if obstacle:
        raise RuntimeError(f"backend={requested!r} cannot serve this call: {obstacle}")
    return Selection(requested, "asked for")


def check_backend(backend: str | None) -> None:
    """Raise unless `backend` is None or the name of a backend."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be None or one of {BACKENDS}")


def plain_backend(backend: str | None) -> str | None:
    """What to ask of an op that has plain torch only, where `backend` is asked of the others."""
    return "reference" if backend == "reference" else None


def backend_obstacle(
    backend: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    has_cuda_kernel: bool = False,
) -> str | None:
    """Why a backend cannot serve a bag of this type on this device; None if it can.

    `has_cuda_kernel`: the native core has kernels of the op for GPUs, too.

    Raises:
        ValueError: no backend has that name.
    """
    check_backend(backend)
    device = torch.device(device)
    if backend == "triton":
        return _triton_obstacle(device, dtype)
    if backend == "native":
        return _native_obstacle(device, dtype, has_cuda_kernel)
    return None


def _fastest(device: torch.device, dtype: torch.dtype, n_rows: int) -> Selection:
    if device.type == "cuda":
        obstacle = _triton_obstacle(device, dtype)
        if obstacle is None:
            return Selection("triton", "the fused kernels of this GPU")
        return Selection("tiled", f"no Triton: {obstacle}")
    obstacle = _native_obstacle(device, dtype, False)
    if obstacle is not None:
        return Selection("tiled", f"no native kernel: {obstacle}")
    if dtype == torch.bfloat16 and n_rows > _AMX_ROWS and multiplies_bf16():
        return Selection("tiled", f"{n_rows} rows in bf16: oneDNN multiplies them with AMX")
    return Selection("native", "the C++ kernels of this processor")


# with few rows the bag is read once and memory decides; beyond, matrix units do
_AMX_ROWS = 24


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels take bf16, fp16 and fp32, not fp64"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if dtype == torch.float32 else "Triton's interpreter is right for fp32 only"
    return f"Triton needs a GPU, the bag is on {device}"


def _native_obstacle(device: torch.device, dtype: torch.dtype, has_cuda_kernel: bool) -> str | None:
    if device.type == "cuda":
        if not has_cuda_kernel:
            return "the native core has no CUDA kernel of this op"
        return _cuda_obstacle(dtype)
    if device.type != "cpu":
        return f"the native core runs on the CPU, the bag is on {device}"
    if dtype not in ELEMENT_TYPES:
        return f"it takes {', '.join(map(str, ELEMENT_TYPES))}, not {dtype}"
    if native_core() is None:
        return (
            "the native core was not built (SURVFUSE_BUILD=none) or cannot be loaded; "
            "`survfuse doctor` says which"
        )
    return None


def _cuda_obstacle(dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the CUDA kernels take bf16, fp16 and fp32, not fp64"
    if torch.version.cuda is None:
        return "this torch's GPU is no NVIDIA one"
    core = native_core()
    if core is None or not core.build_info()["cuda"]:
        return "the native core was built without CUDA; `survfuse doctor` says more"
    return _cuda_error() or None


@functools.cache
def _cuda_error() -> str:
    """Why this build's CUDA kernels cannot run here, such as a driver that is too old."""
    return native_core().machine_info()["cuda_error"]
