"""`cross_attention`: bad input, and input that is odd but right."""

from __future__ import annotations

import importlib.util
import itertools
import re
import time

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import survfuse.tiled.tiles as tiles
from survfuse import Ragged, ops
from survfuse.ops.backends import backend_obstacle
from tests.ops.contract import CASES, OPS, Case
from tests.ops.test_contract import grads_and_results
from tests.ops.tolerance import assert_within_budget

CPU = torch.device("cpu")
B, LQ, H, D, DV, TK, TQ = 2, 3, 2, 5, 6, 9, 11
KEYS, QUERIES = Ragged.from_lengths([4, 5]), Ragged.from_lengths([6, 5])
ATTENTION = [op for op in OPS if op.registered == "cross_attention"]
MODULES = importlib.import_module("survfuse.ops.cross_attention")._MODULES


def serves(backend: str) -> bool:
    obstacle = backend_obstacle(backend, device=CPU, dtype=torch.float64)
    return importlib.util.find_spec(MODULES[backend]) is not None and obstacle is None


BACKENDS = ["tiled", *(["native"] if serves("native") else [])]
streamed = pytest.mark.parametrize("backend", BACKENDS)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


pytestmark = pytest.mark.usefixtures("one_thread")


CALL = {
    "query": torch.zeros(B, LQ, H, D),
    "key": torch.zeros(TK, H, D),
    "value": torch.zeros(TK, H, DV),
    "bias": torch.zeros(TK),
    "key_ragged": KEYS,
}
LONG = {"query": torch.zeros(TQ, H, D), "query_ragged": QUERIES}
LONG |= {"key": torch.zeros(B, 4, H, D), "value": torch.zeros(B, 4, H, DV)}
LONG |= {"bias": torch.zeros(B, 4), "key_ragged": None}


def ranges(starts: list[int], lengths: list[int]) -> Ragged:
    """As nobody would get them from a constructor."""
    tensors = torch.tensor(starts), torch.tensor(lengths)
    return Ragged(*tensors, sum(lengths), max(lengths))


