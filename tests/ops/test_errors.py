"""Bad input raises before any kernel starts: the argument, what it was, what it must be."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.ops import backends
from survfuse.ragged import as_packed

B, R, T, D, LQ, H, HEAD, DV = 2, 6, 9, 4, 3, 2, 5, 7
RAGGED = Ragged.from_ranges([0, 4], [4, 5])
POOL = {
    "rows": torch.zeros(B, R, D),
    "bag": torch.zeros(T, D),
    "bias": torch.zeros(T),
    "ragged": RAGGED,
    "stats": (torch.zeros(T), torch.ones(T)),
    "normalize_eps": 1e-5,
}
ATTEND = {
    "query": torch.zeros(B, LQ, H, HEAD),
    "bag": torch.zeros(T, D),
    "w_k": torch.zeros(H, HEAD, D),
    "w_v": torch.zeros(H, DV, D),
    "b_k": torch.zeros(H, HEAD),
    "b_v": torch.zeros(H, DV),
    "norm_weight": torch.ones(D),
    "norm_bias": torch.zeros(D),
    "bias": torch.zeros(T),
    "ragged": RAGGED,
}
WEIGHTS = POOL | {"lse": torch.zeros(B, R)}
ATTEND_WEIGHTS = {k: v for k, v in ATTEND.items() if k not in ("w_v", "b_v")}
ATTEND_WEIGHTS |= {"lse": torch.zeros(B, LQ, H)}
CALLS: dict[str, tuple[Callable, dict]] = {
    "pool_bag": (ops.pool_bag, POOL),
    "pool_weights": (ops.pool_weights, WEIGHTS),
    "tokens_attend_bag": (ops.tokens_attend_bag, ATTEND),
    "tokens_attend_bag_with_lse": (ops.tokens_attend_bag_with_lse, ATTEND),
    "tokens_attend_bag_weights": (ops.tokens_attend_bag_weights, ATTEND_WEIGHTS),
}
every_op = pytest.mark.parametrize("op", CALLS)


def call(op: str, **changes) -> object:
    function, arguments = CALLS[op]
    return function(**(arguments | changes))


def refuses(kind: type[Exception], message: str, op: str, **changes) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call(op, **changes)


def tensors_of(op: str) -> list[str]:
    return [name for name, value in CALLS[op][1].items() if isinstance(value, Tensor)]


TENSORS = [pytest.param(op, name, id=f"{op}-{name}") for op in CALLS for name in tensors_of(op)]
# what the message of each says a shape must be
SHAPES = {
    "rows": ((B, R, D + 1), f"[B, R, {D}]"),
    "query": ((B, LQ, H * HEAD), "[B, Lq, H, d]"),
    "bias": ((T + 1,), f"[{T}]"),
    "w_k": ((H, HEAD, D + 1), f"[{H}, {HEAD}, {D}]"),
    "w_v": ((H + 1, DV, D), f"[{H}, dv, {D}]"),
    "b_k": ((H * HEAD,), f"[{H}, {HEAD}]"),
    "b_v": ((H, DV - 1), f"[{H}, {DV}]"),
    "norm_weight": ((D, 1), f"[{D}]"),
    "norm_bias": ((D + 2,), f"[{D}]"),
}


@every_op
def test_the_calls_of_this_file_are_right(op: str) -> None:
    result = call(op)
    first = result if isinstance(result, Tensor) else result[0]
    assert bool(first.isfinite().all())


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_tensor_argument_must_be_a_tensor(op: str, name: str) -> None:
    value = CALLS[op][1][name].numpy()
    refuses(TypeError, f"{name} is ndarray; it must be a tensor", op, **{name: value})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_tensor_must_be_floating(op: str, name: str) -> None:
    value = CALLS[op][1][name].long()
    message = f"{name} is torch.int64; it must be bf16, fp16, fp32 or fp64"
    refuses(TypeError, message, op, **{name: value})


@pytest.mark.parametrize(("op", "name"), [p for p in TENSORS if p.values[1] != "bag"])
def test_tensors_must_be_on_the_device_of_the_bag(op: str, name: str) -> None:
    value = CALLS[op][1][name].to("meta")
    message = f"{name} is on meta and the bag on cpu; move one of them"
    refuses(ValueError, message, op, **{name: value})


@pytest.mark.parametrize(("op", "name"), [p for p in TENSORS if p.values[1] in SHAPES])
def test_shapes_are_named(op: str, name: str) -> None:
    shape, wanted = SHAPES[name]
    message = f"{name} has shape {shape}; it must be {wanted}"
    refuses(ValueError, message, op, **{name: torch.zeros(shape)})


@every_op
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((D,), "; it must be [T, D] or [B, N, D]"),
        ((1, B, T, D), "; it must be [T, D] or [B, N, D]"),
        ((T, 0), "; a patch needs at least one feature"),
    ],
    ids=str,
)
def test_shape_of_the_bag(op: str, shape: tuple[int, ...], message: str) -> None:
    refuses(ValueError, f"bag has shape {shape}{message}", op, bag=torch.zeros(shape))


@every_op
def test_a_dense_bag_takes_no_ragged(op: str) -> None:
    message = f"bag has shape (2, 7, {D}) and ragged is given; a dense [B, N, D] bag"
    changes = {"bag": torch.zeros(B, 7, D), "bias": None, "stats": None}
    refuses(ValueError, message, op, **{k: v for k, v in changes.items() if k in CALLS[op][1]})


@every_op
@pytest.mark.parametrize("shape", [(B, 6), (B * 7 + 1,)])
def test_bias_of_a_dense_bag(op: str, shape: tuple[int, ...]) -> None:
    changes = {"bag": torch.zeros(B, 7, D), "ragged": None, "stats": None}
    changes = {k: v for k, v in changes.items() if k in CALLS[op][1]}
    wanted = f"[{B}, 7]" if len(shape) == 2 else f"[{B * 7}]"
    message = f"bias has shape {shape}; it must be {wanted}"
    refuses(ValueError, message, op, bias=torch.zeros(shape), **changes)


@every_op
def test_number_of_bags(op: str) -> None:
    message = "ragged has 1 bags, the other arguments 2; they must have the same number"
    refuses(ValueError, message, op, ragged=RAGGED.select([0]))
    # a packed matrix alone is one bag
    refuses(ValueError, message, op, ragged=None)


@every_op
def test_ragged_must_be_a_ragged(op: str) -> None:
    refuses(TypeError, "ragged is list; it must be a survfuse.Ragged", op, ragged=[4, 5])


@every_op
@pytest.mark.parametrize("name", ["starts", "lengths"])
def test_ragged_must_be_on_the_device_of_the_bag(op: str, name: str) -> None:
    moved = RAGGED._replace(**{name: getattr(RAGGED, name).to("meta")})
    message = f"ragged.{name} is on meta and bag on cpu; they must be on one device"
    refuses(ValueError, message, op, ragged=moved)


OUTSIDE = {
    "past the end": (RAGGED._replace(starts=torch.tensor([0, 5])), "bag 1 is rows 5 to 10"),
    "before the start": (RAGGED._replace(starts=torch.tensor([-1, 4])), "bag 0 is rows -1 to 3"),
    "negative length": (RAGGED._replace(lengths=torch.tensor([4, -5])), "bag 1 is rows 4 to -1"),
    "far outside": (RAGGED._replace(starts=torch.tensor([2**40, 4])), f"bag 0 is rows {2**40}"),
    "past 64 bits": (
        RAGGED._replace(starts=torch.tensor([0, 2**63 - 1])),
        f"bag 1 is rows {2**63 - 1}",
    ),
}
HOST = {
    "total": (
        RAGGED._replace(total=8),
        "total and max_length are 8 and 5, but the lengths give 9 and 5",
    ),
    "max_length": (
        RAGGED._replace(max_length=4),
        "total and max_length are 9 and 4, but the lengths give 9 and 5",
    ),
}
# every way a call can go on the CPU
WAYS = [
    pytest.param("pool_bag", {"backend": "reference"}, id="pool_bag-reference"),
    pytest.param("pool_bag", {"backend": "tiled"}, id="pool_bag-tiled"),
    pytest.param("pool_bag", {}, id="pool_bag"),
    pytest.param("pool_weights", {"backend": "reference"}, id="pool_weights-reference"),
    pytest.param("pool_weights", {}, id="pool_weights"),
    pytest.param("tokens_attend_bag", {"absorb": "always"}, id="absorbed"),
    pytest.param("tokens_attend_bag", {"absorb": "never"}, id="formed"),
    pytest.param("tokens_attend_bag", {"backend": "reference"}, id="attend-reference"),
    pytest.param("tokens_attend_bag_weights", {}, id="attend_weights"),
]


@pytest.mark.parametrize(("op", "options"), WAYS)
@pytest.mark.parametrize("case", [*OUTSIDE, *HOST])
def test_ranges_are_checked_on_the_cpu(op: str, options: dict, case: str) -> None:
    ragged, message = (OUTSIDE | HOST)[case]
    refuses(ValueError, f"ragged: {message}", op, ragged=ragged, **options)


@pytest.mark.parametrize(("op", "options"), WAYS)
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"starts": torch.tensor([0.0, 4.0])}, "starts is torch.float32 of shape (2,)"),
        ({"starts": torch.tensor([0, 4]).short()}, "starts is torch.int16 of shape (2,)"),
        ({"lengths": torch.tensor([4, 5]).int()}, "lengths is torch.int32 of shape (2,)"),
        ({"starts": torch.tensor([[0, 4]])}, "starts is torch.int64 of shape (1, 2)"),
        ({"starts": torch.tensor([0])}, "starts is torch.int64 of shape (1,)"),
    ],
    ids=["floating", "int16", "int32", "matrix", "fewer"],
)
def test_fields_of_a_ragged_made_by_hand(op, options, changes, found) -> None:
    """A launcher reads 64-bit integers where it is told to: nothing else may reach it."""
    # a missing check must fail this test and not the process, as the native launchers would
    options = {"backend": "tiled"} | options
    message = f"ragged.{found}; both must be int64 vectors of one length"
    refuses(ValueError, message, op, ragged=RAGGED._replace(**changes), **options)


@pytest.mark.parametrize("name", ["starts", "lengths"])
@every_op
def test_fields_of_a_ragged_are_tensors(op: str, name: str) -> None:
    message = f"ragged.{name} is list; it must be"
    refuses(TypeError, message, op, ragged=RAGGED._replace(**{name: [4, 5]}))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("op", ["pool_bag", "tokens_attend_bag", "tokens_attend_bag_with_lse"])
def test_dropout_out_of_range(op: str, p: float) -> None:
    refuses(ValueError, f"dropout_p is {p}; it must be at least 0 and below 1", op, dropout_p=p)


EPS = {"pool_bag": "normalize_eps", "pool_weights": "normalize_eps"}


@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
@every_op
def test_eps_below_zero(op: str, eps: float) -> None:
    name = EPS.get(op, "norm_eps")
    refuses(ValueError, f"{name} is {eps}; it must be at least 0", op, **{name: eps})


@every_op
def test_scale_is_finite(op: str) -> None:
    refuses(ValueError, "scale is inf; it must be finite", op, scale=float("inf"))


@every_op
def test_bags_are_dense(op: str) -> None:
    bag = CALLS[op][1]["bag"]
    message = "bag is torch.sparse_coo; it must be a dense tensor"
    refuses(TypeError, message, op, bag=bag.to_sparse())
    nested = torch.nested.as_nested_tensor([bag, bag[:2]], layout=torch.jagged)
    refuses(TypeError, "bag is nested; it must be a dense tensor; Ragged.from", op, bag=nested)


@every_op
def test_numbers_are_numbers(op: str) -> None:
    names = ["scale", EPS.get(op, "norm_eps")]
    names += ["dropout_p"] if "weights" not in op else []
    for name in names:
        for value in ("0.1", [0.1], True):
            refuses(TypeError, f"{name} is {value!r}; it must be a number", op, **{name: value})


@pytest.mark.parametrize("op", ["pool_weights", "tokens_attend_bag_weights"])
def test_unknown_reduction(op: str) -> None:
    refuses(ValueError, 'reduce is \'sum\'; it must be None, "rows" or "heads"', op, reduce="sum")


@pytest.mark.parametrize("op", ["tokens_attend_bag", "tokens_attend_bag_with_lse"])
def test_unknown_absorption(op: str) -> None:
    message = "absorb is 'maybe'; it must be one of ('auto', 'always', 'never')"
    refuses(ValueError, message, op, absorb="maybe")


@pytest.mark.parametrize(("op", "options"), [p for p in WAYS if "backend" not in p.values[1]])
def test_unknown_backend(op: str, options: dict) -> None:
    for backend in ("cudnn", 3):
        message = f"backend is {backend!r}; it must be None or one of ('reference', 'tiled', "
        refuses(ValueError, message, op, backend=backend, **options)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("op", ["pool_weights", "tokens_attend_bag_weights"])
def test_weights_have_two_backends(op: str, backend: str) -> None:
    message = f'backend=\'{backend}\' cannot serve this call: only None, "reference" and "tiled"'
    refuses(RuntimeError, message, op, backend=backend)


@pytest.mark.parametrize("name", ["mean", "rstd"])
@pytest.mark.parametrize("op", ["pool_bag", "pool_weights"])
def test_stats(op: str, name: str) -> None:
    def with_stats(tensor):
        mean, rstd = POOL["stats"]
        return (tensor, rstd) if name == "mean" else (mean, tensor)

    for value, kind, message in (
        (torch.zeros(T + 1), ValueError, f"has shape ({T + 1},); it must be [{T}]"),
        (torch.zeros(T, device="meta"), ValueError, "is on meta and the bag on cpu"),
        (torch.zeros(T).long(), TypeError, "is torch.int64; it must be bf16, fp16, fp32 or fp64"),
        (None, TypeError, "is NoneType; it must be a tensor"),
    ):
        refuses(kind, f"stats {name} {message}", op, stats=with_stats(value))


@pytest.mark.parametrize("op", ["pool_bag", "pool_weights"])
def test_stats_are_two(op: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^stats .*must be .*mean.*rstd"):
        call(op, stats=(torch.zeros(T),))


def test_lse_of_the_weights() -> None:
    for shape, message in (
        ((B, R + 1), f"lse has shape (2, 7); it must be [{B}, {R}]"),
        ((R,), f"lse has shape (6,); it must be [{B}, {R}]"),
        ((B + 1, LQ, H), f"lse has shape (3, 3, 2); it must be [{B}, Lq, H]"),
        ((B, LQ, H + 1), f"lse has shape (2, 3, 3); Lq * H must be the {R} rows of `rows`"),
    ):
        refuses(ValueError, message, "pool_weights", lse=torch.zeros(shape))
    message = 'reduce="heads" needs lse as [B, Lq, H]; its shape is (2, 6)'
    refuses(ValueError, message, "pool_weights", reduce="heads")
    message = f"lse has shape (2, 6); it must be [{B}, {LQ}, {H}]"
    refuses(ValueError, message, "tokens_attend_bag_weights", lse=torch.zeros(B, R))


def test_weights_need_rows() -> None:
    message = f"rows has shape (2, 0, {D}); it must hold at least one row"
    rows, lse = torch.zeros(B, 0, D), torch.zeros(B, 0)
    refuses(ValueError, message, "pool_weights", rows=rows, lse=lse)


def test_heads_need_channels() -> None:
    message = "query has shape (2, 3, 2, 0); its heads need at least 1 channel"
    query, w_k = torch.zeros(B, LQ, H, 0), torch.zeros(H, 0, D)
    refuses(ValueError, message, "tokens_attend_bag", query=query, w_k=w_k, b_k=None)


def obstacle(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The message of a named backend that cannot serve such a bag."""
    with pytest.raises(RuntimeError) as caught:
        backends.select_backend(backend, device=torch.device(device), dtype=dtype, n_rows=6)
    assert str(caught.value).startswith(f"backend={backend!r} cannot serve this call: ")
    return str(caught.value)


