"""`cross_attention_weights`: that they are the weights, in every form of a call."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import survfuse.tiled.tiles as tiles
from survfuse import Ragged, ops
from tests.ops.contract import CASES, OPS, Case
from tests.ops.contract_attention import make_both, make_few, make_many
from tests.ops.test_contract import grads_and_results
from tests.ops.tolerance import assert_within_budget

DOUBLE = {"dtype": torch.float64}
WEIGHTS = [op for op in OPS if op.registered == "cross_attention_weights"]
B, LQ, H, D, LK, TK, TQ = 2, 3, 2, 5, 4, 9, 11
KEYS, QUERIES = Ragged.from_lengths([4, 5]), Ragged.from_lengths([6, 5])
both = pytest.mark.parametrize("backend", ["reference", "tiled"])


def attended(call: dict, value: Tensor) -> tuple[Tensor, Tensor]:
    options = {k: v for k, v in call.items() if k not in ("lse", "reduce")}
    return ops.cross_attention_with_lse(value=value, **options, backend="tiled")


FORMS = {
    "few": (make_few, {"reduce": None}),
    "many": (make_many, {"reduce": None}),
}


@both
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [CASES[5], CASES[8], CASES[14]], ids=lambda case: case.name)
def test_weights_sum_to_one_and_average_the_values(form: str, case: Case, backend: str) -> None:
    tensors, ranges, _ = FORMS[form][0](case)
    value = tensors.pop("value")
    out, lse = attended(tensors | ranges, value)
    weights = ops.cross_attention_weights(**tensors, **ranges, lse=lse, backend=backend)
    value = torch.nan_to_num(value)
    if form == "few":
        ragged = ranges["key_ragged"]
        index = [torch.arange(s, s + n) for s, n in zip(ragged.starts, ragged.lengths)]
        parts = weights.split(ragged.lengths.tolist())
        averaged = [torch.einsum("kqh,khe->qhe", p, value[i]) for p, i in zip(parts, index)]
        sums = torch.stack([part.sum(0) for part in parts])
        averaged = torch.stack(averaged)
    else:
        lengths = ranges["query_ragged"].lengths
        sums = weights.sum(-1)
        averaged = torch.einsum("qhk,qkhe->qhe", weights, value.repeat_interleave(lengths, 0))
    assert_within_budget("sum", sums, sums, (lse > -torch.inf).double(), torch.float64)
    assert_within_budget("average", averaged, out, out, torch.float64)


@both
@pytest.mark.parametrize("make", [make_few, make_many, make_both])
def test_means_are_means(make, backend: str) -> None:
    tensors, ranges, _ = make(CASES[5])
    value = tensors.pop("value")
    _, lse = attended(tensors | ranges, value)

    def weights(reduce: str | None) -> Tensor:
        return ops.cross_attention_weights(
            **tensors, **ranges, lse=lse, reduce=reduce, backend=backend
        )

    mean = weights("rows")
    if make is make_both:
        assert mean.shape == (ranges["key_ragged"].total,)
        sums = torch.stack([p.sum() for p in mean.split(ranges["key_ragged"].lengths.tolist())])
        counts = ranges["query_ragged"].lengths
        shares = torch.stack(
            [
                (p > -torch.inf).double().sum() / max(p.numel(), 1)
                for p in lse.split(counts.tolist())
            ]
        )
        assert_within_budget("sum", sums, shares, shares, torch.float64)
        return
    every, by_head = weights(None), weights("heads")
    if make is make_few:
        assert_within_budget("heads", by_head, every.mean(2), every.mean(2), torch.float64)
        expected = every.mean((1, 2))
    else:
        assert_within_budget("heads", by_head, every.mean(1), every.mean(1), torch.float64)
        parts = every.split(ranges["query_ragged"].lengths.tolist())
        expected = torch.stack([p.sum((0, 1)) / max(p.shape[0] * p.shape[1], 1) for p in parts])
    assert_within_budget("rows", mean, expected, expected, torch.float64)


@pytest.mark.parametrize("reduce", ["heads", "rows"])
@pytest.mark.parametrize("op", WEIGHTS[:2], ids=lambda op: op.name)
def test_gradients_of_means(op, reduce: str) -> None:
    call = op.make(CASES[5]).to(torch.float64)
    got, expected = (
        grads_and_results(op, call, backend, reduce=reduce) for backend in ("tiled", "reference")
    )
    for have, want in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        assert_within_budget(reduce, have, want, want, torch.float64)


@pytest.mark.parametrize("op", WEIGHTS, ids=lambda op: op.name)
@pytest.mark.parametrize("case", [CASES[5], CASES[15]], ids=lambda case: case.name)
def test_tiles_in_lockstep_match_tiles_bag_by_bag(op, case: Case, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_MAX_ROWS", 16)
    monkeypatch.setattr(tiles, "_MIN_ROWS", 16)
    call = op.make(case).to(torch.float64)
    outs = []
    for known in (True, False):
        monkeypatch.setattr(tiles, "_known_to_host", lambda starts, k=known: k)
        outs.append(grads_and_results(op, call, "tiled"))
    for a, b in zip(itertools.chain(*outs[0]), itertools.chain(*outs[1]), strict=True):
        assert_within_budget("lockstep", b, a, a, torch.float64)


@pytest.mark.parametrize("reduce", [None, "heads", "rows"])
def test_no_bags_and_no_rows(reduce: str | None) -> None:
    shapes = {
        "no bags": ((0, LQ, H, D), (0, LK, H, D), {}),
        "no packed bags": ((0, H, D), (0, LK, H, D), {"query_ragged": Ragged.from_lengths([])}),
        "no keys": ((B, LQ, H, D), (0, H, D), {"key_ragged": Ragged.from_lengths([0, 0])}),
        "no queries": ((0, H, D), (B, LK, H, D), {"query_ragged": Ragged.from_lengths([0, 0])}),
    }
    for query, key, options in shapes.values():
        outs = []
        for backend in ("reference", "tiled"):
            lse = torch.zeros(query[:-1])
            outs.append(
                ops.cross_attention_weights(
                    torch.zeros(query),
                    torch.zeros(key),
                    lse,
                    reduce=reduce,
                    backend=backend,
                    **options,
                )
            )
        assert torch.equal(*outs)


def test_the_lse_of_a_merge_gives_weights_within_all_keys() -> None:
    query, keys = torch.randn(1, LQ, H, D, **DOUBLE), torch.randn(2, TK, H, D, **DOUBLE)
    parts = [ops.cross_attention_with_lse(query, key, key, backend="tiled") for key in keys]
    _, lse = ops.merge_attention(*zip(*parts, strict=True))
    together = ops.cross_attention_weights(query, keys.flatten(0, 1), lse)
    apart = torch.cat([ops.cross_attention_weights(query, key, lse) for key in keys])
    assert_within_budget("weights", apart, together, together, torch.float64)
    ones = torch.ones(1, LQ, H, **DOUBLE)
    assert_within_budget("sum", together.sum(0)[None], ones, ones, torch.float64)


def test_operations_are_counted() -> None:
    query = torch.randn(B, LQ, H, D, requires_grad=True)
    key, lse = torch.randn(TK, H, D), torch.zeros(B, LQ, H)
    with FlopCounterMode(display=False) as counter:
        weights = ops.cross_attention_weights(query, key, lse, key_ragged=KEYS)
        forward = counter.get_total_flops()
        weights.sum().backward()
    unit = 2 * TK * LQ * H * D
    assert (forward, counter.get_total_flops()) == (unit, 3 * unit)


CALL = {
    "query": torch.zeros(B, LQ, H, D),
    "key": torch.zeros(TK, H, D),
    "lse": torch.zeros(B, LQ, H),
    "bias": torch.zeros(TK),
    "key_ragged": KEYS,
}
LONG = {"query": torch.zeros(TQ, H, D), "lse": torch.zeros(TQ, H), "query_ragged": QUERIES}
BAD = {
    "lse": ({"lse": torch.zeros(B, LQ)}, ValueError, "lse has shape (2, 3); it must be [2, 3, 2]"),
    "packed lse": (
        LONG | {"lse": torch.zeros(TQ)},
        ValueError,
        "lse has shape (11,); it must be [",
    ),
    "device": ({"lse": CALL["lse"].to("meta")}, ValueError, "lse is on meta and the key on cpu"),
    "heads": (
        {"key": torch.zeros(TK, H + 1, D)},
        ValueError,
        "key has shape (9, 3, 5); it must be",
    ),
    "reduce": ({"reduce": "sum"}, ValueError, "reduce is 'sum'; it must be None, \"rows\" or"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
    "pairs": (
        LONG,
        ValueError,
        'reduce is None; queries and keys that are both packed take "rows"',
    ),
    "mean pairs": (
        LONG | {"reduce": "heads"},
        ValueError,
        "reduce is 'heads'; queries and keys that",
    ),
    "backend": ({"backend": "native"}, RuntimeError, '"tiled" implement cross_attention_weights'),
    "no backend": ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'; it must be None or one"),
    "outside": (
        {"key_ragged": Ragged.from_ranges([0, 5], [4, 5])},
        ValueError,
        "key_ragged: bag 1 is rows 5 to 10",
    ),
    "not ragged": ({"key_ragged": [4, 5]}, TypeError, "key_ragged is list; it must be a survfuse"),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, backend: str) -> None:
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=re.escape(message)):
        ops.cross_attention_weights(**({"backend": backend} | CALL | changes))
