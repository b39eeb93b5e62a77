"""The CUDA kernels of `multi_scale_deformable_attention`, run on a CPU by tests/cuda_emulator."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from survfuse.deformable import Samples, SamplingNeeds
from survfuse.native import core as native
from survfuse.native import multi_scale_deformable_attention_cuda as cuda
from survfuse.native.deformable_fields import deformable_fields
from tests.cuda_emulator.build import emulated_core
from tests.ops.deformable_cases import CASES, FORMS, Call, Case, make_call
from tests.ops.guarded_memory import guarded
from tests.ops.test_multi_scale_deformable_attention import check_budget, result_and_gradients

TYPES = (torch.float32, torch.bfloat16, torch.float16)
every_form = pytest.mark.parametrize("form", FORMS)
IDS = {"ids": lambda value: getattr(value, "name", str(value))}
# one for every width a thread reads and every number of threads a head gets
WIDTHS = (1, 3, 4, 8, 9, 12, 14, 16, 20, 32, 33, 48, 64, 100, 128, 160, 255, 256, 258, 264)


@pytest.fixture(scope="module")
def core() -> ModuleType:
    return emulated_core()


@pytest.fixture(autouse=True)
def _native_is_emulated(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """backend="native" runs the CUDA kernels."""

    def launch(launcher: str, arguments: dict, device: torch.device) -> None:
        getattr(core, launcher)(arguments)

    monkeypatch.setattr(cuda, "launch_on_device", launch)
    module = importlib.import_module("survfuse.native.multi_scale_deformable_attention")
    for name in ("forward", "backward"):
        name = f"multi_scale_deformable_attention_{name}"
        monkeypatch.setattr(module, name, getattr(cuda, name))
    yield
    core.set_order(0)
    core.limit_grid(0)


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """The mode, with NaN in whatever torch.empty hands out."""
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def samples_of(call: Call, shapes: Tensor | None = None) -> tuple[Tensor, Samples]:
    """A call's value and samples as a backend gets them."""
    shapes = torch.tensor(call.shapes).reshape(-1, 2) if shapes is None else shapes
    value, *rest = (tensor.detach() for tensor in call.tensors.values())
    if call.form == "locations":
        return value, Samples(shapes, *rest, None)
    reference, offsets, logits = rest
    return value, Samples(shapes, offsets, logits, reference)


@every_form
@pytest.mark.parametrize("case", CASES, **IDS)
def test_results_and_gradients_within_budget(core, case: Case, form: str) -> None:
    for seed, dtype in enumerate(TYPES):
        core.set_order(seed)
        # atomic and fixed-point sums by turns
        with deterministic(seed != 1):
            check_budget(case, form, "native", "cpu", dtype)


@pytest.mark.parametrize("dim", WIDTHS)
def test_every_width_of_a_head(core, dim: int) -> None:
    core.set_order(dim)
    case = Case("width", dim=dim, queries=3, batch=1, heads=3, shapes=((3, 4), (2, 2)))
    for dtype in TYPES:
        with deterministic(dim % 2 == 0):
            check_budget(case, "locations", "native", "cpu", dtype)


@pytest.mark.parametrize("form", ["locations", "boxes"])
def test_more_samples_than_are_staged_at_once(core, form: str) -> None:
    """Chunks of samples that end within a level, for few and for many threads per head."""
    core.set_order(9)
    for dim, points in ((8, 21), (64, 67)):
        case = Case("long", shapes=((4, 5), (2, 3)), dim=dim, points=points, queries=2, heads=3)
        check_budget(case, form, "native", "cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", [*TYPES, torch.float64], ids=str)
@every_form
def test_weights_have_a_type_of_their_own(form: str, kind: torch.dtype) -> None:
    call = make_call(CASES[0], form).to(torch.bfloat16)
    name = "attention_weights" if form == "locations" else "attention_logits"
    weights = call.tensors[name].detach().to(kind).requires_grad_()
    got_call = Call(form, call.shapes, call.tensors | {name: weights})
    got = result_and_gradients(got_call, got_call.run("native"))
    wide = Call(form, call.shapes, call.tensors | {name: weights.detach().float().requires_grad_()})
    expected = result_and_gradients(wide, wide.run("native"))
    for key, tensor in got.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype))


