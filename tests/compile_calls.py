"""What compile_triton.py compiles: launchers run on kernels that only record.

The launchers run on empty CPU tensors, so what is compiled is what they would launch: the same
constants, types, alignments and options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from survfuse.triton_kernels import pool_bag_shapes

OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@dataclass
class Launch:
    """One recorded launch: what the just-in-time compiler would have specialised on."""

    module: str
    kernel: str
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]
    known_spills: int = 0  # bytes on sm_90 that docs/kernels.md owns up to

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

    module: str
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
        unknown = keywords.keys() - set(names) - set(OPTIONS)
        assert not unknown, f"{self.name} takes no {sorted(unknown)}"
        assert not set(names[: len(args)]) & keywords.keys()
        assert len(args) <= len(names)
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
            Launch(self.module, self.name, self.case, signature, constants, attributes, options)
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


@contextlib.contextmanager
def recording(
    module: ModuleType, case: object, limits: pool_bag_shapes.Limits
) -> Iterator[list[Launch]]:
    """Within it, kernels that `module` launches are recorded, on a device of these limits."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in [name for name in dir(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            stack.callback(setattr, module, name, kernel)
            setattr(module, name, Recorder(module.__name__, name, kernel, str(case), launches))
        stack.callback(setattr, pool_bag_shapes, "device_limits", pool_bag_shapes.device_limits)
        pool_bag_shapes.device_limits = lambda device: limits
        yield launches
