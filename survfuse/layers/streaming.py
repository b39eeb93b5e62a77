"""Computing over bags piece by piece, so that little or nothing of their length is held at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# registers the operations whose results are kept
import survfuse.ops  # noqa: F401
from survfuse.ragged import Ragged

# rows of a piece: long enough for a product of matrices to run at full speed, short enough that
# what a piece needs for its gradients is small beside a bag
_ROWS_ON_CPU = 3072
_ROWS_ON_DEVICE = 16384
# numbers in a piece of narrow rows, 4 MB in fp32: fewer would not be worth the calls
_NUMBERS = 2**20


RECOMPUTE = ("none", "light", "all")
# results that a light recomputation keeps: they cost most, and are narrow
_KEPT = (torch.ops.survfuse.project_bag.default, torch.ops.survfuse.cross_attention.default)


def stream(
    run: Callable[[Ragged], tuple[Tensor, ...]],
    bag: Tensor,
    ragged: Ragged,
    *,
    recompute: str = "none",
    rows: int | None = None,
) -> list[tuple[Tensor, ...]]:
    """`run` on successive pieces of a batch of bags.

    What only one piece needs, forward and backward, exists for one piece at a time. What `run`
    keeps for its backward is up to `recompute`: "none" keeps all of it for every piece; "all"
    keeps nothing, and runs every piece a second time in the backward; "light" keeps what projected
    the bag and what attention gave, and computes the rest a second time. Dropout draws the same
    numbers both times.

    There is one piece, kept, where the bag itself is trained (its gradient, as large as the bag,
    would be made once per piece) and under `torch.compile` (a loop would compile one graph per
    length).

    Args:
        run: of the ranges of a piece, which name rows of the stored bag, to its results. It may
            read parameters and tensors of its surroundings; gradients reach them.
        bag: [T, D], what `run` reads; only its device and whether it is trained matter here.
        ragged: the ranges of all bags.
        recompute: one of the above.
        rows: of a piece; None for what suits the device.

    Returns:
        The results of every piece, in batch order; at least one piece, which may be empty.
    """
    if torch.compiler.is_compiling() or bag.requires_grad:
        return [run(ragged)]
    parts = pieces(ragged, rows or default_rows(bag))
    if len(parts) == 1 or recompute == "none" or not torch.is_grad_enabled():
        return [run(part) for part in parts]
    keep = {}
    if recompute == "light":
        keep["context_fn"] = partial(create_selective_checkpoint_contexts, list(_KEPT))
    device = bag.device.type
    # weights that autocast casts once and remembers would be cast anew in the backward, where an
    # operation too many is mistaken for another computation
    with torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    ):
        return [checkpoint(run, part, use_reentrant=False, **keep) for part in parts]


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