@pytest.mark.parametrize("most_blocks", [1, 2])
def test_a_grid_of_any_size_covers_all_queries(core, most_blocks: int) -> None:
    call = make_call(CASES[-1], "points").to(torch.float32)
    with deterministic():
        expected = result_and_gradients(call, call.run("native"))
        core.limit_grid(most_blocks)
        got = result_and_gradients(call, call.run("native"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@every_form
def test_the_order_of_threads_changes_no_bit_but_of_atomic_sums(core, form: str) -> None:
    call = make_call(CASES[-1], form).to(torch.float32)

    def runs() -> list[dict[str, Tensor]]:
        found = []
        for seed in range(1, 5):
            core.set_order(seed)
            found.append(result_and_gradients(call, call.run("native")))
        return found

    with deterministic():
        expected, *others = runs()
    for got in others:
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    first, *others = runs()
    for got in others:
        differing = {name for name in first if not torch.equal(got[name], first[name])}
        assert differing <= {"value"}
    # the seeds did shuffle something
    assert any(not torch.equal(got["value"], first["value"]) for got in others)


def test_fixed_point_sums_are_as_exact_as_fp32_holds() -> None:
    """Thousands of queries at one pixel, over upstream gradients of any size."""
    n = 5000
    generator = torch.Generator().manual_seed(0)
    value = torch.zeros(1, 4, 1, 8)
    locations = torch.full((1, n, 1, 1, 1, 2), 0.5)
    weights = torch.rand(1, n, 1, 1, 1, generator=generator)
    samples = Samples(torch.tensor([(2, 2)]), locations, weights, None)
    needs = SamplingNeeds(True, False, False, False)
    for size in (1e-44, 1e-38, 1e-20, 1.0, 1e20, 1e34):
        d_out = size * torch.randn(1, n, 8, generator=generator)
        with deterministic():
            got = cuda.multi_scale_deformable_attention_backward(d_out, None, value, samples, needs)
        exact = (0.25 * weights.double().view(n, 1) * d_out.double()[0]).sum(0)
        error = (got[0][0].double() - exact).abs().max()
        # the products round to fp32 before they are summed: their errors add like a random walk
        info = torch.finfo(torch.float32)
        # numbers below the normal ones are as far apart as the smallest of them
        subnormal = n * info.smallest_normal * info.eps if size < 1e-37 else 0
        assert error <= 4 * info.eps * exact.abs().max() + subnormal
        assert got[1:] == (None, None, None)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["d_out", "weights"])
@every_form
def test_what_is_not_finite_makes_fixed_point_sums_nan(form: str, where: str, bad: float) -> None:
    call = make_call(CASES[0], form).to(torch.float32)
    value, samples = samples_of(call)
    d_out = torch.ones(2, 9, 16)
    if where == "d_out":
        d_out[1, 3, 2] = bad
    else:
        samples.weights[1, 3, 1, 2, 0] = bad
    forward = cuda.multi_scale_deformable_attention_forward(value, samples)
    needs = SamplingNeeds(True, True, True, form != "locations")
    arguments = (d_out, forward.lse, value, samples, needs)
    with deterministic():
        d_value, *others = cuda.multi_scale_deformable_attention_backward(*arguments)
    if where == "weights" and form != "locations" and bad == -torch.inf:
        # a logit that excludes its sample is nothing bad
        assert d_value.isfinite().all()
        return
    assert d_value.isnan().all()
    # elsewhere nothing is different
    _, *expected = cuda.multi_scale_deformable_attention_backward(*arguments)
    for got, want in zip(others, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert got is None or got.isfinite().any()


@every_form
def test_what_is_not_finite_spreads_no_further_than_in_torch(form: str) -> None:
    """An infinite gradient of a query does not reach corners outside the image."""
    case = Case("small levels", shapes=((5, 7), (1, 3)), batch=1, queries=30, heads=1, points=1)
    call = make_call(case, form).to(torch.float32)
    d_out = torch.ones(1, 30, 8)
    d_out[:, ::9] = torch.inf
    tensors = list(call.tensors.values())
    expected = torch.autograd.grad(call.run("reference"), tensors, d_out)
    got = torch.autograd.grad(call.run("native"), tensors, d_out)
    for name, ours, theirs in zip(call.tensors, got, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
        assert theirs.isfinite().any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_bad_weights_do_no_harm_outside_the_image(bad: float) -> None:
    """Corners outside bring nothing, whatever the weight of their sample."""
    case = Case("half outside", shapes=((2, 2),), batch=1, queries=40, heads=1, points=1)
    call = make_call(case).to(torch.float32)
    call.tensors["attention_weights"].detach()[:, ::2] = bad
    call.tensors["value"].detach().abs_()
    tensors = list(call.tensors.values())
    results = []
    for backend in ("reference", "native"):
        out = call.run(backend)
        results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(results[1][0].isnan(), results[0][0].isnan())
    assert not results[0][0].isfinite().all()


@every_form
def test_gradients_nobody_wants_are_not_written(form: str) -> None:
    call = make_call(CASES[1], form).to(torch.bfloat16)
    value, samples = samples_of(call)
    d_out = torch.randn(2, 9, 16).to(torch.bfloat16)
    lse = cuda.multi_scale_deformable_attention_forward(value, samples).lse
    wants = [True] * (3 if form == "locations" else 4) + [False] * (form == "locations")
    backward = cuda.multi_scale_deformable_attention_backward
    with deterministic():
        expected = backward(d_out, lse, value, samples, SamplingNeeds(*wants))
        for i, wanted in enumerate(wants):
            alone = SamplingNeeds(*(wanted and j == i for j in range(4)))
            got = backward(d_out, lse, value, samples, alone)
            assert [tensor is not None for tensor in got] == list(alone)
            assert not wanted or torch.equal(got[i], expected[i])


@every_form
@pytest.mark.parametrize("n_rows", [0, 10, 15])
def test_levels_that_do_not_fit_the_value_are_cut_off(form: str, n_rows: int) -> None:
    """As if the value went on with zeros; a GPU's shapes are never looked at on the host."""
    case = Case("4 x 4 and 2 x 3", shapes=((4, 4), (2, 3)))
    call = make_call(case, form).to(torch.float32)
    value, samples = samples_of(call)
    value[:, n_rows:] = 0
    d_out = torch.randn(2, 9, 16)
    needs = SamplingNeeds(True, True, True, form != "locations")

    def run(value: Tensor) -> list[Tensor]:
        with guarded(value, samples) as (inside, kept):
            out, lse = cuda.multi_scale_deformable_attention_forward(inside, kept)
            arguments = (d_out, lse, inside, kept, needs)
            return [out, *cuda.multi_scale_deformable_attention_backward(*arguments)]

    with deterministic():
        expected, got = run(value), run(value[:, :n_rows].contiguous())
    assert torch.equal(got[0], expected[0])
    if n_rows:
        # the scales of the fixed point are the same
        assert torch.equal(got[1], expected[1][:, :n_rows])
    for ours, theirs in zip(got[2:], expected[2:], strict=True):
        assert theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "shapes",
    [((-4, 4), (2, 3)), ((2**40, 2**40), (2, 3)), ((2**62, 4), (2, 3)), ((0, 0), (9, 0))],
)
def test_senseless_shapes_are_no_memory_error(shapes) -> None:
    call = make_call(Case("any", shapes=((4, 4), (2, 3)), points=8)).to(torch.float32)
    value, samples = samples_of(call, torch.tensor(shapes))
    needs = SamplingNeeds(True, True, True, False)
    for at_end in (False, True):
        with guarded(value, samples, at_end=at_end) as (inside, kept):
            out, _ = cuda.multi_scale_deformable_attention_forward(inside, kept)
            arguments = (torch.ones(2, 9, 16), None, inside, kept, needs)
            cuda.multi_scale_deformable_attention_backward(*arguments)
        assert out.isfinite().all()


@every_form
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_beside_the_tensors_is_touched(core, form: str, at_end: bool) -> None:
    for case in (CASES[0], CASES[9], Case("many", queries=37, heads=3, dim=40, points=5)):
        call = make_call(case, form).to(torch.bfloat16)
        value, samples = samples_of(call)
        n_batches, n_queries, heads, n_levels, _, _ = samples.points.shape
        group = (n_batches, n_queries, heads)
        sides = 2 if samples.reference is None else samples.reference.shape[-1]
        results = Samples(
            torch.zeros(value.shape),
            torch.zeros(samples.points.shape),
            torch.zeros(samples.weights.shape),
            torch.zeros(*group, n_levels, sides),
        )
        others = Samples(torch.zeros(group), torch.ones(2), None, None)
        with (
            guarded(value, samples, at_end=at_end) as (inside, kept),
            guarded(value.new_ones(*group, case.dim), others, at_end=at_end) as (
                out,
                (lse, scale, *_),
            ),
            guarded(torch.zeros(value.shape, dtype=torch.int64), results, at_end=at_end) as (
                fixed,
                written,
            ),
        ):
            fields = deformable_fields(inside, kept)
            fields |= {"out": out.data_ptr(), "lse": lse.data_ptr(), "d_out": out.data_ptr()}
            core.deformable_forward_cuda(fields)
            names = ("d_value", "d_points", "d_weights", "d_reference")
            fields |= {name: t.data_ptr() for name, t in zip(names, written, strict=True)}
            for is_fixed in (False, True):
                fields |= {
                    "fixed_d_value": fixed.data_ptr() * is_fixed,
                    "fixed_scale": scale.data_ptr() * is_fixed,
                }
                core.deformable_backward_cuda(fields)


def test_points_on_pixels_fall_to_the_side_they_fall_to_in_torch() -> None:
    """One rounding more or less decides on which side of a pixel the slopes are taken."""
    # of these sizes a contracted product and difference fall to the other side of some pixels
    shapes = ((29, 31), (25, 19))
    case = Case("odd sizes", shapes=shapes, where="integers", queries=99, batch=1)
    call = make_call(case).to(torch.float32)
    expected = result_and_gradients(call, call.run("reference"))
    got = result_and_gradients(call, call.run("native"))
    torch.testing.assert_close(got["sampling_locations"], expected["sampling_locations"])


def test_strided_and_misaligned_values() -> None:
    """Views with a unit last stride are read where they lie, 16 bytes at a time or one by one."""
    call = make_call(Case("width 16", dim=16)).to(torch.bfloat16)
    with deterministic():
        expected = result_and_gradients(call, call.run("native"))
        value = call.tensors["value"].detach()
        for padding, first in ((8, 0), (8, 8), (2, 0), (6, 2), (3, 0), (8, 1)):
            longer = value.new_full((*value.shape[:-1], 16 + padding + first), torch.nan)
            view = longer[..., first : first + 16]
            view.copy_(value)
            strided = Call(call.form, call.shapes, call.tensors | {"value": view.requires_grad_()})
            got = result_and_gradients(strided, strided.run("native"))
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-2)
            turned = value.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            strided = Call(call.form, call.shapes, call.tensors | {"value": turned})
            got = result_and_gradients(strided, strided.run("native"))
            assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_large_logits_and_excluded_ones(scale: float) -> None:
    call = make_call(CASES[0], "points").to(torch.float32)
    logits = call.tensors["attention_logits"].detach() * scale
    logits[..., 0, 0] = -torch.inf
    call = Call("points", call.shapes, call.tensors | {"attention_logits": logits.requires_grad_()})
    value, samples = samples_of(call)
    lse = cuda.multi_scale_deformable_attention_forward(value, samples).lse
    torch.testing.assert_close(lse, logits.flatten(3).logsumexp(-1))
    got = result_and_gradients(call, call.run("native"))
    wide = call.to(torch.float64)
    exact = result_and_gradients(wide, wide.run("reference"))
    for name in got:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=1e-4)


