"""What every registered model promises: outputs, gradients, absence, inspection, saved weights."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from contract_cases import (
    CASES,
    HAS_GENES,
    LENGTHS,
    MODEL_CASES,
    OUTPUTS,
    STARTS,
    Case,
    as_type,
    assert_equal,
    assert_same,
    build,
    loss,
    mixed,
    nobody_has,
    pick,
)

from survfuse import Ragged
from survfuse.batch import Modality, ModelOutput, TableBatch
from survfuse.models import model_class

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_model = pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES)
# a mean weighs no patch
WEIGHS_NONE = [
    CASES[name]
    for name in ("snn", "mean_pool", "mean_pool of a graph", "multimodn", "multimodn of a graph")
]


def absences(case: Case) -> dict[str, dict[str, Modality]]:
    """Batches of a case by what is missing from them."""
    inputs = mixed(case)
    gone = {name: nobody_has(inputs, name) for name in inputs}
    nothing = {name: gone[name][name] for name in inputs}
    found = {"some of each": inputs, "nothing": nothing}
    for name in inputs if len(inputs) > 1 else ():
        rest = {key: batch for key, batch in inputs.items() if key != name}
        found |= {f"nobody has {name}": gone[name], f"{name} left out": rest}
        found[f"nothing but {name}, which nobody has"] = {name: nothing[name]}
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


@each_case
def test_a_batch_of_nobody(case: Case) -> None:
    """As a loader may hand out at the end of a shard: empty logits, zero gradients."""
    model = build(case)
    output = model(pick(mixed(case), []))
    for task, width in OUTPUTS.items():
        assert output.logits[task].shape == (0, width)
    loss(output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@each_case
def test_what_is_stored_where_nothing_is_changes_nothing(case: Case) -> None:
    """Rows that are no sample's, and bags that `present` denies, may hold anything."""
    model, inputs = build(case).eval(), mixed(case)
    zeros = {}
    for name, batch in inputs.items():
        if isinstance(batch, TableBatch):
            zeros[name] = batch._replace(values=batch.values.nan_to_num(7.0))
        else:
            zeros[name] = batch._replace(features=batch.features.nan_to_num(7.0))
    assert_equal(model(inputs), model(zeros))
    if "slides" not in inputs:
        return
    # a bag that is denied by its mask alone, with NaN in its rows
    slides, start = inputs["slides"], STARTS[1]
    features = slides.features.clone()
    features[start : start + LENGTHS[1]] = torch.nan
    present = slides.present.clone()
    present[1] = False
    denied = slides._replace(features=features, present=present)
    lengths = slides.ragged.lengths.clone()
    lengths[1] = 0
    gone = slides._replace(ragged=Ragged.from_ranges(STARTS, lengths), present=present)
    output = model({**inputs, "slides": denied})
    assert_same(output, model({**inputs, "slides": gone}))
    loss(output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@each_case
def test_a_sample_is_the_same_in_any_batch(case: Case) -> None:
    """Alone, twice, in another order: also with one patch, with none, and without anything."""
    model, inputs = build(case).eval(), mixed(case)
    together = model(inputs)
    for b in range(6):
        assert_same(model(pick(inputs, [b])), together, [b])
    order = [4, 0, 3, 0, 5, 2, 1]
    assert_same(model(pick(inputs, order)), together, order)
    order = [1, 1, 1]
    assert_same(model(pick(inputs, order)), together, order)
    if "slides" in inputs:
        # an empty slide is an absent one
        empty = inputs["slides"]._replace(present=torch.tensor(LENGTHS) > 0)
        assert_equal(model({**inputs, "slides": empty}), together)


@each_case
def test_evaluation_repeats_itself(case: Case) -> None:
    model, inputs = build(case).eval(), mixed(case)
    assert_equal(model(inputs), model(inputs))
    output = model(as_type(inputs, torch.bfloat16))
    assert all(logits.dtype == torch.float32 for logits in output.logits.values())
    for task, logits in model(inputs).logits.items():
        torch.testing.assert_close(output.logits[task], logits, rtol=0.03, atol=0.03)
    # as numpy hands them out, beside weights that are not
    output = model(as_type(inputs, torch.float64))
    for task, logits in model(inputs).logits.items():
        torch.testing.assert_close(output.logits[task], logits, rtol=1e-4, atol=1e-5)
    double = build(case).double().eval()
    assert all(
        x.dtype == torch.float64 for x in double(as_type(inputs, torch.float64)).logits.values()
    )


@each_case
def test_weights_come_back(case: Case) -> None:
    """Through a state dict, and a configuration through JSON."""
    model, inputs = build(case).eval(), mixed(case)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    again = build(case).eval()
    again.load_state_dict(model.state_dict())
    assert_equal(again(inputs), model(inputs))
    kind = model_class(case.model).config_class
    plain = json.loads(json.dumps(dataclasses.asdict(model.config)))
    config = kind(**plain)
    assert dataclasses.asdict(config) == dataclasses.asdict(model.config)
    built = model_class(case.model)(config).eval()
    built.load_state_dict(model.state_dict())
    assert_equal(built(inputs), model(inputs))


@each_case
def test_weights_of_patches(case: Case) -> None:
    """Per sample and group at least 0 and of sum 1.

    The sum is 0 where a group of AMMASurv is not there to look, and where all points that subspace
    fusion samples lie beside the tissue, as in a slide of one patch.
    """
    model = build(case)
    may_be_zero = case.model in ("ammasurv", "subspace_fusion")
    for given in absences(case).values():
        weights = model.patch_attention(given)
        assert model.training
        lengths = given["slides"].ragged.lengths.tolist() if "slides" in given else []
        # without any patch there is nothing to weigh
        assert list(weights) == ([] if case in WEIGHS_NONE or not sum(lengths) else ["slides"])
        for groups in weights.values():
            for group, found in groups.items():
                assert found.shape == (sum(lengths),), group
                assert (found >= 0).all(), group
                for b, part in enumerate(found.split(lengths)):
                    total, where = float(part.sum()), f"{group} of sample {b}"
                    if lengths[b] and not (may_be_zero and total == 0.0):
                        assert total == pytest.approx(1.0, abs=1e-5), where
    found = model.patch_attention(mixed(case)).get("slides", {})
    for group, weights in found.items():
        # the sample that has everything
        assert float(weights[: LENGTHS[0]].sum()) == pytest.approx(1.0, abs=1e-5), group


@each_case
def test_effects_and_importances(case: Case) -> None:
    model, inputs = build(case), mixed(case)

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits.sum(1)

    for task in OUTPUTS:
        effects = model.modality_effect(inputs, score=score, task=task)
        assert list(effects) == list(inputs)
        for name, effect in effects.items():
            has = HAS_GENES if name == "genes" else [bool(n) for n in LENGTHS]
            assert effect.shape == (6,)
            assert effect.isfinite().all()
            assert (effect[~torch.tensor(has)] == 0.0).all()
            assert effect[0] != 0.0
    if "genes" in inputs:
        importance = model.gradient_importance(inputs, "genes", score=score)
        assert importance.shape == (6, 5)
        assert importance.isfinite().all()
        assert (importance[~torch.tensor(HAS_GENES)] == 0).all()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
