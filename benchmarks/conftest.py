"""`pytest benchmarks` measures; rows go to benchmarks/results/<device>.csv.

pytest benchmarks --device cpu -k healnet
SHARD=1/3 make gpu SET=   (the first of three parts of all shapes)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .harness import (
    ANY,
    RESULTS,
    Row,
    device_name,
    peak_memory,
    percentiles,
    race,
    versions,
    write_rows,
)
from .peers import COMPILING

# seconds that the turns of one contender may take, where no number of rounds is asked for
SECONDS = {"cpu": 1.0, "cuda": 0.25}
# in the core set, of all shapes together; FlexAttention is compiled for each
CORE_COMPILE_SECONDS = 60.0
SETS = {
    "core": "the shapes that say most: minutes",
    "smoke": "tiny shapes that only show that a benchmark works",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    cuda = torch.cuda.is_available()
    parser.addoption("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.addoption(
        "--rounds",
        type=int,
        default=0,
        help="turns of every contender; 0: 7 (CPU), 30 (GPU), fewer for one that is slow",
    )
    parser.addoption("--results", default=None, help="results file; by default by device name")
    for name, what in SETS.items():
        parser.addoption(f"--{name}", action="store_true", help=f"only {what}")


def pytest_configure(config: pytest.Config) -> None:
    for name, what in SETS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    if config.getoption("--core"):
        COMPILING.limit = CORE_COMPILE_SECONDS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = [name for name in SETS if config.getoption(f"--{name}")]
    if asked:
        items[:] = [item for item in items if any(map(item.get_closest_marker, asked))]
    else:
        items[:] = [item for item in items if not item.get_closest_marker("smoke")]
    shard = os.environ.get("SHARD")
    if shard:
        part, parts = (int(number) for number in shard.split("/"))
        if not 1 <= part <= parts:
            raise pytest.UsageError(f"SHARD is {shard}; it must be k/n with 1 <= k <= n")
        items[:] = items[part - 1 :: parts]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, device: str) -> Iterator[Callable[[list[Row]], None]]:
    """Write rows at once: a run that is stopped keeps what it measured."""
    path = request.config.getoption("--results")
    path = Path(path) if path else RESULTS / f"{device_name(device)}.csv"
    written = 0

    def write(rows: list[Row]) -> None:
        nonlocal written
        write_rows(path, rows)
        written += len(rows)

    yield write
    if written:
        print(f"\n{written} rows written to {path}")


@pytest.fixture(scope="session")
def bandwidth(device: str) -> float:
    """Bytes per second: reading 400 MB on the CPU, copying 4 GB (read and write) on a GPU."""
    if device == "cuda":
        source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)
        samples = race({"copy": lambda: target.copy_(source)}, device, 20)["copy"]
        return 2 * source.nbytes / (percentiles(samples)[1] / 1e3)
    source = torch.randn(100_000, 1024)
    samples = race({"read": lambda: source.sum()}, device, 9)["read"]
    return source.nbytes / (percentiles(samples)[1] / 1e3)


def _timed(contenders: dict, device: str, rounds: int) -> tuple[dict, dict]:
    """Peak megabytes and (p20, p50, p80) milliseconds of each contender."""
    # the call that shows the peak warms up, too
    peaks, once = {}, {}
    for name, way in contenders.items():
        begin = time.perf_counter()
        peaks[name] = peak_memory(way, device) / 1e6
        once[name] = time.perf_counter() - begin
    seconds = None if rounds else SECONDS[device]
    rounds = rounds or (30 if device == "cuda" else 7)
    samples = race(contenders, device, rounds, seconds, once)
    return peaks, {name: percentiles(times) for name, times in samples.items()}


@pytest.fixture
def measure(request, benchmark, device: str, bandwidth: float, record) -> Callable:
    """Check, race, record. No number comes from a contender whose check fails.

    `gbytes` are the fewest bytes that the op must move, `moved` those of a way of computing it;
    `left_out` says of contenders that take no part why, (shape's own?, reason) by name.
    """

    def run(
        op: str,
        mode: str,
        shape: str,
        dtype: torch.dtype,
        contenders: dict[str, Callable[[], object]],
        *,
        baseline: str,
        gbytes: float,
        gflop: dict[str, float],
        check: Callable[[], None],
        moved: dict[str, float] | None = None,
        left_out: dict[str, tuple[bool, str]] | None = None,
    ) -> dict[str, Row]:
        check()
        kind, about = str(dtype).removeprefix("torch."), {"device": device_name(device)}
        about |= versions()
        absent = []
        for name, (of_this_shape, reason) in (left_out or {}).items():
            key = (mode, shape, kind) if of_this_shape else (ANY, ANY, ANY)
            absent.append(Row.absent(op, name, *key, note=reason, **about))
            print(f"left out: {name}: {reason}")
        peaks, medians = _timed(contenders, device, request.config.getoption("--rounds"))
        against = medians.get(baseline, (float("nan"),) * 3)[1]
        measured = {
            name: Row(
                op=op,
                backend=name,
                mode=mode,
                shape=shape,
                dtype=kind,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                peak_mb=peaks[name],
                gbytes=gbytes,
                gflop=gflop.get(name, float("nan")),
                bandwidth_fraction=1e9 * gbytes / bandwidth / (p50 / 1e3),
                speedup=against / p50,
                moved_gbytes=(moved or {}).get(name, float("nan")),
                **about,
            )
            for name, (p20, p50, p80) in medians.items()
        }
        record([*measured.values(), *absent])
        # the plugin's own table shows ours, measured once more by its clock
        ours = next(iter(contenders))
        benchmark.extra_info.update({n: f"{m[1]:.3f} ms" for n, m in medians.items()})
        benchmark.pedantic(contenders[ours], rounds=1, warmup_rounds=0)
        return measured

    return run
