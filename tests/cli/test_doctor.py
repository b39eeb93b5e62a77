"""`survfuse doctor` in installations that lack things."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from survfuse.cli import doctor

BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from survfuse.cli import main
main({arguments!r})
"""


def stripped(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the command line where modules are missing and no tool is on PATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked, arguments=list(arguments))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment | {"PATH": "/nonexistent"},
    )


BARE = ["triton", "typer", "rich", "pandas", "pydantic", "yaml", "h5py", "scipy", "matplotlib"]
BARE += ["openslide", "survfuse._native", "sksurv"]


def test_a_bare_installation_says_what_works_and_what_is_missing() -> None:
    done = stripped(BARE, "doctor")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "[--] native CPU" in text
    assert "[--] triton" in text
    assert 'pip install "triton>=3.6"' in text
    assert "[--] nvcc" in text
    assert "would add: the CUDA" not in text
    assert "and CUDA kernels" not in text
    assert 'pip install "survfuse[train]"' in text
    assert "would add: survfuse train, evaluate, pack and demo" in text
    assert "cpu tensors" in text
    assert "tiled, reference; not native" in " ".join(text.split())
    assert not done.stderr


def test_json_holds_the_same_findings() -> None:
    done = stripped(["triton"], "doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = {item["topic"]: item for item in json.loads(done.stdout)}
    assert found["triton"]["state"] == "no"
    assert found["triton"]["gain"]
    assert found["torch"]["state"] == "yes"
    assert found["extra train"]["found"] == "complete"


def test_without_typer_another_command_names_the_extra() -> None:
    done = stripped(["typer"], "train", "x.yaml")
    assert done.returncode == 2
    assert 'needs typer: pip install "survfuse[train]"' in done.stderr
    assert "doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_extra() -> None:
    done = stripped(BARE, "--help")
    assert done.returncode == 0
    assert "survfuse doctor" in done.stdout or "doctor" in done.stdout


@pytest.mark.parametrize(
    ("info", "state", "words"),
    [
        ({"cuda": False}, "no", "nvcc was not found"),
        ({"cuda": True, "cuda_archs": ["sm_90a"], "cuda_error": "boom"}, "no", "boom"),
        (
            {"cuda": True, "cuda_archs": [], "cuda_runtime": 13000, "cuda_driver": 12080},
            "no",
            "the driver supports CUDA 12.8, the build is of 13.0",
        ),
        ({"cuda": True, "cuda_archs": ["sm_80"], "cuda_devices": 0}, "no", "no device"),
        (
            {"cuda": True, "cuda_archs": ["sm_80"], "cuda_runtime": 13000, "cuda_driver": 13000},
            "yes",
            "built for sm_80",
        ),
    ],
)
@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_cuda_core_is_judged_by_what_it_reports(
    info: dict, state: str, words: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    found = doctor._native_cuda(info)
    assert found.state == state
    assert words in found.found
    kernels = "the CUDA C++ kernels of multi_scale_deformable_attention"
    assert (kernels in found.found) is (state == "yes")
    # without a GPU nothing would be gained
    assert (kernels in found.gain) is (has_gpu and state != "yes")


def test_the_extra_for_slides_says_what_else_encode_needs() -> None:
    found = doctor._extra("slides", ["no_such_module"])
    assert "survfuse encode, together with extra train" in found.gain


def test_a_core_that_does_not_load_is_told_from_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    cpu, _ = doctor._native()
    assert "built, but cannot be loaded: undefined symbol: x" in cpu.found


@pytest.mark.parametrize(("version", "state"), [("3.5.1", "part"), ("3.6.0", "yes")])
def test_an_old_triton_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, version: str, state: str
) -> None:
    fake = SimpleNamespace(__version__=version)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: fake)
    assert doctor._triton().state == state


@pytest.mark.parametrize(
    ("threads", "said"), [("OpenMP", "on torch's threads"), ("own", "on threads of its own")]
)
def test_whose_threads_the_native_core_works_on(
    monkeypatch: pytest.MonkeyPatch, threads: str, said: str
) -> None:
    core = SimpleNamespace(
        build_info=lambda: {"compiler": "g++", "cpu_isas": ["plain"], "cuda": False},
        machine_info=lambda: {"cpu_isa": "plain", "threads": threads},
    )
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: core)
    assert doctor._native()[0].found.endswith(said)
