"""The build of the native core: how setup.py decides, what it makes, what a wheel holds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from types import ModuleType

import pytest

from survfuse.native.core import CPU_ISAS, native_core

ROOT = Path(__file__).resolve().parents[1]
ISA_FILES = {"_avx2.cpp": "-mavx2", "_avx512.cpp": "-mavx512f", "_avx512bf16.cpp": "-mavx512bf16"}


@pytest.fixture
def core() -> ModuleType:
    core = native_core()
    if core is None:
        pytest.skip("survfuse was installed without its native core (SURVFUSE_BUILD=none)")
    return core


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch):
    """setup.py as a module, run without setting anything up; what it asked for is in `.calls`."""
    calls = []
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: calls.append(arguments))

    def load(mode: str | None = "cpu") -> ModuleType:
        if mode is None:
            monkeypatch.delenv("SURVFUSE_BUILD", raising=False)
        else:
            monkeypatch.setenv("SURVFUSE_BUILD", mode)
        spec = importlib.util.spec_from_file_location("survfuse_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.calls = calls
        return module

    return load


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)


def make_nvcc(toolkit: Path, *, script: str = "") -> Path:
    """An nvcc that prints what a dry run prints, and its toolkit's static runtime."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


class TestMode:
    """SURVFUSE_BUILD=none|cpu|cuda; unset: cuda if nvcc is found, else cpu."""

    def test_named(self, build, no_nvcc) -> None:
        assert build("none").build_mode() == "none"
        assert build("cpu").build_mode() == "cpu"

    @pytest.mark.parametrize("unset", [None, ""])
    def test_unset_without_nvcc(self, build, no_nvcc, unset) -> None:
        assert build(unset).build_mode() == "cpu"

    def test_nvcc_on_path(self, build, no_nvcc, monkeypatch, tmp_path) -> None:
        nvcc = make_nvcc(tmp_path / "cuda")
        monkeypatch.setenv("PATH", str(nvcc.parent))
        module = build(None)
        assert module.find_nvcc() == nvcc
        assert module.build_mode() == "cuda"
        assert build("cpu").build_mode() == "cpu"

    def test_nvcc_under_cuda_home(self, build, no_nvcc, monkeypatch, tmp_path) -> None:
        nvcc = make_nvcc(tmp_path / "cuda")
        monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
        module = build(None)
        assert module.find_nvcc() == nvcc
        assert module.build_mode() == "cuda"

    @pytest.mark.parametrize("garbage", ["gpu", "CPU", "0"])
    def test_anything_else_is_refused(self, build, garbage) -> None:
        message = f"SURVFUSE_BUILD is '{garbage}'; it must be none, cpu or cuda, or unset"
        with pytest.raises(SystemExit, match=re.escape(message)):
            build(garbage)

    def test_cuda_needs_nvcc(self, build, no_nvcc) -> None:
        with pytest.raises(SystemExit, match="SURVFUSE_BUILD=cuda needs nvcc on PATH, or CUDA_HO"):
            build("cuda")

    def test_none_sets_up_no_extension(self, build) -> None:
        assert build("none").calls == [{}]

    def test_cpu_sets_up_one_extension(self, build) -> None:
        module = build("cpu")
        (asked,) = module.calls
        assert [extension.name for extension in asked["ext_modules"]] == ["survfuse._native"]
        assert asked["cmdclass"] == {"build_ext": module.BuildNative}


class TestCudaLibrary:
    """A wrapper named nvcc may stand on PATH: the compiler says where its toolkit is."""

    def test_asks_the_compiler(self, build, tmp_path) -> None:
        library = tmp_path / "toolkit" / "targets" / "x86_64-linux" / "lib"
        library.mkdir(parents=True)
        (library / "libcudart_static.a").touch()
        script = f'echo "#$ TOP={tmp_path / "toolkit"}" >&2'
        nvcc = make_nvcc(tmp_path / "wrapper", script=script)
        assert build().cuda_library_dir(nvcc) == library

    def test_next_to_the_compiler(self, build, tmp_path) -> None:
        nvcc = make_nvcc(tmp_path / "cuda")
        (tmp_path / "cuda" / "lib64").mkdir()
        (tmp_path / "cuda" / "lib64" / "libcudart_static.a").touch()
        assert build().cuda_library_dir(nvcc) == tmp_path / "cuda" / "lib64"

    def test_missing(self, build, tmp_path) -> None:
        nvcc = make_nvcc(tmp_path / "cuda")
        with pytest.raises(SystemExit, match=r"but no libcudart_static\.a in its toolkit"):
            build().cuda_library_dir(nvcc)


