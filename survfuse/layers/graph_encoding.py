"""Positional encodings of graph nodes that do not depend on the order of the nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.ragged import Ragged

_MAX_STATE = 1 << 24  # numbers held at a time: walkers of a few start nodes, on every node


def random_walk_encoding(
    edges: Tensor, ragged: Ragged, *, steps: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Probability that a random walk is back at its node after 1 .. `steps` steps.

    `encoding[i, k - 1] = (A^k)[i, i]`, where A moves from a node to one of its out-neighbours with
    equal probability. A node without edges has zeros.

    Args:
        edges: [2, E] int64, from row `edges[0]` to row `edges[1]` of the packed nodes; an
            undirected edge is listed both ways. Edges of other graphs are ignored.
        ragged: one range of nodes per graph; no edge leaves its graph. The same graph may appear
            more than once, overlapping different graphs may not.
        steps: number of steps K.
        dtype: of the result.

    Returns:
        [total, K], packed in batch order.

    Cost:
        `K * E * max_length` operations: all graphs walk side by side, start node by start node.
        Stored rows of other graphs cost nothing.

    Source:
        Dwivedi et al., "Graph neural networks with learnable structural and positional
        representations", ICLR 2022, equation 6.
    """
    return _walk_back(edges, *ragged, steps, dtype)


# one operation to a compiler, which cannot say how many different nodes a batch has
@torch.library.custom_op(
    "survfuse::random_walk_encoding",
    mutates_args=(),
    schema="(Tensor edges, Tensor starts, Tensor lengths, SymInt total, SymInt max_length, "
    "int steps, ScalarType dtype) -> Tensor",
)
def _walk_back(
    edges: Tensor,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    max_length: int,
    steps: int,
    dtype: torch.dtype,
) -> Tensor:
    ragged = Ragged(starts, lengths, total, max_length)
    rows = ragged.rows()
    if ragged.total == 0 or steps == 0:
        return torch.zeros(ragged.total, steps, dtype=dtype, device=edges.device)
    # the nodes of this batch, a graph that repeats once, are numbered anew
    nodes, number = rows.unique(return_inverse=True)
    source, target = torch.searchsorted(nodes, edges.contiguous()).clamp(max=nodes.shape[0] - 1)
    taken = (nodes[source] == edges[0]).to(dtype)
    place = torch.empty_like(nodes)
    place[number] = ragged.places()
    degree = nodes.new_zeros(nodes.shape, dtype=dtype).index_add_(0, source, taken)
    weight = (taken / degree.clamp(min=1)[source])[:, None]
    encoding = torch.zeros(nodes.shape[0], steps, dtype=dtype, device=edges.device)
    width = max(1, min(ragged.max_length, _MAX_STATE // max(nodes.shape[0], edges.shape[1], 1)))
    for first in range(0, ragged.max_length, width):
        column = place - first
        own = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)[:, None]
        # reach[i, c]: probability of being at the c-th start node, k steps after leaving node i
        reach = torch.zeros(nodes.shape[0], width, dtype=dtype, device=edges.device)
        reach.scatter_(1, column, own[:, None].to(dtype))
        for step in range(steps):
            moved = weight * reach.index_select(0, target)
            reach = torch.zeros_like(reach).index_add_(0, source, moved)
            back = reach.gather(1, column)[:, 0]
            encoding[:, step] = torch.where(own, back, encoding[:, step])
    return encoding[number]


@_walk_back.register_fake
def _(edges, starts, lengths, total, max_length, steps, dtype) -> Tensor:
    return edges.new_empty((total, steps), dtype=dtype)
