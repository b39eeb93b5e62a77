"""Gated attention pooling: refusals, properties, operations, and tiles in lockstep."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from survfuse import Ragged, ops
from survfuse.native.core import native_core
from tests.ops.contract import CASES, OPS, Call
from tests.ops.test_contract import grads_and_results
from tests.ops.tolerance import assert_within_budget

BACKENDS = ["reference", "tiled", "native"]
POOL, WEIGHTS = (op for op in OPS if op.name.startswith("gated_attention"))
N, D, L, K = 11, 6, 4, 2


def arguments(**replaced) -> dict:
    torch.manual_seed(3)
    made = {
        "bag": torch.randn(N, D, dtype=torch.double),
        "w_tanh": torch.randn(L, D, dtype=torch.double),
        "b_tanh": torch.randn(L, dtype=torch.double),
        "w_gate": torch.randn(L, D, dtype=torch.double),
        "b_gate": torch.randn(L, dtype=torch.double),
        "w_score": torch.randn(K, L, dtype=torch.double),
        "b_score": torch.randn(K, dtype=torch.double),
    }
    return made | replaced


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("bag", None, TypeError, "bag is NoneType; it must be a tensor"),
        ("bag", torch.zeros(3), ValueError, "bag has shape"),
        ("w_tanh", None, TypeError, "w_tanh is NoneType; it must be a tensor"),
        ("w_tanh", torch.zeros(L, D + 1), ValueError, r"w_tanh has shape \(4, 7\)"),
        ("w_tanh", torch.zeros(0, D), ValueError, "w_gate has shape"),
        ("w_gate", torch.zeros(L + 1, D), ValueError, r"w_gate .* must be \[4, 6\]"),
        ("w_gate", torch.zeros(L, D).int(), TypeError, "w_gate is torch.int32"),
        ("w_score", torch.zeros(K, L + 1), ValueError, r"w_score .* must be \[K, 4\]"),
        ("w_score", torch.zeros(0, L), ValueError, "w_score .* must hold a row"),
        ("b_tanh", torch.zeros(L + 1), ValueError, r"b_tanh .* must be \[4\]"),
        ("b_gate", 1.0, TypeError, "b_gate is float"),
        ("b_score", torch.zeros(L), ValueError, r"b_score .* must be \[2\]"),
        ("bias", torch.zeros(N + 1), ValueError, r"bias .* must be \[11\]"),
        ("ragged", (0, 1), TypeError, "ragged is tuple"),
        ("ragged", Ragged.from_ranges([0], [N + 1]), ValueError, "bag 0 is rows 0 to 12"),
        ("dropout_p", 1.0, ValueError, "dropout_p is 1.0"),
        ("backend", "cudnn", ValueError, "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_are_named(name: str, value, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ops.gated_attention_pool(**arguments(**{name: value}))


def test_a_hidden_layer_of_nothing_is_refused() -> None:
    empty = {name: torch.zeros(0, D) for name in ("w_tanh", "w_gate")}
    nothing = dict.fromkeys(("b_tanh", "b_gate"))
    with pytest.raises(ValueError, match=r"w_tanh has shape \(0, 6\); it must hold a row"):
        ops.gated_attention_pool(**arguments(**empty, **nothing, w_score=torch.zeros(K, 0)))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"lse": torch.zeros(1, K + 1)}, ValueError, r"lse has shape .* must be \[B, 2\]"),
        ({"lse": torch.zeros(2, K)}, ValueError, "ragged has 1 bags, the other arguments 2"),
        ({"lse": None}, TypeError, "lse is NoneType"),
        ({"reduce": "heads"}, ValueError, "reduce is 'heads'; it must be None or \"rows\""),
        ({"backend": "triton"}, RuntimeError, '"reference" and "tiled" implement'),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_of_weights_are_named(changed: dict, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ops.gated_attention_weights(**(arguments(lse=torch.zeros(1, K)) | changed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_may_be_none(backend: str) -> None:
    zero = {"b_tanh": torch.zeros(L), "b_gate": torch.zeros(L), "b_score": torch.zeros(K)}
    with_zero = arguments(**{name: value.double() for name, value in zero.items()})
    without = arguments(**dict.fromkeys(zero))
    expected = ops.gated_attention_pool(**with_zero, backend=backend)
    w_score = without["w_score"].requires_grad_()
    got = ops.gated_attention_pool(**without, backend=backend)
    torch.testing.assert_close(got, expected)
    got.pooled.sum().backward()
    assert w_score.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_merge_into_the_whole(backend: str) -> None:
    made = arguments()
    bag = made.pop("bag")
    whole, left, right = (
        ops.gated_attention_pool(part, **made, backend=backend) for part in (bag, bag[:4], bag[4:])
    )
    lse = torch.logaddexp(left.lse, right.lse)
    share = (left.lse - lse).exp()[..., None]
    torch.testing.assert_close(share * left.pooled + (1 - share) * right.pooled, whole.pooled)
    torch.testing.assert_close(lse, whole.lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_and_what_is_added_to_all_logits_change_nothing(backend: str) -> None:
    made = arguments()
    plain = ops.gated_attention_pool(**made, backend=backend)
    turned = ops.gated_attention_pool(**arguments(bag=made["bag"].flip(0)), backend=backend)
    torch.testing.assert_close(turned, plain)
    moved = ops.gated_attention_pool(**arguments(b_score=made["b_score"] + 3.0), backend=backend)
    torch.testing.assert_close(moved.pooled, plain.pooled)
    torch.testing.assert_close(moved.lse, plain.lse + 3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_pool_the_bag(backend: str) -> None:
    made, ragged = arguments(), Ragged.from_ranges([4, 0, 2], [7, 6, 0])
    pooled, lse = ops.gated_attention_pool(**made, ragged=ragged, backend=backend)
    backend = None if backend == "native" else backend
    weights = ops.gated_attention_weights(**made, lse=lse, ragged=ragged, backend=backend)
    assert weights.shape == (13, K)
    torch.testing.assert_close(weights[:7].T @ made["bag"][4:], pooled[0])
    torch.testing.assert_close(weights[7:].T @ made["bag"][:6], pooled[1])
    mean = ops.gated_attention_weights(
        **made, lse=lse, ragged=ragged, reduce="rows", backend=backend
    )
    torch.testing.assert_close(mean, weights.mean(1))


def test_reduced_weights_have_the_gradient_of_the_mean() -> None:
    made = {name: tensor.requires_grad_() for name, tensor in arguments().items()}
    lse = ops.gated_attention_pool(**made).lse.detach().requires_grad_()
    up = torch.randn(N, dtype=torch.double)
    outs = []
    for reduce in ("rows", None):
        weights = ops.gated_attention_weights(**made, lse=lse, reduce=reduce)
        mean = weights if reduce else weights.mean(1)
        outs.append(torch.autograd.grad(mean, [*made.values(), lse], up))
    for got, expected in zip(*outs, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", [POOL, WEIGHTS], ids=lambda op: op.name)
def test_tiles_in_lockstep_match_tiles_bag_by_bag(op, monkeypatch) -> None:
    """Devices walk all bags at once, since reading the ranges would make the host wait."""
    import survfuse.tiled.tiles as module

    monkeypatch.setattr(module, "_MAX_ROWS", 16)
    monkeypatch.setattr(module, "_MIN_ROWS", 16)
    for case, dropout in itertools.product((CASES[5], CASES[-1]), (0.0, 0.3)):
        call = op.make(case).to(torch.float64)
        options = {"dropout_p": dropout} if op.has_dropout and dropout else {}
        outs = []
        for known in (True, False):
            monkeypatch.setattr(module, "_known_to_host", lambda starts, k=known: k)
            torch.manual_seed(3)
            outs.append(grads_and_results(op, call, "tiled", **options))
        for a, b in zip(itertools.chain(*outs[0]), itertools.chain(*outs[1]), strict=True):
            assert_within_budget("lockstep", b, a, a, torch.float64)


def test_without_onednn_the_products_are_torch_mm(monkeypatch) -> None:
    import survfuse.tiled.gated_hidden as module

    monkeypatch.setattr(module, "_onednn_linear", lambda: None)
    for dtype in (torch.float32, torch.bfloat16):
        call = POOL.make(CASES[5]).to(dtype)
        exact = grads_and_results(POOL, Call(call.tensors, call.options).to(torch.double), None)
        plain = POOL.plain(call)
        got = POOL.function(call, "tiled")
        for index in range(2):
            assert_within_budget("by mm", got[index], plain[index], exact[0][index], dtype)


@pytest.mark.parametrize("backend", ["tiled", "native", "triton"])
def test_only_what_is_asked_for_is_differentiated(backend: str) -> None:
    made = {name: tensor.float() for name, tensor in arguments().items()}
    everything = [tensor.requires_grad_() for tensor in made.values()]
    all_of_them = torch.autograd.grad(
        ops.gated_attention_pool(**made, backend=backend).lse.sum(), everything
    )
    for index, name in enumerate(made):
        alone = {other: tensor.detach() for other, tensor in made.items()}
        alone[name].requires_grad_()
        lse = ops.gated_attention_pool(**alone, backend=backend).lse
        (gradient,) = torch.autograd.grad(lse.sum(), [alone[name]])
        torch.testing.assert_close(gradient, all_of_them[index])


@pytest.mark.parametrize("trained", [False, True])
def test_operations_of_a_call(trained: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    made = {name: tensor.requires_grad_() for name, tensor in arguments().items()}
    made["bag"] = made["bag"].detach().requires_grad_(trained)
    with FlopCounterMode(display=False) as counter:
        pooled, lse = ops.gated_attention_pool(**made)
        forward = counter.get_total_flops()
        pooled.sum().backward()
        both = counter.get_total_flops()
        ops.gated_attention_weights(**made, lse=lse.detach()).sum().backward()
    assert forward == N * D * (4 * L + 2 * K)
    assert both - forward == N * D * ((12 * L + 4 * K) if trained else (8 * L + 2 * K))
    assert counter.get_total_flops() - both == N * D * L * (16 if trained else 12)


def many_rows(ranges: list[tuple[int, int]], dtype: torch.dtype) -> tuple[dict, Ragged]:
    """A call whose rows take several chunks and tiles; odd sizes all over."""
    g = torch.Generator().manual_seed(7)
    n_rows, width, n_hidden, n_pools = 3100, 35, 21, 3
    shapes = {
        "bag": (n_rows, width),
        "w_tanh": (n_hidden, width),
        "b_tanh": (n_hidden,),
        "w_gate": (n_hidden, width),
        "b_gate": (n_hidden,),
        "w_score": (n_pools, n_hidden),
        "b_score": (n_pools,),
        "bias": (n_rows,),
    }
    made = {
        name: torch.randn(shape, generator=g, dtype=torch.double) * (0.2 if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }
    made["bias"][1000:1010] = -torch.inf
    made = {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}
    return made, Ragged.from_ranges(*zip(*ranges, strict=True))


APART = [(40, 1200), (0, 0), (1240, 5), (1245, 1500), (2745, 1), (2746, 290)]
SHARED = [(0, 1700), (0, 0), (600, 1900), (5, 1), (2500, 600)]
# more chunks than there are sums to keep: bags that share rows are never in one chunk
CROWDED = [(7 * i, 40) for i in range(150)]


def differentiated(made: dict, ragged: Ragged, backend: str) -> list[torch.Tensor]:
    pooled, lse = ops.gated_attention_pool(**made, ragged=ragged, dropout_p=0.0, backend=backend)
    up = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view(pooled.shape)
    total = (up * pooled).sum() + torch.where(lse == -torch.inf, 0.0, lse).square().sum()
    return [pooled, lse, *torch.autograd.grad(total, list(made.values()))]


@pytest.mark.parametrize("ranges", [APART, SHARED, CROWDED], ids=["apart", "shared", "crowded"])
def test_chunks_of_the_native_kernel_add_up(ranges) -> None:
    made, ragged = many_rows(ranges, torch.double)
    expected = differentiated(made, ragged, "reference")
    got = differentiated(made, ragged, "native")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranges", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit_of_the_native_kernel(ranges, dtype: torch.dtype) -> None:
    made, ragged = many_rows(ranges, dtype)
    before, outs = torch.get_num_threads(), []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        outs.append(differentiated(made, ragged, "native"))
    torch.set_num_threads(before)
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_choice_is_visible() -> None:
    made = tuple(arguments().values())
    chosen = ops.selected_backend("gated_attention_pool", *made)
    slow = native_core() is None or native_core().machine_info()["cpu_isa"] == "plain"
    assert chosen.backend == ("tiled" if slow else "native")
    assert ops.selected_backend("gated_attention_weights", *made, backend="tiled")[1] == "asked for"
    assert ops.selected_backend("gated_attention_weights", *made).backend == "tiled"
    with pytest.raises(RuntimeError, match="fp64"):
        ops.selected_backend("gated_attention_pool", *made, backend="triton")


def test_processors_that_libraries_serve_better_get_them(monkeypatch) -> None:
    # the package shows the function under the module's name
    module = importlib.import_module("survfuse.ops.gated_attention_pool")

    class Core:
        def __init__(self, isa: str) -> None:
            self.isa = isa

        def machine_info(self) -> dict:
            return {"cpu_isa": self.isa}

    def chosen(dtype: torch.dtype):
        return ops.selected_backend("gated_attention_pool", torch.zeros(2, 3, dtype=dtype))

    monkeypatch.setattr(module, "backend_obstacle", lambda *_, **__: None)
    monkeypatch.setattr(module, "native_core", lambda: Core("avx512bf16"))
    monkeypatch.setattr(module, "multiplies_bf16", lambda: True)
    assert chosen(torch.float32).backend == "native"
    assert chosen(torch.bfloat16) == ("tiled", "bf16: oneDNN multiplies with AMX")
    monkeypatch.setattr(module, "native_core", lambda: Core("plain"))
    assert chosen(torch.float32).backend == "tiled"
