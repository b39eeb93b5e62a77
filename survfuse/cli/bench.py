"""`survfuse bench`: the kernels against other people's attention, on the user's own machine."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from survfuse.extras import require

# lines of the printed table; the file and the picture hold everything
MOST_LINES = 40
_RESULT = re.compile(r"::bench_(?P<name>\S.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")
_NOTHING_TO_DO, _FAILED, _INTERRUPTED = 5, 1, 2


def bench_command(
    op: Annotated[
        list[str] | None,
        typer.Option("--op", metavar="NAME", help="Only this operation; may be given again."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    core: Annotated[
        bool,
        typer.Option("--core/--full", help="The shapes that say most, or all of them (hours)."),
    ] = True,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Tiny shapes only: shows that it works, times mean nothing."),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option(help="Turns of every contender; by default 7 or 30, fewer for slow ones."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the results go.")] = Path("bench"),
) -> None:
    """Time the kernels against other people's attention on this machine, and draw the result.

    \b
        survfuse bench --out bench
        survfuse bench --op cross_attention --op pool_bag --device cpu

    Every way to compute an operation is first checked against fp64 and then raced: ours, plain
    torch, every kernel of scaled_dot_product_attention, FlexAttention, flash-attn and xformers
    where they are installed. Rows are written as they come, so that a run that is stopped keeps
    them; the same command measures them again, with other options it adds to them. The core set
    takes about half an hour.
    """
    for library in ("pytest", "pytest_benchmark", "matplotlib.figure"):
        require(library, extra="bench")
    benchmarks = benchmarks_folder()
    files = files_of(op or [], benchmarks)
    device = device_of(device)
    if rounds is not None and rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")
    if smoke and not core:
        raise ValueError("--smoke and --full exclude each other")
    from survfuse.benchmarks.harness import device_name

    out.mkdir(parents=True, exist_ok=True)
    stem = out / device_name(device)
    results = stem.with_name(f"{stem.name}.csv")
    options = ["--device", device, "--results", str(results.resolve())]
    options += ["--smoke"] if smoke else ["--core"] if core else []
    options += ["--rounds", str(rounds)] if rounds is not None else []
    began = time.time()
    log = stem.with_name(f"{stem.name}.log")
    code, failed = measure([*map(str, files), *options], benchmarks, log)
    shown = conclude(results, stem, began)
    if code == _INTERRUPTED:
        print("stopped; what was measured is kept" if shown else "stopped", file=sys.stderr)
        raise typer.Exit(130)
    refuse(code, failed, log)


def refuse(code: int, failed: int, log: Path) -> None:
    """Raise what another code of pytest than 0 means."""
    if code == _NOTHING_TO_DO:
        raise ValueError("this set holds no benchmark of what was asked for; --full holds all")
    if code == _FAILED:
        raise RuntimeError(f"{failed} benchmark(s) failed; {log} says why, other rows are kept")
    if code:
        raise RuntimeError(f"the benchmarks ended with code {code}; {log} says why")


def benchmarks_folder() -> Path:
    """Where `survfuse.benchmarks` lies.

    Raises:
        ImportError: this installation lacks it.
    """
    spec = importlib.util.find_spec("survfuse.benchmarks")
    if spec is None or spec.origin is None:
        raise ImportError(
            "this installation has no survfuse.benchmarks; an editable one must be installed again"
        )
    return Path(spec.origin).parent


def files_of(names: Sequence[str], folder: Path) -> list[Path]:
    """The benchmark file of each operation, all where none is named.

    Raises:
        ValueError: an operation has no benchmark.
    """
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    for name in names:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(found)}"
            raise ValueError(f"--op is {name}, which has no benchmark; {hint}")
    return [found[name] for name in dict.fromkeys(names)] or list(found.values())


def device_of(name: str | None) -> str:
    """cpu or cuda.

    Raises:
        ValueError: another name, or a GPU that is not there.
    """
    import torch

    cuda = torch.cuda.is_available()
    if name is None:
        return "cuda" if cuda else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; it must be cpu or cuda")
    if name == "cuda" and not cuda:
        raise ValueError("--device is cuda, and torch sees no GPU; `survfuse doctor` says why")
    return name


def measure(arguments: Sequence[str], folder: Path, log: Path) -> tuple[int, int]:
    """Run pytest on the benchmarks in a process of its own: a kernel that crashes ends only that.

    Returns:
        pytest's exit code, and how many benchmarks failed.
    """
    command = [sys.executable, "-u", "-m", "pytest", *arguments, "-v", "--tb=short"]
    # nothing of the project that the user happens to stand in
    command += ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "SHARD")}
    environment["COLUMNS"] = "400"
    outcomes: dict[str, int] = {}
    with (
        log.open("w", encoding="utf-8") as written,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            # Ctrl-C then reaches this process alone, which passes it on once
            start_new_session=True,
        ) as process,
    ):
        interrupted = False
        while True:
            try:
                for line in process.stdout:
                    written.write(line)
                    written.flush()
                    tell(line, outcomes)
                break
            except KeyboardInterrupt:
                # pytest ends by itself, and what it wrote is whole
                interrupted = True
                process.send_signal(signal.SIGINT)
    code = _INTERRUPTED if interrupted else process.returncode
    return code, outcomes.get("FAILED", 0) + outcomes.get("ERROR", 0)


def tell(line: str, outcomes: dict[str, int]) -> None:
    """Count a benchmark that ended, and say so."""
    match = _RESULT.search(line)
    if match is None:
        return
    outcome = match["outcome"]
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    words = {"PASSED": "measured", "SKIPPED": "skipped"}.get(outcome, "FAILED")
    print(f"{words}  {match['name']}", file=sys.stderr, flush=True)


def conclude(results: Path, stem: Path, began: float) -> bool:
    """Draw and print what the results file holds; False where nothing was measured."""
    from survfuse.benchmarks.figure import save, times_figure
    from survfuse.benchmarks.harness import read_rows

    rows = [row for row in read_rows(results) if not row["note"]]
    if not rows or results.stat().st_mtime < began:
        return False
    figure = times_figure(rows, f"medians on {stem.name}")
    for suffix in (".png", ".svg"):
        save(figure, stem.with_name(stem.name + suffix))
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables_of(rows):
        console.print(table)
    print(f"{len(rows)} rows in {results}, drawn in {stem}.png and {stem.name}.svg")
    return True


def tables_of(rows: Sequence[dict[str, str]]) -> Iterator[Table]:
    """Ours against the fastest other way: a table for each op, a line for each race."""
    lines = list(comparisons(rows))
    if len(lines) > MOST_LINES:
        lines = [line for line in lines if line[3].startswith("both")]
    for op in dict.fromkeys(line[0] for line in lines):
        own = [line[1:] for line in lines if line[0] == op]
        table = Table("shape", "type", "mode", "ms", "ratio", "fastest other, ms")
        table.title, table.box, table.title_justify = op, None, "left"
        for line in own[:MOST_LINES]:
            table.add_row(*line)
        if len(own) > MOST_LINES:
            table.caption = f"and {len(own) - MOST_LINES} more in the file"
        yield table


def comparisons(rows: Sequence[dict[str, str]]) -> Iterator[tuple[str, ...]]:
    """Of each race: its key, our median, who was fastest of the others, and how much slower."""
    races: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "shape", "dtype", "mode"))
        races.setdefault(key, {})[row["backend"]] = float(row["p50_ms"])
    for key, medians in sorted(races.items()):
        others = {
            name: ms for name, ms in medians.items() if not name.startswith(("survfuse", "floor"))
        }
        if "survfuse" in medians and others:
            best = min(others, key=others.__getitem__)
            ours = medians["survfuse"]
            ratio = f"{others[best] / ours:.2f}x"
            op, shape, kind, mode = key
            kind = {"float32": "fp32", "bfloat16": "bf16"}.get(kind, kind)
            yield op, shape, kind, mode, f"{ours:.3g}", ratio, f"{best} {others[best]:.3g}"
