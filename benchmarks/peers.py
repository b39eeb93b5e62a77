"""Other people's attention, and how each is called: the one place that knows.

Every peer takes packed queries [Tq, H, d], keys [Tk, H, d], values [Tk, H, dv] and a `Layout` that
says which rows meet, and gives [Tq, H, dv]. One that attends to a single pair of dense sides is
called bag by bag.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# of the memory that is free, what the weights of a way that forms them may take
_WEIGHTS_SHARE = 0.5
# logits, weights and the gradient of both live at once
_WEIGHTS_COPIES = 4
# compiling takes seconds
_FEWEST_COMPILED_PAIRS = 10_000
_SDPA = {
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
_GPU_ONLY = ("SDPA efficient", "SDPA cuDNN")


@dataclass(frozen=True)
class Layout:
    """Which queries meet which keys: bag b is a range of packed queries and one of packed keys."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    device: str

    @functools.cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Both sides' running sums [B + 1], int32 on the device."""
        return tuple(
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(self.device)
            for lengths in (self.query_lengths, self.key_lengths)
        )

    @property
    def longest(self) -> tuple[int, int]:
        return max(self.query_lengths), max(self.key_lengths)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that meet."""
        return sum(q * k for q, k in zip(self.query_lengths, self.key_lengths, strict=True))

    def bags(self, query: Tensor, key: Tensor, value: Tensor):
        """Each bag's three tensors."""
        return zip(
            query.split(self.query_lengths),
            key.split(self.key_lengths),
            value.split(self.key_lengths),
            strict=True,
        )


@dataclass
class CompileTime:
    """Seconds that compiling peers has taken in this process, and may take."""

    spent: float = 0.0
    limit: float = float("inf")


COMPILING = CompileTime()
Attend = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
Obstacle = Callable[[Layout, int, torch.dtype], str | None]


class Peer(NamedTuple):
    """One way to attend.

    Attributes:
        name: as it stands in the tables.
        attend: the call.
        obstacle: why it must not be tried on (layout, heads, type); None if it may.
        forms_weights: whether it holds a weight for each pair of query and key.
    """

    name: str
    attend: Attend
    obstacle: Obstacle = lambda *_: None
    forms_weights: bool = False


