"""One shape of one op: its inputs, the ways to compute it, and which of them are right.

A way is checked against fp64, results and gradients, before anything is timed. One of ours that
fails stops the benchmark; a peer that fails, or cannot serve the shape, is left out, and the rows
say why.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .peers import COMPILING, Layout, first_line, peers
from .shapes import DTYPES
from .work import FORWARD, Passes, attention, of_mode

FROZEN_MODES = ("forward", "backward", "both")
MODES = (*FROZEN_MODES, "backward, trained", "both, trained")
FLOOR = "floor (memory alone)"
COMPILED = "FlexAttention"
# norm of the error over the norm of what is exact: result, gradients
TOLERANCE = {torch.float32: (1e-4, 5e-4), torch.bfloat16: (2e-2, 5e-2)}


class Problem:
    """Inputs and ways of one shape.

    A subclass sets, in its constructor, the attributes below and `add`s its ways, ours first.

    Attributes:
        op, label: the row's op and shape.
        dtype, device: of the inputs.
        inputs: name -> tensor whose gradient is taken.
        bag: the one among them that may be frozen; None where there is none.
        upstream: the gradient of the result.
        minimum: the fewest bytes and operations of each pass.
        baseline: name of the way that speedups are against.
        traffic: pass -> (tensors read, tensors read and written, tensors written) that a kernel
            cannot avoid.
    """

    op: str
    label: str
    inputs: dict[str, Tensor]
    bag: str | None = None
    upstream: Tensor
    minimum: Passes
    baseline: str
    traffic: dict[str, tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]]

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.ways: dict[str, Callable[[], Tensor]] = {}
        self.work: dict[str, Passes] = {}
        # name -> (of this shape?, reason)
        self.absent: dict[str, tuple[bool, str]] = {}
        self._refused: dict[bool | None, dict[str, str]] = {}

    def exact(self) -> Tensor:
        """The result in fp64, differentiable in the inputs that ask for it."""
        raise NotImplementedError

    def add(self, name: str, way: Callable[[], Tensor], work: Passes | None = None) -> None:
        self.ways[name] = way
        if work is not None:
            self.work[name] = work

    def add_peers(
        self,
        prefix: str,
        layout: Layout,
        sides: Callable[[], tuple[Tensor, Tensor, Tensor]],
        sizes: tuple[int, int, int],
        before: Passes | None = None,
    ) -> None:
        """Every peer on the three sides that `sides` makes, which is part of what is timed.

        Args:
            prefix: of the names.
            layout: which rows meet.
            sides: packed queries, keys and values.
            sizes: heads, channels of keys, channels of values.
            before: the work of `sides`.
        """
        heads, d, dv = sizes
        found, absent = peers(self.device)
        self.absent |= {prefix + name: (False, reason) for name, reason in absent.items()}
        for peer in found:
            reason = peer.obstacle(layout, heads, self.dtype)
            if reason is not None:
                self.absent[prefix + peer.name] = (True, reason)
                continue
            tq, tk = sum(layout.query_lengths), sum(layout.key_lengths)
            e, weights = self.dtype.itemsize, peer.forms_weights
            work = attention(layout.pairs, tq, tk, heads, d, dv, e, weights=weights)
            if before is not None:
                work = {name: work[name] + before[name] for name in work}
            self.add(prefix + peer.name, lambda p=peer: p.attend(*sides(), layout), work)

    # -- what is right ---------------------------------------------------------------------------

    def refused(self, mode: str) -> dict[str, str]:
        """Ways that take no part in a mode, and why; looked into once for each kind of mode."""
        trained = None if mode == FORWARD else mode.endswith("trained")
        if trained not in self._refused:
            self.train_bag(bool(trained))
            self._refused[trained] = self._check(gradients=trained is not None)
        return self._refused[trained]

    def train_bag(self, trained: bool) -> None:
        if self.bag is not None:
            self.inputs[self.bag].requires_grad_(trained)

    def wanted(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.inputs.items() if tensor.requires_grad}

    def gradients(self, out: Tensor, *, keep: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            out, list(self.wanted().values()), self.upstream.to(out.dtype), retain_graph=keep
        )

    def _check(self, *, gradients: bool) -> dict[str, str]:
        exact = self.exact() if gradients else self._without_graph(self.exact)
        expected = [exact.detach(), *(self.gradients(exact) if gradients else ())]
        del exact
        # without a result there is no gradient
        refused = dict(self._refused.get(None, {}))
        for name, way in self.ways.items():
            if name in refused:
                continue
            if name.endswith(COMPILED) and COMPILING.spent > COMPILING.limit:
                refused[name] = f"the {COMPILING.limit:.0f} s for compiling in this set are spent"
                continue
            begin = time.perf_counter()
            reason = self._fault(way, expected, gradients=gradients)
            if name.endswith(COMPILED):
                COMPILING.spent += time.perf_counter() - begin
            if reason is not None and name.startswith("survfuse"):
                raise AssertionError(f"{self.op}, {self.label}, {name}: {reason}")
            if reason is not None:
                refused[name] = reason
                self.tidy()
        return refused

    def _fault(self, way, expected: list[Tensor], *, gradients: bool) -> str | None:
        """Why a way cannot be timed: it raises, or what it computes is wrong."""
        # a library that cannot serve a call warns, and then says only that it failed
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                out = way() if gradients else self._without_graph(way)
                got = [out.detach(), *(self.gradients(out) if gradients else ())]
            except Exception as error:
                return _why(error, [first_line(warning.message) for warning in said])
            finally:
                out = None
        names = ["the result", *(f"d_{name}" for name in self.wanted())]
        limits = TOLERANCE[self.dtype]
        for index, (name, result, exact) in enumerate(zip(names, got, expected)):
            if result.shape != exact.shape:
                return f"{name} has shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
            error = float((result.double() - exact).norm() / exact.norm())
            if not error <= limits[min(index, 1)]:
                return f"{name} is wrong: relative error {error:.1e}"
        return None

    @staticmethod
    def _without_graph(way: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return way()

    def tidy(self) -> None:
        """Give back what a way that failed half-way holds."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # -- what is timed ---------------------------------------------------------------------------

    def contenders(self, mode: str) -> tuple[dict[str, Callable[[], object]], dict]:
        """What to time, by name, and what is left out: name -> (of this shape?, reason)."""
        left_out = self.absent | {name: (True, why) for name, why in self.refused(mode).items()}
        self.train_bag(mode.endswith("trained"))
        contenders = {}
        for name, way in self.ways.items():
            if name in left_out:
                continue
            try:
                contenders[name] = self._timed(mode, way)
            except torch.OutOfMemoryError as error:
                left_out[name] = (True, first_line(error))
                self.tidy()
        contenders[FLOOR] = lambda: self._floor(mode)
        return contenders, left_out

    def _timed(self, mode: str, way: Callable[[], Tensor]) -> Callable[[], object]:
        if mode == FORWARD:
            return lambda: self._without_graph(way)
        if mode.startswith("both"):
            return lambda: self.gradients(way())
        out = way()
        return lambda: self.gradients(out, keep=True)

    def _floor(self, mode: str) -> None:
        """Touch the memory that any kernel must, and compute nothing."""
        passes = [mode]
        if mode.startswith("both"):
            passes = [FORWARD, mode.replace("both", "backward")]
        for name in passes:
            reads, copies, writes = self.traffic[name]
            for tensor in reads:
                _words(tensor).sum()
            for tensor in copies:
                tensor.detach().clone()
            for tensor in writes:
                torch.full_like(tensor, 1.0)