def test_why_triton_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    assert "take bf16, fp16 and fp32, not fp64" in obstacle("triton", "cuda", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "right for fp32 only" in obstacle("triton", dtype=torch.bfloat16)
    assert "needs a GPU, the bag is on meta" in obstacle("triton", "meta")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a GPU, the bag is on cpu" in obstacle("triton")
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert "triton is not installed" in obstacle("triton", "cuda")


def test_why_native_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "runs on the CPU, the bag is on meta" in obstacle("native", "meta")
    assert "torch.float32, " in obstacle("native", dtype=torch.int8)
    assert "not torch.int8" in obstacle("native", dtype=torch.int8)
    monkeypatch.setattr(backends, "native_core", lambda: None)
    assert "was not built (SURVFUSE_BUILD=none) or cannot be loaded" in obstacle("native")
    # and what is taken instead says the same
    chosen = backends.select_backend(
        None, device=torch.device("cpu"), dtype=torch.float32, n_rows=6
    )
    assert chosen.backend == "tiled"
    assert "SURVFUSE_BUILD=none" in chosen.reason


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="not fp64"):
        call("pool_bag", backend="triton", bag=torch.zeros(T, D).double())


def test_obstacles_of_a_backend_nobody_has() -> None:
    with pytest.raises(ValueError, match="backend is 'tritn'; it must be None or one of"):
        backends.backend_obstacle("tritn", device="cpu", dtype=torch.float32)
    assert backends.backend_obstacle("tiled", device="cpu", dtype=torch.float32) is None


