"""Arguments of several types in one call: fp64 tables beside fp32 bags are what a loader hands out.

No op may read or write numbers of one type as those of another. Those of deformable attention
refuse several types.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.native.core import ELEMENT_TYPES, address, native_core
from survfuse.native.spread_tokens import _arguments
from survfuse.ops.registration import make_pooling

RAGGED = Ragged.from_lengths([40, 0, 33])
TYPES = (torch.float64, torch.float32, torch.bfloat16)
Call = Callable[[list[Tensor], list[Tensor], str], Tensor]


def cross_few(few: list[Tensor], many: list[Tensor], backend: str) -> Tensor:
    key, value = many[0].unflatten(1, (2, 3)), many[1].unflatten(1, (2, 3))
    query = few[0].unflatten(2, (2, 3))
    return ops.cross_attention(query, key, value, key_ragged=RAGGED, backend=backend)


def cross_many(few: list[Tensor], many: list[Tensor], backend: str) -> Tensor:
    query = many[0][:72].view(3, 24, 2, 3)
    key, value = few[0].unflatten(2, (2, 3)), few[1].unflatten(2, (2, 3))
    return ops.cross_attention(query, key, value, backend=backend)


def cross_packed(few: list[Tensor], many: list[Tensor], backend: str) -> Tensor:
    key, value = few[0].unflatten(2, (2, 3)), few[1].unflatten(2, (2, 3))
    query = many[0].unflatten(1, (2, 3))
    return ops.cross_attention(query, key, value, query_ragged=RAGGED, backend=backend)


CALLS: dict[str, Call] = {
    "pool_bag": lambda few, many, backend: (
        ops.pool_bag(few[0], many[0], ragged=RAGGED, backend=backend).pooled
    ),
    "pool_bag, normalised": lambda few, many, backend: (
        ops.pool_bag(few[0], many[0], ragged=RAGGED, normalize_eps=1e-5, backend=backend).pooled
    ),
    "tokens_attend_bag": lambda few, many, backend: ops.tokens_attend_bag(
        few[0].unflatten(2, (2, 3)), many[0], few[3], few[4], ragged=RAGGED, backend=backend
    ),
    "tokens_attend_bag, formed": lambda few, many, backend: ops.tokens_attend_bag(
        few[0].unflatten(2, (2, 3)),
        many[0],
        few[3],
        few[4],
        ragged=RAGGED,
        absorb="never",
        backend=backend,
    ),
    "bag_attends_tokens": lambda few, many, backend: ops.bag_attends_tokens(
        many[0],
        few[3],
        few[0].unflatten(2, (2, 3)),
        few[1].unflatten(2, (2, 3)),
        ragged=RAGGED,
        backend=backend,
    ),
    "spread_tokens": lambda few, many, backend: (
        ops.spread_tokens(
            few[0][:, None], few[1][:, None], many[0], ragged=RAGGED, backend=backend
        ).out
    ),
    "gated_attention_pool": lambda few, many, backend: (
        ops.gated_attention_pool(
            many[0],
            few[2],
            few[2][:, 0],
            few[2] * 0.5,
            few[2][:, 1],
            few[2].mT[:1],
            few[2][0, :1],
            ragged=RAGGED,
            backend=backend,
        ).pooled
    ),
    "cross_attention, few queries": cross_few,
    "cross_attention, few keys": cross_many,
    "cross_attention, few keys, packed": cross_packed,
}


def tensors(few: torch.dtype, many: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(3, 2, 6), (3, 2, 6), (5, 6), (2, 3, 6), (2, 3, 6)]
    small = [torch.randn(shape).to(few).requires_grad_() for shape in shapes]
    return small, [torch.randn(73, 6).to(many).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("op", CALLS)
def test_types_beside_each_other(op: str, backend: str) -> None:
    if backend == "native" and native_core() is None:
        pytest.skip("the native core is not built")
    for few_type in TYPES:
        for many_type in TYPES:
            if few_type == many_type:
                continue
            rough = torch.bfloat16 in (few_type, many_type)
            found = []
            for chosen in (backend, "reference"):
                few, many = tensors(few_type, many_type)
                out = CALLS[op](few, many, chosen)
                weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64)
                (out.double().flatten() * weights).sum().backward()
                leaves = [leaf.grad for leaf in (*few, *many) if leaf.grad is not None]
                found.append((out.detach(), leaves))
            (out, gradients), (expected, exact) = found
            message = f"{few_type} beside {many_type}"
            assert out.dtype == expected.dtype, message
            close = {"rtol": 0.05, "atol": 0.05} if rough else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(out, expected, **close, msg=message)
            assert len(gradients) == len(exact), message
            for gradient, wanted in zip(gradients, exact, strict=True):
                assert gradient.dtype == wanted.dtype
                torch.testing.assert_close(gradient, wanted, **close, msg=message)


def test_the_native_core_refuses_what_it_cannot_write() -> None:
    """Whoever calls the launchers with other types is told, instead of losing memory."""
    if native_core() is None:
        pytest.skip("the native core is not built")
    bag, keys = torch.randn(73, 6), torch.randn(3, 1, 2, 6)
    out, lse = torch.empty(73, 1, 6, dtype=torch.float64), torch.empty(73, 1)
    pooling = make_pooling(RAGGED, 1.0, None, None, 0.0, None)
    arguments = _arguments(keys, keys, bag, None, pooling, "auto")[0]
    arguments.set(out=address(out), out_type=ELEMENT_TYPES[out.dtype], lse=address(lse))
    with pytest.raises(ValueError, match="out is fp64 beside other keys; rows are written in"):
        native_core().cross_attention_forward(arguments.values)
