"""Render benchmarks/results/*.csv into docs/performance.md (between its two markers).

python -m benchmarks.render           write
python -m benchmarks.render --check   fail if the page is not what the results say
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"


def tables() -> str:
    """One section per device, one table per op, mode, shape and type."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        parts.append(f"## {path.stem}\n")
        runs = sorted(
            {
                f"commit {r['commit']}, torch {r['torch']}, triton {r['triton']}, "
                f"{r['threads']} threads, {r['date']}"
                for r in rows
            }
        )
        parts.append("Measured: " + "; ".join(runs) + ".\n")
        for op in sorted({row["op"] for row in rows}):
            parts.append(_table(op, [row for row in rows if row["op"] == op]))
    return "\n".join(parts)


def _table(op: str, rows: list[dict[str, str]]) -> str:
    lines = [
        f"### {op}\n",
        "| shape | type | mode | way | p20 / p50 / p80 ms | speedup | bandwidth | extra MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        times = " / ".join(f"{float(row[p]):.3g}" for p in ("p20_ms", "p50_ms", "p80_ms"))
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['mode']} | {row['backend']} | {times} "
            f"| {float(row['speedup']):.2f}x | {100 * float(row['bandwidth_fraction']):.0f} % "
            f"| {float(row['peak_mb']):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _order(row: dict[str, str]) -> tuple:
    return row["shape"], row["dtype"], row["mode"], float(row["p50_ms"])


def rendered() -> str:
    """The page with its results section replaced."""
    page = PAGE.read_text()
    head, rest = page.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    return f"{head}{BEGIN}\n{tables()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    page = rendered()
    if "--check" in arguments:
        if page != PAGE.read_text():
            print(f"{PAGE.relative_to(Path.cwd())} is not what benchmarks/results holds: "
                  "run python -m benchmarks.render")  # fmt: skip
            return 1
        return 0
    temporary = PAGE.with_suffix(".partial")
    temporary.write_text(page)
    temporary.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
