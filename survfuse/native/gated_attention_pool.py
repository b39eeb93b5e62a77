"""`gated_attention_pool` on the CPU by the native core (csrc/cpu/gated_attention_pool.cpp).

Contract: survfuse/ops/gated_attention_pool.py.  Oracle: survfuse/reference/gated_attention_pool.py.
Math: docs/math.md, "Gated attention pooling".
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
    workspace,
)
from survfuse.pooling import Gate, GatedBag, GatedNeeds, Pooling, accumulation_type


def gated_attention_pool_forward(
    bag: Tensor, gate: Gate, bias: Tensor | None, pooling: Pooling, *, isa: str = "auto"
) -> GatedBag:
    """Results of the accumulation type."""
    kind = accumulation_type(bag.dtype)
    shape = (pooling.starts.shape[0], gate.w_score.shape[0])
    # a bag without rows is no work: its results stand here already
    pooled = torch.zeros((*shape, bag.shape[1]), dtype=kind)
    lse = torch.full(shape, -torch.inf, dtype=kind)
    arguments, alive = _arguments(bag, gate, bias, pooling, isa, backward=False)
    arguments |= {"pooled": address(pooled), "lse": address(lse)}
    native_core().gated_attention_pool_forward(arguments)
    del alive
    return GatedBag(pooled, lse)


def gated_attention_pool_backward(
    d_results: GatedBag,
    results: GatedBag,
    bag: Tensor,
    gate: Gate,
    bias: Tensor | None,
    pooling: Pooling,
    needs: GatedNeeds,
    *,
    isa: str = "auto",
) -> tuple[Tensor | None, ...]:
    """The gradients of the bag, of the six parameters and of the bias; None where not needed."""
    kind = accumulation_type(bag.dtype)
    d_pooled, d_lse = (tensor.to(kind).contiguous() for tensor in d_results)
    lse = results.lse.contiguous()
    delta = (d_pooled * results.pooled).sum(-1) - d_lse
    overlapping, covering = coverage(pooling.starts, pooling.lengths, bag.shape[0])
    make = torch.empty if covering else torch.zeros
    # sums of overlapping bags are rounded once, at the end
    d_bag_type = kind if overlapping else bag.dtype
    d_bag = make(bag.shape, dtype=d_bag_type) if needs.bag else None
    d_bias = make(bag.shape[0], dtype=kind) if needs.bias else None
    d_gate = {
        f"d_{name}": torch.empty(tensor.shape, dtype=kind)
        if tensor is not None and getattr(needs, name)
        else None
        for name, tensor in gate._asdict().items()
        if name != "b_score"
    }
    arguments, alive = _arguments(bag, gate, bias, pooling, isa, backward=True)
    arguments |= {name: address(tensor) for name, tensor in d_gate.items()}
    arguments |= {
        "lse": address(lse),
        "delta": address(delta),
        "d_pooled": address(d_pooled),
        "d_bag": address(d_bag),
        "d_bias": address(d_bias),
        "d_bag_type": ELEMENT_TYPES[d_bag_type],
        "overlapping": overlapping,
    }
    native_core().gated_attention_pool_backward(arguments)
    del alive
    d_b_score = None
    if needs.b_score:
        # the gradients of a pool's logits sum to that of its lse
        d_b_score = torch.where(lse == -torch.inf, 0.0, d_lse).sum(0)
    d_bag = None if d_bag is None else d_bag.to(bag.dtype)
    return d_bag, *d_gate.values(), d_b_score, d_bias


def _arguments(
    bag: Tensor, gate: Gate, bias: Tensor | None, pooling: Pooling, isa: str, *, backward: bool
) -> tuple[dict, list]:
    """The launcher's arguments, and the tensors that must outlive the call."""
    kind = accumulation_type(bag.dtype)
    tensors = {
        name: None if tensor is None else tensor.to(kind).contiguous()
        for name, tensor in (*gate._asdict().items(), ("bias", bias))
    }
    tensors["starts"] = pooling.starts.contiguous()
    tensors["lengths"] = pooling.lengths.contiguous()
    n_pools, n_hidden = gate.w_score.shape
    arguments = {name: address(tensor) for name, tensor in tensors.items()}
    arguments |= {
        "bag": address(bag),
        "bag_type": ELEMENT_TYPES[bag.dtype],
        "bag_stride": bag.stride(0),
        "n_bags": pooling.starts.shape[0],
        "dim": bag.shape[1],
        "n_hidden": n_hidden,
        "n_pools": n_pools,
        "dropout_p": 0.0 if pooling.seed is None else pooling.dropout_p,
        "seed": 0 if pooling.seed is None else int(pooling.seed),
        "workspace": 0,
        "n_threads": torch.get_num_threads(),
        "isa": CPU_ISAS.index(isa),
    }
    memory = workspace(native_core().gated_attention_pool_workspace(arguments, backward))
    arguments["workspace"] = address(memory)
    return arguments, [*tensors.values(), memory]
