"""What the registered operations share: their schemas and the small print of torch.library."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from survfuse.ops.checks import check_eps, check_scale
from survfuse.pooling import Pooling
from survfuse.ragged import Ragged

# the first nine fields of Pooling; dropout follows where an op has it
POOLING_SCHEMA = (
    "Tensor starts, Tensor lengths, SymInt total, SymInt max_length, "
    "float scale, bool normalize, float eps, Tensor? mean, Tensor? rstd"
)


def make_pooling(
    ragged: Ragged,
    scale: float,
    normalize_eps: float | None,
    stats: tuple[Tensor, Tensor] | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Pooling:
    """The public arguments, checked, as the registered ops take them."""
    check_scale(scale)
    if normalize_eps is not None:
        check_eps("normalize_eps", normalize_eps)
    mean, rstd = (None, None) if stats is None or normalize_eps is None else stats
    normalize, eps = normalize_eps is not None, normalize_eps or 0.0
    return Pooling(*ragged, scale, normalize, eps, mean, rstd, dropout_p, seed)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """No autocast within; meta tensors, which compute nothing, know none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(function: Callable) -> Callable:
    """Autocast would round the fp32 products inside an implementation to 16 bits."""

    @functools.wraps(function)
    def wrapped(*arguments):
        with autocast_off(arguments[0].device):
            return function(*arguments)

    return wrapped


def check_ranges(bag: Tensor, ragged: Ragged, name: str = "ragged") -> None:
    """On the CPU, raise unless every bag lies within the matrix; kernels on a device clamp."""
    if bag.device.type == "cpu":
        ragged.check(bag.shape[0], name)


def check_ranges_eagerly(bag: Tensor, ragged: Ragged, name: str = "ragged") -> None:
    """The same for the reference, which is no op; a graph being compiled cannot look at values."""
    check_reference(bag)
    if not torch.compiler.is_compiling():
        check_ranges(bag, ragged, name)


def check_reference(tensor: Tensor, what: str = "the ranges of bags") -> None:
    """Raise unless the reference, which reads `what` on the host, can serve the call."""
    if tensor.is_meta:
        raise RuntimeError(
            f"backend='reference' cannot serve this call: it reads {what}, and tensors on meta "
            "hold no numbers"
        )


def call_reference(function: Callable, *arguments, **options):
    """What the reference gives in its own types, as every other backend does.

    Autocast would round its sums, and the logsumexp with them, to 16 bits.
    """
    tensor = next(value for value in _flat(arguments) if isinstance(value, Tensor))
    with autocast_off(tensor.device):
        return function(*arguments, **options)


def _flat(values: Sequence) -> Iterator:
    for value in values:
        yield from _flat(value) if isinstance(value, (tuple, list)) else (value,)


def unit_stride(bag: Tensor) -> Tensor:
    """The bag with a unit last stride: as it is, or a copy."""
    return bag if bag.stride(-1) == 1 else bag.contiguous()


def save_call(ctx, inputs: Sequence, outputs: Sequence[Tensor] = ()) -> None:
    """Keep an op's results and inputs for its backward."""
    ctx.save_for_backward(*outputs, *(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def saved_call(ctx) -> tuple[list[Tensor], list]:
    """The results and the inputs that `save_call` kept."""
    tensors = list(ctx.saved_tensors)
    n_outputs = len(tensors) - ctx.others.count(None)
    remaining = iter(tensors[n_outputs:])
    inputs = [next(remaining) if other is None else other[0] for other in ctx.others]
    return tensors[:n_outputs], inputs


def gradients_like(
    gradients: Sequence[Tensor | None], likes: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients in the types of their inputs.

    An op returns a fixed number of tensors: an empty one stands for "not needed".
    """
    return tuple(
        likes[0].new_empty(0) if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, likes, strict=True)
    )


def fake_gradients(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The shapes of `gradients_like`, for tracing."""
    return tuple(
        like.new_empty(like.shape) if need else likes[0].new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )


def to_autograd(
    gradients: Sequence[Tensor], needs: Sequence[bool], n_inputs: int
) -> tuple[Tensor | None, ...]:
    """A gradient for each of `n_inputs`: None where none is needed."""
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * (n_inputs - len(needs))


def call_op(op: str, registered: Callable, *arguments):
    """`registered(*arguments)`, where torch can differentiate it.

    In forward mode torch takes a registered op for a constant, and its tangent for zero.

    Raises:
        RuntimeError: an argument has a tangent, or a gradient of `torch.func` is asked for.
    """
    if any(_has_tangent(value) for value in arguments if isinstance(value, Tensor)):
        raise RuntimeError(
            f'{op} has no forward-mode derivative on this backend; backend="reference" has one'
        )
    try:
        return registered(*arguments)
    except RuntimeError as error:
        if "functorch transforms" not in str(error):
            raise
        raise RuntimeError(
            f"{op} has no derivative for torch.func on this backend; torch.autograd.grad gives "
            'one, and backend="reference" both'
        ) from error


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:
        # vmap within a forward mode hides the tangent
        return True


def no_double_backward(op: str) -> Callable:
    """An autograd formula that says why there is none."""

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f'{op} has no double backward on this backend; backend="reference" has one'
        )

    return refuse
