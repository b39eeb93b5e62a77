"""What each process of the tests of `merge_over_group` runs; imported by the ones spawned."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from survfuse import Ragged, ops

DOUBLE = {"dtype": torch.float64}
# rows of either bag on each rank: uneven, and one rank with nothing at all
SHARDS = {1: [(11, 8)], 2: [(10, 1), (1, 7)], 3: [(4, 7), (0, 0), (7, 1)]}
CASES = ("cross_attention", "tokens_attend_bag", "pool_bag")


def make(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What all ranks share, what is cut by rows, and the weight of a layer behind the merge."""
    g = torch.Generator().manual_seed(CASES.index(case))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, **DOUBLE).requires_grad_()

    n = sum(SHARDS[1][0])
    shared, rows = {"tokens": random(2, 3, 6), "w_q": random(2, 4, 6)}, {"bias": random(n)}
    if case == "cross_attention":
        rows |= {"key": random(n, 2, 4), "value": random(n, 2, 5)}
    else:
        rows |= {"bag": random(n, 6)}
    if case == "tokens_attend_bag":
        shared |= {"w_k": random(2, 4, 6), "w_v": random(2, 5, 6), "b_k": random(2, 4)}
        shared |= {"b_v": random(2, 5), "norm_weight": random(6), "norm_bias": random(6)}
    return shared, rows, random(6 if case == "pool_bag" else 5)


def attend(case: str, shared: dict, rows: dict, ragged: Ragged) -> tuple[Tensor, Tensor]:
    query = torch.einsum("bqd,hed->bqhe", shared["tokens"], shared["w_q"])
    if case == "cross_attention":
        return ops.cross_attention_with_lse(query, **rows, key_ragged=ragged, backend="tiled")
    if case == "tokens_attend_bag":
        weights = {k: v for k, v in shared.items() if k not in ("tokens", "w_q")}
        return ops.tokens_attend_bag_with_lse(query, **rows, **weights, ragged=ragged)
    absorbed = torch.einsum("bqhe,hed->bqhd", query, shared["w_q"]).flatten(1, 2)
    return ops.pool_bag(absorbed, rows["bag"], bias=rows["bias"], ragged=ragged)[:2]


def shard(rank: int, n_ranks: int) -> tuple[Tensor, Ragged]:
    """The rows of the whole matrix that a rank holds, and where its bags lie among them."""
    counts = torch.tensor(SHARDS[n_ranks])
    first = counts[:rank].sum(0) + torch.tensor([0, SHARDS[1][0][0]])
    index = [torch.arange(int(f), int(f + n)) for f, n in zip(first, counts[rank])]
    return torch.cat(index), Ragged.from_lengths(counts[rank])


def differentiate(case: str, rank: int, n_ranks: int, merge) -> dict[str, Tensor]:
    """Merged results, and the gradients of one loss by whose they are: shared, rows, behind."""
    shared, rows, behind = make(case)
    index, ragged = shard(rank, n_ranks)
    mine = {name: tensor.detach()[index].requires_grad_() for name, tensor in rows.items()}
    out, lse = merge(*attend(case, shared, mine, ragged))
    loss = ((out @ behind).sin() * lse).sum()
    names = [*shared, *mine, "behind"]
    gradients = torch.autograd.grad(loss, [*shared.values(), *mine.values(), behind])
    return {"index": index, "out": out.detach(), "lse": lse.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def run(rank: int, folder: str) -> None:
    """One of three ranks, the first two of which are a group of their own as well."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    found: dict = {3: everything(rank, 3, None)}
    if rank < 2:
        found[2] = everything(rank, 2, pair)
    else:
        found["outside"] = refusal(torch.zeros(2, 1, 3), pair)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def everything(rank: int, n_ranks: int, group: dist.ProcessGroup | None) -> dict:
    """What one rank of a group finds: results, gradients and errors."""
    found: dict = {}
    for case in CASES:
        result = differentiate(
            case, rank, n_ranks, lambda out, lse: ops.merge_over_group(out, lse, group=group)
        )
        for name in make(case)[0]:
            # partial sums by SUM, as the docstring says; strides may differ between ranks
            result[f"d_{name}"] = result[f"d_{name}"].contiguous()
            dist.all_reduce(result[f"d_{name}"], group=group)
        found[case] = result
    part = torch.full((2, 1, 3), float(rank)).bfloat16()
    found["narrow"] = ops.merge_over_group(part, torch.zeros(2, 1), group=group)
    found["shapes"] = refusal(torch.zeros(2 + rank, 1, 3), group)
    found["types"] = refusal(
        torch.zeros(2, 1, 3).to([torch.float32, torch.float64][rank > 0]), group
    )
    found["not a group"] = refusal(torch.zeros(2, 1, 3), "world")
    return found


def refusal(out: Tensor, group) -> str:
    """The error of a call that must not get through."""
    try:
        ops.merge_over_group(out, torch.zeros(out.shape[:-1]), group=group)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"
