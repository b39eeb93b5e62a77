"""The shape of the house: docs/design.md, "The house". Imports are read, not run."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# where each package of the installed library lies in the sources
PACKAGES = {
    "survfuse": ROOT / "survfuse",
    "survfuse.triton_kernels": ROOT / "triton_kernels",
    "survfuse.benchmarks": ROOT / "benchmarks",
}

# types, errors and files that belong to no room; each may be used by all
NEUTRAL = {
    "ragged": set(),
    "pooling": {"ragged"},
    "attention": {"ragged"},
    "deformable": set(),
    "position_bias": {"ragged"},
    "batch": {"ragged"},
    "grid": {"ragged"},
    "patch_cells": set(),
    "extras": set(),
    "outcomes": set(),
    "baseline_hazard": {"outcomes"},
    "data.atomic": set(),
}
# room -> the rooms it may import, lazily or not; a room may always import itself
ARROWS = {
    "cli": {"training", "evaluation", "data", "benchmarks"},
    # measures what users call; nothing but the command that runs it knows of it
    "benchmarks": {"models", "layers", "ops"},
    "training": {"evaluation", "models", "data"},
    "evaluation": set(),
    "models": {"layers", "ops"},
    "layers": {"ops"},
    "ops": {"reference", "tiled", "native", "native.core", "triton_kernels"},
    "native": {"native.core", "tiled", "reference"},
    "tiled": {"native.core", "reference"},
    # the loaded core, apart from what is computed with it: it also knows the processor
    "native.core": {"_native"},
    "reference": set(),
    "triton_kernels": set(),
    "data": set(),
}
# modules whose business is another room's inside
EXCEPTIONS = {
    # reports what was built and what each device can run
    "survfuse.cli.doctor": {"_native", "ops"},
    # times the kernel and a model against plain torch
    "survfuse.cli.demo_kernel": {"ops", "models"},
}
# modules of survfuse.models that belong to no model; the others are named <model> or <model>_<part>
SHARED_BY_MODELS = {
    *("base", "config", "settings", "inputs", "heads", "encoders", "registry"),
    *("gene_tokens", "patches_and_genes", "gene_consistency", "partial_likelihood"),
}
# models that are another one with a part replaced
BUILDS_ON = {"motcat": "mcat", "cox": "elastic"}
# what installed code may import beside the standard library: none is under the GPL
BASE = {"torch", "numpy", "survfuse"}
OPTIONAL = {
    *("h5py", "matplotlib", "openpyxl", "openslide", "ot", "pandas", "PIL", "pydantic", "rich"),
    *("pytest", "pytest_benchmark", "scipy", "sklearn", "triton", "typer", "yaml"),
}
# where an optional library may be imported at the top: modules nobody imports without needing it
TOP_LEVEL = {
    "survfuse.cli": {"rich", "typer"},
    "survfuse.triton_kernels": {"triton"},
    "survfuse.benchmarks": {"pytest"},
}
# what benchmarks race against where somebody has it; nothing else may import it
PEERS = {"flash_attn", "flash_attn_interface", "mmcv", "transformers", "xformers"}
HEAVY = ("triton", "openslide", "matplotlib", "pandas", "scipy", "h5py", "pydantic", "sklearn")
IMPORT_SECONDS = 0.3
MAX_LINES = 450


class Import(NamedTuple):
    """One import of one module."""

    importer: str
    target: str  # dotted name
    line: int
    lazy: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING`
    required: bool  # by survfuse.extras.require, or after it in the same function


def modules(packages: dict[str, Path] = PACKAGES) -> dict[str, Path]:
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


def imports_of(module: str, path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(_walk(tree, module, package, set(), lazy=False, typing_only=False))


def _walk(node, module, package, required, *, lazy, typing_only) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        here_lazy, here_typing, known = lazy, typing_only, required
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            here_lazy = True
            known = {name.partition(".")[0] for name in _required(child)}
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            here_typing = True
        for target in _targets(child, package):
            by_require = isinstance(child, ast.Call) or target.partition(".")[0] in known
            yield Import(module, target, child.lineno, here_lazy, here_typing, by_require)
        yield from _walk(child, module, package, known, lazy=here_lazy, typing_only=here_typing)


def _required(node: ast.AST) -> list[str]:
    return [name for child in ast.walk(node) for name in _called(child, ("require",))]


def _called(node: ast.AST, functions: tuple[str, ...]) -> list[str]:
    """The module a call such as require("h5py.h5d") or import_module("triton") names."""
    if not isinstance(node, ast.Call) or not node.args:
        return []
    name = ast.unparse(node.func).rpartition(".")[2]
    first = node.args[0]
    literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return [first.value] if literal and name in functions else []


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")
        base = base[: len(base) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        # `from survfuse import reference` imports a module, `from survfuse.ragged import Ragged`
        # a name; both are told apart where the target is looked up
        return [f"{origin}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # tables of modules that are imported by name
        return [node.value] if re.fullmatch(r"survfuse(\.\w+)+", node.value) else []
    return _called(node, ("require", "import_module", "__import__"))


def room_of(name: str) -> str | None:
    """The room or neutral module that a dotted name lies in; None outside survfuse."""
    parts = name.split(".")
    if parts[0] != "survfuse" or len(parts) < 2:
        return None
    two = ".".join(parts[1:3])
    return two if two in NEUTRAL or two in ARROWS else parts[1]


ALL = modules()


@functools.cache
def all_imports() -> list[Import]:
    return [found for name, path in ALL.items() for found in imports_of(name, path)]


def test_the_sources_were_found() -> None:
    rooms = {room_of(name) for name in ALL} - {None}
    assert rooms == (set(ARROWS) | set(NEUTRAL)), "a new room needs its arrows in this table"
    targets = {(found.importer, found.target) for found in all_imports()}
    # one of every way to import: from, lazy, relative, a table of names, require
    assert ("survfuse.layers.latent_attention", "survfuse.ops.tokens_attend_bag") in targets
    assert ("survfuse.native.core", "survfuse._native") in targets
    assert (
        "survfuse.triton_kernels.pool_bag",
        "survfuse.triton_kernels.pool_bag_shapes",
    ) in targets
    assert ("survfuse.ops.pool_bag", "survfuse.triton_kernels.pool_bag") in targets
    assert ("survfuse.evaluation.figures", "matplotlib.figure") in targets


def test_arrows_point_one_way() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()
    graphlib.TopologicalSorter(NEUTRAL).prepare()


def test_imports_follow_the_arrows() -> None:
    against = []
    for found in all_imports():
        source, target = room_of(found.importer), room_of(found.target)
        if target is None or source is None or source == target or found.target == found.importer:
            continue
        # what the top of the package shows
        if target in ("__version__", "Ragged"):
            continue
        if source in NEUTRAL:
            allowed = NEUTRAL[source]
        else:
            allowed = ARROWS[source] | set(NEUTRAL) | EXCEPTIONS.get(found.importer, set())
        if target not in allowed:
            against.append(f"{found.importer}:{found.line} imports {found.target}")
    assert not against, "\n".join(against)


def test_exceptions_are_used() -> None:
    for module, rooms in EXCEPTIONS.items():
        used = {room_of(found.target) for found in all_imports() if found.importer == module}
        assert rooms <= used, f"{module} needs no arrow to {sorted(rooms - used)} any more"


def family_of(module: str) -> str | None:
    """The model a module of survfuse.models belongs to; None for what models share."""
    room, _, stem = module.removeprefix("survfuse.").partition(".")
    stem = stem.partition(".")[0]
    if room != "models" or not stem or stem in SHARED_BY_MODELS:
        return None
    return stem.partition("_")[0]


def test_models_do_not_import_each_other() -> None:
    """So that deleting a model deletes its files and its lines in the registry, and no more."""
    against, used = [], set()
    for found in all_imports():
        model = family_of(found.importer)
        other = family_of(found.target)
        # `__init__` and the registry, which name every model, belong to none
        if model is None or other is None or other == model:
            continue
        used.add(model)
        if BUILDS_ON.get(model) != other:
            against.append(f"{found.importer}:{found.line} imports {found.target}")
    assert not against, "\n".join(against)
    assert used == set(BUILDS_ON), "a model that builds on no other needs no line in the table"
    stems = {name.removeprefix("survfuse.models.") for name in ALL}
    assert stems >= SHARED_BY_MODELS


def third_party(found: Import) -> str | None:
    top = found.target.partition(".")[0]
    return None if top in BASE or top in sys.stdlib_module_names else top


def test_only_known_libraries_are_imported() -> None:
    """In particular nothing under the GPL, such as scikit-survival, which tests may use."""
    outside = []
    for found in [*all_imports(), *imports_of("setup", ROOT / "setup.py")]:
        known = {None, *OPTIONAL}
        if found.importer.startswith("survfuse.benchmarks."):
            known |= PEERS
        elif found.importer == "setup":
            known = {None, "setuptools", "pybind11"}
        if third_party(found) not in known:
            outside.append(found)
    assert not outside, [f"{found.importer}:{found.line} {found.target}" for found in outside]


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    early = []
    for found in all_imports():
        library = third_party(found)
        if library is None or found.lazy or found.typing_only:
            continue
        allowed = {
            name
            for package, names in TOP_LEVEL.items()
            if found.importer.startswith(f"{package}.")
            for name in names
        }
        if library not in allowed:
            early.append(f"{found.importer}:{found.line} imports {found.target} at the top")
    assert not early, "\n".join(early)


def test_a_missing_optional_library_is_named_with_its_extra() -> None:
    """Lazy imports outside the command line, which has words of its own, go through `require`.

    Nor do benchmarks: a peer that is missing is left out of the race.
    """
    bare = [
        f"{found.importer}:{found.line} imports {found.target} without require"
        for found in all_imports()
        if third_party(found) and found.lazy and not found.required
        if not found.importer.startswith(("survfuse.cli", "survfuse.benchmarks.peers"))
        if not (found.importer == "survfuse.benchmarks.harness" and found.target == "triton")
    ]
    assert not bare, "\n".join(bare)


def test_triton_kernels_are_kernels_and_launchers() -> None:
    """No autograd and no registration there: survfuse.ops is their only home."""
    for path in PACKAGES["survfuse.triton_kernels"].glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("torch.library", "torch.autograd", "custom_op", "register_autograd"):
            assert word not in text, f"{path.name} holds {word}"


@pytest.mark.parametrize(
    "folder",
    [
        "survfuse",
        "triton_kernels",
        "csrc",
        "benchmarks",
        "tests",
    ],
)
def test_files_stay_short(folder: str) -> None:
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    long = []
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in kinds and path.is_file():
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MAX_LINES:
                long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_LINES}")
    assert not long, "\n".join(long)


PROBE = """
import json, sys, time
import torch
loaded = set(sys.modules)
report = {}
for name in ("survfuse", "survfuse.ops"):
    start = time.process_time()
    __import__(name)
    report[name] = [time.process_time() - start, sorted(set(sys.modules) - loaded)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def fresh_imports() -> list[dict[str, list]]:
    """CPU seconds and new modules of both imports, beyond `import torch`, in three processes."""
    reports = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT
        )
        reports.append(json.loads(done.stdout))
    return reports


@pytest.mark.parametrize("name", ["survfuse", "survfuse.ops"])
def test_import_brings_no_heavy_library(fresh_imports, name: str) -> None:
    new = {module.partition(".")[0] for module in fresh_imports[0][name][1]}
    assert "survfuse" in new
    assert not new & set(HEAVY)
    # nor any other installed library: what torch itself brings is not new
    assert not new - {"survfuse"} - set(sys.stdlib_module_names) - {"torch", "numpy"}


@pytest.mark.parametrize("name", ["survfuse", "survfuse.ops"])
def test_import_is_quick(fresh_imports, name: str) -> None:
    # processor time, best of three, measured after torch in the same process: other programs on
    # the machine do not count. survfuse.ops comes on top of survfuse.
    seconds = min(report[name][0] for report in fresh_imports)
    if name == "survfuse.ops":
        seconds += min(report["survfuse"][0] for report in fresh_imports)
    assert seconds < IMPORT_SECONDS
