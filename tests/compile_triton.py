"""Compile every Triton kernel ahead of time, in every launch configuration, without a GPU.

    python tests/compile_triton.py                     all targets, all cases
    python tests/compile_triton.py --quick --targets sm_90

The launchers run on empty CPU tensors with their kernels replaced by recorders, so what is compiled
is what they would launch: the same constants, types, alignments and options. For NVIDIA targets
`ptxas -v` then says how many registers a kernel takes and whether it spills; for all targets shared
memory is held against the device's. Exits with 1 on a failed compile, on too much shared memory, on
a kernel that no case launches, on spills for sm_90 (from Triton 3.7 on: the ptxas of 3.6 spills
where all options meet), and where a quick case for sm_90 leaves the asynchronous pipeline.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import compile_attention
import compile_deformable
import compile_gated
import compile_pool_bag
import compile_position_biased
import compile_spread
import triton
from compile_calls import OPTIONS, Launch
from survfuse.triton_kernels.pool_bag_shapes import Limits
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CALLS = (
    compile_pool_bag,
    compile_attention,
    compile_gated,
    compile_spread,
    compile_deformable,
    compile_position_biased,
)
TARGETS = {
    # shared memory a program may have, in bytes
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
# what reads a bag tile by tile: aligned rows of 16-bit features, as those of the quick cases, come
# by asynchronous copies on sm_90
STREAMS = ("pool_bag_fwd", "pool_bag_bwd_rows", "spread_tokens_fwd")
STREAMS += ("cross_attention_few_fwd", "cross_attention_few_bwd", "cross_attention_many_fwd")
KERNELS = Path(__file__).resolve().parents[1] / "triton_kernels"
SPILLS_ARE_ERRORS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def compile_launch(launch: Launch, target_name: str) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one launch; `error` where it failed."""
    target, shared_limit = TARGETS[target_name]
    row = {
        "target": target_name,
        "kernel": launch.kernel.removesuffix("_kernel"),
        "case": launch.case,
        "shape": " ".join(
            f"{name.removeprefix('BLOCK_')}={launch.constants[(i,)]}"
            for i, name in enumerate(launch.signature)
            if name.startswith("BLOCK_") or name == "GROUPS"
        ),
        **launch.options,
        "registers": None,
        "spills": None,
        "shared": None,
        "copies": None,
        "error": "",
    }
    try:
        source = ASTSource(
            fn=getattr(importlib.import_module(launch.module), launch.kernel),
            signature=launch.signature,
            constexprs=launch.constants,
            attrs=launch.attributes,
        )
        compiled = triton.compile(source, target=target, options=launch.options)
        row["shared"] = compiled.metadata.shared
        if target.backend == "cuda":
            row["registers"], row["spills"] = _registers(compiled.asm["ptx"], target.arch)
            # 16-byte asynchronous copies: a pipelined load of the bag shows here
            row["copies"] = compiled.asm["ptx"].count("cp.async.cg")
        else:
            row["registers"], row["spills"] = _amd_registers(compiled.asm["amdgcn"])
    except Exception as problem:
        row["error"] = f"{type(problem).__name__}: {str(problem)[-300:]}"
        return row
    if row["shared"] > shared_limit:
        row["error"] = f"{row['shared']} bytes of shared memory, the device has {shared_limit}"
    elif target_name == "sm_90" and SPILLS_ARE_ERRORS and row["spills"] > launch.known_spills:
        row["error"] = f"spills {row['spills']} bytes"
    return row


def _registers(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled (stores and loads), as ptxas reports them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    name = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        # the options of Triton's own call
        command = [tool, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}"]
        done = subprocess.run(
            [*command, file.name, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    used = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(used[1]), sum(map(int, spilled))


def _amd_registers(assembly: str) -> tuple[int, int]:
    """Vector registers per thread and vector registers spilled, from the code object's notes."""
    used = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return int(used[1]), int(spilled[1])


def kernels_of_the_package() -> set[str]:
    """Every kernel of triton_kernels, by its name."""
    return {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="a few cases instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="part of a case's or kernel's name")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted and cannot be compiled")
    work: dict[tuple, tuple[Launch, str]] = {}
    for name in options.targets.split(","):
        if name not in TARGETS:
            parser.error(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
        limits = Limits(132, TARGETS[name][1])
        for calls in CALLS:
            for case in calls.cases(name, options.quick):
                for launch in calls.record(case, limits):
                    if options.only in f"{launch.kernel} {launch.case}":
                        work.setdefault((name, *launch.key()), (launch, name))
    print(f"{len(work)} compiles on {options.jobs} processes", flush=True)
    failed = 0
    if not options.only:
        for name in options.targets.split(","):
            launched = {launch.kernel for launch, target in work.values() if target == name}
            for kernel in sorted(kernels_of_the_package() - launched):
                failed += 1
                print(f"FAILED: no case launches {kernel} for {name}")
    print(
        _line(
            "target",
            "kernel",
            "case",
            "shape",
            "warps",
            "stages",
            "regs",
            "spill",
            "shared",
            "copies",
        )
    )
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(compile_launch, *item) for item in work.values()]
        for future in as_completed(futures):
            row = future.result()
            streams = row["kernel"] in STREAMS and row["case"].startswith("bf16")
            if options.quick and row["target"] == "sm_90" and streams and row["copies"] == 0:
                row["error"] = "no asynchronous copies"
            failed += bool(row["error"])
            columns = ("target", "kernel", "case", "shape", *OPTIONS)
            print(
                _line(
                    *(row[name] for name in columns),
                    *(row[name] for name in ("registers", "spills", "shared", "copies")),
                ),
                f"FAILED: {row['error']}" if row["error"] else "",
                flush=True,
            )
    print(f"{failed} failed of {len(work)}")
    return int(failed > 0)


def _line(*cells: Any) -> str:
    widths = (7, 26, 44, 28, 6, 7, 5, 6, 7, 6)
    return " ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
