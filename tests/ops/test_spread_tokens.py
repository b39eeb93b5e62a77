"""Patches attending to a few tokens: refusals, types, and the two ways of forming queries."""

from __future__ import annotations

import re

import pytest
import torch

from survfuse import Ragged, ops
from survfuse.native.core import native_core

B, T, D, H, LK, HEAD, DV = 2, 9, 4, 2, 3, 5, 7
RAGGED = Ragged.from_ranges([0, 4], [4, 5])
SPREAD = {
    "keys": torch.zeros(B, H, LK, D),
    "values": torch.zeros(B, H, LK, DV),
    "bag": torch.zeros(T, D),
    "key_bias": torch.zeros(B, H, LK),
    "ragged": RAGGED,
    "stats": (torch.zeros(T), torch.ones(T)),
    "normalize_eps": 1e-5,
}
ATTEND = {
    "bag": torch.zeros(T, D),
    "w_q": torch.zeros(H, HEAD, D),
    "key": torch.zeros(B, LK, H, HEAD),
    "value": torch.zeros(B, LK, H, DV),
    "b_q": torch.zeros(H, HEAD),
    "norm_weight": torch.ones(D),
    "norm_bias": torch.zeros(D),
    "key_bias": torch.zeros(B, LK),
    "ragged": RAGGED,
}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bag": None}, TypeError, "bag is NoneType; it must be a tensor"),
        ({"keys": [1.0]}, TypeError, "keys is list"),
        ({"keys": torch.zeros(B, H, LK, D + 1)}, ValueError, "keys has shape (2, 2, 3, 5)"),
        ({"keys": torch.zeros(B, H, LK, D).int()}, TypeError, "keys is torch.int32"),
        ({"values": torch.zeros(B, H, LK + 1, DV)}, ValueError, "must be [2, 2, 3, dv]"),
        ({"values": torch.zeros(B, H + 1, LK, DV)}, ValueError, "must be [2, 2, 3, dv]"),
        (
            {"values": torch.zeros(B, H, LK, DV).half()},
            TypeError,
            "values is torch.float16; it must have the type of keys, torch.float32, or of the bag",
        ),
        ({"key_bias": torch.zeros(B, LK)}, ValueError, "key_bias has shape (2, 3)"),
        ({"ragged": Ragged.from_ranges([0, 4], [4, 6])}, ValueError, "bag 1 is rows 4 to 10"),
        ({"ragged": Ragged.from_ranges([0], [4])}, ValueError, "ragged has 1 bags"),
        ({"stats": (torch.zeros(T), torch.zeros(T + 1))}, ValueError, "stats"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
        ({"normalize_eps": -1.0}, ValueError, "normalize_eps is -1.0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_of_spread_tokens_are_named(changes: dict, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        ops.spread_tokens(**(SPREAD | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bag": torch.zeros(T)}, ValueError, "bag has shape (9,)"),
        ({"w_q": torch.zeros(H, HEAD, D + 1)}, ValueError, "w_q has shape (2, 5, 5)"),
        ({"w_q": torch.zeros(H, 0, D)}, ValueError, "its heads need at least 1 channel"),
        ({"key": torch.zeros(B, LK, H + 1, HEAD)}, ValueError, "must be [B, Lk, 2, 5]"),
        ({"value": torch.zeros(B, LK, H + 1, DV)}, ValueError, "must be [2, 3, 2, dv]"),
        ({"value": torch.zeros(B, LK + 1, H, DV)}, ValueError, "must be [2, 3, 2, dv]"),
        ({"b_q": torch.zeros(HEAD)}, ValueError, "b_q has shape (5,)"),
        ({"norm_weight": torch.ones(D + 1)}, ValueError, "norm_weight has shape (5,)"),
        ({"key_bias": torch.zeros(B, H, LK)}, ValueError, "key_bias has shape (2, 2, 3)"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps is -1.0"),
        ({"ragged": Ragged.from_ranges([0], [4])}, ValueError, "ragged has 1 bags"),
        ({"scale": float("inf")}, ValueError, "scale is inf; it must be finite"),
        ({"dropout_p": -0.5}, ValueError, "dropout_p is -0.5"),
        ({"absorb": "sometimes"}, ValueError, "absorb is 'sometimes'; it must be one of"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_of_bag_attends_tokens_are_named(changes: dict, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        ops.bag_attends_tokens(**(ATTEND | changes))


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_values_of_the_bags_type_give_results_of_it(backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    keys, values, bag = (
        torch.randn(*shape, generator=g) for shape in ((1, 2, 3, 8), (1, 2, 3, 6), (11, 8))
    )
    bag = bag.bfloat16()
    wide = ops.spread_tokens(keys, values.bfloat16().float(), bag, backend=backend)
    narrow = ops.spread_tokens(keys, values.bfloat16().requires_grad_(), bag, backend=backend)
    assert wide.out.dtype == torch.float32
    assert narrow.out.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.out.float(), wide.out, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(narrow.lse, wide.lse)


@pytest.mark.skipif(native_core() is None, reason="the native core was not built")
@pytest.mark.parametrize("n_tokens", [31, 32, 70])
@pytest.mark.parametrize("n_rows", [63, 64, 129, 700])
def test_products_by_panels_and_without_agree(n_tokens: int, n_rows: int) -> None:
    """From 32 tokens on the products go by panels of whole tiles; their edges are here."""
    g = torch.Generator().manual_seed(2)
    shapes = ((1, 1, n_tokens, 72), (1, 1, n_tokens, 136), (n_rows, 72))
    made = [torch.randn(*s, generator=g, dtype=torch.double).requires_grad_() for s in shapes]
    up = torch.randn(n_rows, 1, 136, generator=g, dtype=torch.double)
    outs = []
    for backend in ("reference", "native"):
        out, lse = ops.spread_tokens(*made, scale=0.1, backend=backend)
        total = (out * up).sum() + lse.sum()
        outs.append([out, lse, *torch.autograd.grad(total, made)])
    for got, expected in zip(outs[1], outs[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
