"""torch.compile and torch.export of every registered model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_cases import (
    BAG,
    CASES,
    MODEL_CASES,
    Case,
    assert_same,
    build,
    mixed,
    pick,
)
from torch.export import Dim

import survfuse
from survfuse import Ragged
from survfuse.batch import BagBatch, GraphBatch, Modality, ModelOutput, TableBatch
from survfuse.models import model_class

PACKAGE = Path(survfuse.__file__).parent
# one graph each, on another path than the case of its model
FURTHER = ("abmil of a graph", "healnet with positions")
GRAPHS = {**MODEL_CASES, **{name: CASES[name] for name in FURTHER}}
EXPORTS = {
    name: case for name, case in GRAPHS.items() if model_class(case.model).export_obstacle is None
}


def slow_to_trace(name: str) -> object:
    """The parameter of a case; each time the host reads, all that follows is traced anew."""
    marks = [pytest.mark.slow] if name == "cmta" else []
    return pytest.param(GRAPHS[name], id=name, marks=marks)


# where the host reads a batch, and so a graph ends: file and function
_MAKES_RANGES = "ragged.py:from_ranges"
BREAKS = {
    "transmil": {"models/transmil.py:to_squares", _MAKES_RANGES},
    "motcat": {
        "layers/transport_attention.py:_plan",
        "layers/transport_attention.py:forward",
    },
    "cmta": {
        "models/cmta.py:_encode_genes",
        "models/cmta.py:forward",
        "layers/nystrom_encoder.py:forward",
        _MAKES_RANGES,
    },
    "subspace_fusion": {
        "models/subspace_fusion.py:_lay_out",
        "layers/deformable_parts.py:check_inputs",
        "layers/deformable_parts.py:attend_ragged",
        "layers/deformable_cross_attention.py:_sparse",
        "grid.py:cells",
        _MAKES_RANGES,
    },
}


@pytest.fixture(autouse=True)
def _one_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # a record per traced operation costs more than tracing it
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    # sizes this small spend their time waiting for threads
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)


# torch's own way to trace an autograd function, of which it warns itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", [slow_to_trace(name) for name in GRAPHS])
@torch.no_grad()
def test_compiled_it_computes_the_same_and_breaks_where_the_host_reads(case: Case) -> None:
    model, inputs = build(case).eval(), pick(mixed(case), [0, 1, 2])
    found: list[ModelOutput] = []

    def run() -> None:
        found.append(model(inputs))

    report = torch._dynamo.explain(run)()
    assert_same(found[-1], model(inputs))
    places = set()
    for reason in report.break_reasons:
        # the innermost of ours: a break may lie within torch itself
        ours = [frame for frame in reason.user_stack if PACKAGE in Path(frame.filename).parents]
        for frame in ours[-1:]:
            places.add(f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.name}")
    assert places <= BREAKS.get(case.model, set())
    rooms = {place.split("/")[0] for place in places}
    assert not rooms & {"ops", "reference", "tiled", "native", "triton_kernels"}
    assert report.graph_break_count == 0 or case.model in BREAKS


@pytest.mark.parametrize("case", EXPORTS.values(), ids=EXPORTS)
@torch.no_grad()
def test_exported_it_computes_the_same_for_other_batches(case: Case) -> None:
    """Captured on four samples; run on six of other lengths, of which others lack something."""
    model, inputs = build(case).eval(), pick(mixed(case), [0, 1, 2, 4])
    program = torch.export.export(
        model, (inputs,), dynamic_shapes=(dynamic_sizes(inputs),), strict=False
    ).module()
    assert_same(program(inputs), model(inputs))
    other = another_batch(case)
    assert_same(program(other), model(other))
    # what is stored where nothing is, is not read either
    assert_same(program(pick(other, [3, 0])), model(pick(other, [3, 0])))


@pytest.mark.parametrize("name", BREAKS)
def test_a_model_that_the_host_must_help_says_why_it_does_not_export(name: str) -> None:
    model, inputs = build(MODEL_CASES[name]).eval(), mixed(MODEL_CASES[name])
    assert len(model.export_obstacle) > 20
    with pytest.raises(Exception, match=r"data-dependent|must be a vector of integers"):
        torch.export.export(model, (inputs,), strict=False)


def dynamic_sizes(inputs: dict[str, Modality]) -> dict[str, tuple]:
    """Which sizes of a batch may be others: samples, patches, bag lengths, edges."""
    any_size = {0: Dim.DYNAMIC}
    ragged = Ragged(any_size, any_size, Dim.DYNAMIC, Dim.DYNAMIC)
    found = {}
    for name, batch in inputs.items():
        if isinstance(batch, TableBatch):
            found[name] = TableBatch(any_size, any_size)
        elif isinstance(batch, BagBatch):
            found[name] = BagBatch(any_size, ragged, any_size, any_size)
        else:
            found[name] = GraphBatch(any_size, ragged, {1: Dim.DYNAMIC}, any_size)
    return found


def another_batch(case: Case) -> dict[str, Modality]:
    other = mixed(case)
    present = torch.tensor([False, True, True, False, True, True])
    if "genes" in other:
        values = torch.randn(6, 5).masked_fill(~present[:, None], torch.nan)
        other["genes"] = TableBatch(values, present)
    if "slides" in other:
        ragged = Ragged.from_ranges([2, 0, 9, 0, 8, 13], [7, 2, 4, 0, 1, 9])
        slides = other["slides"]._replace(
            features=torch.randn(22, 6), ragged=ragged, present=ragged.lengths > 0
        )
        if case.modalities["slides"].kind == BAG.kind:
            slides = slides._replace(coords=torch.rand(22, 2) * 4096.0)
        else:
            slides = slides._replace(edges=torch.tensor([[2, 3, 14], [3, 2, 15]]))
        other["slides"] = slides
    return other
