"""Lower bounds on a GPU that nobody here has: arithmetic from bytes and operations.

A kernel that moves each byte it must at the speed of a copy, or does each operation it must at the
speed of the tensor cores, whichever takes longer; launches and merges are left out.
"""

from __future__ import annotations

from . import (
    bench_bag_attends_tokens,
    bench_cross_attention,
    bench_pool_bag,
    bench_tokens_attend_bag,
)
from .work import Passes, Work, least, of_mode

# assumed of an H200: bytes a second of a copy, bf16 operations a second of its tensor cores
COPY_BYTES, OPERATIONS = 4.3e12, 790e12
_BF16 = 2
_MODES = ("forward", "both", "both, trained")


def floors() -> str:
    """One table for each op, its shapes as the benchmarks have them, bf16."""
    parts = []
    for op, lines in _by_op().items():
        with_bag = not op.startswith("cross_attention")
        modes = _MODES if with_bag else _MODES[:2]
        heads = ["shape", *(f"{mode}: GB, GFLOP, us" for mode in modes)]
        table = [f"### {op}: lower bounds, not measured\n", _line(heads), "|" + "---|" * len(heads)]
        for label, passes in lines:
            table.append(_line([label, *(_cell(of_mode(passes, mode)) for mode in modes)]))
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(work: Work) -> str:
    memory, arithmetic = 1e6 * work.n_bytes / COPY_BYTES, 1e6 * work.operations / OPERATIONS
    bound = "memory" if memory >= arithmetic else "arithmetic"
    amounts = f"{1e-9 * work.n_bytes:.3g}, {1e-9 * work.operations:.3g}"
    return f"{amounts}, {max(memory, arithmetic):.3g} ({bound})"


def _by_op() -> dict[str, list[tuple[str, Passes]]]:
    found: dict[str, list[tuple[str, Passes]]] = {}
    for shape in _shapes(bench_pool_bag.SHAPES):
        found.setdefault(shape.op, []).append((shape.label, shape.minimum(_BF16)))
    for shape in _shapes(bench_tokens_attend_bag.SHAPES):
        passes = least(*shape.attending(_BF16))
        found.setdefault("tokens_attend_bag", []).append((shape.label("q"), passes))
    for shape in _shapes(bench_bag_attends_tokens.SHAPES):
        passes = least(*shape.spreading(_BF16))
        found.setdefault("bag_attends_tokens", []).append((shape.label("k"), passes))
    for shape in _shapes(bench_cross_attention.SHAPES):
        found.setdefault(shape.op, []).append((shape.label, shape.minimum(_BF16)))
    return found


def _shapes(rows: list[tuple]) -> list:
    """The shapes of a benchmark but those of the smoke set."""
    return [shape for shape, *names in rows if "smoke" not in names]