def commands_of(module: ModuleType, monkeypatch, tmp_path: Path) -> tuple[list, list]:
    """The compile commands and the link command of a build that compiles nothing."""
    import setuptools

    commands = []
    monkeypatch.setattr(module, "run", commands.append)
    monkeypatch.setattr(module, "python_includes", lambda: ["-I/python"])
    distribution = setuptools.Distribution({"name": "survfuse"})
    command = module.BuildNative(distribution)
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.ensure_finalized()
    command.build_extension(setuptools.Extension("survfuse._native", sources=[]))
    return commands[:-1], commands[-1]


def source_of(command: list[str]) -> Path:
    return Path(command[command.index("-c") + 1])


class TestCommands:
    """Each source has its own flags, and nothing but the toolchain's libraries is linked."""

    def test_cpu(self, build, monkeypatch, tmp_path) -> None:
        monkeypatch.setenv("CXX", "g++ -march=x86-64")
        compiles, link = commands_of(build("cpu"), monkeypatch, tmp_path)
        expected = {*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")}
        module = build("cpu")
        if not module.X86:
            expected = {path for path in expected if not module.isa_flags(path)}
        assert {source_of(command) for command in compiles} == expected
        for command in compiles:
            assert command[:2] == ["g++", "-march=x86-64"]
            assert {"-std=c++17", "-DSURVFUSE_WITH_CUDA=0"} <= set(command)
            # the instruction set is chosen at run time, so no file is built for this machine
            assert "-march=native" not in command
        binding = [command for command in compiles if "-I/python" in command]
        bound = {path.name for path in (ROOT / "csrc").glob("*bindings.cpp")}
        assert {source_of(command).name for command in binding} == bound
        objects = [command[command.index("-o") + 1] for command in compiles]
        assert len(set(objects)) == len(objects)
        assert set(objects) <= set(link)
        assert not [part for part in link if part.startswith("-l")]

    def test_instruction_sets_by_file_name(self, build, monkeypatch, tmp_path) -> None:
        module = build("cpu")
        monkeypatch.setattr(module, "X86", True)
        compiles, _ = commands_of(module, monkeypatch, tmp_path)
        seen = set()
        for command in compiles:
            name = source_of(command).name
            own = {part for part in command if part.startswith("-m")}
            end = next((end for end in ISA_FILES if name.endswith(end)), None)
            if end is None:
                assert not own, f"{name} must run on every processor"
            else:
                seen.add(end)
                assert ISA_FILES[end] in own
                assert own == set(module.isa_flags(Path(name)))
        assert seen == set(ISA_FILES)
        assert "-mavx512f" not in module.isa_flags(Path("x_avx2.cpp"))
        assert "-mavx512bf16" not in module.isa_flags(Path("x_avx512.cpp"))

    def test_other_processors_get_plain_files(self, build, monkeypatch, tmp_path) -> None:
        module = build("cpu")
        monkeypatch.setattr(module, "X86", False)
        compiles, _ = commands_of(module, monkeypatch, tmp_path)
        names = {source_of(command).name for command in compiles}
        assert "pool_bag_plain.cpp" in names
        assert not [name for name in names if "avx" in name]
        assert all("-DSURVFUSE_X86=0" in command for command in compiles)

    def test_cuda(self, build, monkeypatch, tmp_path) -> None:
        nvcc = make_nvcc(tmp_path / "cuda")
        library = tmp_path / "cuda" / "lib64"
        library.mkdir()
        (library / "libcudart_static.a").touch()
        monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
        compiles, link = commands_of(build("cuda"), monkeypatch, tmp_path)
        kernels = [command for command in compiles if source_of(command).suffix == ".cu"]
        assert {source_of(command) for command in kernels} == {*(ROOT / "csrc/cuda").glob("*.cu")}
        for command in kernels:
            assert command[0] == str(nvcc)
            for target in ("sm_80", "sm_90a", "sm_100", "[sm_120,compute_120]"):
                assert any(part.endswith(f"code={target}") for part in command)
        assert all("-DSURVFUSE_WITH_CUDA=1" in command for command in compiles)
        libraries = {part for part in link if part.startswith("-l")}
        assert libraries == {"-lcudart_static", "-lrt", "-ldl"}
        assert f"-L{library}" in link


def test_a_failed_compile_is_an_error(build, capfd) -> None:
    module = build("cpu")
    command = [sys.executable, "-c", "import sys; print('line 3: no such type'); sys.exit(4)"]
    with pytest.raises(SystemExit, match=f"failed with exit code 4: {re.escape(sys.executable)}"):
        module.run(command)
    assert "line 3: no such type" in capfd.readouterr().out


def test_the_core_links_no_torch(core: ModuleType) -> None:
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("this system has no ldd")
    done = subprocess.run([ldd, core.__file__], capture_output=True, text=True, check=True)
    linked = [line.split()[0].rpartition("/")[2] for line in done.stdout.splitlines()]
    assert any(name.startswith("libstdc++") for name in linked), done.stdout
    # nor a second OpenMP runtime, nor a CUDA runtime that a wheel would have to find
    foreign = ("libtorch", "libc10", "libpython", "libgomp", "libomp", "libiomp", "libcudart")
    assert not [name for name in linked if name.startswith(foreign)]


def test_the_core_loads_without_torch(core: ModuleType) -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(core.build_info()['compiler'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, core.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == core.build_info()["compiler"]


def test_build_info(core: ModuleType) -> None:
    info = core.build_info()
    assert set(info) == {"compiler", "cuda", "cpu_isas", "cuda_archs"}
    assert info["compiler"]
    assert info["cpu_isas"][0] == "plain"
    assert set(info["cpu_isas"]) <= set(CPU_ISAS)
    assert bool(info["cuda_archs"]) is info["cuda"]


def test_machine_info(core: ModuleType) -> None:
    info = core.machine_info()
    assert {"cpu_isa", "amx_bf16", "threads"} <= set(info)
    assert info["cpu_isa"] in core.build_info()["cpu_isas"]
    best = CPU_ISAS.index(info["cpu_isa"])
    assert core.cpu_isa_available(best)
    assert core.cpu_isa_available(CPU_ISAS.index("plain"))
    assert not any(core.cpu_isa_available(isa) for isa in range(best + 1, len(CPU_ISAS)))
    assert ("cuda_devices" in info) is core.build_info()["cuda"]


def test_the_core_has_every_launcher_that_is_called(core: ModuleType) -> None:
    called = set()
    for path in (ROOT / "survfuse" / "native").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "native_core()":
                called.add(node.attr)
    assert called >= {"pool_bag_forward", "pool_bag_backward", "pool_bag_workspace"}
    assert not [name for name in called if not callable(getattr(core, name, None))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that the build leaves nothing in the sources."""
    # the first that reads the license field of pyproject.toml
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sources")
    patterns = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")

    def ignored(folder: str, names: list[str]) -> set[str]:
        # a link to another folder of the sources is nothing that a build reads
        return patterns(folder, names) | {n for n in names if Path(folder, n).is_symlink()}

    for name in ("survfuse", "triton_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def call_backend(sources: Path, hook: str, out: Path) -> Path:
    """Run one hook of the build backend as pip would, without a native core."""
    out.mkdir()
    program = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env=os.environ | {"SURVFUSE_BUILD": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def test_wheel(sources: Path, tmp_path: Path) -> None:
    wheel = call_backend(sources, "build_wheel", tmp_path / "wheel")
    # without a native core one wheel serves every Python and every machine
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(archive.read(metadata).decode())
        points = metadata.replace("METADATA", "entry_points.txt")
        assert "survfuse = survfuse.cli:main" in archive.read(points).decode()
    folder = metadata.partition("/")[0]
    expected = {"survfuse/py.typed"}
    installed = {"survfuse": "survfuse"}
    # results are of the machines they were measured on, so only what measures is installed
    installed |= {name: f"survfuse/{name}" for name in ("benchmarks", "triton_kernels")}
    for source, target in installed.items():
        kernels = (sources / source).rglob("*.cu")
        for path in (*(sources / source).rglob("*.py"), *kernels):
            expected.add(f"{target}/{path.relative_to(sources / source).as_posix()}")
    assert {name for name in names if not name.startswith(folder)} == expected
    assert f"{folder}/licenses/LICENSE" in names
    always = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in always} == {"torch", "numpy"}
    extras = {"train", "slides", "bench", "transport", "test", "dev"}
    assert set(header.get_all("Provides-Extra")) == extras


def test_source_distribution_can_be_built(sources: Path, tmp_path: Path) -> None:
    """What `pip install survfuse-*.tar.gz` needs: the C++ sources and headers, and the kernels."""
    archive = call_backend(sources, "build_sdist", tmp_path / "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    for folder in ("benchmarks", "csrc", "survfuse", "triton_kernels"):
        for path in (sources / folder).rglob("*"):
            if path.is_file() and path.suffix != ".csv":
                assert (tree / path.relative_to(sources)).is_file(), path.relative_to(sources)
