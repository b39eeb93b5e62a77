"""A library that is not installed: every call that needs it says how to install it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from survfuse.extras import require

ROOT = Path(__file__).resolve().parents[1]
# library -> the extra that brings it, and calls that need it; `here` is a folder with files of
# every suffix that hold nothing readable
CALLS = {
    "pandas": (
        "train",
        {
            "OmicsTable.from_tcga": "data.OmicsTable.from_tcga(here / 'x.csv')",
            "simulate_cohort": "data.simulate_cohort()",
            "read_cohort": "data.read_cohort(here / 'x.csv', metadata=here / 'x.csv')",
            "read_signatures": "call('data.omics', 'read_signatures', here / 'x.csv')",
            "read_case_metadata": "call('data.omics', 'read_case_metadata', here / 'x.csv')",
            "read_tcga_cdr": "call('data.outcomes', 'read_tcga_cdr', here / 'x.csv')",
            "predict": "call('training', 'predict', here, None)",
            "survfuse train": "command('train', here / 'demo.yaml', '--out', here / 'run')",
        },
    ),
    "h5py": (
        "train",
        {
            "read_bag": "data.read_bag(here / 'x.h5')",
            "BagStore": "data.BagStore(here / 'x.h5')",
            "BagStore.write": "data.BagStore.write(here / 'y.h5', bags())",
            "pack": "data.pack(here / 'x.h5', here / 'y.h5')",
            "survfuse pack": "command('pack', here / 'x.h5', '--out', here / 'y.h5')",
        },
    ),
    "scipy": (
        "train",
        {
            "kaplan_meier": "call('evaluation.curves', 'kaplan_meier', TIME, EVENT)",
            "logrank_test": "call('evaluation.curves', 'logrank_test', [(TIME, EVENT)] * 2)",
            "corrected_t": "call('evaluation.intervals', 'corrected_t', [0.1, 0.2], "
            "n_train=9, n_test=3)",
        },
    ),
    "sklearn": (
        "train",
        {
            "macro_auc": "call('evaluation.classification', 'macro_auc', [0, 1], [[1, 0], [0, 1]])",
        },
    ),
    "matplotlib": (
        "train",
        {
            "kaplan_meier_figure": "call('evaluation.figures', 'kaplan_meier_figure', "
            "{'low': (TIME, EVENT), 'high': (TIME, EVENT)})",
        },
    ),
    "openslide": (
        "slides",
        {
            "tile_slide": "call('data.slides', 'tile_slide', here / 'x.svs')",
            "encode_slide": "call('data.slides', 'encode_slide', here / 'x.svs', here / 'y.h5')",
            "survfuse encode": "command('encode', here / 'x.svs', '--out', here / 'bags')",
        },
    ),
    "PIL": ("slides", {"tile_slide": "call('data.slides', 'tile_slide', here / 'x.svs')"}),
    "openpyxl": (
        "train",
        {"read_tcga_cdr": "call('data.outcomes', 'read_tcga_cdr', here / 'x.xlsx')"},
    ),
    "pydantic": (
        "train",
        {
            "parse_config": "call('training', 'parse_config', {})",
            "survfuse train": "command('train', here / 'demo.yaml', '--out', here / 'run')",
        },
    ),
    "yaml": (
        "train",
        {
            "load_config": "call('training', 'load_config', here / 'demo.yaml')",
            "survfuse train": "command('train', here / 'demo.yaml', '--out', here / 'run')",
        },
    ),
    "typer": (
        "train",
        {
            "survfuse train": "command('train', here / 'demo.yaml')",
            "survfuse pack": "command('pack', '--help')",
            "survfuse evaluate": "command('evaluate', here)",
        },
    ),
    "rich": (
        "train",
        {
            "survfuse train": "command('train', here / 'demo.yaml')",
            "survfuse pack": "command('pack', '--help')",
            "survfuse encode": "command('encode', '--help')",
        },
    ),
}
PROGRAM = """
import contextlib, importlib, io, json, os, pathlib, sys
import torch
import survfuse

