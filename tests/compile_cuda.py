"""Compile every CUDA file for every architecture of the build, without a GPU.

    python tests/compile_cuda.py                       all architectures
    python tests/compile_cuda.py --targets sm_90a --only backward

The flags are those of setup.py, warnings being errors. `ptxas -v` says what a kernel takes of
registers and memory. Exits with 1 on a failed compile, on a warning, on a file of which no kernel
is reported, and on spills for sm_90a; with 0 and a message where there is no nvcc.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "benchmarks/original_deformable.cu")
NO_SPILLS = "sm_90a"


class Kernel(NamedTuple):
    """One kernel for one architecture, as ptxas compiled it."""

    target: str
    name: str
    registers: int
    spills: int  # bytes stored and loaded
    stack: int
    shared: int  # static, in bytes


def find_nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/nonexistent")) / "bin"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(home))


def flags_of_the_build() -> list[str]:
    """NVCC_FLAGS of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    flags = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS"
    )
    return eval(compile(ast.Expression(flags), "setup.py", "eval"), {})


def flags_for(targets: list[str]) -> list[str]:
    """The build's flags with the code of these architectures alone; of all if none is named.

    One architecture after another, so that what ptxas says of each stays together.
    """
    kept, rest = [], (flag for flag in flags_of_the_build() if not flag.startswith("--threads"))
    for flag in rest:
        code = [flag, next(rest)] if flag == "-gencode" else [flag]
        if len(code) == 1 or not targets or set(targets_of(code)) & set(targets):
            kept += code
    return kept


def targets_of(flags: list[str]) -> list[str]:
    return [name for flag in flags for name in re.findall(r"\bsm_\w+", flag)]


def kernels_of(report: str) -> list[Kernel]:
    """What `ptxas -v` reports, names readable."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\S+?)' for '(?P<target>\w+)'\n"
        r".*?\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    )
    found = list(pattern.finditer(report))
    kernels = []
    for match, name in zip(found, _readable([match["name"] for match in found])):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                match["target"],
                name,
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["stack"]),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def _readable(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    # neither namespaces nor parameters
    return [
        re.sub(r"^void |\w+::|\(anonymous namespace\)::|\([^()]*\)$", "", line)
        for line in done.stdout.splitlines()
    ]


def compile_source(nvcc: str, source: Path, flags: list[str]) -> tuple[list[Kernel], str]:
    """The kernels of a file, and an error if it did not compile without a warning."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}"]
        command += ["-c", str(source), "-o", str(Path(folder) / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    error = "" if done.returncode == 0 else report[-4000:]
    return kernels_of(report), error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="", help="comma-separated; all of setup.py's if none")
    parser.add_argument("--only", default="", help="part of a file's name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA files are not compiled: no nvcc on PATH, nor under CUDA_HOME")
        return 0
    wanted = [name for name in options.targets.split(",") if name]
    flags = flags_for(wanted)
    unknown = set(wanted) - set(targets_of(flags))
    if unknown:
        parser.error(f"unknown target {unknown.pop()!r}; setup.py has {targets_of(flags_for([]))}")
    sources = [source for source in SOURCES if options.only in source.name]
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda source: compile_source(nvcc, source, flags), sources)
        for source, (kernels, error) in zip(sources, results):
            print(f"{source.relative_to(ROOT)}: {len(kernels)} kernels", flush=True)
            for kernel in kernels:
                bad = kernel.target == NO_SPILLS and kernel.spills > 0
                failed += bad
                print(
                    f"  {kernel.target:7} {kernel.name:48} {kernel.registers:3} registers "
                    f"{kernel.spills:4} spilled {kernel.stack:4} stack {kernel.shared:6} shared"
                    + ("  FAILED: spills" if bad else "")
                )
            if not kernels and not error:
                error = "no kernel is reported"
            if error:
                failed += 1
                print(f"  FAILED: {error}")
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
