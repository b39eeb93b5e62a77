"""`survfuse doctor`: what was built, what this machine can run, and what would be gained.

Needs neither typer nor rich: it is the command for an installation that does not work.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# extra -> modules it brings, as they are imported
EXTRAS = {
    "train": (
        *("h5py", "matplotlib", "pandas", "pydantic", "yaml", "rich", "scipy", "sklearn", "typer"),
    ),
    "slides": ("openslide", "PIL", "h5py"),
    "transport": ("ot",),
    "bench": ("pytest", "pytest_benchmark", "matplotlib", "rich", "typer"),
    "test": ("hypothesis", "sksurv"),
}
GAINS = {
    "train": "survfuse train, evaluate, pack and demo",
    "slides": "survfuse encode, together with extra train: bags straight from slide files",
    "transport": "MOTCat with solver 'pot'",
    "bench": "survfuse bench: the kernels against other people's on this machine",
    "test": "the test suite",
}
CUDA_KERNELS = "the CUDA C++ kernels of multi_scale_deformable_attention"
MARKS = {"yes": "ok", "no": "--", "part": "!!"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        state: "yes", "no" or "part" (there, but not usable as it is).
        found: what there is, or why it is not there.
        gain: what having it would add; "" where nothing is missing.
    """

    topic: str
    state: str
    found: str
    gain: str = ""


