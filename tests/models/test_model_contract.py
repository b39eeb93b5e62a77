"""What every registered model promises: outputs, gradients, absence, inspection, saved weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from contract_cases import (
    CASES,
    GRAPH_CASES,
    HAS_GENES,
    HAS_SLIDE,
    LENGTHS,
    MODEL_CASES,
    OUTPUTS,
    Case,
    assert_same,
    build,
    loss,
    mixed,
    nobody_has,
    pick,
)

from survfuse import Ragged
from survfuse.batch import BagBatch, GraphBatch, Modality, ModelOutput, TableBatch
from survfuse.models import FusionModel, model_class

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_model = pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES)
ABSENCES = {
    "some of each": lambda inputs: inputs,
    "nobody has genes": lambda inputs: nobody_has(inputs, "genes"),
    "nobody has slides": lambda inputs: nobody_has(inputs, "slides"),
    "genes left out": lambda inputs: {"slides": inputs["slides"]},
    "slides left out": lambda inputs: {"genes": inputs["genes"]},
    "nothing": lambda inputs: nobody_has(nobody_has(inputs, "genes"), "slides"),
    "a table of nothing": lambda inputs: {"genes": nobody_has(inputs, "genes")["genes"]},
    "bags of nothing": lambda inputs: {"slides": nobody_has(inputs, "slides")["slides"]},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # sizes this small spend their time waiting for threads
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def absences(case: Case) -> dict[str, dict[str, Modality]]:
    """Every batch of `ABSENCES` that the model of a case can be given."""
    inputs, found = mixed(case), {}
    for name, change in ABSENCES.items():
        try:
            found[name] = change(inputs)
        except KeyError:
            # a model of one modality
            one = next(iter(inputs))
            found["nothing"] = nobody_has(inputs, one)
    return found


@each_case
def test_outputs_are_what_was_asked_for(case: Case) -> None:
    model = build(case)
    for given in absences(case).values():
        output = model(given)
        assert isinstance(output, ModelOutput)
        assert {task: logits.shape for task, logits in output.logits.items()} == {
            task: (6, width) for task, width in OUTPUTS.items()
        }
        assert all(logits.isfinite().all() for logits in output.logits.values())
        assert all(logits.dtype == torch.float32 for logits in output.logits.values())
        assert all(vector.shape[0] == 6 for vector in output.embeddings.values())
        assert all(vector.isfinite().all() for vector in output.embeddings.values())
        for auxiliary in output.auxiliary.values():
            assert auxiliary.shape == ()
            assert auxiliary.isfinite()


@each_case
def test_every_parameter_has_a_gradient(case: Case) -> None:
    model = build(case)
    for absence, given in absences(case).items():
        model.zero_grad(set_to_none=True)
        loss(model(given)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{absence}: {name}"
            assert parameter.grad.isfinite().all(), f"{absence}: {name}"
