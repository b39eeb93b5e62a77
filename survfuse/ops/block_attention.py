"""`block_attention`: tokens and a bag attend to one another and themselves, by chosen blocks.

Oracle: survfuse/reference/block_attention.py.  Math: docs/math.md, "Blocks".
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from survfuse import reference
from survfuse.attention import BLOCKS, BlockAttended, BlockSide
from survfuse.ops.backends import check_backend
from survfuse.ops.checks import check_dropout, check_scale, check_tensor
from survfuse.ops.cross_attention import cross_attention_with_lse
from survfuse.ops.merge_attention import merge_with_shares
from survfuse.ops.registration import call_reference, check_ranges
from survfuse.ragged import Ragged, as_packed_heads

SIDES = ("tokens", "bag")


def block_attention(
    tokens: BlockSide,
    bag: BlockSide,
    blocks: Collection[str],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> BlockAttended:
    r"""Exact attention of a few tokens and a long bag over the union of the blocks of each side.

    .. math:: o_r = \sum_{i \in U(r)} \mathrm{softmax}_{i \in U(r)}(\mathrm{scale}\; q_r \cdot k_i
              + bias_i)\, v_i

    where U(r) are the keys of all sides that the side of row r attends to. "a->b" means that the
    queries of a attend to the keys of b: MCAT is {"tokens->bag"}; SurvPath is all but "bag->bag".
    One softmax runs over the union, not one per block; the tiles of a block are streamed and blocks
    are merged by their logsumexps, so nothing of the size of a block is held, "bag->bag" included.

    Args:
        tokens: `BlockSide` with query, key [B, G, H, d], value [B, G, H, dv] and bias [B, G], all
            dense. query may be None if no block asks for it, key and value if none attends to it.
        bag: likewise, packed: query, key [T, H, d], value [T, H, dv], bias [T], and `ragged` the
            range of rows of each bag (None is one bag; a dense [B, N, H, d] is accepted).
        blocks: any of "tokens->tokens", "tokens->bag", "bag->tokens", "bag->bag", at least one.
        scale: by default d ** -0.5.
        dropout_p: each weight is dropped with this probability, the rest scaled by 1 / (1 - p).
            Blocks draw their masks one after the other, each from a seed of its own.
        backend: None, "reference", "tiled", "triton" or "native", of every block.

    Returns:
        `BlockAttended`: out and lse of either side, as `cross_attention_with_lse` has them, and the
        mass [..., H, 2]: which share of each row's weight, before dropout, lies on tokens and bag.
        The shares sum to 1, or to 0 for a row that may attend to nothing, whose out is zero. All
        are differentiable. None for a side that no block serves.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named, as
            `tokens.key`.
        RuntimeError: a named backend cannot serve the call.

    Precision: that of `cross_attention`; for 16-bit queries every block's result is rounded to
    their type before they are merged.
    Determinism: bitwise.
    Cost: that of a `cross_attention` per block. "bag->bag" takes N^2 pairs of time, not of memory.
    vmap: by the fallback of torch, one call per sample; batch through `ragged`.

    Example:
        >>> tokens = BlockSide(*(torch.randn(1, 6, 1, 8) for _ in range(3)))
        >>> bag = BlockSide(key=torch.randn(50, 1, 8), value=torch.randn(50, 1, 8))
        >>> attended = block_attention(tokens, bag, {"tokens->bag"}, backend="tiled")
        >>> attended.tokens_out.shape, attended.bag_out is None
        (torch.Size([1, 6, 1, 8]), True)
    """
    blocks = _check_blocks(blocks)
    sides = {"tokens": tokens, "bag": bag}
    _check_sides(sides, blocks)
    if scale is not None:
        check_scale(scale)
    check_dropout(dropout_p)
    check_backend(backend)
    if backend == "reference":
        return call_reference(
            reference.block_attention, tokens, bag, blocks, scale=scale, dropout_p=dropout_p
        )
    parts = {
        block: _attend(*(sides[name] for name in block.split("->")), scale, dropout_p, backend)
        for block in blocks
    }
    return BlockAttended(*_merge(parts, "tokens"), *_merge(parts, "bag"))


def _attend(
    asking: BlockSide,
    asked: BlockSide,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """One block."""
    return cross_attention_with_lse(
        asking.query,
        asked.key,
        asked.value,
        bias=asked.bias,
        query_ragged=asking.ragged,
        key_ragged=asked.ragged,
        scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )


def _merge(
    parts: dict[str, tuple[Tensor, Tensor]], asking: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """out, lse and mass of one side from its blocks."""
    attended = [name for name in SIDES if f"{asking}->{name}" in parts]
    if not attended:
        return None, None, None
    outs, lses = zip(*(parts[f"{asking}->{name}"] for name in attended), strict=True)
    out, lse, share = merge_with_shares(list(outs), list(lses))
    nothing = torch.zeros_like(lse)
    mass = [share[attended.index(name)] if name in attended else nothing for name in SIDES]
    return out, lse, torch.stack(mass, -1)


def _check_blocks(blocks: Collection[str]) -> list[str]:
    """The blocks in the order in which they draw their masks."""
    if isinstance(blocks, str) or not isinstance(blocks, Collection):
        raise TypeError(f"blocks is {blocks!r}; it must be a collection of some of {BLOCKS}")
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown or not blocks:
        found = f"holds {unknown[0]!r}" if unknown else "is empty"
        raise ValueError(f"blocks {found}; it must hold at least one of {BLOCKS}")
    return [block for block in BLOCKS if block in blocks]


def _check_sides(sides: dict[str, BlockSide], blocks: list[str]) -> None:
    """Every check on types, shapes and devices, before the first block runs."""
    for name, side in sides.items():
        if not isinstance(side, BlockSide):
            raise TypeError(f"{name} is {type(side).__name__}; it must be a survfuse.ops.BlockSide")
    if sides["tokens"].ragged is not None:
        raise ValueError("tokens.ragged is given; tokens are dense [B, G, H, d] and take None")
    for block in blocks:
        asking, asked = block.split("->")
        for name, field in ((asking, "query"), (asked, "key"), (asked, "value")):
            if getattr(sides[name], field) is None:
                raise ValueError(f"{name}.{field} is None; the block {block!r} needs it")
    n_bags, heads, value_dim = {}, ("H", "d"), "dv"
    first = getattr(sides[blocks[0].split("->")[1]].key, "device", None)
    for name, side in sides.items():
        asks = any(block.startswith(f"{name}->") for block in blocks)
        asked = any(block.endswith(f"->{name}") for block in blocks)
        if asks or asked:
            side = side if asks else side._replace(query=None)
            side = side if asked else side._replace(key=None, value=None, bias=None)
            heads, value_dim = _check_side(name, side, heads, value_dim, first)
            stored = side.query if asks else side.key
            n_bags[name] = _count_bags(name, stored, side.ragged)
    if len(set(n_bags.values())) > 1:
        raise ValueError(
            f"tokens hold {n_bags['tokens']} bags and bag {n_bags['bag']}; "
            "they must have the same number"
        )
    _check_types({name: sides[name].key for name in SIDES}, blocks)


def _check_side(
    name: str,
    side: BlockSide,
    heads: tuple[int | str, ...],
    value_dim: int | str,
    device: torch.device | None,
) -> tuple[tuple[int | str, ...], int | str]:
    """(heads, channels) and channels of the values, as far as this side has them."""
    like = {"device": device, "beside": "the first key"}
    stored = side.key if side.query is None else side.query
    lead: tuple[int | str, ...] = _lead(name, stored)
    for field in ("query", "key"):
        tensor = getattr(side, field)
        if tensor is not None:
            check_tensor(f"{name}.{field}", tensor, shape=(*lead, *heads), **like)
            lead, heads = tuple(tensor.shape[:-2]), tuple(tensor.shape[-2:])
    if side.value is not None:
        check_tensor(f"{name}.value", side.value, shape=(*lead, heads[0], value_dim), **like)
        value_dim = side.value.shape[-1]
        if side.value.dtype != side.key.dtype:
            raise TypeError(
                f"{name}.value is {side.value.dtype} and {name}.key {side.key.dtype}; "
                "they must have one type"
            )
    if side.bias is not None:
        check_tensor(f"{name}.bias", side.bias, shape=lead, **like)
    return heads, value_dim


def _check_types(keys: dict[str, Tensor | None], blocks: list[str]) -> None:
    asked = {block.split("->")[1] for block in blocks}
    if len(asked) == 2 and len({key.dtype == torch.float64 for key in keys.values()}) == 2:
        found = " and ".join(f"{name}.key is {key.dtype}" for name, key in keys.items())
        raise TypeError(f"{found}; both or neither must be fp64")


def _lead(name: str, stored: Tensor) -> tuple[str, ...]:
    """The letters in front of heads and channels."""
    if name == "tokens":
        return ("B", "G")
    return ("B", "N") if isinstance(stored, Tensor) and stored.dim() == 4 else ("T",)


def _count_bags(name: str, stored: Tensor, ragged: Ragged | None) -> int:
    if stored.dim() == 4:
        return stored.shape[0]
    packed, ragged = as_packed_heads(name, stored, ragged)
    if not torch.compiler.is_compiling():
        check_ranges(packed, ragged, f"{name}_ragged")
    return ragged.n_bags
