"""`pool_bag` on the CPU by the native core (csrc/cpu/pool_bag.cpp).

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.native.core import (
    CPU_ISAS,
    ELEMENT_TYPES,
    address,
    coverage,
    native_core,
    rounds_products,
    workspace,
)
from survfuse.pooling import Needs, PooledBag, Pooling, accumulation_type
from survfuse.tiled.pool_bag import balance_rows, weighted_gradient


def pool_bag_forward(
    rows: Tensor, bag: Tensor, bias: Tensor | None, pooling: Pooling, *, isa: str = "auto"
) -> PooledBag:
    """Results of the accumulation type."""
    kind = accumulation_type(bag.dtype)
    shapes = (rows.shape, rows.shape[:2], rows.shape[:2])
    results = PooledBag(*(bag.new_empty(shape, dtype=kind) for shape in shapes))
    arguments, alive = _arguments(rows, bag, bias, pooling, isa)
    arguments |= {name: address(tensor) for name, tensor in results._asdict().items()}
    native_core().pool_bag_forward(arguments)
    del alive
    return results


def pool_bag_backward(
    d_results: PooledBag,
    results: PooledBag,
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    pooling: Pooling,
    needs: Needs,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_rows [B, R, D], d_bag [T, D] of the bag's type, d_bias [T]; None where not needed."""
    kind = accumulation_type(bag.dtype)
    d_results = PooledBag(*(tensor.to(kind).contiguous() for tensor in d_results))
    # rounded as the kernel's products round it: the two must cancel
    rounded = d_results.pooled
    if rounds_products(bag.dtype, isa):
        rounded = rounded.to(bag.dtype).to(kind)
    delta = weighted_gradient(rounded, d_results, results)
    d_rows = bag.new_empty(rows.shape, dtype=kind) if needs.rows else None
    overlapping, covering = coverage(pooling.starts, pooling.lengths, bag.shape[0])
    make = torch.empty if covering else torch.zeros
    # sums of overlapping bags are rounded once, at the end
    d_bag_type = kind if overlapping else bag.dtype
    d_bag = make(bag.shape, dtype=d_bag_type) if needs.bag else None
    d_bias = make(bag.shape[0], dtype=kind) if needs.bias else None
    arguments, alive = _arguments(rows, bag, bias, pooling, isa)
    lse, delta = results.lse.contiguous(), delta.contiguous()
    d_logit_sum = torch.empty_like(lse)
    arguments |= {
        "d_logit_sum": address(d_logit_sum),
        "lse": address(lse),
        "delta": address(delta),
        "d_pooled": address(d_results.pooled),
        "d_weight_sum": address(d_results.weight_sum),
        "d_rows": address(d_rows),
        "d_bag": address(d_bag),
        "d_bias": address(d_bias),
        "d_bag_type": ELEMENT_TYPES[d_bag_type],
        "overlapping": overlapping,
    }
    native_core().pool_bag_backward(arguments)
    del alive
    if d_rows is not None:
        balance_rows(d_rows, d_logit_sum, d_results.lse, results.pooled, pooling.scale)
    return d_rows, None if d_bag is None else d_bag.to(bag.dtype), d_bias


def _arguments(
    rows: Tensor, bag: Tensor, bias: Tensor | None, pooling: Pooling, isa: str
) -> tuple[dict, list]:
    """The launcher's arguments, and the tensors that must outlive the call."""
    kind = accumulation_type(bag.dtype)
    rows = rows.to(kind).contiguous()
    bias, mean, rstd = (
        None if tensor is None else tensor.to(kind).contiguous()
        for tensor in (bias, pooling.mean, pooling.rstd)
    )
    starts, lengths = pooling.starts.contiguous(), pooling.lengths.contiguous()
    n_bags, n_rows, dim = rows.shape
    n_threads = torch.get_num_threads()
    element = ELEMENT_TYPES[bag.dtype]
    memory = workspace(
        native_core().pool_bag_workspace(n_bags, n_rows, dim, pooling.total, element, n_threads)
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
        "scale": pooling.scale,
        "normalize": pooling.normalize,
        "eps": pooling.eps,
        "dropout_p": 0.0 if pooling.seed is None else pooling.dropout_p,
        "seed": 0 if pooling.seed is None else int(pooling.seed),
        "workspace": address(memory),
        "n_threads": n_threads,
        "isa": CPU_ISAS.index(isa),
    }
    return arguments, [rows, bias, mean, rstd, starts, lengths, memory]
