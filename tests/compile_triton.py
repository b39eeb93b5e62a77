"""Compile every Triton kernel ahead of time, in every launch configuration, without a GPU.

    python tests/compile_triton.py                     all targets, all cases
    python tests/compile_triton.py --quick --targets sm_90

The launchers run on empty CPU tensors with their kernels replaced by recorders, so what is compiled
is what they would launch: the same constants, types, alignments and options. For NVIDIA targets
`ptxas -v` then says how many registers a kernel takes and whether it spills; for all targets shared
memory is held against the device's. Exits with 1 on a failed compile, on too much shared memory,
and on spills for sm_90 (from Triton 3.7 on: the ptxas of 3.6 spills where all options meet).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from compile_gated import GatedCase, gated_cases
from survfuse.triton_kernels import (
    gated_attention_pool_passes,
    pool_bag,
    pool_bag_call,
    pool_bag_passes,
    pool_bag_shapes,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from survfuse.pooling import Needs, PooledBag, Pooling

TARGETS = {
    # shared memory a program may have, in bytes
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
OPTIONS = ("num_warps", "num_stages")
# the modules that launch kernels
LAUNCHERS = (pool_bag_passes, gated_attention_pool_passes)
SPILLS_ARE_ERRORS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """One call of the launchers."""

    dtype: torch.dtype
    n_rows: int
    width: int
    normalize: bool = False
    stats: bool = False
    bias: bool = False
    dropout: bool = False
    wide_rows: bool = False  # fp32 query rows over a 16-bit bag
    padding: int = 0  # columns between the bag's rows

    def __str__(self) -> str:
        flags = ("normalize", "stats", "bias", "dropout", "wide_rows")
        on = "+".join(name for name in flags if getattr(self, name))
        width = f"{self.width}+{self.padding}" if self.padding else self.width
        return f"{TYPES[self.dtype]} R={self.n_rows} D={width} {on or 'plain'}"


@dataclass
class Launch:
    """One recorded launch: what the just-in-time compiler would have specialised on."""

    kernel: str
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]

    def key(self) -> tuple:
        return (
            self.kernel,
            tuple(self.signature.items()),
            tuple((name, str(value)) for name, value in self.constants.items()),
            tuple(self.attributes),
            tuple(self.options.items()),
        )


@dataclass
class Recorder:
    """Stands in for a kernel: `kernel[grid](...)` notes the arguments and runs nothing."""

    name: str
    kernel: Any
    case: str
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        assert 0 < grid[0] < 2**31
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        names = self.kernel.arg_names
        unspecialised = {
            parameter.name for parameter in self.kernel.params if parameter.do_not_specialize
        }
        signature, constants, attributes = {}, {}, {}
        values = dict(zip(names, args))
        values.update({k: v for k, v in keywords.items() if k not in OPTIONS})
        for i, name in enumerate(names):
            value = values[name]
            signature[name], aligned = _specialise(value, name in unspecialised)
            if self.kernel.params[i].is_constexpr or signature[name] == "constexpr":
                signature[name] = "constexpr"
                constants[(i,)] = value
            elif aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        options = {k: v for k, v in keywords.items() if k in OPTIONS}
        self.launches.append(
            Launch(self.name, self.case, signature, constants, attributes, options)
        )


def _specialise(value: Any, plain: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be a multiple of 16."""
    if value is None or isinstance(value, (str, bool)):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        # device allocations are aligned, and so are the planes cut from them
        return "*" + TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not plain:
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), not plain and value % 16 == 0


def record(case: Case | GatedCase, limits: pool_bag_shapes.Limits) -> list[Launch]:
    """Every launch of a forward and of all gradients."""
    recorders = []
    with contextlib.ExitStack() as stack:
        for module in LAUNCHERS:
            for name in [name for name in dir(module) if name.endswith("_kernel")]:
                recorders.append(Recorder(name, getattr(module, name), str(case)))
                stack.callback(setattr, module, name, recorders[-1].kernel)
                setattr(module, name, recorders[-1])
        stack.callback(setattr, pool_bag_shapes, "device_limits", pool_bag_shapes.device_limits)
        pool_bag_shapes.device_limits = lambda device: limits
        case.launch() if isinstance(case, GatedCase) else launch_pool_bag(case)
    return [launch for recorder in recorders for launch in recorder.launches]


