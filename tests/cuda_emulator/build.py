"""Compiles CUDA kernels by the host's compiler, to run in the emulator beside this file."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DSURVFUSE_WITH_CUDA=1"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
# products and sums are contracted only where a kernel says so, as the emulated intrinsics promise
KERNEL_FLAGS = ["-O1", "-ffp-contract=off", "-x", "c++"]
# an address that a GPU would refuse stops the launch
KERNEL_FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


def emulated_core() -> ModuleType:
    """The CUDA launchers of survfuse._native on CPU memory; skips the test without a compiler."""
    sources = [
        *sorted((ROOT / "csrc/cuda").glob("multi_scale_deformable_attention*.cu")),
        ROOT / "csrc/multi_scale_deformable_attention_bindings.cpp",
        EMULATOR / "module.cpp",
    ]
    spec = importlib.util.spec_from_file_location("survfuse_emulated", build(sources))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(sources: list[Path]) -> Path:
    """A shared library of the sources and the emulator, compiled once per state of the sources."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler {compiler[0]!r}")
    sources = [*sources, EMULATOR / "emulator.cpp"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    includes = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    folder = Path(tempfile.gettempdir()) / f"survfuse-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{_state(sources, [*compiler, *FLAGS, *KERNEL_FLAGS, *python])}.so"

    def compile_one(source: Path) -> str:
        target = scratch / f"{source.name}.o"
        flags = KERNEL_FLAGS if source.suffix == ".cu" else ["-O0", "-g0", *python]
        if source.name == "emulator.cpp":
            flags = ["-O1"]
        _run([*compiler, *FLAGS, *includes, *flags, "-c", str(source), "-o", str(target)])
        return str(target)

    # other processes of the same tests wait for the first
    with open(folder / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as name:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        scratch = Path(name)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        _run([*compiler, "-shared", *objects, "-o", str(scratch / "done.so")])
        (scratch / "done.so").rename(library)
    return library


def _state(sources: list[Path], words: list[str]) -> str:
    """A name for what the library would be made of."""
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    state = hashlib.sha256("\0".join(words).encode())
    for path in sorted({*sources, *headers, *EMULATOR.glob("*.h")}):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
