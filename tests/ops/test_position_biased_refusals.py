"""Attention biased by position: what is refused and in which words, and who serves what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from survfuse import Ragged, ops
from survfuse.ops import position_bias
from survfuse.ops.selection import selected_backend
from tests.ops.position_biased import EXACT_CASES, Case, make

B, L, M, H, G, D = 2, 5, 7, 2, 2, 8
MLP = ((torch.zeros(16, 2), torch.zeros(16)), (torch.zeros(1, 16), torch.zeros(1)))


def arguments(**replaced) -> dict:
    made = {
        "query": torch.zeros(B, L, H, D),
        "key": torch.zeros(B, M, H, D),
        "value": torch.zeros(B, M, H, D),
        "query_pos": torch.zeros(B, L, 2),
        "key_pos": torch.zeros(B, G, M, 2),
        "mlp": MLP,
    }
    return made | replaced


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"query": None}, TypeError, "query is NoneType; it must be a tensor"),
        ({"key": [1.0]}, TypeError, "key is list; it must be a tensor"),
        ({"key": torch.zeros(M, H, D)}, ValueError, r"key has shape .* must be \[B, M, H, d\]"),
        ({"key": torch.zeros(B, M, H, 0)}, ValueError, "key .* needs a head and a channel"),
        ({"query": torch.zeros(B, L, H, D + 1)}, ValueError, r"query .* must be \[B, Lq, 2, 8\]"),
        ({"query": torch.zeros(3)}, ValueError, r"be \[T, 2, 8\], or dense \[B, Lq, H, d\]"),
        (
            {"query": torch.zeros(L, H, D), "query_pos": torch.zeros(L, 2)},
            ValueError,
            r"query holds 1 bags, .* same number; without query_ragged, packed rows are one bag",
        ),
        (
            {"query": torch.zeros(B + 1, L, H, D)},
            ValueError,
            "query holds 3 bags, the other arguments 2; they must have the same number$",
        ),
        ({"value": torch.zeros(B, M + 1, H, D)}, ValueError, r"value .* must be \[2, 7, 2, dv\]"),
        ({"value": torch.zeros(B, M, H, D).half()}, TypeError, "value is torch.float16 and key"),
        ({"query": torch.zeros(B, L, H, D).double()}, TypeError, "query is torch.float64 and key"),
        ({"query_pos": torch.zeros(B, L, 3)}, ValueError, r"query_pos .* must be \[2, 5, 2\]"),
        ({"query_pos": torch.zeros(L + 1, 2)}, ValueError, r"query_pos .* must be \[5, 2\]"),
        ({"query_pos": torch.zeros(B, L, 2).half()}, TypeError, "query_pos is .* 16 bits lose"),
        (
            {"key_pos": torch.zeros(B, G, M, 2).double()},
            TypeError,
            r"key_pos .* be torch.float32 beside a key of torch.float32$",
        ),
        ({"key_pos": torch.zeros(B, 3, M, 2)}, ValueError, "key_pos .* 3 groups must divide the 2"),
        ({"key_pos": torch.zeros(B, 0, M, 2)}, ValueError, "key_pos .* 0 groups must divide"),
        ({"key_pos": torch.zeros(B, M, 2)}, ValueError, r"key_pos .* must be \[2, G, 7, 2\]"),
        ({"mlp": None}, TypeError, "mlp is NoneType; it must be a tuple"),
        ({"mlp": ()}, TypeError, "mlp is empty; it must be a tuple"),
        ({"mlp": (MLP[0], MLP[1][0])}, TypeError, r"mlp\[1\] is Tensor; it must be a pair"),
        ({"mlp": (MLP[0], (*MLP[1], 1))}, TypeError, r"mlp\[1\] is 3 of them; it must be a pair"),
        ({"mlp": (MLP[1],)}, ValueError, r"mlp\[0\] weight .* must be \[out, 2\]"),
        ({"mlp": (MLP[0],)}, ValueError, r"mlp\[0\] weight .* one output for each head"),
        ({"mlp": (MLP[0], (MLP[1][0], MLP[0][1]))}, ValueError, r"mlp\[1\] bias .* must be \[1\]"),
        (
            {"mlp": ((torch.zeros(0, 2), torch.zeros(0)), (torch.zeros(1, 0), torch.zeros(1)))},
            ValueError,
            "a layer needs a unit",
        ),
        ({"query_ragged": (0, 1)}, ValueError, "query_ragged is given"),
        ({"bias": "linear"}, ValueError, 'bias is \'linear\'; it must be "exact" or "table"'),
        ({"table_size": 2.5}, TypeError, "table_size is 2.5; it must be an integer"),
        ({"table_size": 1}, ValueError, "table_size is 1; it must be from 2 to 16384"),
        ({"table_size": 16385}, ValueError, "table_size is 16385; it must be from 2"),
        ({"table_range": 0.0}, ValueError, "table_range is 0.0; it must be positive and finite"),
        ({"table_range": "far"}, TypeError, "table_range is 'far'; it must be a number"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_are_named(changed: dict, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ops.position_biased_attention(**arguments(**changed))


@pytest.mark.parametrize("bias", ["exact", "table"])
def test_meta_tensors_tell_the_shape(bias: str) -> None:
    moved = {name: t.to("meta") for name, t in arguments().items() if name != "mlp"}
    mlp = [(weight.to("meta"), shift.to("meta")) for weight, shift in MLP]
    out = ops.position_biased_attention(**moved, mlp=mlp, bias=bias)
    assert out.is_meta
    assert out.shape == (B, L, H, D)
    with pytest.raises(RuntimeError, match=r"'reference' cannot serve .* meta hold no numbers"):
        ops.position_biased_attention(**moved, mlp=mlp, bias=bias, backend="reference")


@pytest.mark.parametrize(
    ("position", "bias", "finite"),
    [
        (torch.nan, "exact", False),
        (torch.nan, "table", False),
        (torch.inf, "table", True),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference", "tiled"])
def test_positions_that_are_not_finite(position, bias, finite, backend) -> None:
    call = make(EXACT_CASES[0]).to(torch.float32)
    call.tensors["key_pos"].data[:, :, 0, 0] = position
    out = call.run(backend, bias=bias)[0]
    assert bool(out.isfinite().all()) == finite
    assert bool(out.isnan().all()) != finite


def test_a_numpy_integer_is_a_table_size() -> None:
    sizes = (8, np.int64(8), np.int32(8))
    outs = [ops.position_biased_attention(**arguments(bias="table", table_size=n)) for n in sizes]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("backend", [None, "reference", "tiled"])
def test_ranges_outside_the_queries_are_named(backend: str | None) -> None:
    packed = arguments(query=torch.zeros(L, H, D), query_pos=torch.zeros(L, 2))
    ranges = Ragged.from_ranges([0, 2], [3, 4])
    with pytest.raises(ValueError, match="query_ragged: bag 1 is rows 2 to 6"):
        ops.position_biased_attention(**packed, query_ragged=ranges, backend=backend)


@pytest.mark.parametrize("widths", [(), (16, 16, 16, 16), (65,)], ids=str)
def test_an_mlp_no_kernel_serves_runs_on_tiles(widths: tuple[int, ...]) -> None:
    call = make(Case("other mlp", widths=widths)).to(torch.float32)
    expected = call.run("tiled")
    assert all(torch.equal(a, b) for a, b in zip(call.run(None), expected, strict=True))
    for a, b in zip(expected, call.run("reference"), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="backend='native' cannot serve this call: "):
        call.run("native")
    table = call.run(None, bias="table")
    assert bool(table[0].isfinite().all())


def test_which_backend_would_run() -> None:
    call = make(EXACT_CASES[0]).to(torch.float32)
    tensors = list(call.tensors.values())[:3]
    assert (
        selected_backend("position_biased_attention", *tensors, backend="tiled").backend == "tiled"
    )
    assert selected_backend("position_biased_attention", *tensors).backend in ("native", "tiled")
    with pytest.raises(TypeError, match="key is list; it must be a tensor"):
        selected_backend("position_biased_attention", tensors[0], [1], tensors[2])


@pytest.mark.parametrize(
    ("dtype", "hidden", "backend"),
    [
        (torch.float32, (3, 64), "tiled"),
        (torch.float32, (2, 64), "triton"),
        (torch.float32, (3, 32), "triton"),
        (torch.bfloat16, (3, 64), "triton"),
    ],
)
def test_a_gpu_with_little_shared_memory(
    dtype: torch.dtype, hidden: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position_bias, "backend_obstacle", lambda *_, **__: None)
    monkeypatch.setattr(position_bias, "_shared_bytes", lambda _: 163 * 2**10)
    selection = position_bias.select_biased_backend(
        None,
        ("tiled", "triton"),
        device=torch.device("cuda"),
        dtype=dtype,
        head_dim=64,
        hidden=hidden,
    )
    assert selection.backend == backend
    if backend == "tiled":
        assert "takes 224 KB of shared memory, this GPU has 163" in selection.reason
