"""Bytes that attention must move and operations it must do: arithmetic, nothing here is measured.

A pass is keyed "forward", "backward" (the bag is frozen) or "backward, trained"; `e` is the bytes
of an element throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD, TRAINED = "forward", "backward", "backward, trained"


@dataclass(frozen=True)
class Work:
    """What one pass moves and computes."""

    n_bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.n_bytes + other.n_bytes, self.operations + other.operations)


Passes = dict[str, Work]


def of_mode(passes: Passes, mode: str) -> Work:
    """The work of a mode: `both` is the forward and the backward of its kind."""
    if mode.startswith("both"):
        return passes[FORWARD] + passes[mode.replace("both", BACKWARD)]
    return passes[mode]


def added(*several: Passes) -> Passes:
    """The passes of one after another."""
    return {name: sum((passes[name] for passes in several), Work()) for name in several[0]}


def least(*ways: Passes) -> Passes:
    """The fewest bytes and the fewest operations of several ways, each by itself: a lower bound."""
    return {
        name: Work(
            min(passes[name].n_bytes for passes in ways),
            min(passes[name].operations for passes in ways),
        )
        for name in ways[0]
    }


def attention(
    pairs: int, tq: int, tk: int, heads: int, d: int, dv: int, e: int, *, weights: bool = False
) -> Passes:
    """Attention to keys given: each side once per pass, gradients written once.

    Args:
        pairs: pairs of query and key that meet.
        tq, tk: queries and keys of all bags.
        heads, d, dv: heads, and channels of keys and of values.
        e: bytes of an element.
        weights: the weights go to memory: written and read by the softmax and both products
            forward; backward they are kept, where a fused kernel multiplies queries and keys again.
    """
    inputs, outputs = e * heads * (tq * d + tk * (d + dv)), e * heads * tq * dv
    held = e * heads * pairs if weights else 0
    again = 0 if weights else d
    backward = Work(
        2 * inputs + 2 * outputs + 6 * held, 2 * pairs * heads * (2 * d + 2 * dv + again)
    )
    return {
        FORWARD: Work(inputs + outputs + 4 * held, 2 * pairs * heads * (d + dv)),
        BACKWARD: backward,
        TRAINED: backward,
    }


def linear(rows: int, dim: int, width: int, e: int) -> Passes:
    """A linear layer over a bag; frozen, only its weight has a gradient."""
    moved, operations = e * (rows * dim + rows * width + dim * width), 2 * rows * dim * width
    once = Work(moved, operations)
    return {FORWARD: once, BACKWARD: once, TRAINED: once + once}


def normalising(rows: int, dim: int, e: int) -> Passes:
    """A layer norm without parameters: nothing backward over a frozen bag."""
    bag = e * rows * dim
    return {FORWARD: Work(2 * bag), BACKWARD: Work(), TRAINED: Work(3 * bag)}


def pooling(total: int, n_rows: int, n_bags: int, dim: int, e: int) -> Passes:
    """`pool_bag`: the bag once forward and once backward, written once more if it is trained."""
    bag, rows = e * total * dim, e * n_bags * n_rows * dim
    product = 2 * total * n_rows * dim
    return {
        FORWARD: Work(bag + 2 * rows, 2 * product),
        BACKWARD: Work(bag + 4 * rows, 3 * product),
        TRAINED: Work(2 * bag + 4 * rows, 5 * product),
    }


def plain_pooling(total: int, n_rows: int, dim: int, e: int) -> Passes:
    """The same in three torch expressions: the bag twice per pass, weights in memory."""
    bag, held, product = e * total * dim, e * total * n_rows, 2 * total * n_rows * dim
    backward = Work(2 * bag + 6 * held, 2 * product)
    # two gradients of the bag are written, read and added
    trained = backward + Work(5 * bag + 2 * held, 2 * product)
    return {FORWARD: Work(2 * bag + 4 * held, 2 * product), BACKWARD: backward, TRAINED: trained}


def spreading(total: int, n_keys: int, heads: int, dim: int, dv: int, e: int) -> Passes:
    """`bag_attends_tokens`, absorbed: bag and result once per pass."""
    bag, result = e * total * dim, e * total * heads * dv
    operations = 2 * total * n_keys * heads
    return {
        FORWARD: Work(bag + result, operations * (dim + dv)),
        BACKWARD: Work(bag + result, operations * (2 * dim + 2 * dv)),
        TRAINED: Work(2 * bag + result, operations * (3 * dim + 2 * dv)),
    }


def absorbing(n_rows: int, n_bags: int, dim: int, width: int) -> Passes:
    """The products around a pool: rows with projections of `width` channels in all."""
    once = Work(0.0, 2 * n_rows * n_bags * dim * width)
    return {FORWARD: once, BACKWARD: once + once, TRAINED: once + once}
