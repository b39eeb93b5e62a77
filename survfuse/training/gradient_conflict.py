"""Two gradients that pull apart: which rows do, and what becomes of them.

Derivation: docs/math.md, "Gradient coordination".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["projection", "released"]
MODES: tuple[Mode, ...] = ("projection", "released")


class Resolved(NamedTuple):
    """Gradients of both branches after coordination."""

    a: Tensor  # [out, d], the type of what came in; unchanged rows have the same bits
    b: Tensor  # [out, d]
    conflict: Tensor  # [out] bool
    changed_a: Tensor  # [out] bool
    changed_b: Tensor  # [out] bool
    strength_a: Tensor  # [out] fp64, |change| / |gradient|, 0 where unchanged
    strength_b: Tensor  # [out] fp64


def resolve(
    grad_a: Tensor, grad_b: Tensor, *, mode: Mode, weaker: Literal["a", "b"] | None
) -> Resolved:
    """Change the weaker branch's rows where they conflict with the other's.

    Rows conflict where their cosine is negative beyond the rounding of a sum in fp64.

        projection  g <- g - p, p = (g . o / |o|^2) o; without a weaker branch both do this, each
                    against the other's gradient as it was
        released    g <- |g - p| (g - 2 p) / |g - 2 p|; without a weaker branch nothing changes

    Args:
        grad_a, grad_b: [out, d] finite, one type; row r is of one class (bin) in both.
        mode: which of the two.
        weaker: the branch to change; None where neither is.

    Precision: fp64 inside. After "projection" no row conflicts, whatever the type: a changed row
    is moved towards the other by at most its own rounding. A remainder smaller than the rounding
    of the gradient it is left of becomes zero, since it has no direction.
    """
    a, b = grad_a.double(), grad_b.double()
    noise = a.shape[1] * torch.finfo(torch.float64).eps
    conflict = (a * b).sum(1) < -noise * a.norm(dim=1) * b.norm(dim=1)
    either = mode == "projection" and weaker is None
    changed_a = conflict & (weaker == "a" or either)
    changed_b = conflict & (weaker == "b" or either)
    if mode == "projection":
        smallest = torch.finfo(grad_a.dtype).eps
        new_a = torch.where(changed_a[:, None], _perpendicular(a, b, smallest), a)
        new_b = torch.where(changed_b[:, None], _perpendicular(b, a, smallest), b)
        new_a, new_b = _agree_when_rounded(new_a, new_b, changed_a, changed_b, grad_a.dtype)
    else:
        new_a, new_b = _reflected(a, b), _reflected(b, a)
    # selected, so that rows without a conflict keep their bits
    new_a = torch.where(changed_a[:, None], new_a.to(grad_a.dtype), grad_a)
    new_b = torch.where(changed_b[:, None], new_b.to(grad_b.dtype), grad_b)
    return Resolved(
        new_a,
        new_b,
        conflict,
        changed_a,
        changed_b,
        _strength(a, new_a, changed_a),
        _strength(b, new_b, changed_b),
    )


def _along(g: Tensor, o: Tensor) -> Tensor:
    """[out, d]: the part of each row of g along that of o; zero where o is."""
    square = (o * o).sum(1, keepdim=True)
    return (g * o).sum(1, keepdim=True) / torch.where(square > 0, square, 1.0) * o


def _perpendicular(g: Tensor, o: Tensor, smallest: float) -> Tensor:
    rest = g - _along(g, o)
    keep = rest.norm(dim=1) > smallest * g.norm(dim=1)
    return torch.where(keep[:, None], rest, 0.0)


def _reflected(g: Tensor, o: Tensor) -> Tensor:
    along = _along(g, o)
    mirrored = g - 2.0 * along
    length = mirrored.norm(dim=1, keepdim=True)
    scale = (g - along).norm(dim=1, keepdim=True) / torch.where(length > 0, length, 1.0)
    return scale * mirrored


def _agree_when_rounded(
    a: Tensor, b: Tensor, changed_a: Tensor, changed_b: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Move changed rows towards the other where, rounded to `dtype`, they would conflict."""
    wrong = (a.to(dtype).double() * b.to(dtype).double()).sum(1, keepdim=True) < 0
    info = torch.finfo(dtype)
    unit, step = info.eps / 2, info.smallest_normal * info.eps
    # a row of zeros stays one
    round_a = torch.where(changed_a[:, None], _rounding(a, unit, step), 0.0)
    round_b = torch.where(changed_b[:, None], _rounding(b, unit, step), 0.0)
    lost = (round_a * (b.abs() + round_b) + round_b * a.abs()).sum(1, keepdim=True)
    # the move is rounded as well
    missing = (lost - (a * b).sum(1, keepdim=True)).clamp(min=0) * (1 + 4 * unit)
    move_a = wrong & changed_a[:, None]
    move_b = wrong & (changed_b & ~changed_a)[:, None]
    square_a, square_b = (a * a).sum(1, keepdim=True), (b * b).sum(1, keepdim=True)
    toward_b = missing / torch.where(square_b > 0, square_b, 1.0) * b
    toward_a = missing / torch.where(square_a > 0, square_a, 1.0) * a
    return torch.where(move_a, a + toward_b, a), torch.where(move_b, b + toward_a, b)


def _rounding(x: Tensor, unit: float, step: float) -> Tensor:
    """[out, d]: bound of what rounding changes; 0 in rows of zeros."""
    return torch.where((x != 0).any(1, keepdim=True), unit * x.abs() + step, 0.0)


def _strength(before: Tensor, after: Tensor, changed: Tensor) -> Tensor:
    length = before.norm(dim=1)
    change = (after.double() - before).norm(dim=1)
    return torch.where(changed, change / torch.where(length > 0, length, 1.0), 0.0)
