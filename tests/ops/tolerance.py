"""Every tolerance of the op tests."""

from __future__ import annotations

import torch
from torch import Tensor

# error against fp64: at most this often that of plain torch in the same type ...
FACTOR = 2.0
# ... plus so many units of rounding of the result's scale
EPSILONS = 4.0
# in fp64 nothing more exact is at hand: plain torch and the reference are one formula there, so
# two orders of the sums are compared, over features as far as 300 deviations from zero
FP64_RELATIVE = 1e-12


def assert_within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor, dtype) -> None:
    """The precision budget of docs/design.md, for one result."""
    exact, got, plain = exact.detach().cpu(), got.detach().cpu().double(), plain.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    infinite = exact.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinities differ"
    if not bool((~infinite).any()):
        return
    got, plain, exact = got[~infinite], plain.cpu()[~infinite], exact[~infinite]
    assert not bool(got.isnan().any()), f"{name}: NaN"
    if dtype == torch.float64:
        plain = exact + FP64_RELATIVE / FACTOR * exact.abs().max()
    budget = FACTOR * (plain - exact).abs().max() + EPSILONS * torch.finfo(dtype).eps * (
        exact.abs().max()
    )
    error = (got - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
