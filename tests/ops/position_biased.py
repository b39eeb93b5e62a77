"""Calls of `position_biased_attention` for its tests, and the formula as anybody would write it."""

from __future__ import annotations

import importlib
import zlib
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.native.core import CPU_ISAS, native_core
from tests.ops.contract import TARGETS
from tests.ops.contract import random as normal


@dataclass(frozen=True)
class Case:
    """Sizes of a call."""

    name: str
    n_bags: int = 2
    n_queries: int = 5
    n_keys: int = 7
    heads: int = 2
    groups: int = 2
    dim: int = 8
    value_dim: int = 8
    widths: tuple[int, ...] = (16,)
    ranges: tuple[tuple[int, int], ...] | None = None  # of packed queries; None: dense
    n_stored: int = 0
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


TABLE = {"bias": "table", "table_size": 16}
EXACT_CASES = (
    Case("one hidden layer"),
    Case("two hidden layers", widths=(32, 32), n_queries=19, n_keys=37, dim=16),
    Case("three hidden layers", widths=(16, 24, 9), n_keys=33, heads=4, groups=2),
    Case("64 units", widths=(64, 40), n_keys=17, heads=4, groups=1, dim=20, value_dim=12),
    Case("one unit", widths=(1,), heads=3, groups=3),
    Case("one key, one query", n_queries=1, n_keys=1),
    Case("no keys", n_keys=0),
    Case("no queries", n_queries=0),
    Case("no bags", n_bags=0),
    Case("257 bags", n_bags=257, n_queries=2, n_keys=3, heads=1, groups=1),
    Case("131 keys", n_bags=1, n_queries=23, n_keys=131, widths=(32, 32), heads=8, groups=8),
    Case(
        "gaps, overlap, repeats, empty",
        n_bags=6,
        ranges=((60, 9), (3, 40), (20, 30), (3, 40), (7, 0), (69, 1)),
        n_stored=72,
        n_keys=5,
    ),
    Case("empty bag last", ranges=((0, 5), (5, 0)), n_stored=5),
    Case("601 keys", n_bags=1, n_keys=601, groups=1),
)
TABLE_CASES = (
    Case("table", n_queries=19, n_keys=37, options=TABLE),
    Case("table, heads share groups", heads=6, groups=2, widths=(32, 32), options=TABLE),
    Case("table, one key", n_queries=1, n_keys=1, options=TABLE),
    Case("table, no keys", n_keys=0, options=TABLE),
    Case("table, no queries", n_queries=0, options=TABLE),
    Case("table of an odd size, short", n_keys=33, options=TABLE | {"table_size": 7}),
    Case("table, much beyond it", n_keys=33, options=TABLE | {"table_range": 1.5}),
    Case("table of one cell", options=TABLE | {"table_size": 2}),
    Case("table, 601 keys", n_bags=1, n_keys=601, groups=1, options=TABLE),
    Case(
        "table, ragged",
        ranges=((3, 9), (1, 4)),
        n_stored=14,
        n_keys=5,
        options=TABLE,
    ),
)
CASES = EXACT_CASES + TABLE_CASES
BIG = Case("big", n_bags=2, n_queries=150, n_keys=97, heads=4, widths=(32, 32), dim=16)


