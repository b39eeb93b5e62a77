"""`pytest benchmarks` measures; rows go to benchmarks/results/<device>.csv.

pytest benchmarks --device cpu -k healnet
SHARD=1/3 make gpu        (the first of three parts)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    RESULTS,
    Row,
    device_name,
    peak_memory,
    percentiles,
    race,
    versions,
    write_rows,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    cuda = torch.cuda.is_available()
    parser.addoption("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.addoption("--rounds", type=int, default=0, help="rounds per race; 0: 7 (CPU), 30 (GPU)")
    parser.addoption("--results", default=None, help="results file; by default by device name")
    parser.addoption("--core", action="store_true", help="only the core set of shapes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--core"):
        items[:] = [item for item in items if item.get_closest_marker("core")]
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
def _rows(request: pytest.FixtureRequest, device: str):
    rows: list[Row] = []
    path = request.config.getoption("--results")
    path = Path(path) if path else RESULTS / f"{device_name(device)}.csv"
    yield rows
    if rows:
        write_rows(path, rows)
        print(f"\n{len(rows)} rows written to {path}")


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


@pytest.fixture
def measure(request, benchmark, device: str, bandwidth: float, _rows: list[Row]) -> Callable:
    """Check, race, record. No number comes from a contender whose check fails."""

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
    ) -> dict[str, Row]:
        check()
        rounds = request.config.getoption("--rounds") or (30 if device == "cuda" else 7)
        samples = race(contenders, device, rounds)
        medians = {name: percentiles(times) for name, times in samples.items()}
        measured = {}
        for name, (p20, p50, p80) in medians.items():
            measured[name] = Row(
                op,
                name,
                mode,
                shape,
                str(dtype).removeprefix("torch."),
                device_name(device),
                p20,
                p50,
                p80,
                peak_memory(contenders[name], device) / 1e6,
                gbytes,
                gflop.get(name, float("nan")),
                1e9 * gbytes / bandwidth / (p50 / 1e3),
                medians[baseline][1] / p50,
                **versions(),
            )
        _rows.extend(measured.values())
        # the plugin's own table shows ours, measured once more by its clock
        ours = next(iter(contenders))
        benchmark.extra_info.update({n: f"{m[1]:.3f} ms" for n, m in medians.items()})
        benchmark.pedantic(contenders[ours], rounds=3, warmup_rounds=0)
        return measured

    return run
