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
from .harness import ANY, RESULTS, ROOT, read_rows

PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"
# marker -> what stands between its begin and its end
SECTIONS = {"results": lambda: tables(), "floors": floors}
Row = dict[str, str]


def results() -> dict[str, list[Row]]:
    """Rows by device."""
    return {path.stem: read_rows(path) for path in sorted(RESULTS.glob("*.csv"))}


def ops_of(rows: list[Row]) -> dict[str, list[Row]]:
    return {op: [row for row in rows if row["op"] == op] for op in sorted({r["op"] for r in rows})}


def figure_path(device: str, op: str) -> Path:
    return FIGURES / device / f"{re.sub(r'[^a-z0-9]+', '_', op.lower())}.svg"


def tables() -> str:
    """One section per device; per op a picture, and a table by mode, shape and type."""
    parts = []
    for device, rows in results().items():
        parts.append(f"## {device}\n")
        runs = sorted(
            {
                f"commit {r['commit']}, torch {r['torch']}, triton {r['triton']}, "
                f"{r['threads']} threads, {r['date']}"
                for r in rows
            }
        )
        parts.append("Measured: " + "; ".join(runs) + ".\n")
        for op, own in ops_of(rows).items():
            timed = [row for row in own if not row["note"]]
            parts.append(f"### {op}\n")
            if timed:
                picture = figure_path(device, op).relative_to(PAGE.parent).as_posix()
                parts += [f"![{op}: median times by mode]({picture})\n", _table(timed)]
            parts += _left_out([row for row in own if row["note"]])
    return "\n".join(parts)


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