def peers(device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that this machine has, torch's own choice first; and why others are missing."""
    found = [Peer("SDPA", functools.partial(_sdpa, None))]
    found.append(Peer("plain torch", _eager, _weights_obstacle, forms_weights=True))
    absent = {}
    for name, backend in _SDPA.items():
        if device == "cpu" and name in _GPU_ONLY:
            absent[name] = "needs a GPU"
        elif name == "SDPA math":
            attend = functools.partial(_sdpa, backend)
            found.append(Peer(name, attend, _weights_obstacle, forms_weights=True))
        else:
            found.append(Peer(name, functools.partial(_sdpa, backend), _chosen_anyway))
    found.append(Peer("FlexAttention", _Flex(), _flex_obstacle))
    for family in (_varlen_attn, _flash_attn, _xformers):
        family(device, found, absent)
    return found, absent


def _dense(tensor: Tensor) -> Tensor:
    """[n, H, d] as [1, H, n, d]."""
    return tensor.transpose(0, 1)[None]


def _bag_by_bag(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *sides, layout) -> Tensor:
    outs = [attend(q, k, v) for q, k, v in layout.bags(*sides)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _eager(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """As MCAT and SurvPath write it: two batched products around a softmax, weights formed."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q * q.shape[-1] ** -0.5, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).transpose(0, 1)

    return _bag_by_bag(attend, query, key, value, layout=layout)


def _sdpa(
    backend: SDPBackend | None, query: Tensor, key: Tensor, value: Tensor, layout: Layout
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(_dense(q), _dense(k), _dense(v))[0].transpose(0, 1)

    with nullcontext() if backend is None else sdpa_kernel(backend):
        return _bag_by_bag(attend, query, key, value, layout=layout)


def _weights_obstacle(layout: Layout, heads: int, dtype: torch.dtype) -> str | None:
    needed = _WEIGHTS_COPIES * layout.pairs * heads * dtype.itemsize
    if needed > _WEIGHTS_SHARE * free_memory(layout.device):
        return f"its weights alone need {needed / 1e9:.0f} GB"
    return None


def free_memory(device: str) -> float:
    """Bytes that are free on the device, or on the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as stream:
        fields = dict(line.split(":", 1) for line in stream)
    return 1024.0 * int(fields["MemAvailable"].split()[0])


def _chosen_anyway(layout: Layout, heads: int, dtype: torch.dtype) -> str | None:
    """A CPU has one fused kernel, which torch takes where it can: not measured twice."""
    return "is what SDPA chooses on a CPU" if layout.device == "cpu" else None


class _Flex:
    """FlexAttention, compiled for the shape at hand; ragged batches by a mask of bags."""

    def __init__(self) -> None:
        self._layout: Layout | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        if layout is not self._layout:
            self._prepare(layout)
        # on a CPU there is no backward, and inputs that ask for one are refused
        sides = [_dense(t if torch.is_grad_enabled() else t.detach()) for t in (query, key, value)]
        return self._call(*sides, block_mask=self._mask)[0].transpose(0, 1)

    def _prepare(self, layout: Layout) -> None:
        """Compile anew and mask once: neither is timed."""
        from torch._functorch import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # beyond eight shapes torch would go on without compiling
        torch.compiler.reset()
        # or the backward could not be timed alone, on a graph that is kept
        config.donated_buffer = False
        self._layout, self._mask = layout, None
        self._call = torch.compile(flex_attention, dynamic=False)
        if len(layout.query_lengths) > 1:
            query_bag, key_bag = (
                torch.repeat_interleave(torch.tensor(lengths, device=layout.device))
                for lengths in (layout.query_lengths, layout.key_lengths)
            )
            self._mask = create_block_mask(
                lambda b, h, q, k: query_bag[q] == key_bag[k],
                B=None,
                H=None,
                Q_LEN=len(query_bag),
                KV_LEN=len(key_bag),
                device=layout.device,
            )


def _flex_obstacle(layout: Layout, heads: int, dtype: torch.dtype) -> str | None:
    """The mask of a ragged batch is made from one bit, held as a byte, for every pair of rows."""
    if layout.pairs < _FEWEST_COMPILED_PAIRS:
        return "compiling would take longer than everything else"
    if len(layout.query_lengths) == 1:
        return None
    if layout.device == "cpu":
        return "ragged batches are left to GPUs"
    bits = sum(layout.query_lengths) * sum(layout.key_lengths)
    if bits > _WEIGHTS_SHARE * free_memory(layout.device):
        return f"making its mask of bags needs {bits / 1e9:.0f} GB"
    return None


def _splits(function: Callable) -> dict[str, dict[str, int]]:
    """Suffixes and options: with keys split by the library's own rule, and not at all."""
    if "num_splits" not in inspect.signature(function).parameters:
        return {"": {}}
    return {f", num_splits {n}": {"num_splits": n} for n in (0, 1)}


def _varlen_attn(device: str, found: list[Peer], absent: dict[str, str]) -> None:
    """torch's own attention over packed sides."""
    name = "varlen_attn"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        absent[name] = "this torch has none"
        return
    if device == "cpu":
        absent[name] = "needs a GPU"
        return
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    choices = {"": {}}
    if "num_splits" in inspect.signature(varlen).parameters:
        # without the option it splits by its own rule
        choices[", num_splits 1"] = {"num_splits": 1}
    for suffix, options in choices.items():

        def attend(query, key, value, layout, options=options):
            return varlen(query, key, value, *layout.offsets, *layout.longest, **options)

        found.append(Peer(name + suffix, attend))


def _flash_attn(device: str, found: list[Peer], absent: dict[str, str]) -> None:
    """flash-attn 2, 3 and 4: three modules with one pair of functions."""
    modules = {
        "flash-attn 2": "flash_attn",
        "flash-attn 3": "flash_attn_interface",
        "flash-attn 4": "flash_attn.cute",
    }
    for name, path in modules.items():
        module, reason = _installed(path, device)
        if module is None:
            absent[name] = reason
            continue
        for function, kind in ((module.flash_attn_func, "dense"),
                               (module.flash_attn_varlen_func, "varlen")):  # fmt: skip
            for suffix, options in _splits(function).items():
                call = functools.partial(_flash, function, kind == "varlen", options)
                obstacle = _one_bag if kind == "dense" else (lambda *_: None)
                found.append(Peer(f"{name} {kind}{suffix}", call, obstacle))


def _flash(function, varlen: bool, options, query, key, value, layout: Layout) -> Tensor:
    if varlen:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        ranges = dict(zip(names, (*layout.offsets, *layout.longest), strict=True))
        known = inspect.signature(function).parameters
        options = options | {name: at for name, at in ranges.items() if name in known}
        out = function(query, key, value, **options)
    else:
        out = function(query[None], key[None], value[None], **options)
    # some versions give the logsumexp, too
    out = out[0] if isinstance(out, tuple) else out
    return out if varlen else out[0]


def _xformers(device: str, found: list[Peer], absent: dict[str, str]) -> None:
    module, reason = _installed("xformers.ops", device)
    if module is None:
        absent["xformers"] = reason
        return
    attention = module.memory_efficient_attention

    def dense(query, key, value, layout):
        return attention(query[None], key[None], value[None])[0]

    @functools.lru_cache(maxsize=1)
    def mask(layout: Layout):
        block_diagonal = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask
        return block_diagonal.from_seqlens(list(layout.query_lengths), list(layout.key_lengths))

    def varlen(query, key, value, layout):
        return attention(query[None], key[None], value[None], attn_bias=mask(layout))[0]

    found.append(Peer("xformers dense", dense, _one_bag))
    found.append(Peer("xformers varlen", varlen))


def _one_bag(layout: Layout, heads: int, dtype: torch.dtype) -> str | None:
    return None if len(layout.query_lengths) == 1 else "a ragged batch is for its varlen function"


def _installed(path: str, device: str):
    """The module, or None and why there is none."""
    top = path.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return None, "not installed"
    if device == "cpu":
        return None, "needs a GPU"
    try:
        return importlib.import_module(path), ""
    except Exception as error:
        return None, f"cannot be imported: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a table."""
    text = str(error).strip().partition("\n")[0]
    return (text or type(error).__name__)[:160]
