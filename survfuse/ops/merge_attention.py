"""`merge_attention`: results over disjoint sets of keys become the result over all of them.

Oracle: survfuse/reference/merge_attention.py.  Math: docs/math.md, "Merging" and "Merging over a
group".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from survfuse.ops.checks import check_tensor


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Exact merge of attention results of the same queries over disjoint sets of keys.

    .. math:: L = \log \sum_j e^{L_j}, \qquad o = \sum_j e^{L_j - L}\, o_j

    Args:
        outs: the partial results o_j, each [..., H, dv]: a sequence, or one stacked tensor
            [parts, ..., H, dv].
        lses: their logsumexps L_j, each [..., H], fp32 or fp64: likewise.

    Returns:
        out [..., H, dv] of the type of `outs` and lse [..., H] of that of `lses`, as if all keys
        had been one set; dropout included. Both are differentiable in every part, twice too. A part
        whose lse is -inf contributes nothing and has zero gradients, whatever its out holds; where
        every part is -inf, out is zero and lse -inf. An lse of +inf or NaN gives what softmax does.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named.

    Precision: fp32 (fp64) inside; each part of 16 bits was rounded once before.
    Determinism: bitwise; parts are added in ascending order.
    Cost: reads every part once; keeps one copy of each for the backward.
    vmap: supported over leading dimensions, which are a batch already.

    Example:
        >>> outs, lses = torch.tensor([[[1.0]], [[4.0]]]), torch.tensor([[1.0], [2.0]]).log()
        >>> merge_attention(outs, lses)[0]
        tensor([[3.]])
    """
    return merge_with_shares(*check_parts(outs, lses))[:2]


def merge_with_shares(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the share [parts, ..., H] of every part, of parts that were checked."""
    kind = torch.promote_types(outs[0].dtype, lses[0].dtype)
    stacked = torch.stack(lses).to(kind)
    absent = stacked == -torch.inf
    top = stacked.detach().amax(0)
    empty = top == -torch.inf
    # where nothing is included subtract 0 and not -inf; selected before and behind the exponential,
    # so that neither it nor its gradient sees what does not count
    shifted = torch.where(absent, 0.0, stacked) - torch.where(empty, 0.0, top)
    weights = torch.where(absent, 0.0, torch.where(absent, 0.0, shifted).exp())
    total = torch.where(empty, 1.0, weights.sum(0))
    share = weights / total
    # inf - inf is NaN among the weights, as in softmax, but a logsumexp has a value
    lse = torch.where(empty | (top == torch.inf), top, top + total.log())
    out = torch.zeros_like(outs[0], dtype=kind)
    for part, mine, gone in zip(outs, share, absent, strict=True):
        out = out + mine[..., None] * torch.where(gone[..., None], 0.0, part.to(kind))
    kind = lses[0].dtype
    return out.to(outs[0].dtype), lse.to(kind), share.to(kind)


def check_parts(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The parts as two lists of one length, after every check on types, shapes and devices."""
    outs, lses = _as_list("outs", outs), _as_list("lses", lses)
    if len(outs) != len(lses):
        raise ValueError(
            f"outs are {len(outs)} parts and lses {len(lses)}; every part needs one of each"
        )
    if not outs:
        raise ValueError("outs holds no part; it must hold at least one")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part((f"outs[{i}]", f"lses[{i}]"), out, lse, outs[0], lses[0])
    return outs, lses


def _check_part(
    names: tuple[str, str], out: Tensor, lse: Tensor, first_out: Tensor, first_lse: Tensor
) -> None:
    if isinstance(out, Tensor) and out.dim() < 2:
        raise ValueError(f"{names[0]} has shape {tuple(out.shape)}; it must be [..., H, dv]")
    # the first part is compared with itself: that checks that it is a tensor of floats
    shape = tuple(first_out.shape) if isinstance(first_out, Tensor) else ()
    device = first_out.device if isinstance(first_out, Tensor) else None
    check_tensor(names[0], out, shape=shape, device=device, beside="the first out")
    check_tensor(names[1], lse, shape=shape[:-1], device=device, beside="the first out")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{names[1]} is {lse.dtype}; a logsumexp must be fp32 or fp64")
    for name, tensor, first in ((names[0], out, first_out), (names[1], lse, first_lse)):
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and the first part {first.dtype}; "
                "they must have one type"
            )