here, tables = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
TIME, EVENT = [1.0, 2.0, 3.0, 4.0], [1, 1, 0, 1]


class Without:
    # a finder to which one library does not exist
    def __init__(self, finder, library):
        self.finder, self.library = finder, library

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.library:
            return None
        return self.finder.find_spec(name, path, target)


def call(module, name, *arguments, **options):
    return getattr(importlib.import_module("survfuse." + module), name)(*arguments, **options)


def bags():
    return data.Bags(torch.zeros(2, 8), [2], ["a"])


def command(*arguments):
    from survfuse import cli
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    assert code, f"the command ended with {code}"
    raise ImportError(shown.getvalue())


assert not set(tables) & set(sys.modules), "a library came with torch"
for library, calls in tables.items():
    # torch is imported once, and each library is missing in a process of its own
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    sys.meta_path[:] = [Without(finder, library) for finder in sys.meta_path]
    messages = {}
    for name, expression in calls.items():
        try:
            from survfuse import data
            eval(expression)
            messages[name] = "nothing was raised"
        except BaseException as error:
            messages[name] = f"{type(error).__name__}: {error}"
    print(json.dumps([library, messages]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("x.csv", "x.h5", "x.svs", "x.xlsx"):
        (folder / name).write_bytes(b"nothing")
    (folder / "demo.yaml").write_text("data: {folder: simulated}\n")
    return folder


@pytest.fixture(scope="module")
def messages(here: Path) -> dict[str, dict[str, str]]:
    """What each call said without its library."""
    tables = {library: calls for library, (_, calls) in CALLS.items()}
    done = run("-c", PROGRAM, here, json.dumps(tables))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(("library", "name"), [(key, n) for key in CALLS for n in CALLS[key][1]])
def test_a_missing_library_is_named_with_its_extra(library, name, messages) -> None:
    extra, _ = CALLS[library]
    message = messages[library][name]
    assert message.startswith("ImportError: ")
    assert f'needs {library}: pip install "survfuse[{extra}]"' in message


def test_nothing_is_half_written(messages, here: Path) -> None:
    written = [path.name for path in here.rglob("*") if path.is_file() and path.stat().st_size]
    assert sorted(written) == ["demo.yaml", "x.csv", "x.h5", "x.svs", "x.xlsx"]


def test_doctor_and_ops_work_without_any(here: Path) -> None:
    """All of them, and Triton, at once: what is left is torch and numpy."""
    missing = [*CALLS, "triton", "hypothesis", "sksurv"]
    program = (
        "import sys\n"
        "for name in sys.argv[1:]: sys.modules[name] = None\n"
        "import torch\n"
        "from survfuse import ops\n"
        "pooled = ops.pool_bag(torch.zeros(1, 1, 2), torch.eye(2)).pooled\n"
        "assert pooled.tolist() == [[[0.5, 0.5]]]\n"
        "import survfuse.models, survfuse.training, survfuse.evaluation, survfuse.data\n"
        "from survfuse.cli import main\n"
        "main(['doctor'])\n"
    )
    done = run("-c", program, *missing)
    assert done.returncode == 0, done.stderr
    for extra in ("train", "slides"):
        assert f'pip install "survfuse[{extra}]"' in done.stdout
    assert "triton" in done.stdout
    assert "Traceback" not in done.stderr


def test_require_returns_the_module() -> None:
    assert require("json.decoder", extra="train").JSONDecoder is json.JSONDecoder


def test_require_names_the_top_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(ImportError, match=r'^needs absent: pip install "survfuse\[train\]"$') as e:
        require("absent.inner", extra="train")
    assert e.value.name == "absent"


def test_require_hides_no_other_missing_library(tmp_path, monkeypatch) -> None:
    """A library that is installed and lacks one of its own is another problem."""
    (tmp_path / "present.py").write_text("import its_own_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'its_own_dependency'"):
        require("present", extra="train")
