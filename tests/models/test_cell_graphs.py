"""Three cell graphs of gliomas (`--shared-data`) through every model that reads graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from survfuse import Ragged
from survfuse.batch import GraphBatch, Modality, TableBatch
from survfuse.layers.graph_encoding import random_walk_encoding
from survfuse.models import FusionModel, ModalityConfig, model_class

STEPS = 4
# cells of each graph that models are given, those nearest to its middle
N_CELLS = 100
CELLS = ModalityConfig("graph", 9, walk_steps=STEPS)
GENES = {"rna": ModalityConfig("table", 5, groups={"a": (0, 1), "b": (2, 3, 4)})}
_GENE_SIDE = {"gene_widths": (6,), "dim": 8}
_LATENTS = {"n_latents": 3, "latent_dim": 6, "cross_heads": 1, "cross_head_dim": 4}
_LATENTS |= {"latent_heads": 1, "latent_head_dim": 4}
# what makes each model small
SETTINGS = {
    "healnet": {**_LATENTS, "depth": 1},
    "mcat": {**_GENE_SIDE, "encoder_heads": 2, "encoder_hidden": 8},
    # transport plans of whole graphs, not of runs of their nodes
    "motcat": {**_GENE_SIDE, "encoder_heads": 2, "encoder_hidden": 8, "micro_batch": 1000},
    "survpath": {**_GENE_SIDE, "inner_dim": 8, "hidden": 8},
    "cmta": {**_GENE_SIDE, "encoder_heads": 2, "patch_widths": (8,), "landmarks": 6},
    "perceiver": {**_LATENTS, "token_dim": 8},
    "multimodn": {"state_dim": 6, "encoder_widths": (8,)},
    "late_fusion": {"dim": 6, "rank": 4, "hidden": 6, "patch_dim": 8, "attention_hidden": 4},
    "abmil": {"dim": 8, "hidden": 4},
    "transmil": {"dim": 8, "heads": 2, "head_dim": 4, "landmarks": 6},
    "mean_pool": {"width": 8},
}
ALONE = ("abmil", "transmil")
# read rows as a sequence or as a square map, which the order of the nodes decides
ORDERED = ("cmta", "transmil")
# reads the features of nodes alone
WITHOUT_EDGES = ("mean_pool",)


class _Graph:
    """Stands for torch_geometric's class, of which the files hold the attributes alone."""


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[dict[str, Any]]:
    """What the three files hold."""
    paths = sorted((shared_data / "bags").glob("TCGA-*.pt"))
    if len(paths) < 3:
        pytest.skip(f"the cell graphs are not in {shared_data / 'bags'}")
    stand_in = (_Graph, "torch_geometric.data.data.Data")
    with torch.serialization.safe_globals([stand_in]):
        return [vars(torch.load(path, weights_only=True)) for path in paths]


def joined(graphs: list[tuple[torch.Tensor, torch.Tensor]]) -> GraphBatch:
    """One batch of the features and edges of each graph."""
    ragged = Ragged.from_lengths([len(nodes) for nodes, _ in graphs])
    starts = ragged.starts.tolist()
    edges = torch.cat([edges + start for (_, edges), start in zip(graphs, starts)], 1)
    features = torch.cat([nodes[:, : CELLS.channels] for nodes, _ in graphs]).double()
    features = (features - features.mean(0)) / features.std(0)
    return GraphBatch(features, ragged, edges, torch.ones(3, dtype=torch.bool))


@pytest.fixture(scope="module")
def middles(files) -> GraphBatch:
    """The middle of each graph: its cells and the edges among them."""
    found = []
    for graph in files:
        places = graph["centroid"].double()
        near = (places - places.mean(0)).norm(dim=1).argsort()[:N_CELLS]
        number = torch.full((len(graph["x"]),), -1)
        number[near] = torch.arange(N_CELLS)
        edges = number[graph["edge_index"]]
        found.append((graph["x"][near], edges[:, (edges >= 0).all(0)]))
    return joined(found)


def build(name: str) -> FusionModel:
    modalities = {"cells": CELLS} | ({} if name in ALONE else GENES)
    cls = model_class(name)
    preset = next(iter(cls.config_class.PRESETS))
    return cls.from_preset(preset, modalities=modalities, **SETTINGS[name]).double().eval()


def inputs_of(name: str, graphs: GraphBatch) -> dict[str, Modality]:
    genes = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    table = {} if name in ALONE else {"rna": TableBatch(genes, graphs.present)}
    return {"cells": graphs, **table}


def reordered(graphs: GraphBatch) -> tuple[GraphBatch, torch.Tensor]:
    """The nodes of every graph in another order, with edges renamed, and that order."""
    parts = zip(graphs.ragged.starts.tolist(), graphs.ragged.lengths.tolist())
    order = torch.cat([start + torch.randperm(length) for start, length in parts])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return graphs._replace(features=graphs.features[order], edges=place[graphs.edges]), order


def test_walks_return_as_the_edges_of_the_file_say(files) -> None:
    graphs = joined([(graph["x"], graph["edge_index"]) for graph in files])
    assert graphs.ragged.lengths.tolist() == [667, 711, 373]
    found = random_walk_encoding(graphs.edges, graphs.ragged, steps=STEPS, dtype=torch.float64)
    for graph, part in zip(files, found.split(graphs.ragged.lengths.tolist()), strict=True):
        walk = torch.zeros(len(part), len(part), dtype=torch.float64)
        walk.index_put_(tuple(graph["edge_index"]), walk.new_ones(()), accumulate=True)
        walk = walk / walk.sum(1, keepdim=True)
        power, returns = walk, [walk.diagonal()]
        for _ in range(STEPS - 1):
            power = power @ walk
            returns.append(power.diagonal())
        torch.testing.assert_close(part, torch.stack(returns, 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_learns_from_cell_graphs(name: str, middles: GraphBatch) -> None:
    model = build(name)
    output = model(inputs_of(name, middles))
    assert output.logits["survival"].isfinite().all()
    (output.logits["survival"].square().sum() + sum(output.auxiliary.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ORDERED])
@torch.no_grad()
def test_the_order_of_nodes_does_not_matter(name: str, middles: GraphBatch) -> None:
    model, (other, order) = build(name), reordered(middles)
    given, turned = inputs_of(name, middles), inputs_of(name, other)
    found, again = (model(inputs).logits["survival"] for inputs in (given, turned))
    torch.testing.assert_close(again, found)
    before, after = (model.patch_attention(i).get("cells", {}) for i in (given, turned))
    assert list(before) == list(after)
    for looks, weights in before.items():
        torch.testing.assert_close(after[looks], weights[order])


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_edges_are_read(name: str, middles: GraphBatch) -> None:
    """Other edges among the same nodes, and none at all, are other middles."""
    model, found = build(name), []
    for edges in (middles.edges, middles.edges[:, ::2], middles.edges[:, :0]):
        found.append(model(inputs_of(name, middles._replace(edges=edges))).logits["survival"])
    # changes of a few return probabilities among as many features, in double precision
    differ = [bool((other - found[0]).abs().amax(1).gt(1e-7).all()) for other in found[1:]]
    assert differ == [name not in WITHOUT_EDGES] * 2
