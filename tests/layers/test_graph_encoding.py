"""Random-walk encodings against powers of the dense walk matrix."""

from __future__ import annotations

import pytest
import torch

from survfuse import Ragged
from survfuse.layers import graph_encoding
from survfuse.layers.graph_encoding import random_walk_encoding


def dense(edges: torch.Tensor, n: int, steps: int) -> torch.Tensor:
    walk = torch.zeros(n, n, dtype=torch.float64)
    walk.index_put_(
        (edges[0], edges[1]), torch.ones(edges.shape[1], dtype=walk.dtype), accumulate=True
    )
    walk = walk / walk.sum(1, keepdim=True).clamp(min=1)
    power, found = torch.eye(n, dtype=walk.dtype), []
    for _ in range(steps):
        power = power @ walk
        found.append(power.diagonal())
    return torch.stack(found, 1)


def random_graphs() -> tuple[torch.Tensor, Ragged]:
    """Three graphs of 6, 0 and 4 nodes behind two stored rows of no graph; node 11 is alone."""
    first = torch.randint(2, 8, (2, 14))
    second = torch.randint(8, 11, (2, 5))
    return torch.cat([first, second], 1), Ragged.from_ranges([2, 8, 8], [6, 0, 4])


@pytest.mark.parametrize("held", [1, 1 << 24])
def test_encoding_is_the_diagonal_of_powers(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_encoding, "_MAX_STATE", held)
    edges, ragged = random_graphs()
    found = random_walk_encoding(edges, ragged, steps=5, dtype=torch.float64)
    rows = [*range(2, 8), *range(8, 12)]
    torch.testing.assert_close(found, dense(edges, 13, 5)[rows])
    assert not found[-1].any()
    # an edge of a graph that is not in the batch
    other = torch.cat([edges, torch.tensor([[0, 1, 12], [1, 0, 12]])], 1)
    assert torch.equal(random_walk_encoding(other, ragged, steps=5, dtype=found.dtype), found)


def test_node_order_does_not_matter() -> None:
    edges, ragged = random_graphs()
    order = torch.cat([torch.arange(2), 2 + torch.randperm(6), 8 + torch.randperm(4)])
    place = torch.empty(12, dtype=torch.int64)
    place[order] = torch.arange(12)
    found = random_walk_encoding(edges, ragged, steps=4)
    renamed = random_walk_encoding(place[edges], ragged, steps=4)
    torch.testing.assert_close(renamed, found[order[2:] - 2])


def test_graphs_that_repeat_and_nothing_at_all() -> None:
    edges, ragged = random_graphs()
    once = random_walk_encoding(edges, ragged, steps=3)
    twice = random_walk_encoding(edges, ragged.select([2, 0, 2]), steps=3)
    assert torch.equal(torch.cat([once[6:], once]), torch.cat([twice[:4], twice[4:]]))
    none = random_walk_encoding(edges[:, :0], Ragged.from_lengths([0, 0]), steps=3)
    assert none.shape == (0, 3)
