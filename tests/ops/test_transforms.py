"""Transforms of torch: forward mode and torch.func go by the reference, or raise and say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from survfuse import ops
from tests.ops import contract, deformable_cases, position_biased, test_sample_bag

# the forward mode of torch 2.13 itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
SMALL = contract.Case("small", ranges=((0, 4),), n_stored=4, dim=4)
Function = Callable[[Tensor, str | None], Tensor]


def of_contract(op: contract.Op) -> tuple[Function, Tensor]:
    call = op.make(SMALL).to(torch.float64)
    name = next(iter(call.tensors))
    return (
        lambda x, backend: op.function(call.with_tensors({name: x}), backend)[0],
        call.tensors[name],
    )


def multi_scale(form: str) -> tuple[Function, Tensor]:
    call = deformable_cases.make_call(deformable_cases.CASES[0], form).to(torch.float64)

    def run(value: Tensor, backend: str | None) -> Tensor:
        tensors = call.tensors | {"value": value}
        return deformable_cases.Call(call.form, call.shapes, tensors).run(backend)

    return run, call.tensors["value"]


def position_bias(table: bool) -> tuple[Function, Tensor]:
    cases = position_biased.TABLE_CASES if table else position_biased.EXACT_CASES
    call = position_biased.make(cases[0]).to(torch.float64)

    def run(key: Tensor, backend: str | None) -> Tensor:
        return position_biased.Call(call.tensors | {"key": key}, call.options).run(backend)[0]

    return run, call.tensors["key"]


def samples() -> tuple[Function, Tensor]:
    bag, grid, points = test_sample_bag.make()
    return (
        lambda x, backend: ops.sample_bag(x, grid, points, backend=backend),
        torch.nan_to_num(bag),
    )


MADE = {
    **{op.name: (of_contract, op) for op in contract.OPS},
    "locations": (multi_scale, "locations"),
    "offsets": (multi_scale, "points"),
    "exact bias": (position_bias, False),
    "table": (position_bias, True),
    "sample_bag": (samples,),
}


@pytest.fixture(params=MADE)
def made(request) -> tuple[Function, Tensor]:
    make, *arguments = MADE[request.param]
    function, x = make(*arguments)
    return function, x.detach()


def test_forward_mode_raises_and_works_on_the_reference(made) -> None:
    function, x = made
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    with pytest.raises(RuntimeError, match=r'no forward-mode .* backend="reference" has one'):
        torch.func.jvp(lambda at: function(at, None), (x,), (direction,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r'no forward-mode .* backend="reference" has one'),
    ):
        function(forward_ad.make_dual(x, direction), None)
    tangent = torch.func.jvp(lambda at: function(at, "reference"), (x,), (direction,))[1]
    # the same derivative by reverse mode, which every backend has
    x.requires_grad_()
    out = function(x, None)
    upstream = torch.ones_like(out) + torch.arange(out.numel()).reshape(out.shape)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close((tangent * upstream).sum(), (gradient * direction).sum())


def test_tangents_of_an_upstream_gradient_raise_and_reach_the_reference_s(made) -> None:
    function, x = made
    x.requires_grad_()
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.ones((), dtype=x.dtype), torch.ones((), dtype=x.dtype))
        with pytest.raises(RuntimeError, match=r'no forward-mode .* backend="reference" has one'):
            torch.autograd.grad(function(x, None).sum() * factor, x)
        (gradient,) = torch.autograd.grad(function(x, "reference").sum() * factor, x)
        primal, tangent = forward_ad.unpack_dual(gradient)
        torch.testing.assert_close(tangent, primal)


def test_gradients_of_torch_func_raise_and_work_on_the_reference(made) -> None:
    function, x = made
    with pytest.raises(RuntimeError, match=r'no derivative for torch\.func .* backend="reference"'):
        torch.func.grad(lambda at: function(at, None).sum())(x)
    gradient = torch.func.grad(lambda at: function(at, "reference").sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(function(x, None).sum(), x)[0])


@pytest.mark.parametrize("within", [False, True])
def test_forward_mode_raises_beside_vmap(within: bool) -> None:
    function, x = multi_scale("locations")
    several = torch.stack([x.detach(), x.detach()])

    def tangent(at: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: function(y, None), (at,), (at,))[1]

    def batched(at: Tensor) -> Tensor:
        return torch.vmap(lambda y: function(y, None))(at)

    with pytest.raises(RuntimeError, match="no forward-mode"):
        torch.vmap(tangent)(several) if within else torch.func.jvp(batched, (several,), (several,))


def test_forward_mode_raises_in_compiled_code() -> None:
    function, x = multi_scale("locations")
    x = x.detach()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda at: torch.func.jvp(lambda y: function(y, None), (at,), (at,))[1], backend="eager"
    )
    with pytest.raises(RuntimeError, match="no forward-mode"):
        compiled(x)


def test_what_has_no_tangent_may_lie_beside_what_has() -> None:
    function, x = multi_scale("locations")
    constant, scale = x.detach(), torch.tensor(2.0, dtype=x.dtype)
    out, tangent = torch.func.jvp(lambda s: s * function(constant, None), (scale,), (scale,))
    assert torch.equal(out, tangent)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_once_per_sample() -> None:
    function, x = multi_scale("locations")
    several = torch.stack([x.detach(), 2 * x.detach()])
    out = torch.vmap(lambda at: function(at, None))(several)
    assert torch.equal(out, torch.stack([function(at, None) for at in several]))
