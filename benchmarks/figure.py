"""Pictures of results: the time of every way over the shapes of an op, one panel for each mode.

Drawn on matplotlib's object interface, without dates or random names, so that the same rows and the
same matplotlib give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from survfuse.data.atomic import atomic_path
from survfuse.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Rows = Sequence[dict[str, str]]
MODE_ORDER = ("forward", "backward", "both", "backward, trained", "both, trained")
# Okabe and Ito's colours, told apart by the colour-blind; a family shares one, markers tell more
_BLUE, _SKY, _RED, _GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
_PINK, _ORANGE, _GREY, _BLACK = "#CC79A7", "#E69F00", "#767676", "#000000"
_STYLES = {
    "survfuse": (_BLUE, "o"),
    "survfuse tiled": (_SKY, "o"),
    "floor (memory alone)": (_BLACK, "|"),
    "plain torch": (_RED, "s"),
    "plain torch, absorbed": (_RED, "d"),
    "SDPA": (_GREEN, "^"),
    "SDPA math": (_GREEN, "v"),
    "SDPA flash": (_GREEN, "<"),
    "SDPA efficient": (_GREEN, ">"),
    "SDPA cuDNN": (_GREEN, "D"),
    "FlexAttention": (_PINK, "P"),
    "varlen_attn": (_ORANGE, "X"),
    "varlen_attn, num_splits 1": (_ORANGE, "*"),
    "xformers dense": (_GREY, "h"),
    "xformers varlen": (_GREY, "H"),
}
# any other way, in the order of names
_OTHERS = [(colour, marker) for marker in "p8s^" for colour in (_GREY, _ORANGE, _PINK, _SKY)]
_INCHES_PER_LINE = 0.27


def times_figure(rows: Rows, title: str) -> Figure:
    """One block of panels for each op in `rows`, below each other.

    Args:
        rows: rows of a results file; those without a time are not drawn.
        title: above everything.

    Raises:
        ValueError: no row holds a time.
        ImportError: matplotlib is not installed.
    """
    blocks = [
        [row for row in rows if row["op"] == op and not row["note"]]
        for op in sorted({row["op"] for row in rows})
    ]
    blocks = [block for block in blocks if block]
    if not blocks:
        raise ValueError("there is no measured row to draw")
    heights = [
        1.6 + _INCHES_PER_LINE * (len(_lines(block)) + _legend_lines(block)) for block in blocks
    ]
    figure = require("matplotlib.figure", extra="bench").Figure(
        figsize=(11.0, 0.5 + sum(heights)), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, block in zip(parts, blocks, strict=True):
        _draw_op(part, block)
    return figure


def save(figure: Figure, path: Path, about: str = "") -> None:
    """Write a figure, its kind by suffix; `about` is kept in the file, no date is."""
    matplotlib = require("matplotlib", extra="bench")
    metadata = {"Date": None, "Creator": None, "Description": about}
    if path.suffix == ".png":
        metadata = {"Software": None, "Description": about}
    with (
        matplotlib.rc_context({"svg.hashsalt": "survfuse", "svg.fonttype": "none"}),
        atomic_path(path) as temporary,
    ):
        figure.savefig(temporary, format=path.suffix[1:], metadata=metadata, dpi=120)


def digest(rows: Rows) -> str:
    """What a figure of these rows is drawn from: the numbers, and this file."""
    drawn = [
        [row[name] for name in ("op", "backend", "mode", "shape", "dtype", "p50_ms")]
        for row in rows
        if not row["note"]
    ]
    source = Path(__file__).read_bytes()
    return hashlib.sha256(json.dumps(drawn).encode() + source).hexdigest()


def _lines(rows: Rows) -> list[tuple[str, str]]:
    return sorted({(row["shape"], row["dtype"]) for row in rows}, reverse=True)


def _names(rows: Rows) -> list[str]:
    """Ours first, then as the styles are listed."""
    known = list(_STYLES)
    rank = {name: index for index, name in enumerate(known)}
    return sorted(
        {row["backend"] for row in rows}, key=lambda name: (rank.get(_family(name), 99), name)
    )


def _family(name: str) -> str:
    return name.removeprefix("Linear + ").removesuffix(", bf16")


def _legend_lines(rows: Rows) -> int:
    return -(-len(_names(rows)) // 4)


def _draw_op(part: SubFigure, rows: Rows) -> None:
    modes = [mode for mode in MODE_ORDER if any(row["mode"] == mode for row in rows)]
    modes += sorted({row["mode"] for row in rows} - set(modes))
    lines, names = _lines(rows), _names(rows)
    strange = [name for name in names if _family(name) not in _STYLES]
    panels = part.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    handles = {}
    for axes, mode in zip(panels, modes, strict=True):
        # ours on top of the others
        for name in reversed(names):
            colour, marker = (
                _STYLES.get(_family(name)) or _OTHERS[strange.index(name) % len(_OTHERS)]
            )
            here = [row for row in rows if row["mode"] == mode and row["backend"] == name]
            handles[name] = axes.plot(
                [float(row["p50_ms"]) for row in here],
                [lines.index((row["shape"], row["dtype"])) for row in here],
                marker,
                color=colour,
                markersize=7 if name.startswith("survfuse") else 6,
                markerfacecolor="none" if name.endswith(", bf16") else colour,
                label=name,
            )[0]
        _scale(axes, [float(row["p50_ms"]) for row in rows])
        axes.set_title(mode, fontsize=9)
        axes.set_xlabel("ms, median", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="both", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(-0.6, len(lines) - 0.4)
    panels[0].set_yticks(range(len(lines)), [f"{shape}, {kind}" for shape, kind in lines])
    part.suptitle(rows[0]["op"], fontsize=10, x=0.01, ha="left")
    shown = [handles[name] for name in names]
    part.legend(shown, names, loc="outside lower center", ncols=4, fontsize=7, frameon=False)


def _scale(axes, times: list[float]) -> None:
    """A logarithmic axis with whole numbers, the same for all modes of an op."""
    ticker = require("matplotlib.ticker", extra="bench")
    steps = (1.0,) if max(times) > 100 * min(times) else (1.0, 2.0, 5.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
