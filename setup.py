"""Builds the native core, `survfuse._native`: C++17 for the CPU and, where nvcc is found, CUDA.

SURVFUSE_BUILD=none|cpu|cuda decides; unset means cuda if nvcc is found, else cpu. A failed compile
is an error. The core knows no torch, so torch is not needed here and one build serves every torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# instruction set by file name: only these files may use it, and the dispatcher asks the processor
# at run time before it calls into them
ISA_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "_avx512bf16.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mavx512bf16",
    ],
}
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-lineinfo", "--compiler-options", "-fPIC,-fvisibility=hidden"),
    # a quarter of the size; architectures side by side
    *("-Xfatbin=-compress-all", "--threads=4"),
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90a,code=sm_90a"),
    *("-gencode", "arch=compute_100,code=sm_100"),
    *("-gencode", "arch=compute_120,code=[sm_120,compute_120]"),
]


def find_nvcc() -> Path | None:
    """The CUDA compiler: on PATH, or under CUDA_HOME."""
    found = shutil.which("nvcc")
    if found is None and os.environ.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin"))
    return Path(found) if found else None


def build_mode() -> str:
    """none, cpu or cuda."""
    mode = os.environ.get("SURVFUSE_BUILD", "")
    if mode not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"SURVFUSE_BUILD is {mode!r}; it must be none, cpu or cuda, or unset")
    if mode == "cuda" and find_nvcc() is None:
        raise SystemExit("SURVFUSE_BUILD=cuda needs nvcc on PATH, or CUDA_HOME set to its toolkit")
    return mode or ("cuda" if find_nvcc() else "cpu")


def cuda_library_dir(nvcc: Path) -> Path:
    """The folder that holds libcudart_static.a of this nvcc's toolkit."""
    # a wrapper script may stand on PATH: ask the compiler where its toolkit is
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    tops = [line.split("=", 1)[1] for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    for top in [*tops, str(nvcc.resolve().parents[1])]:
        for sub in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            if (Path(top) / sub / "libcudart_static.a").is_file():
                return (Path(top) / sub).resolve()
    raise SystemExit(f"found {nvcc} but no libcudart_static.a in its toolkit ({tops})")


class BuildNative(build_ext):
    """Compile each source with its own flags, `.cu` by nvcc; link no torch library."""

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if mode == "cuda" else None
        sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        if not X86:
            sources = [path for path in sources if not isa_flags(path)]
        if nvcc:
            sources += sorted((ROOT / "csrc/cuda").glob("*.cu"))

        defines = [
            f"-DSURVFUSE_WITH_CUDA={int(nvcc is not None)}",
            f"-DSURVFUSE_X86={int(X86)}",
            f"-I{ROOT / 'csrc'}",
        ]

        def compile_one(path: Path) -> str:
            target = build / (path.relative_to(ROOT).as_posix().replace("/", ".") + ".o")
            if path.suffix == ".cu":
                command = [str(nvcc), *NVCC_FLAGS, *defines, "-c", str(path), "-o", str(target)]
            else:
                compiler = os.environ.get("CXX", "c++").split()
                command = [*compiler, *CXX_FLAGS, *isa_flags(path), *defines]
                if path.name.endswith("bindings.cpp"):
                    command += python_includes()
                command += ["-c", str(path), "-o", str(target)]
            run(command)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*os.environ.get("CXX", "c++").split(), "-shared", *objects, "-o", str(output)]
        if nvcc:
            link += [f"-L{cuda_library_dir(nvcc)}", "-lcudart_static", "-lrt", "-ldl"]
        run([*link, "-pthread"])


def isa_flags(path: Path) -> list[str]:
    return next((flags for end, flags in ISA_FLAGS.items() if path.name.endswith(end)), [])


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout or done.stderr:
        print(done.stdout, done.stderr, sep="")
    if done.returncode:
        raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(command)}")


if build_mode() == "none":
    setup()
else:
    setup(
        ext_modules=[Extension("survfuse._native", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