def _as_list(name: str, parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(parts, Tensor):
        if parts.dim() == 0:
            raise ValueError(f"{name} has shape (); stacked parts have a first dimension of parts")
        return list(parts.unbind(0))
    if not isinstance(parts, Sequence):
        raise TypeError(
            f"{name} is {type(parts).__name__}; it must be a sequence of tensors or a stacked one"
        )
    return list(parts)


def merge_over_group(
    out: Tensor, lse: Tensor, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    r"""Merge of attention results over the ranks of a process group, each with its shard of keys.

    A bag that is too long for one device is cut by rows; every rank holds the same queries, attends
    to its own rows, and calls this with what it got. A rank whose shard is empty takes part with
    the zeros and -inf that the ops give for it. Every rank returns the whole result, equal to the
    last bit on all of them.

    Gradients: every rank must go on with the *same* computation, so that the loss, one number and
    not one per rank, and the gradient that comes back here are the same everywhere. This rank's
    part then receives its own share of that gradient, and nothing is communicated. Therefore

    * gradients of this rank's keys, values or bag rows are those of the one loss, complete;
    * gradients of whatever all ranks share *in front* of this call (queries, projections of the
      keys and values, and all that made them) are partial sums, one per rank: all-reduce them by
      SUM. A mean, as `DistributedDataParallel` takes, would be too small by the number of ranks;
    * gradients of what stands *behind* it are whole on every rank already: do not sum them.

    Args:
        out: [..., H, dv] this rank's result, of the same shape and type on every rank.
        lse: [..., H] its logsumexp, fp32 or fp64.
        group: the ranks, each of which must call; None is the default group.

    Returns:
        out and lse over the keys of all ranks; see `merge_attention`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, this process is not in the
            group, or, for tensors on the CPU, shapes differ between ranks (on a device they cannot
            be compared without making the host wait).
        RuntimeError: torch.distributed is not initialised.

    Determinism: parts are added in ascending rank, whatever the network does.
    Cost: one all_gather of (dv + 1) numbers per query and head, in the type of lse, and so much
    memory per rank: queries are few, and a sum by all_reduce, which would hold one part less per
    rank, would leave the order of the sum to the library. Keys take N / ranks per rank.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> merge_over_group(torch.ones(1, 1, 2), torch.zeros(1, 1), group=None)[0]
        tensor([[[1., 1.]]])
        >>> dist.destroy_process_group()
    """
    _check_part(("out", "lse"), out, lse, out, lse)
    group, rank, n_ranks = _members(group)
    kind = torch.promote_types(out.dtype, lse.dtype)
    packed = torch.cat([out.detach().to(kind), lse.detach().to(kind)[..., None]], -1)
    parts = _gather(packed, group.group_name, n_ranks)
    outs = [part[..., :-1].to(out.dtype) for part in parts.unbind(0)]
    lses = [part[..., -1].to(lse.dtype) for part in parts.unbind(0)]
    # the same numbers as came back, now with a past: no other part has one on this rank
    outs[rank], lses[rank] = out, lse
    return merge_attention(outs, lses)


def _members(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup, int, int]:
    """The group, this process' place in it, and its size."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group before merge_over_group"
        )
    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not hold this process; only its ranks may call")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {type(group).__name__}; it must be a torch.distributed.ProcessGroup"
        )
    return group, dist.get_rank(group), dist.get_world_size(group)


@torch.library.custom_op(
    "survfuse::gather_parts",
    mutates_args=(),
    schema="(Tensor packed, str group, int n_ranks) -> Tensor",
)
def _gather(packed, group, n_ranks):
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group)
    packed = packed.contiguous()
    if packed.device.type == "cpu":
        _check_shapes_agree(packed, group, n_ranks)
    gathered = packed.new_empty((n_ranks, *packed.shape))
    dist.all_gather(list(gathered.unbind(0)), packed, group=group)
    return gathered


@_gather.register_fake
def _(packed, group, n_ranks):
    return packed.new_empty((n_ranks, *packed.shape))


# dimensions, their sizes and the bytes of an element
_MOST_DIMS = 14


def _check_shapes_agree(packed: Tensor, group: dist.ProcessGroup, n_ranks: int) -> None:
    """A gather of unequal parts would hang, or mix them up: every rank raises instead."""
    mine = torch.zeros(_MOST_DIMS + 2, dtype=torch.int64)
    mine[:2] = torch.tensor([packed.dim(), packed.element_size()])
    mine[2 : 2 + packed.dim()] = torch.tensor(packed.shape)
    all_shapes = [torch.empty_like(mine) for _ in range(n_ranks)]
    dist.all_gather(all_shapes, mine, group=group)
    shapes = [row[2 : 2 + int(row[0])].tolist() for row in all_shapes]
    for rank, (row, shape) in enumerate(zip(all_shapes, shapes, strict=True)):
        if not torch.equal(row, all_shapes[0]):
            found = f"({', '.join(map(str, [*shape[:-1], shape[-1] - 1]))})"
            first = f"({', '.join(map(str, [*shapes[0][:-1], shapes[0][-1] - 1]))})"
            raise ValueError(
                f"out has shape {found} and elements of {int(row[1])} bytes on rank {rank}, "
                f"{first} and {int(all_shapes[0][1])} on rank 0; they must agree"
            )