def launch_pool_bag(case: Case) -> None:
    """A forward and all gradients of pool_bag."""
    n_bags, length = 4, 1000
    n_stored = n_bags * length
    bag = torch.empty((n_stored, case.width + case.padding), dtype=case.dtype)[:, : case.width]
    row_type = torch.float32 if case.wide_rows else case.dtype
    rows = torch.empty((n_bags, case.n_rows, case.width), dtype=row_type)
    per_stored = torch.zeros(n_stored)
    ranges = torch.arange(n_bags) * length, torch.full((n_bags,), length)
    pooling = Pooling(
        *ranges,
        total=n_stored,
        max_length=length,
        scale=0.5,
        normalize=case.normalize,
        eps=1e-5,
        mean=per_stored if case.stats else None,
        rstd=per_stored if case.stats else None,
        dropout_p=0.25 if case.dropout else 0.0,
        seed=torch.zeros(1, dtype=torch.int64) if case.dropout else None,
    )
    bias = per_stored if case.bias else None
    args = (rows, bag, bias, pooling)
    results = pool_bag.pool_bag_forward(*args)
    gradients = PooledBag(*map(torch.empty_like, results))
    needs = Needs(rows=True, bag=True, bias=case.bias)
    pool_bag.pool_bag_backward(gradients, results, *args, needs)
    # a chunk after the first merges into what is there
    call = pool_bag_call.make_call(*args)
    state = pool_bag_passes.State(results.pooled, call)
    part = torch.empty((2, case.n_rows, case.width))
    state.n_merged = 1
    state.merge(part, [part, part, part], 2, 2, 256)
    per_query = torch.empty((n_bags, case.n_rows))
    known = (part[..., 0], results.pooled, per_query)
    pool_bag_passes.sum_slots(call, part, *known, results.pooled, 2, 2, 256)


def cases(target: str, quick: bool) -> list[Case]:
    """Every type, blocks of query rows and widths that change a launch shape, and every option.

    Targets other than sm_90 take the calls with all options at once.
    """
    every = {"normalize": True, "bias": True, "dropout": True}
    given = {"normalize": True, "stats": True}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        return [
            Case(bf16, 6, 1024),
            Case(bf16, 16, 1024, **every),
            Case(fp32, 16, 1024, **every),
            Case(bf16, 200, 1024, **given),
        ]
    shapes = [
        *((1, 384, 0), (6, 256, 0), (6, 768, 0), (6, 1024, 0), (16, 1024, 0), (32, 512, 0)),
        *((64, 256, 0), (10, 1000, 0), (6, 1029, 3), (16, 1536, 0), (64, 2048, 0)),
        *((200, 1024, 0), (512, 4608, 0), (200, 2560, 0), (6, 1023, 0), (6, 1029, 0)),
    ]
    listed = []
    for dtype in (bf16, fp16, fp32):
        for n_rows, width, padding in shapes:
            wide_rows = dtype != fp32
            listed.append(Case(dtype, n_rows, width, padding=padding))
            listed.append(Case(dtype, n_rows, width, **every, wide_rows=wide_rows, padding=padding))
            listed.append(Case(dtype, n_rows, width, **given, padding=padding))
    if target != "sm_90":
        return [case for case in listed if case.normalize and case.bias and case.dtype != fp16]
    # each option alone, where it costs the most registers
    for dtype in (bf16, fp16, fp32):
        for on in ({"normalize": True}, {"bias": True}, {"dropout": True}, {**every, **given}):
            listed += [
                Case(dtype, n_rows, width, **on) for n_rows, width in ((16, 1024), (200, 1024))
            ]
    return listed


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
            fn=next(vars(m)[launch.kernel] for m in LAUNCHERS if launch.kernel in vars(m)),
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
    elif row["spills"] and target_name == "sm_90" and SPILLS_ARE_ERRORS:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="four cases instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="part of a case's or kernel's name")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted and cannot be compiled")
    work: dict[tuple, tuple[Launch, str]] = {}
    for name in options.targets.split(","):
        if name not in TARGETS:
            parser.error(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
        limits = pool_bag_shapes.Limits(132, TARGETS[name][1])
        gated = gated_cases(options.quick, every_type=name == "sm_90")
        for case in [*cases(name, options.quick), *gated]:
            for launch in record(case, limits):
                if options.only in f"{launch.kernel} {launch.case}":
                    work.setdefault((name, *launch.key()), (launch, name))
    print(f"{len(work)} compiles on {options.jobs} processes", flush=True)
    failed = 0
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
    widths = (7, 20, 44, 28, 6, 7, 5, 6, 7, 6)
    return " ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