BAD = {
    "query": ({"query": None}, TypeError, "query is NoneType; it must be a tensor"),
    "key": ({"key": [0.0]}, TypeError, "key is list; it must be a tensor"),
    "value": ({"value": 1.0}, TypeError, "value is float; it must be a tensor"),
    "bias": ({"bias": [0.0] * TK}, TypeError, "bias is list; it must be a tensor"),
    "query dims": (
        {"query": torch.zeros(D)},
        ValueError,
        "query has shape (5,); it must be [L, H, d]",
    ),
    "key dims": (
        {"key": torch.zeros(TK, D)},
        ValueError,
        "key has shape (9, 5); it must be [Tk, 2, 5]",
    ),
    "heads": (
        {"key": torch.zeros(TK, H + 1, D)},
        ValueError,
        "key has shape (9, 3, 5); it must be [Tk, 2, 5]",
    ),
    "head size": (
        {"query": torch.zeros(B, LQ, H, D + 1)},
        ValueError,
        "key has shape (9, 2, 5); it must be [Tk, 2, 6]",
    ),
    "no channels": (
        {"query": torch.zeros(B, LQ, H, 0)},
        ValueError,
        "query has shape (2, 3, 2, 0); its heads need at least 1 channel",
    ),
    "heads of values": (
        {"value": torch.zeros(TK, H + 1, DV)},
        ValueError,
        "value has shape (9, 3, 6); it must be [9, 2, dv]",
    ),
    "rows of values": (
        {"value": torch.zeros(TK - 1, H, DV)},
        ValueError,
        "value has shape (8, 2, 6); it must be [9, 2, dv]",
    ),
    "rows of bias": (
        {"bias": torch.zeros(TK + 1)},
        ValueError,
        "bias has shape (10,); it must be [9]",
    ),
    "dense bias": (
        LONG | {"bias": torch.zeros(B * 4)},
        ValueError,
        "bias has shape (8,); it must be [2, 4]",
    ),
    "types": (
        {"value": torch.zeros(TK, H, DV).bfloat16()},
        TypeError,
        "value is torch.bfloat16 and key torch.float32; they must have one type",
    ),
    "integers": (
        {"query": torch.zeros(B, LQ, H, D).long()},
        TypeError,
        "query is torch.int64; it must be bf16, fp16, fp32 or fp64",
    ),
    **{
        f"{name} elsewhere": (
            {name: CALL[name].to("meta")},
            ValueError,
            f"{name} is on meta and the key on cpu; move one of them",
        )
        for name in ("query", "value", "bias")
    },
    "ranges elsewhere": (
        {"key_ragged": Ragged(*(t.to("meta") for t in KEYS[:2]), *KEYS[2:])},
        ValueError,
        "key_ragged.starts is on meta and key on cpu; they must be on one device",
    ),
    "bags": (
        {"key_ragged": KEYS.select([0])},
        ValueError,
        "query holds 2 bags, the other arguments 1; they must have the same number",
    ),
    "one bag": ({"key_ragged": None}, ValueError, "query holds 2 bags, the other arguments 1"),
    "not ragged": (
        {"key_ragged": [4, 5]},
        TypeError,
        "key_ragged is list; it must be a survfuse.Rag",
    ),
    "dense and ragged": (
        CALL | {"query_ragged": QUERIES},
        ValueError,
        "query has shape (2, 3, 2, 5) and query_ragged is given; a dense [B, L, H, d] takes",
    ),
    "beyond": (
        {"key_ragged": ranges([0, 5], [4, 5])},
        ValueError,
        "key_ragged: bag 1 is rows 5 to 10",
    ),
    "before": (
        {"key_ragged": ranges([-1, 4], [4, 5])},
        ValueError,
        "key_ragged: bag 0 is rows -1 to 3",
    ),
    "negative": ({"key_ragged": ranges([0, 4], [4, -2])}, ValueError, "bag 1 is rows 4 to 2"),
    "far beyond": (
        {"key_ragged": ranges([0, 2**63 - 1], [4, 5])},
        ValueError,
        "key_ragged: bag 1 is rows 9223372036854775807 to",
    ),
    "wrong total": (
        {"key_ragged": KEYS._replace(total=8)},
        ValueError,
        "key_ragged: total and max_length are 8 and 5, but the lengths give 9 and 5",
    ),
    "queries beyond": (
        LONG | {"query_ragged": ranges([0, 7], [6, 5])},
        ValueError,
        "query_ragged: bag 1 is rows 7 to 12",
    ),
    **{
        f"dropout {p}": (
            {"dropout_p": p},
            ValueError,
            f"dropout_p is {p}; it must be at least 0 and below 1",
        )
        for p in (-0.1, 1.0, 1.5, float("nan"), float("inf"))
    },
    "dropout type": ({"dropout_p": "0.1"}, TypeError, "dropout_p is '0.1'; it must be a number"),
    "scale": ({"scale": float("inf")}, ValueError, "scale is inf; it must be finite"),
    "scale type": ({"scale": True}, TypeError, "scale is True; it must be a number"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; it must be None or one of"),
}


@every_backend
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, backend: str) -> None:
    changes, kind, message = BAD[case]
    for function in (ops.cross_attention, ops.cross_attention_with_lse):
        with pytest.raises(kind, match=re.escape(message)):
            function(**({"backend": backend} | CALL | changes))


@every_backend
@pytest.mark.parametrize("arguments", [CALL, LONG], ids=["few", "many"])
def test_the_calls_of_this_file_are_right(arguments: dict, backend: str) -> None:
    out, lse = ops.cross_attention_with_lse(**arguments, backend=backend)
    assert not bool(out.any())
    assert bool(lse.isfinite().all())


def leaves(*shapes: tuple[int, ...], dtype=torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


@every_backend
def test_all_keys_masked_give_nothing(backend: str) -> None:
    query, key, value = leaves((B, LQ, H, D), (TK, H, D), (TK, H, DV))
    bias = torch.zeros(TK, dtype=torch.float64)
    bias[:4] = -torch.inf
    with torch.no_grad():
        key[:4], value[:4] = torch.nan, torch.inf
    bias.requires_grad_()
    out, lse = ops.cross_attention_with_lse(
        query, key, value, bias=bias, key_ragged=KEYS, backend=backend
    )
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[0] == -torch.inf).all())
    assert bool(lse[1].isfinite().all())
    gradients = torch.autograd.grad(out.sum() + lse.sum(), [query, key, value, bias])
    for gradient, part in zip(gradients, (0, slice(4), slice(4), slice(4))):
        assert not bool(gradient.isnan().any())
        assert not bool(gradient[part].any())


@streamed
def test_infinite_gradients_do_not_reach_what_is_masked(backend: str) -> None:
    query, key, value = leaves((1, LQ, H, D), (TK, H, D), (TK, H, DV))
    bias = torch.zeros(TK, dtype=torch.float64)
    bias[[1, 4]] = -torch.inf
    out = ops.cross_attention(query, key, value, bias=bias, backend=backend)
    for gradient in torch.autograd.grad(out, [key, value], torch.full_like(out, torch.inf)):
        assert torch.equal(gradient[[1, 4]], torch.zeros_like(gradient[[1, 4]]))


