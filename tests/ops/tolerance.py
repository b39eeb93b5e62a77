"""Every tolerance of the op tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# error against fp64: at most this often that of plain torch in the same type ...
FACTOR = 2.0
# ... plus so many units of rounding of the result's scale
EPSILONS = 4.0
# in fp64 nothing more exact is at hand: plain torch and the reference are one formula there, so
# two orders of the sums are compared, over features as far as 300 deviations from zero
FP64_RELATIVE = 1e-12
# inputs like the first, where that is over its budget, and how far from it
MORE_DRAWS, NEARBY = 7, 1e-3
# so many of all these may be over the budgets of their own
OVER = 2

# name, ours, plain torch, exact
Compared = tuple[str, Tensor, Tensor, Tensor]


def nearby(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k-th problem like this one: as well conditioned, but nothing rounds as before."""
    if k == 0:
        return tensors
    g = torch.Generator().manual_seed(k)
    return {
        name: t * (1.0 + NEARBY * torch.randn(t.shape, generator=g, dtype=torch.float64))
        for name, t in tensors.items()
    }


def assert_within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype) -> None:
    """The precision budget of docs/design.md, for one result."""
    _judge(name, [_errors(name, got, plain, exact, dtype)])


def assert_draws_within_budget(draw: Callable[[int], Iterable[Compared]], dtype) -> None:
    """The budget of every result that `draw(k)` compares, of the k-th `nearby` inputs.

    The error of one formula on one input may be anything between nothing and its bound: it changes
    with the order of the sums, so from one processor to the next. Where ours is over the budget
    that plain torch's error sets, both are judged by their greatest on eight inputs like this one,
    of which most must be within their own budgets: what is worse than the formula is so on most.
    """
    first = {name: _errors(name, *rest, dtype) for name, *rest in draw(0)}
    over = {name: [errors] for name, errors in first.items() if not _within([errors])}
    for k in range(1, 1 + MORE_DRAWS if over else 1):
        for name, *rest in draw(k):
            if name in over:
                over[name].append(_errors(name, *rest, dtype))
    for name, errors in over.items():
        _judge(name, errors)
        n_over = sum(not _within([each]) for each in errors)
        assert n_over <= OVER, f"{name}: over its budget on {n_over} of {len(errors)} inputs"


def _errors(name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype) -> tuple[float, float]:
    """The greatest errors of ours and of plain torch, in units of rounding of the scale."""
    exact, got, plain = exact.detach().cpu(), got.detach().cpu().double(), plain.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    infinite = exact.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinities differ"
    if not bool((~infinite).any()):
        return 0.0, 0.0
    got, plain, exact = got[~infinite], plain.cpu()[~infinite], exact[~infinite]
    assert not bool(got.isnan().any()), f"{name}: NaN"
    if dtype == torch.float64:
        plain = exact + FP64_RELATIVE / FACTOR * exact.abs().max()
    # where everything is zero, no error but zero is a small one
    unit = torch.finfo(dtype).eps * max(float(exact.abs().max()), 1e-200)
    return tuple(float((value - exact).abs().max()) / unit for value in (got, plain))


def _within(errors: list[tuple[float, float]]) -> bool:
    ours, plain = (max(side) for side in zip(*errors, strict=True))
    return ours <= FACTOR * plain + EPSILONS


def _judge(name: str, errors: list[tuple[float, float]]) -> None:
    ours, plain = (max(side) for side in zip(*errors, strict=True))
    assert _within(errors), (
        f"{name}: error {ours:.3g}, plain torch {plain:.3g} units of rounding, {len(errors)} draws"
    )