def test_logits_that_are_no_numbers_follow_torch() -> None:
    call = make_call(CASES[0], "points").to(torch.float32)
    logits = call.tensors["attention_logits"].detach().clone()
    logits[0, 0], logits[0, 1, 0, 0, 0], logits[0, 2, 0, 0, 0] = -torch.inf, torch.nan, torch.inf
    call = Call("points", call.shapes, call.tensors | {"attention_logits": logits})
    out, expected = call.run("native"), call.run("reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()
    assert out.isfinite().any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_levels": 1025}, "number of levels is 1025; the CUDA kernels take at most 1024"),
        ({"n_rows": 2**31}, "number of rows of value is 2147483648; the CUDA"),
        ({"row_stride": 2**31}, "the stride between rows of value is 2147483648"),
        ({"n_points": 2**21}, "the number of points is 2097152"),
        ({"dim": 2**30}, "the number of channels of all heads is 2147483648"),
        ({"value_type": 1}, "value is fp64; the CUDA kernels take fp32, bf16 and fp16"),
    ],
)
def test_launchers_name_what_they_cannot_hold(core, changed: dict, message: str) -> None:
    value, samples = samples_of(make_call(CASES[0]).to(torch.float32))
    fields = deformable_fields(value, samples) | {"out": 0, "lse": 0} | changed
    with pytest.raises(ValueError, match=message):
        core.deformable_forward_cuda(fields)


def test_points_at_odd_addresses_are_copied() -> None:
    call = make_call(CASES[0]).to(torch.float32)
    value, samples = samples_of(call)
    storage = torch.empty(samples.points.numel() + 1)
    points = storage[1:].view(samples.points.shape).copy_(samples.points)
    assert points.data_ptr() % 8
    got = cuda.multi_scale_deformable_attention_forward(value, samples._replace(points=points))
    assert torch.equal(got.out, cuda.multi_scale_deformable_attention_forward(value, samples).out)


def test_launches_go_to_the_device_and_its_current_stream(monkeypatch) -> None:
    entered, launched = [], []

    @contextmanager
    def guard(device) -> Iterator[None]:
        entered.append(device)
        yield

    fake = SimpleNamespace(some_cuda_launcher=launched.append)
    monkeypatch.setattr(native, "native_core", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", guard)
    streams = {torch.device("cuda", 1): SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    native.launch_on_device("some_cuda_launcher", {"out": 5, "stream": 0}, torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1)]
    assert launched == [{"out": 5, "stream": 77}]