@dataclass(frozen=True)
class Call:
    """Arguments: tensors by name, those of the MLP as w0, b0, w1, ..., and options."""

    tensors: dict[str, Tensor]
    options: dict

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """Features in `dtype`; positions and the MLP at least in fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {
            name: tensor.detach()
            .to(device, dtype if name in ("query", "key", "value") else wide)
            .requires_grad_()
            for name, tensor in self.tensors.items()
        }
        options = {k: v.to(device) if isinstance(v, Ragged) else v for k, v in self.options.items()}
        return Call(tensors, options)

    def run(self, backend: str | None, **options) -> tuple[Tensor, Tensor]:
        """out, lse."""
        options = self.options | options
        return ops.position_biased_attention_with_lse(*self.arguments, **options, backend=backend)

    @property
    def arguments(self) -> tuple:
        """As the op takes them."""
        *sides, mlp = self.split()
        return *sides, mlp

    def split(self) -> tuple:
        values = list(self.tensors.values())
        return *values[:5], tuple(zip(values[5::2], values[6::2], strict=True))


def make(case: Case) -> Call:
    """A call in fp64 whose numbers fp32 can hold; rows in no bag hold NaN."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    b, h = case.n_bags, case.heads
    rows = (b, case.n_queries) if case.ranges is None else (case.n_stored,)
    tensors = {
        "query": normal(g, *rows, h, case.dim),
        "key": normal(g, b, case.n_keys, h, case.dim),
        "value": normal(g, b, case.n_keys, h, case.value_dim),
        "query_pos": normal(g, *rows, 2, std=3.0),
        "key_pos": normal(g, b, case.groups, case.n_keys, 2, std=3.0),
    }
    sizes = [2, *case.widths, h // case.groups]
    for i in range(len(sizes) - 1):
        tensors[f"w{i}"] = normal(g, sizes[i + 1], sizes[i], std=(2.0 / sizes[i]) ** 0.5)
        tensors[f"b{i}"] = normal(g, sizes[i + 1], std=0.5)
    tensors = {name: tensor.float().double() for name, tensor in tensors.items()}
    options = dict(case.options)
    if case.ranges is not None:
        starts, lengths = zip(*case.ranges, strict=True)
        options["query_ragged"] = Ragged.from_ranges(starts, lengths)
        unread = torch.ones(case.n_stored, dtype=torch.bool)
        for start, length in case.ranges:
            unread[start : start + length] = False
        tensors["query"][unread] = torch.nan
        tensors["query_pos"][unread] = torch.nan
    return Call(tensors, options)


def plain(call: Call) -> tuple[Tensor, Tensor]:
    """out, lse: everything formed, features in their type, by the log of |d| and the sign of d."""
    if call.options.get("bias") == "table":
        # nobody writes that otherwise
        return call.run("reference")
    query, key, value, query_pos, key_pos, mlp = call.split()
    ragged = call.options.get("query_ragged")
    n_bags, dense = key.shape[0], ragged is None
    if not dense:
        pairs = zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
        picked = [slice(start, start + length) for start, length in pairs]
    outs = [query.new_zeros(0, query.shape[-2], value.shape[-1])]
    lses = [query.new_zeros(0, query.shape[-2])]
    for b in range(n_bags):
        q, at = (t[b] if dense else t[picked[b]] for t in (query, query_pos))
        d = at[:, None, None, :] - key_pos[b]
        x = torch.sign(d) * torch.log(d.abs() + 1)
        for weight, shift in mlp[:-1]:
            x = torch.relu(x @ weight.T + shift)
        x = x @ mlp[-1][0].T + mlp[-1][1]
        shift = x.permute(0, 1, 3, 2).flatten(1, 2).to(q.dtype)
        logits = torch.einsum("nhd,mhd->nhm", q, key[b]) * q.shape[-1] ** -0.5 + shift
        outs.append(torch.einsum("nhm,mhd->nhd", logits.softmax(-1), value[b]))
        lses.append(logits.logsumexp(-1))
    out, lse = torch.cat(outs), torch.cat(lses)
    if dense:
        return out.view(*query.shape[:3], value.shape[-1]), lse.view(query.shape[:3])
    return out, lse


def differentiate(call: Call, results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradients of one fixed weighted sum of them."""
    total = 0.0
    for index, result in enumerate(results):
        g = torch.Generator().manual_seed(index)
        weight = torch.randn(result.shape, generator=g, dtype=torch.float64).to(result.device)
        finite = torch.where(result == -torch.inf, 0.0, result.double())
        total = total + (weight * finite).sum()
    inputs = list(call.tensors.values())
    if total.requires_grad:
        gradients = torch.autograd.grad(total, inputs, materialize_grads=True)
    else:
        # a batch of no bags, formed bag by bag, has met no input
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
    return [result.detach() for result in results] + list(gradients)


def targets() -> list[tuple[str, str]]:
    """The backends this op has, and where they run here; the interpreter has tests of its own."""
    built = importlib.import_module("survfuse.ops.position_biased_attention")._MODULES
    here = [target for target in TARGETS if target != ("triton", "cpu")]
    return [target for target in here if target[0] in built]


def names(call: Call) -> list[str]:
    return ["out", "lse", *(f"gradient of {name}" for name in call.tensors)]


EACH_TARGET = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(*target, marks=[pytest.mark.gpu] if target[1] == "cuda" else [])
        for target in targets()
    ],
)
TORCH_TARGETS = pytest.mark.parametrize(
    "backend", [b for b, device in targets() if device == "cpu" and b != "triton"]
)


def use_isa(monkeypatch, isa: str) -> None:
    """Have the native kernel of one instruction set run, or skip."""
    if native_core() is None or not native_core().cpu_isa_available(CPU_ISAS.index(isa)):
        pytest.skip(f"this processor has no {isa}")
    module = importlib.import_module("survfuse.native.position_biased_attention")
    for direction in ("forward", "backward"):
        name = f"position_biased_attention_{direction}"
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original: f(*a, isa=isa))