def _why(error: Exception, said: list[str]) -> str:
    """Why a call failed: torch warns of each kernel it cannot take, then says that none is left."""
    if "No available kernel" in str(error):
        # kernels that nobody asked for are switched off, and headings say nothing
        empty = ("not used because", "runtime disabled")
        said = [text for text in said if not any(words in text for words in empty)]
        return (said or [first_line(error)])[0]
    return first_line(error)


def _words(tensor: Tensor) -> Tensor:
    """16-bit numbers in pairs: their own sum is bound by conversions, not by memory."""
    flat = tensor.detach().reshape(-1)
    return flat if flat.element_size() > 2 or len(flat) % 2 else flat.view(torch.float32)


_LATEST: dict[tuple, Problem] = {}


def problem_of(kind: type[Problem], shape: object, dtype: str, device: str) -> Problem:
    """The problem, shared by the modes of a shape: at most one lives at a time."""
    key = (kind, shape, dtype, device)
    if key not in _LATEST:
        while _LATEST:
            _LATEST.popitem()[1].tidy()
        torch.manual_seed(0)
        _LATEST[key] = kind(shape, DTYPES[dtype], device)
    return _LATEST[key]


def compete(measure: Callable, problem: Problem, mode: str) -> None:
    """Check, and race what is right."""
    work = {name: of_mode(passes, mode) for name, passes in problem.work.items()}
    least = of_mode(problem.minimum, mode)
    with warnings.catch_warnings():
        # what a peer warns of is its own affair
        warnings.simplefilter("ignore")
        contenders, left_out = problem.contenders(mode)
        measure(
            problem.op,
            mode,
            problem.label,
            problem.dtype,
            contenders,
            baseline=problem.baseline,
            gbytes=1e-9 * least.n_bytes,
            gflop={name: 1e-9 * w.operations for name, w in work.items()},
            moved={name: 1e-9 * w.n_bytes for name, w in work.items()}
            | {FLOOR: 1e-9 * least.n_bytes},
            check=lambda: None,
            left_out=left_out,
        )
