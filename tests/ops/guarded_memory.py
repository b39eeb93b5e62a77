"""Tensors beside which nothing can be read or written."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from survfuse.deformable import Samples


@contextmanager
def guarded(value: Tensor, samples: Samples, *, at_end: bool = True) -> Iterator[tuple]:
    """Copies whose last byte (or first, if not `at_end`) lies beside an inaccessible page."""
    kept: list[mmap.mmap] = []

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.numel() == 0:
            return tensor
        size, page = tensor.nbytes, mmap.PAGESIZE
        pages = -(-size // page) * page
        kept.append(mmap.mmap(-1, pages + 2 * page))
        whole = torch.frombuffer(kept[-1], dtype=torch.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for offset in (0, page + pages):
            address = ctypes.c_void_p(whole.data_ptr() + offset)
            assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0
        begin = page + (pages - size if at_end else 0)
        copy = whole[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    yield moved(value), Samples(*map(moved, samples))
