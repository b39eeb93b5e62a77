"""Checks of arguments: the argument's name, what it was, what it must be."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

_NUMBERS = (numbers.Real, torch.SymFloat, torch.SymInt)
_INTEGERS = (numbers.Integral, torch.SymInt)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int | str, ...],
    device: torch.device,
    beside: str = "the bag",
    note: str = "",
) -> None:
    """Raise unless `tensor` is floating, on `device`, and of `shape` (a letter fits any size).

    `beside` names whose device that is; `note` follows the shape in the error.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it must be a tensor")
    _check_floats(name, tensor)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and {beside} on {device}; move one of them")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want
        for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{wanted}]{note}")


def _check_floats(name: str, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout != torch.strided:
        found = "nested" if tensor.is_nested else str(tensor.layout)
        hint = "; Ragged.from_jagged gives the ranges of its .values()" if tensor.is_nested else ""
        raise TypeError(f"{name} is {found}; it must be a dense tensor{hint}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; it must be bf16, fp16, fp32 or fp64")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless parameters can have this type; None is torch's default."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype!r}; it must be bf16, fp16, fp32 or fp64")


def check_layer_input(
    name: str, tensor: Tensor, *, shape: tuple[int | str, ...], weight: Tensor
) -> None:
    """`check_tensor` beside a weight of a layer, whose type the tensor has too but in autocast."""
    check_tensor(name, tensor, shape=shape, device=weight.device, beside="the layer")
    if tensor.dtype == weight.dtype:
        return
    # autocast leaves fp64 as it is
    kinds = (tensor.dtype, weight.dtype)
    if (
        torch.float64 in kinds
        or weight.is_meta
        or not torch.is_autocast_enabled(weight.device.type)
    ):
        raise TypeError(
            f"{name} is {tensor.dtype} and the layer {weight.dtype}; they must have one type"
        )


def check_coordinates(name: str, tensor: Tensor, features: Tensor, beside: str) -> None:
    """Raise unless places beside `features` are fp64 for fp64 ones, and fp32 for all others."""
    wanted = torch.float64 if features.dtype == torch.float64 else torch.float32
    if tensor.dtype != wanted:
        narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize <= 2
        reason = ": 16 bits lose what is finer than a pixel" if narrow else ""
        raise TypeError(
            f"{name} is {tensor.dtype}; it must be {wanted} beside a {beside} of {features.dtype}"
            f"{reason}"
        )


def check_bag(bag: Tensor) -> None:
    """Raise unless `bag` is a floating [T, D] or [B, N, D]."""
    if not isinstance(bag, Tensor):
        raise TypeError(f"bag is {type(bag).__name__}; it must be a tensor")
    _check_floats("bag", bag)
    if bag.dim() not in (2, 3):
        raise ValueError(f"bag has shape {tuple(bag.shape)}; it must be [T, D] or [B, N, D]")
    if bag.shape[-1] == 0:
        raise ValueError(f"bag has shape {tuple(bag.shape)}; a patch needs at least one feature")


def check_number(name: str, value: float) -> None:
    """Raise unless `value` is one real number."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_integer(name: str, value: int) -> None:
    """Raise unless `value` is one whole number."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} is {value!r}; it must be an integer")


def check_size(name: str, value: int) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")


def check_scale(scale: float) -> None:
    """Raise unless `scale` is a finite number."""
    check_number("scale", scale)
    # a graph being compiled holds a symbol
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")


def check_eps(name: str, eps: float) -> None:
    """Raise unless `eps` can stand under a root: a number of at least 0."""
    check_number(name, eps)
    if not eps >= 0:
        raise ValueError(f"{name} is {eps}; it must be at least 0")


def check_dropout(dropout_p: float, name: str = "dropout_p") -> None:
    """Raise unless 0 <= dropout_p < 1."""
    check_number(name, dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name} is {dropout_p}; it must be at least 0 and below 1")


def check_bias(bias: Tensor, bag: Tensor) -> Tensor:
    """`bias` as [T], one number per stored row; [B, N] beside a dense bag is accepted."""
    if bag.dim() == 3 and isinstance(bias, Tensor) and bias.dim() == 2:
        check_tensor("bias", bias, shape=tuple(bag.shape[:2]), device=bag.device)
    else:
        n_rows = bag.shape[0] if bag.dim() == 2 else bag.shape[0] * bag.shape[1]
        check_tensor("bias", bias, shape=(n_rows,), device=bag.device)
    return bias.reshape(-1)


def check_stats(stats: tuple[Tensor, Tensor] | None, packed: Tensor) -> None:
    """Raise unless `stats` is None or the (mean [T], rstd [T]) of a packed bag."""
    if stats is None:
        return
    if not isinstance(stats, tuple) or len(stats) != 2:
        found = f"a tuple of {len(stats)}" if isinstance(stats, tuple) else type(stats).__name__
        raise TypeError(f"stats is {found}; it must be a tuple of two tensors, (mean, rstd)")
    for name, tensor in zip(("stats mean", "stats rstd"), stats, strict=True):
        check_tensor(name, tensor, shape=(packed.shape[0],), device=packed.device)


def check_reduce(reduce: str | None) -> None:
    """Raise unless `reduce` names a reduction of weights."""
    if reduce not in (None, "rows", "heads"):
        raise ValueError(f'reduce is {reduce!r}; it must be None, "rows" or "heads"')
