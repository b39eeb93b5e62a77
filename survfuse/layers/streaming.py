"""Computing over bags piece by piece, so that little or nothing of their length is held at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from survfuse.ragged import Ragged

# rows of a piece: long enough for a product of matrices to run at full speed, short enough that
# what a piece needs for its gradients is small beside a bag
_ROWS_ON_CPU = 3072
_ROWS_ON_DEVICE = 16384
# numbers in a piece of narrow rows, 4 MB in fp32: fewer would not be worth the calls
_NUMBERS = 2**20


def stream(
    run: Callable[[Ragged], tuple[Tensor, ...]],
    bag: Tensor,
    ragged: Ragged,
    *,
    recompute: bool = False,
    rows: int | None = None,
) -> list[tuple[Tensor, ...]]:
    """`run` on successive pieces of a batch of bags.

    What only one piece needs, forward and backward, exists for one piece at a time. What `run`
    keeps for its backward is kept for every piece or, with `recompute`, not at all: every piece is
    run a second time in the backward.

    There is one piece, kept, where the bag itself is trained (its gradient, as large as the bag,
    would be made once per piece) and under `torch.compile` (a loop would compile one graph per
    length).

    Args:
        run: of the ranges of a piece, which name rows of the stored bag, to its results. It may
            read parameters and tensors of its surroundings; gradients reach them.
        bag: [T, D], what `run` reads; only its device and whether it is trained matter here.
        ragged: the ranges of all bags.
        recompute: run every piece a second time in the backward.
        rows: of a piece; None for what suits the device.

    Returns:
        The results of every piece, in batch order; at least one piece, which may be empty.
    """
    if torch.compiler.is_compiling() or bag.requires_grad:
        return [run(ragged)]
    parts = pieces(ragged, rows or default_rows(bag))
    if len(parts) == 1 or not recompute:
        return [run(part) for part in parts]
    return [recomputed(run, part, device=bag.device) for part in parts]


def recomputed(run: Callable[..., Any], *arguments: Any, device: torch.device) -> Any:
    """`run(*arguments)`, of which the arguments alone are kept; the backward runs it again.

    Dropout draws the same numbers both times. Without gradients, or under `torch.compile`, which
    decides itself what it keeps, this is the plain call.

    Args:
        run: may read parameters and tensors of its surroundings; gradients reach them.
        arguments: of `run`.
        device: where it works.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(*arguments)
    # weights that autocast casts once and remembers would be cast anew in the backward, where an
    # operation too many is mistaken for another computation
    kind = device.type
    with torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    ):
        return checkpoint(run, *arguments, use_reentrant=False)


def default_rows(bag: Tensor, width: int | None = None) -> int:
    """Rows of a piece on the device of the bag; more where what is computed of one is narrow.

    Args:
        bag: says where.
        width: of a row of what is computed; None for wide ones.
    """
    rows = _ROWS_ON_CPU if bag.device.type == "cpu" else _ROWS_ON_DEVICE
    return rows if width is None else max(rows, _NUMBERS // width)


def pieces(ragged: Ragged, rows: int) -> list[Ragged]:
    """Consecutive parts of about equal size, each at most `rows` rows of all bags together.

    The ranges of a piece name rows of the same stored matrix, [B] of them: a bag that lies
    elsewhere has length 0 in it. Joined in order the pieces are all rows in batch order.

    Example:
        >>> [part.lengths.tolist() for part in pieces(Ragged.from_lengths([3, 0, 2]), 2)]
        [[1, 0, 0], [2, 0, 0], [0, 0, 2]]
    """
    if ragged.total <= rows:
        return [ragged]
    n_pieces = -(-ragged.total // rows)
    ends = ragged.lengths.cumsum(0)
    begins = ends - ragged.lengths
    found = []
    for i in range(n_pieces):
        first, last = ragged.total * i // n_pieces, ragged.total * (i + 1) // n_pieces
        begin, end = begins.clamp(min=first), ends.clamp(max=last)
        lengths = (end - begin).clamp(min=0)
        starts = torch.where(lengths > 0, ragged.starts + begin - begins, 0)
        # only the CPU compares the longest with the lengths; elsewhere a bound spares a wait
        longest = min(ragged.max_length, last - first)
        if lengths.device.type == "cpu":
            longest = int(lengths.max())
        found.append(Ragged(starts, lengths, last - first, longest))
    return found
