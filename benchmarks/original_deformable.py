"""The layout of Deformable DETR's CUDA extension, as a baseline that everybody can build.

The extension itself builds with few versions of torch and takes fp32 only; original_deformable.cu
has its division of the work. `nvcc` compiles it when it is first called.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parent / "original_deformable.cu"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# a block of the backward has a thread per channel
MOST_CHANNELS = 1024


def original_deformable_attention(
    value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention on a GPU.

    Args:
        value: [B, S, H, C], fp32, bf16 or fp16, C at most 1024.
        shapes: [L, 2] int64 (height, width), on the GPU.
        locations: [B, Q, H, L, P, 2], fp32.
        weights: [B, Q, H, L, P].

    Returns:
        [B, Q, H * C], the type of the value; differentiable in value, locations and weights.

    Raises:
        RuntimeError: there is no GPU or no nvcc, or the kernel did not compile or start.
    """
    library_for(value.device)
    return _Original.apply(value, shapes, locations, weights)


class _Problem(ctypes.Structure):
    """`Problem` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "shapes", "points", "weights")),
        *(
            (name, ctypes.c_int64)
            for name in ("batches", "rows", "heads", "dim", "levels", "n_points", "queries")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("out", "d_out", "d_value", "d_points", "d_weights", "stream")
        ),
    )


class _Original(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        inputs = (value.contiguous(), shapes, locations.contiguous(), weights.float().contiguous())
        ctx.save_for_backward(*inputs)
        ctx.weight_type = weights.dtype
        out = value.new_empty((*locations.shape[:3], value.shape[3]))
        _launch(inputs, {"out": out}, backward=False)
        return out.flatten(2)

    @staticmethod
    def backward(ctx, d_out):
        value, _, locations, weights = inputs = ctx.saved_tensors
        results = {
            "d_out": d_out.contiguous(),
            "d_value": torch.zeros_like(value, dtype=torch.float32),
            "d_points": torch.empty_like(locations),
            "d_weights": torch.empty_like(weights),
        }
        _launch(inputs, results, backward=True)
        d_value = results["d_value"].to(value.dtype)
        return d_value, None, results["d_points"], results["d_weights"].to(ctx.weight_type)


def _launch(inputs: tuple[Tensor, ...], others: dict[str, Tensor], *, backward: bool) -> None:
    value, shapes, locations, weights = inputs
    if value.dtype not in TYPES or value.shape[3] > MOST_CHANNELS:
        raise ValueError(
            f"value is {value.dtype} with {value.shape[3]} channels; the baseline takes fp32, bf16 "
            f"and fp16, and at most {MOST_CHANNELS}"
        )
    n_batches, n_rows, heads, dim = value.shape
    _, n_queries, _, n_levels, n_points, _ = locations.shape
    problem = _Problem(
        *(tensor.data_ptr() for tensor in (value, shapes, locations, weights)),
        *(n_batches, n_rows, heads, dim, n_levels, n_points, n_queries),
        **{name: tensor.data_ptr() for name, tensor in others.items()},
        stream=_stream(value.device),
    )
    function = library_for(value.device).original_deformable
    error = function(ctypes.byref(problem), TYPES.index(value.dtype), int(backward))
    if error:
        raise RuntimeError(f"the baseline's kernel did not start: {error.decode()}")


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def library_for(device: torch.device) -> ctypes.CDLL:
    """The compiled source, for the architecture of this device; RuntimeError says why not."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise RuntimeError(f"the baseline needs an NVIDIA GPU; value is on {device}")
    return load(_compiled(*torch.cuda.get_device_capability(device)))


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """A library of the source."""
    library = ctypes.CDLL(str(path))
    library.original_deformable.restype = ctypes.c_char_p
    library.original_deformable.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return library


@functools.cache
def _compiled(major: int, minor: int) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin"))
    if nvcc is None:
        raise RuntimeError("the baseline is compiled by nvcc: none on PATH, nor under CUDA_HOME")
    state = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"survfuse-benchmarks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"original_deformable-{state}-sm_{major}{minor}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-shared"]
        command += ["--compiler-options", "-fPIC", str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {SOURCE.name}: {done.stderr[-2000:]}")
        partial.rename(library)
    return library
