"""`pool_bag` on the CPU by the native core (csrc/cpu/pool_bag.cpp).

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.native.core import CPU_ISAS, ELEMENT_TYPES, address, native_core, workspace
from survfuse.tiled.pool_bag import accumulation_type, balance_rows


def pool_bag_forward(
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    max_length: int,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    isa: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled [B, R, D], lse [B, R], weight_sum [B, R], all of the accumulation type."""
    kind = accumulation_type(bag.dtype)
    pooled = bag.new_empty(rows.shape, dtype=kind)
    lse = bag.new_empty(rows.shape[:2], dtype=kind)
    weight_sum = bag.new_empty(rows.shape[:2], dtype=kind)
    arguments, alive = _arguments(
        rows, bag, bias, starts, lengths, total, scale, normalize, eps, mean, rstd, dropout_p, seed,
        isa,
    )  # fmt: skip
    arguments |= {
        "pooled": address(pooled),
        "lse": address(lse),
        "weight_sum": address(weight_sum),
    }
    native_core().pool_bag_forward(arguments)
    del alive
    return pooled, lse, weight_sum


def pool_bag_backward(
    d_pooled: Tensor,
    d_lse: Tensor,
    d_weight_sum: Tensor,
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    max_length: int,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    weight_sum: Tensor,
    needs_rows: bool,
    needs_bag: bool,
    needs_bias: bool,
    isa: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_rows [B, R, D], d_bag [T, D] of the bag's type, d_bias [T]; None where not needed."""
    kind = accumulation_type(bag.dtype)
    d_pooled, d_weight_sum = d_pooled.to(kind).contiguous(), d_weight_sum.to(kind).contiguous()
    # rounded as the kernel's products round it: the two must cancel
    rounded = d_pooled.to(bag.dtype).to(kind) if rounds_products(bag.dtype, isa) else d_pooled
    delta = (rounded * pooled).sum(-1) + d_weight_sum * weight_sum - d_lse
    d_rows = bag.new_empty(rows.shape, dtype=kind) if needs_rows else None
    overlapping, covering = _coverage(starts, lengths, bag.shape[0])
    make = torch.empty if covering else torch.zeros
    # sums of overlapping bags are rounded once, at the end
    d_bag_type = kind if overlapping else bag.dtype
    d_bag = make(bag.shape, dtype=d_bag_type) if needs_bag else None
    d_bias = make(bag.shape[0], dtype=kind) if needs_bias else None
    arguments, alive = _arguments(
        rows, bag, bias, starts, lengths, total, scale, normalize, eps, mean, rstd, dropout_p, seed,
        isa,
    )  # fmt: skip
    lse, delta = lse.contiguous(), delta.contiguous()
    d_logit_sum = torch.empty_like(lse)
    arguments |= {
        "d_logit_sum": address(d_logit_sum),
        "lse": address(lse),
        "delta": address(delta),
        "d_pooled": address(d_pooled),
        "d_weight_sum": address(d_weight_sum),
        "d_rows": address(d_rows),
        "d_bag": address(d_bag),
        "d_bias": address(d_bias),
        "d_bag_type": ELEMENT_TYPES[d_bag_type],
        "overlapping": overlapping,
    }
    native_core().pool_bag_backward(arguments)
    del alive
    if d_rows is not None:
        balance_rows(d_rows, d_logit_sum, d_lse, pooled, scale)
    return d_rows, None if d_bag is None else d_bag.to(bag.dtype), d_bias


def rounds_products(dtype: torch.dtype, isa: str) -> bool:
    """Whether the kernel multiplies bf16 pairs, and so rounds rows, weights and gradients."""
    chosen = native_core().machine_info()["cpu_isa"] if isa == "auto" else isa
    return dtype == torch.bfloat16 and chosen == "avx512bf16"


def _arguments(
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    scale: float,
    normalize: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    isa: str,
) -> tuple[dict, list]:
    """The launcher's arguments, and the tensors that must outlive the call."""
    kind = accumulation_type(bag.dtype)
    rows = rows.to(kind).contiguous()
    bias, mean, rstd = (
        None if tensor is None else tensor.to(kind).contiguous() for tensor in (bias, mean, rstd)
    )
    starts, lengths = starts.contiguous(), lengths.contiguous()
    n_bags, n_rows, dim = rows.shape
    n_threads = torch.get_num_threads()
    element = ELEMENT_TYPES[bag.dtype]
    memory = workspace(
        native_core().pool_bag_workspace(n_bags, n_rows, dim, total, element, n_threads)
    )
    arguments = {
        "rows": address(rows),
        "bag": address(bag),
        "bias": address(bias),
        "starts": address(starts),
        "lengths": address(lengths),
        "mean": address(mean),
        "rstd": address(rstd),
        "n_bags": n_bags,
        "n_rows": n_rows,
        "dim": dim,
        "bag_stride": bag.stride(0),
        "bag_type": element,
        "scale": scale,
        "normalize": normalize,
        "eps": eps,
        "dropout_p": dropout_p if seed is not None else 0.0,
        "seed": 0 if seed is None else int(seed),
        "workspace": address(memory),
        "n_threads": n_threads,
        "isa": CPU_ISAS.index(isa),
    }
    return arguments, [rows, bias, mean, rstd, starts, lengths, memory]


def _coverage(starts: Tensor, lengths: Tensor, n_rows: int) -> tuple[bool, bool]:
    """Whether bags share rows, and whether they cover every row exactly once."""
    order = starts.argsort()
    first, count = starts[order], lengths[order]
    first, count = first[count > 0], count[count > 0]
    overlapping = bool((first[1:] < (first + count)[:-1]).any())
    return overlapping, not overlapping and int(count.sum()) == n_rows