class TestSelectedBackend:
    """`selected_backend` refuses what the call itself would refuse."""

    def test_unknown_op(self) -> None:
        with pytest.raises(ValueError, match=re.escape("op is 'pool'; it must be one of ('pool_")):
            ops.selected_backend("pool", POOL["rows"], POOL["bag"], ragged=RAGGED)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="backend is 'cudnn'; it must be None or one of"):
            ops.selected_backend("pool_bag", POOL["rows"], POOL["bag"], backend="cudnn")

    def test_backend_the_op_does_not_have(self) -> None:
        with pytest.raises(RuntimeError, match="backend='native' cannot serve this call"):
            ops.selected_backend("pool_weights", POOL["rows"], POOL["bag"], backend="native")

    def test_unknown_absorption(self) -> None:
        tensors = [ATTEND[name] for name in ("query", "bag", "w_k", "w_v")]
        with pytest.raises(ValueError, match="absorb is 'maybe'; it must be one of"):
            ops.selected_backend("tokens_attend_bag", *tensors, ragged=RAGGED, absorb="maybe")

    def test_weights_of_the_projections(self) -> None:
        with pytest.raises(TypeError, match="takes 4 of them: query, bag, w_k, w_v"):
            ops.selected_backend("tokens_attend_bag", ATTEND["query"], ATTEND["bag"])

    def test_says_what_runs(self) -> None:
        tensors = [ATTEND[name] for name in ("query", "bag", "w_k", "w_v")]
        chosen = ops.selected_backend("tokens_attend_bag", *tensors, ragged=RAGGED, absorb="never")
        assert chosen.backend in ("native", "tiled")
        assert "torch forms K and V" in chosen.reason
        chosen = ops.selected_backend("pool_weights", POOL["rows"], POOL["bag"])
        assert chosen.backend == "tiled"


def test_as_packed_names_the_shape() -> None:
    with pytest.raises(ValueError, match=re.escape("bag has shape (3,); it must be packed")):
        as_packed(torch.zeros(3), None)
