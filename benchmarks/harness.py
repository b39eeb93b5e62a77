"""Measure contenders side by side: one run, in turn, medians, and what the machine could do."""

from __future__ import annotations

import csv
import ctypes
import datetime
import functools
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import survfuse
from survfuse.data.atomic import atomic_path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
# fewer turns than this have no percentiles
FEWEST_TURNS = 3
ANY = "*"
# ops of this name are models, which the page shows by themselves
MODEL_OP = "training step, "


@dataclass
class Row:
    """One measurement; the first six fields are its key."""

    op: str
    backend: str
    mode: str  # forward | backward | both
    shape: str
    dtype: str
    device: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mb: float  # memory beyond the inputs, at its highest
    gbytes: float  # fewest bytes the op must move
    gflop: float  # operations of this way of computing it
    bandwidth_fraction: float  # of the read bandwidth (CPU) or copy bandwidth (GPU) of this run
    speedup: float  # against the baseline of the race, in this run
    commit: str = ""
    torch: str = ""
    triton: str = ""
    threads: int = 0
    date: str = ""
    moved_gbytes: float = float("nan")  # bytes this way of computing it moves
    # why there is no time; mode, shape and dtype are "*" where it does not depend on them
    note: str = ""

    @classmethod
    def absent(cls, op: str, backend: str, mode: str, shape: str, dtype: str, **rest) -> Row:
        """A contender that took no part, and `note` why."""
        return cls(op, backend, mode, shape, dtype, **rest, **dict.fromkeys(_NUMBERS, math.nan))


KEY = tuple(field.name for field in fields(Row))[:6]
_NUMBERS = tuple(field.name for field in fields(Row))[6:14]


def device_name(device: str) -> str:
    """Short name of the machine for rows and file names."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    isa = torch.backends.cpu.get_cpu_capability()
    name = f"{model} {isa} {torch.get_num_threads()} threads".lower()
    return "-".join(re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)", "", name)))


def versions() -> dict[str, str | int]:
    """What was measured: commit, library versions, threads, day."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def commit() -> str:
    """The commit of the sources, or the version of an installed package."""
    # an environment may lie inside somebody else's repository
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return f"survfuse-{survfuse.__version__}"
    name = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of seconds, in milliseconds."""
    quantiles = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return tuple(1e3 * q for q in quantiles.tolist())


def time_once(function: Callable[[], object], device: str) -> float:
    """Seconds of one call: device events behind an L2 flush, or the host's clock."""
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the flush keeps the device busy while the host queues what is measured
    flush.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def race(
    contenders: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    seconds: float | None = None,
    once: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender, taken in turn so that a drifting machine drifts for all.

    Args:
        contenders: name -> what is timed.
        device: cpu or cuda.
        rounds: turns of each.
        seconds: if given, a contender that would take longer gets fewer turns, spread over the
            race, and FEWEST_TURNS at least.
        once: seconds of a call that warmed each contender up; without it they are called here.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    turns = dict.fromkeys(contenders, rounds)
    for name, function in contenders.items():
        if once is None or device == "cuda":
            took = wall_clock(function, device)
        else:
            took = once[name]
        if seconds is not None:
            turns[name] = min(rounds, max(FEWEST_TURNS, int(seconds / max(took, 1e-9))))
    for turn in range(rounds):
        for name, function in contenders.items():
            if (turn + 1) * turns[name] // rounds > turn * turns[name] // rounds:
                samples[name].append(time_once(function, device))
    return samples


def wall_clock(function: Callable[[], object], device: str) -> float:
    """Seconds of one call as the host sees it."""
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory(function: Callable[[], object], device: str) -> float:
    """Bytes in use at the highest point of a call, beyond those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # give freed memory back first, or a call that reuses it would seem to need none
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    function()
    return max(0.0, _status("VmHWM") - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * int(line.split()[1])
    return float("nan")


def write_rows(path: Path, rows: list[Row]) -> None:
    """Merge rows into a results file: one row per key, the newest."""
    table = {tuple(old[k] for k in KEY): old for old in read_rows(path)}
    for row in rows:
        record = {
            key: f"{value:.5g}" if isinstance(value, float) else value
            for key, value in asdict(row).items()
        }
        table[tuple(str(record[k]) for k in KEY)] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file as text, none where there is no file."""
    if not path.exists():
        return []
    blank = {field.name: "" for field in fields(Row)}
    with path.open(newline="") as stream:
        return [blank | row for row in csv.DictReader(stream)]