@streamed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_shared_keys_add_up_in_the_order_of_the_bags(backend: str, dtype) -> None:
    starts, lengths = [3, 0, 3, 1], [5, 8, 5, 4]
    n = len(starts)
    query, key, value, bias = leaves((n, LQ, H, D), (TK, H, D), (TK, H, DV), (TK,), dtype=dtype)
    weight = torch.linspace(-1.0, 2.0, n * LQ * H * DV, dtype=dtype).view(n, LQ, H, DV)

    def gradients(bags: slice) -> tuple[Tensor, ...]:
        out = ops.cross_attention(
            query[bags],
            key,
            value,
            bias=bias,
            key_ragged=Ragged.from_ranges(starts[bags], lengths[bags]),
            backend=backend,
        )
        return torch.autograd.grad((out * weight[bags]).sum(), [key, value, bias])

    expected = [torch.zeros_like(tensor) for tensor in (key, value, bias)]
    for b in range(n):
        for total, gradient in zip(expected, gradients(slice(b, b + 1))):
            total += gradient
    for have, want in zip(gradients(slice(None)), expected):
        assert torch.equal(have, want)


@streamed
def test_gradients_of_the_query_of_one_key_are_exactly_zero(backend: str) -> None:
    """Its weight is 1 whatever is asked: not even rounding may say otherwise."""
    for query, ragged in (((1, LQ, H, D), None), ((TQ, H, D), Ragged.from_lengths([TQ]))):
        query, key, value = leaves(query, (1, H, D), (1, H, DV), dtype=torch.float32)
        keys, values = (key, value) if ragged is None else (key[None], value[None])
        out = ops.cross_attention(query, keys, values, query_ragged=ragged, backend=backend)
        d_query, d_key = torch.autograd.grad(out.sin().sum(), [query, key])
        assert not bool(d_query.any())
        assert not bool(d_key.any())


@streamed
@pytest.mark.parametrize("many", [False, True], ids=["few queries", "many queries"])
def test_a_million_empty_bags_finish_quickly(backend: str, many: bool) -> None:
    n = 1_000_000
    ragged = Ragged.from_lengths(torch.zeros(n, dtype=torch.int64))
    dense, packed = leaves((n, 1, 1, 2), (0, 1, 2), dtype=torch.float32)
    start = time.process_time()
    if many:
        out, lse = ops.cross_attention_with_lse(
            packed, dense, dense, query_ragged=ragged, backend=backend
        )
        assert out.shape == (0, 1, 2)
    else:
        out, lse = ops.cross_attention_with_lse(
            dense, packed, packed, key_ragged=ragged, backend=backend
        )
        assert not bool(out.any())
        assert bool((lse == -torch.inf).all())
    gradients = torch.autograd.grad(out.sum(), [dense, packed])
    # a product per bag, however small, would take minutes
    assert time.process_time() - start < 30.0
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("op", ATTENTION, ids=lambda op: op.name)
@pytest.mark.parametrize("case", [CASES[5], CASES[15]], ids=lambda case: case.name)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_tiles_in_lockstep_match_tiles_bag_by_bag(op, case: Case, dropout_p, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_MAX_ROWS", 16)
    monkeypatch.setattr(tiles, "_MIN_ROWS", 16)
    call = op.make(case).to(torch.float64)
    outs = []
    for known in (True, False):
        monkeypatch.setattr(tiles, "_known_to_host", lambda starts, k=known: k)
        torch.manual_seed(3)
        outs.append(grads_and_results(op, call, "tiled", dropout_p=dropout_p))
    for a, b in zip(itertools.chain(*outs[0]), itertools.chain(*outs[1]), strict=True):
        assert_within_budget("lockstep", b, a, a, torch.float64)


@streamed
def test_operations_are_counted(backend: str) -> None:
    query, key, value = leaves((B, LQ, H, D), (TK, H, D), (TK, H, DV))
    with FlopCounterMode(display=False) as counter:
        out = ops.cross_attention(query, key, value, key_ragged=KEYS, backend=backend)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = TK * LQ * H
    assert forward == 2 * pairs * (D + DV)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * D + 2 * DV)


@every_backend
def test_one_key_per_bag_is_its_value(backend: str) -> None:
    query, key, value = leaves((TQ, H, D), (B, 1, H, D), (B, 1, H, DV))
    out, lse = ops.cross_attention_with_lse(
        query, key, value, query_ragged=QUERIES, backend=backend
    )
    assert torch.equal(out, value[:, 0].repeat_interleave(QUERIES.lengths, 0))
    logit = torch.einsum("nhe,nhe->nh", query, key[:, 0].repeat_interleave(QUERIES.lengths, 0))
    assert_within_budget("lse", lse, lse, D**-0.5 * logit, torch.float64)
