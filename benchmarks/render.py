"""Render benchmarks/results/*.csv into docs/performance.md and docs/performance/*/*.svg.

python -m benchmarks.render           write
python -m benchmarks.render --check   fail if the page or a figure is not what the results say
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from survfuse.data.atomic import atomic_path

from .figure import digest, save, times_figure
from .floors import floors
from .harness import ANY, MODEL_OP, RESULTS, ROOT, read_rows

PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"
# marker -> what stands between its begin and its end
SECTIONS = {"models": lambda: model_tables(), "results": lambda: tables(), "floors": floors}
# the way of a model that the others are compared with
PLAIN = "plain torch"
Row = dict[str, str]


def results() -> dict[str, list[Row]]:
    """Rows by device."""
    return {path.stem: read_rows(path) for path in sorted(RESULTS.glob("*.csv"))}


def ops_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by operation; models are none."""
    ops = sorted({row["op"] for row in rows if not row["op"].startswith(MODEL_OP)})
    return {op: [row for row in rows if row["op"] == op] for op in ops}


def models_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by model."""
    ops = sorted({row["op"] for row in rows if row["op"].startswith(MODEL_OP)})
    return {op.removeprefix(MODEL_OP): [r for r in rows if r["op"] == op] for op in ops}


def figure_path(device: str, op: str) -> Path:
    return FIGURES / device / f"{re.sub(r'[^a-z0-9]+', '_', op.lower())}.svg"


def tables() -> str:
    """One section per device; per op a picture, and a table by mode, shape and type."""
    parts = []
    for device, rows in results().items():
        ops = ops_of(rows)
        if not ops:
            continue
        parts += [f"## {device}\n", _runs(ops)]
        for op, own in ops.items():
            timed = [row for row in own if not row["note"]]
            parts.append(f"### {op}\n")
            if timed:
                picture = figure_path(device, op).relative_to(PAGE.parent).as_posix()
                parts += [f"![{op}: median times by mode]({picture})\n", _table(timed)]
            parts += _left_out([row for row in own if row["note"]])
    return "\n".join(parts)


def model_tables() -> str:
    """Per device and model a table of all ways by length, and who took no part."""
    parts = []
    for device, rows in results().items():
        models = models_of(rows)
        if not models:
            continue
        parts += [f"### Models on {device}\n", _runs(models)]
        for model, own in models.items():
            timed = [row for row in own if not row["note"]]
            parts.append(f"#### {model}\n")
            if timed:
                parts.append(_model_table(timed))
            parts += _left_out([row for row in own if row["note"]])
    return "\n".join(parts) or "No machine has been measured yet.\n"


def _runs(groups: dict[str, list[Row]]) -> str:
    """What was measured and when."""
    runs = sorted(
        {
            f"commit {r['commit']}, torch {r['torch']}, triton {r['triton']}, "
            f"{r['threads']} threads, {r['date']}"
            for rows in groups.values()
            for r in rows
        }
    )
    return "Measured: " + "; ".join(runs) + ".\n"


def _model_table(rows: list[Row]) -> str:
    lines = [
        "| N | type | way | step ms (p20 / p50 / p80) | faster than plain | extra MB "
        "| less memory than plain |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {_race(row): row for row in rows if row["backend"] == PLAIN}
    for row in sorted(rows, key=lambda row: (*_race(row), float(row["p50_ms"]))):
        times = " / ".join(f"{float(row[p]):.3g}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        against = plain.get(_race(row))
        ratios = [
            _ratio(against, row, name) if against is not None else "-"
            for name in ("p50_ms", "peak_mb")
        ]
        lines.append(
            f"| {_race(row)[0]} | {row['dtype']} | {row['backend']} | {times} | {ratios[0]} "
            f"| {float(row['peak_mb']):.0f} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def _race(row: Row) -> tuple[int, str, str]:
    """What the ways of one race share, shortest bags first and fp32 before bf16."""
    length = re.search(r"N=(\d+)", row["shape"])
    return int(length[1]) if length else 0, f"{row['dtype'] != 'float32':d}", row["shape"]


def _ratio(plain: Row, row: Row, name: str) -> str:
    own = float(row[name])
    return f"{float(plain[name]) / own:.2f}x" if own > 0 else "-"


def _table(rows: list[Row]) -> str:
    lines = [
        "| shape | type | mode | way | p20 / p50 / p80 ms | speedup | GB/s | bandwidth "
        "| extra MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        times = " / ".join(f"{float(row[p]):.3g}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        speed = 1e3 * float(row["gbytes"]) / float(row["p50_ms"])
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['mode']} | {row['backend']} | {times} "
            f"| {float(row['speedup']):.2f}x | {speed:.3g} "
            f"| {100 * float(row['bandwidth_fraction']):.0f} % | {float(row['peak_mb']):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _order(row: Row) -> tuple:
    return row["shape"], row["dtype"], row["mode"], float(row["p50_ms"])


def _left_out(rows: list[Row]) -> list[str]:
    """A line for each way that took no part and each reason."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["backend"], row["note"]), []).append(row)
    lines = []
    for (name, reason), absent in sorted(found.items()):
        where = ""
        if absent[0]["shape"] != ANY:
            shapes = sorted({f"{row['shape']} {row['dtype']}" for row in absent})
            modes = sorted({row["mode"] for row in absent})
            where = f" ({'; '.join(shapes)}: {', '.join(modes)})"
        lines.append(f"* {name}: {reason}{where}")
    return ["Left out:\n", "\n".join(lines) + "\n"] if lines else []


def rendered() -> str:
    """The page with its generated sections replaced."""
    page = PAGE.read_text()
    for name, text in SECTIONS.items():
        begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
        head, rest = page.split(begin, 1)
        tail = rest.split(end, 1)[1]
        page = f"{head}{begin}\n{text()}\n{end}{tail}"
    return page


def figures() -> dict[Path, tuple[str, list[Row]]]:
    """Every figure: where, its title, and its rows."""
    return {
        figure_path(device, op): (f"{op} on {device}", own)
        for device, rows in results().items()
        for op, own in ops_of(rows).items()
        if any(not row["note"] for row in own)
    }


def stale_figures() -> list[Path]:
    """Figures that are missing, or drawn from other numbers, or of no result any more.

    What a figure was drawn from is compared, not its bytes: another version of matplotlib places
    letters elsewhere.
    """
    wanted = figures()
    found = set(FIGURES.rglob("*.svg"))
    stale = found - set(wanted)
    for path, (_, rows) in wanted.items():
        if path not in found or digest(rows) not in path.read_text():
            stale.add(path)
    return sorted(stale)


def draw_stale_figures() -> None:
    wanted = figures()
    for path in stale_figures():
        if path not in wanted:
            path.unlink()
            continue
        title, rows = wanted[path]
        path.parent.mkdir(parents=True, exist_ok=True)
        save(times_figure(rows, title), path, about=f"drawn from {digest(rows)}")


def main(arguments: list[str]) -> int:
    page = rendered()
    if "--check" in arguments:
        wrong = stale_figures() + ([PAGE] if page != PAGE.read_text() else [])
        for path in wrong:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results holds")
        if wrong:
            print("run python -m benchmarks.render")
        return int(bool(wrong))
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page)
    # after the page, which needs no other library
    draw_stale_figures()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
