"""The hidden layer of gated attention on one tile of a bag, and its gradients.

Math: docs/math.md, "Gated attention pooling".
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.native.core import native_core
from survfuse.pooling import Gate, GatedNeeds, Pooling, accumulation_type
from survfuse.tiled.pool_bag import add_rows, included
from survfuse.tiled.tiles import Tile, multiplies_bf16, operand_type, product


class Rows(NamedTuple):
    """The rows of a tile; excluded ones, and those behind a bag's end, are zero."""

    x: Tensor  # [M, D] of the type the hidden layer is multiplied in; M = B n
    wide: Tensor  # [B, n, D] of the type they are pooled in
    bias: Tensor | None  # [B, n], -inf where excluded


class Hidden(NamedTuple):
    """The hidden layer of a tile, M = B n rows."""

    value: Tensor  # [M, L] the branch of tanh
    share: Tensor  # [M, L] the branch of the sigmoid
    gated: Tensor  # [M, L] their product, of the accumulation type


class Branch:
    """One of the two affine maps and its activation: of the operand's type where oneDNN computes
    it, and of the accumulation type elsewhere."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None, bias_type) -> None:
        self.name, self.weight = name, weight
        self.bias = None if bias is None else bias.to(bias_type)
        n_columns = weight.shape[1]
        # oneDNN adds up a row of columns one by one, and the rounding of a sum grows with its
        # length; MKL, whose precision is the yardstick, takes some 300 at a time
        fp32 = weight.dtype == torch.float32 and _by_onednn(weight)
        n_pieces = -(-n_columns // 512) if fp32 else 1
        self.width = max(-(-n_columns // n_pieces), 1)
        self.weights = [piece.contiguous() for piece in weight.split(self.width, 1)]

    def __call__(self, pieces: list[Tensor]) -> Tensor:
        """[M, L] of the columns of x [M, D] in pieces."""
        multiply = _onednn_linear() if _by_onednn(pieces[0]) else None
        if multiply is not None and len(pieces) == 1:
            return multiply(pieces[0], self.weights[0], self.bias, self.name, [], None)
        if multiply is not None:
            out = multiply(pieces[0], self.weights[0], self.bias, "none", [], None)
            for piece, weight in zip(pieces[1:], self.weights[1:], strict=True):
                out += multiply(piece, weight, None, "none", [], None)
        else:
            out = product(pieces[0][None], self.weights[0].T[None])[0]
            if self.bias is not None:
                out += self.bias
        return out.tanh_() if self.name == "tanh" else out.sigmoid_()


class GatedTiles:
    """What the tiles of one call share: parameters as they are multiplied."""

    def __init__(self, bag: Tensor, gate: Gate, bias: Tensor | None, pooling: Pooling) -> None:
        self.bag, self.bias, self.pooling = bag, bias, pooling
        self.kind = accumulation_type(bag.dtype)
        self.operand, self.pooled_as = hidden_type(bag), operand_type(bag, centred=False)
        # 16-bit biases beside 16-bit products on the CPU: torch's fused product takes one type
        small = self.operand if bag.device.type == "cpu" else self.kind
        self.tanh = Branch("tanh", gate.w_tanh.to(self.operand), gate.b_tanh, small)
        self.sigmoid = Branch("sigmoid", gate.w_gate.to(self.operand), gate.b_gate, small)
        self.buffer: Tensor | None = None
        self.w_score = gate.w_score.to(self.kind)
        self.b_score = None if gate.b_score is None else gate.b_score.to(self.kind)

    def rows(self, tile: Tile) -> Rows:
        """The rows of a tile, read."""
        x = tile.take(self.bag)
        row_bias = None if self.bias is None else tile.take(self.bias).to(self.kind)
        if tile.valid is not None:
            row_bias = torch.where(tile.valid, 0.0 if row_bias is None else row_bias, -torch.inf)
        if row_bias is not None:
            x = torch.where((row_bias == -torch.inf)[..., None], 0.0, x)
        wide = self._widened(x)
        x = wide if self.operand == self.pooled_as else x.to(self.operand)
        return Rows(x.flatten(0, 1), wide, row_bias)

    def _widened(self, x: Tensor) -> Tensor:
        """The tile as it is pooled; a copy lives until the next tile is read."""
        if x.dtype == self.pooled_as:
            return x
        # memory that is handed back and asked for again tile by tile costs as much as the copy
        if self.buffer is None or self.buffer.numel() < x.numel():
            self.buffer = x.new_empty(x.numel(), dtype=self.pooled_as)
        return self.buffer[: x.numel()].view(x.shape).copy_(x)

    def hidden(self, rows: Rows) -> Hidden:
        """Both branches and their product."""
        # the pieces are shared by both branches
        pieces = [piece.contiguous() for piece in rows.x.split(self.tanh.width, 1)]
        value, share = self.tanh(pieces), self.sigmoid(pieces)
        return Hidden(value, share, (value * share).to(self.kind))

    def logits(self, rows: Rows, hidden: Hidden) -> Tensor:
        """[B, K, n] of the accumulation type."""
        flat = torch.mm(hidden.gated, self.w_score.T)
        if self.b_score is not None:
            flat += self.b_score
        logits = flat.view(*rows.wide.shape[:2], -1).mT
        return logits if rows.bias is None else logits + rows.bias[:, None]


class GatedGradients:
    """Sums the gradients of parameters and stored rows over tiles."""

    def __init__(self, call: GatedTiles, gate: Gate, needs: GatedNeeds) -> None:
        self.call, self.needs = call, needs
        n_hidden, width = gate.w_tanh.shape
        bag, kind = call.bag, call.kind

        def zeros(*shape: int) -> Tensor:
            return bag.new_zeros(shape, dtype=kind)

        # sums of overlapping bags are rounded once, at the end
        self.d_bag = zeros(*bag.shape) if needs.bag else None
        self.d_bias = zeros(bag.shape[0]) if needs.bias else None
        weights, biases = needs.w_tanh or needs.w_gate, needs.b_tanh or needs.b_gate
        self.d_weights = zeros(2 * n_hidden, width) if weights else None
        self.d_biases = zeros(2 * n_hidden) if biases else None
        self.d_score = zeros(*gate.w_score.shape) if needs.w_score else None

    def add(
        self,
        tile: Tile,
        rows: Rows,
        hidden: Hidden,
        d_logits: Tensor,
        weights: Tensor | None = None,
        d_pooled: Tensor | None = None,
    ) -> None:
        """Take in a tile: d_logits and, where the bag is pooled, weights [B, K, n], d_pooled."""
        call = self.call
        if self.d_bias is not None:
            add_rows(self.d_bias, tile, d_logits.sum(-2))
        flat = d_logits.mT.flatten(0, 1)
        if self.d_score is not None:
            self.d_score += torch.mm(flat.T, hidden.gated)
        if not self.needs.hidden:
            return
        d_hidden = self._d_hidden(hidden, flat)
        if self.d_biases is not None:
            self.d_biases += d_hidden.sum(0, dtype=call.kind)
        if self.d_weights is not None:
            self.d_weights += matmul(d_hidden.T, rows.x)
        if self.d_bag is not None:
            d_x = matmul(d_hidden, torch.cat([call.tanh.weight, call.sigmoid.weight]))
            d_x = d_x.view(rows.wide.shape)
            if weights is not None:
                d_x = d_x + product(weights.mT.to(rows.wide.dtype), d_pooled.to(rows.wide.dtype))
            add_rows(self.d_bag, tile, included(d_x.to(call.kind), rows.bias))

    def _d_hidden(self, hidden: Hidden, d_logits: Tensor) -> Tensor:
        """[M, 2 L] the gradient in front of tanh and sigmoid, as operand; from d_logits [M, K]."""
        call, (value, share, _) = self.call, hidden
        n_hidden = value.shape[1]
        out = value.new_empty((value.shape[0], 2 * n_hidden))
        d_gated = torch.mm(d_logits, call.w_score).to(value.dtype)
        torch.mul(d_gated, value, out=out[:, n_hidden:])
        torch.ops.aten.sigmoid_backward(out[:, n_hidden:], share, grad_input=out[:, n_hidden:])
        d_gated *= share
        torch.ops.aten.tanh_backward(d_gated, value, grad_input=out[:, :n_hidden])
        return out.to(call.operand)

    def results(self) -> tuple[Tensor | None, ...]:
        """d_bag, d_w_tanh, d_b_tanh, d_w_gate, d_b_gate, d_w_score and d_bias."""
        bag, needs = self.call.bag, self.needs

        def half(sums: Tensor, index: int) -> Tensor:
            # an operation's results may not share memory
            return sums.chunk(2)[index].clone()

        return (
            None if self.d_bag is None else self.d_bag.to(bag.dtype),
            half(self.d_weights, 0) if needs.w_tanh else None,
            half(self.d_biases, 0) if needs.b_tanh else None,
            half(self.d_weights, 1) if needs.w_gate else None,
            half(self.d_biases, 1) if needs.b_gate else None,
            self.d_score,
            self.d_bias,
        )


def hidden_type(bag: Tensor) -> torch.dtype:
    """The type in which the hidden layer is multiplied.

    Unlike a softmax's logits, what feeds tanh and a sigmoid loses little by operands of 16 bits,
    as long as sums are not rounded before the nonlinearity: oneDNN's fused product keeps them.
    """
    if bag.device.type == "cpu" and bag.dtype in (torch.bfloat16, torch.float16):
        pairs = bag.dtype == torch.bfloat16 and _onednn_linear() is not None and _has_bf16()
        return bag.dtype if pairs else torch.float32
    return operand_type(bag, centred=False)


@functools.cache
def _has_bf16() -> bool:
    """Whether this processor multiplies bf16."""
    core = native_core()
    return multiplies_bf16() or (
        core is not None and core.machine_info()["cpu_isa"] == "avx512bf16"
    )


@functools.cache
def _onednn_linear():
    """The product that torch's compiler calls on the CPU, by oneDNN; None where torch lacks it.

    torch.mm goes to MKL in fp32, which on processors of other makers than its own runs AVX2 code
    where there is AVX-512: measured at 0.45 of the speed of oneDNN, which asks the processor.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _by_onednn(x: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return fits and _onednn_linear() is not None


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n]; fp32 (fp64 for fp64), or a 16-bit type on the CPU."""
    if left.dtype == torch.float32 and _by_onednn(left):
        # turned in memory where it is not: oneDNN multiplies that faster than a strided view
        return _onednn_linear()(left.contiguous(), right.T, None, "none", [], None)
    if left.device.type == "cpu":
        return torch.mm(left, right)
    return product(left[None], right[None])[0]
