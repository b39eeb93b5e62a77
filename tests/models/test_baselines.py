"""What all plain baselines promise: absence per sample, gradients, types, sizes, inspection."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import CASES, build, inputs_of
from healnet_cases import LENGTHS, bag, one_sample, without
from torch import Tensor

from survfuse.batch import ArrayBatch, Modality, TableBatch
from survfuse.models import FusionModel
from survfuse.models.registry import model_class

PAIRS = [(case, name) for case, (_, modalities, _) in CASES.items() for name in modalities]


def logits(model: FusionModel, inputs: dict[str, Modality]) -> Tensor:
    return model(inputs).logits["survival"]


def absent_from_all(inputs: dict[str, Modality]) -> dict[str, Modality]:
    return {name: without({name: batch}, name, [0, 1, 2])[name] for name, batch in inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_each_sample_of_a_batch_as_if_alone(case: str) -> None:
    """The second sample's bags are of one patch."""
    model, inputs = build(case).eval(), inputs_of(case)
    together = logits(model, inputs)
    assert together.shape == (3, 4)
    assert torch.equal(together, logits(model, inputs))
    for b in range(3):
        torch.testing.assert_close(
            together[b : b + 1], logits(model, one_sample(inputs, b)), rtol=1e-4, atol=1e-5
        )
    assert (together[0] - together[2]).abs().max() > 1e-5


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_absent_for_a_sample_is_left_out(case: str, name: str) -> None:
    model, inputs = build(case).eval(), inputs_of(case)
    with torch.no_grad():
        # a learned vector that was learned: zeros would hide a missing selection
        for key, parameter in model.named_parameters():
            if key.endswith("absent"):
                parameter.normal_()
    full, partly = logits(model, inputs), logits(model, without(inputs, name, [1]))
    rest = {key: batch for key, batch in inputs.items() if key != name}
    nothing = logits(model, {**rest, name: without(inputs, name, [0, 1, 2])[name]})
    torch.testing.assert_close(partly[[0, 2]], full[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(partly[1], nothing[1], rtol=1e-4, atol=1e-5)
    assert (partly[1] - full[1]).abs().max() > 1e-6
    if rest:
        torch.testing.assert_close(logits(model, rest), nothing)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_gradients_with_absent_samples(case: str, name: str) -> None:
    """Finite everywhere, none missing, whatever the absent samples hold."""
    model, inputs = build(case).train(), inputs_of(case)
    gone = without(inputs, name, [0, 2])
    if isinstance(gone[name], TableBatch | ArrayBatch):
        gone[name].values[[0, 2]] = torch.nan
    else:
        outside = torch.ones(gone[name].features.shape[0], dtype=torch.bool)
        outside[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = False
        gone[name].features[outside] = torch.nan
    output = model(gone)
    assert all(value.isfinite().all() for value in output.embeddings.values())
    loss = output.logits["survival"].square().sum() + sum(output.auxiliary.values())
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("case", CASES)
def test_nothing_at_all_has_an_answer_and_zero_gradients(case: str) -> None:
    model, inputs = build(case).eval(), inputs_of(case)
    for name in inputs:
        inputs = without(inputs, name, [1])
    partly, nothing = logits(model, inputs), logits(model, absent_from_all(inputs))
    torch.testing.assert_close(nothing, nothing[:1].expand(3, -1))
    torch.testing.assert_close(partly[1], nothing[1])
    nothing.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_where_all_is_there(case: str) -> None:
    """But what softmax and selection cancel: biases of scores, vectors of what is absent."""
    model = build(case).eval()
    for _ in range(3):
        (logits(model, inputs_of(case)) * torch.randn(3, 4)).sum().backward()
    for key, parameter in model.named_parameters():
        if not key.endswith(("absent", "pool.score.bias")):
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("case", CASES)
def test_bags_may_repeat_and_leave_gaps(case: str) -> None:
    model, inputs = build(case).eval(), inputs_of(case)
    expected = logits(model, inputs)[[2, 0, 2]]
    picked = {}
    for name, batch in inputs.items():
        if isinstance(batch, TableBatch | ArrayBatch):
            picked[name] = type(batch)(batch.values[[2, 0, 2]], batch.present)
        else:
            picked[name] = batch._replace(ragged=batch.ragged.select([2, 0, 2]))
    torch.testing.assert_close(logits(model, picked), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_types(case: str) -> None:
    """fp64 and bf16 bags under fp32 parameters, tables in fp64, a model in fp64, the reference."""
    model, inputs = build(case).eval(), inputs_of(case)
    exact = logits(model, inputs)

    def features_in(dtype: torch.dtype, *, tables: bool) -> dict[str, Modality]:
        found = {}
        for name, batch in inputs.items():
            field = "values" if isinstance(batch, TableBatch | ArrayBatch) else "features"
            wanted = tables or field == "features"
            value = getattr(batch, field)
            found[name] = batch._replace(**{field: value.to(dtype) if wanted else value})
        return found

    wide = logits(model, features_in(torch.float64, tables=True))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, exact, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    narrow = logits(model, features_in(torch.bfloat16, tables=False))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, exact, rtol=0.1, atol=0.1)
    narrow.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    double = logits(model.double(), features_in(torch.float64, tables=True))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-5)
    if case != "snn":
        torch.manual_seed(0)
        plain = build(case, backend="reference").eval().double()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(
            logits(plain, features_in(torch.float64, tables=True)), double, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("case", CASES)
def test_patch_attention_is_weights(case: str) -> None:
    model, inputs = build(case).train(), inputs_of(case)
    for name in inputs:
        inputs = without(inputs, name, [1])
    found = model.patch_attention(inputs)
    assert model.training
    weighed = "snn" not in case and case != "multimodn"
    bags = [name for name, batch in inputs.items() if hasattr(batch, "ragged")]
    assert list(found) == (bags if weighed else [])
    for name, groups in found.items():
        assert groups
        for weights in groups.values():
            assert weights.shape == (10,)
            assert weights.min() >= 0
            for part in weights.split([6, 4]):
                torch.testing.assert_close(part.sum(), torch.tensor(1.0))
        # rows of a bag that `present` denies
        denied = inputs[name]._replace(present=torch.tensor([True, False, False]))
        for weights in model.patch_attention({**inputs, name: denied})[name].values():
            assert weights[6:].eq(0).all()
    nothing = model.patch_attention(absent_from_all(inputs))
    assert nothing == {}


@pytest.mark.parametrize("case", CASES)
def test_withholding_a_modality_changes_the_score(case: str) -> None:
    model, inputs = build(case), inputs_of(case)
    effects = model.modality_effect(inputs, score=lambda found: found.sum(1))
    assert list(effects) == list(inputs)
    assert all(effect.abs().max() > 0 for effect in effects.values())


@pytest.mark.parametrize("case", ["snn", "abmil", "kronecker", "multimodn", "perceiver"])
def test_compiles_without_a_graph_break(case: str) -> None:
    small = {"depth": 1, "latent_blocks": 0} if case == "perceiver" else {}
    names = [name for name in CASES[case][1] if name in ("genes", "plain")]
    model, inputs = build(case, **small).eval(), {name: inputs_of(case)[name] for name in names}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs).logits["survival"], logits(model, inputs))


@pytest.mark.parametrize("case", CASES)
def test_configurations_say_what_is_wrong(case: str) -> None:
    name, modalities, _ = CASES[case]
    kind = model_class(name).config_class
    with pytest.raises(ValueError, match="name is 'small'; it must be one of"):
        kind.from_preset("small", modalities=modalities)
    with pytest.raises(ValueError, match=r"dropout is 1\.0|attention_dropout is 1\.0"):
        build(case, **{"attention_dropout" if name == "perceiver" else "dropout": 1.0})
    with pytest.raises(ValueError, match="outputs is 4"):
        kind(modalities, outputs=4)
    first = next(iter(modalities))
    batch = inputs_of(case)[first]
    field = "values" if isinstance(batch, TableBatch | ArrayBatch) else "features"
    narrow = batch._replace(**{field: getattr(batch, field)[..., 1:]})
    with pytest.raises(ValueError, match="the last of"):
        build(case)({first: narrow})


@pytest.mark.parametrize("name", ["abmil", "transmil"])
def test_one_bag_or_graph_only(name: str) -> None:
    kind = model_class(name).config_class
    for wrong in ({"rna": ("table", 3)}, {"a": ("bag", 3), "b": ("bag", 3)}):
        with pytest.raises(ValueError, match=r"reads exactly one bag or graph.*data\.modalities"):
            kind(wrong)


def test_several_tasks() -> None:
    for name in {model for model, _, _ in CASES.values()}:
        one = {"rna": ("table", 5)} if name == "snn" else {"slide": ("bag", 5)}
        model = model_class(name).from_preset(
            "paper", modalities=one, outputs={"survival": 1, "grade": 3}
        )
        batch = bag(5, [2, 1])
        if name == "snn":
            batch = TableBatch(torch.randn(2, 5), batch.present)
        found = model({next(iter(one)): batch}).logits
        assert {task: tuple(x.shape) for task, x in found.items()} == {
            "survival": (2, 1),
            "grade": (2, 3),
        }