def doctor_command(arguments: Sequence[str]) -> int:
    """Parse the command's own arguments, print the report; 0 if the package can compute at all."""
    parser = argparse.ArgumentParser(
        prog="survfuse doctor",
        description="Say what this installation can do: backends, devices and extras, why "
        "something is missing, and what having it would add.",
        epilog="example: survfuse doctor --json > doctor.json   (to attach to a bug report)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    findings = examine()
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(render(findings))
    return 0


def examine() -> list[Finding]:
    """Look at everything; never raises for something that is missing or broken."""
    findings = [_package(), *_torch(), *_native(), _triton(), _nvcc()]
    findings += [_extra(name, modules) for name, modules in EXTRAS.items()]
    return [*findings, *_backends()]


def render(findings: Sequence[Finding]) -> str:
    """The findings as aligned text, gains indented below what is missing."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"[{MARKS[finding.state]}] {finding.topic:<{width}}  {finding.found}")
        if finding.gain:
            lines.append(f"     {'':<{width}}  would add: {finding.gain}")
    return "\n".join(lines)


def _package() -> Finding:
    import survfuse

    where = os.path.dirname(survfuse.__file__)
    return Finding(
        "survfuse",
        "yes",
        f"{survfuse.__version__} in {where}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    )


def _torch() -> list[Finding]:
    import torch

    found = [
        Finding(
            "torch",
            "yes",
            f"{torch.__version__}, {torch.get_num_threads()} threads",
        )
    ]
    gain = "the Triton kernels; models train on the GPU"
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this torch was built for the CPU only"
        return [*found, Finding("GPU", "no", f"{reason}{_driver_note()}", gain)]
    if not torch.cuda.is_available():
        reason = "torch was built for a GPU but sees none" + _driver_note()
        return [*found, Finding("GPU", "no", reason, gain)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Finding(
                f"GPU {index}",
                "yes",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}{_driver_note()}",
            )
        )
    return found


def _driver_note() -> str:
    """What nvidia-smi says of the driver, "" without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "; no NVIDIA driver tools on PATH"
    try:
        done = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"; nvidia-smi failed: {error}"
    versions = sorted(set(done.stdout.split()))
    if done.returncode or not versions:
        return "; nvidia-smi finds no working driver"
    return f"; driver {', '.join(versions)}"


def _native() -> list[Finding]:
    try:
        core = importlib.import_module("survfuse._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = (
            "not built (SURVFUSE_BUILD=none, or a source tree that was not installed)"
            if missing
            else f"built, but cannot be loaded: {error}"
        )
        gain = "the C++ kernels: several times faster attention over long bags on a CPU"
        cuda = Finding("native CUDA", "no", "no native core", _cuda_gain())
        return [Finding("native CPU", "no", reason, gain), cuda]
    info = {**core.build_info(), **core.machine_info()}
    isas = ", ".join(info.get("cpu_isas", [])) or "none"
    runs = info.get("cpu_isa")
    found = f"compiler {info.get('compiler', 'unknown')}; built for {isas}"
    found += f"; this machine runs {runs}" if runs else ""
    found += {"OpenMP": ", on torch's threads", "own": ", on threads of its own"}.get(
        info.get("threads", ""), ""
    )
    cpu = Finding("native CPU", "yes", found)
    return [cpu, _native_cuda(info)]


def _native_cuda(info: dict[str, Any]) -> Finding:
    """What the CUDA part of the core is."""

    def finding(state: str, found: str) -> Finding:
        return Finding("native CUDA", state, found, "" if state == "yes" else _cuda_gain())

    if not info.get("cuda"):
        reason = "not built: nvcc was not found at installation, or SURVFUSE_BUILD=cpu was set"
        return finding("no", reason)
    archs = ", ".join(str(arch) for arch in info.get("cuda_archs", []))
    found = f"built for {archs}"
    if info.get("cuda_error"):
        return finding("no", f"{found}; no use here: {info['cuda_error']}")
    runtime, driver = info.get("cuda_runtime"), info.get("cuda_driver")
    if runtime and driver is not None and driver // 1000 < runtime // 1000:
        return finding(
            "no",
            f"{found}; no use here: the driver supports CUDA {_cuda_version(driver)}, the build is "
            f"of {_cuda_version(runtime)}",
        )
    if info.get("cuda_devices") == 0:
        return finding("no", f"{found}; no device")
    return finding("yes", f"{found}: {CUDA_KERNELS}; other operations run on Triton")


def _cuda_gain() -> str:
    """What a usable CUDA part would bring: nothing where there is no NVIDIA GPU."""
    import torch

    has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    return CUDA_KERNELS if has_gpu else ""


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _triton() -> Finding:
    gain = "the Triton kernels on a GPU"
    try:
        module = importlib.import_module("triton")
    except ImportError as error:
        reason = f"not installed ({error})"
        return Finding("triton", "no", f'{reason}: pip install "triton>=3.6"', gain)
    except Exception as error:
        return Finding("triton", "part", f"installed, but import fails: {error}", gain)
    version = str(getattr(module, "__version__", "unknown"))
    parts = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if parts and parts < [3, 6]:
        return Finding("triton", "part", f"{version}; 3.6 or newer is needed", gain)
    return Finding("triton", "yes", version)


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    if path is None and os.environ.get("CUDA_HOME"):
        path = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    if path is None:
        return Finding(
            "nvcc",
            "no",
            "not on PATH and not under CUDA_HOME; needed only to build, not to run",
        )
    return Finding("nvcc", "yes", path)


def _extra(name: str, modules: Sequence[str]) -> Finding:
    missing = [module for module in modules if not _installed(module)]
    topic = f"extra {name}"
    if not missing:
        return Finding(topic, "yes", "complete")
    state = "no" if len(missing) == len(modules) else "part"
    reason = f'lacks {", ".join(missing)}: pip install "survfuse[{name}]"'
    return Finding(topic, state, reason, GAINS[name])


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _backends() -> list[Finding]:
    """Per kind of device, the backends that can serve a call, and why the others cannot."""
    import torch

    try:
        backends = importlib.import_module("survfuse.ops.backends")
    except Exception as error:
        return [Finding("backends", "no", f"survfuse.ops cannot be imported: {error}", "all ops")]
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    findings = []
    for kind in kinds:
        device = torch.device(kind)
        usable, reasons = [], []
        for name in reversed(backends.BACKENDS):
            obstacle = backends.backend_obstacle(name, device=device, dtype=torch.float32)
            if obstacle is None:
                usable.append(name)
            else:
                reasons.append(f"not {name}: {obstacle}")
        text = "; ".join([", ".join(usable), *reasons])
        findings.append(Finding(f"{kind} tensors", "yes", text))
    return findings
