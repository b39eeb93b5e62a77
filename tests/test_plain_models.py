"""The plain twins of models that benchmarks race against, and what a race of models decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_models
from benchmarks.model_cases import (
    CASES,
    GENES,
    OURS,
    PLAIN,
    REFERENCE,
    SLIDE,
    ModelCase,
    gene_groups,
    hazard_loss,
    logits_of,
    tissue,
)
from survfuse import Ragged
from survfuse.batch import BagBatch, Modality, TableBatch
from survfuse.models import MODELS, model_class

DIM = 12
BY_NAME = {case.name: case for case in CASES}


def batch(case: ModelCase) -> dict[str, Modality]:
    """Three patients, one of a single patch, in another order than their rows lie."""
    lengths = [30, 1, 40]
    ragged = Ragged.from_ranges([45, 2, 4], lengths)
    present = torch.ones(3, dtype=torch.bool)
    coords = torch.zeros(80, 2, dtype=torch.int64)
    for start, n in zip(ragged.starts.tolist(), lengths, strict=True):
        coords[start : start + n] = 100 * tissue(n)
    features = torch.randn(80, DIM)
    # rows of no bag are never read
    features[:2] = torch.nan
    inputs: dict[str, Modality] = {SLIDE: BagBatch(features, ragged, present, coords)}
    columns, groups = gene_groups(case.groups)
    if groups:
        inputs[GENES] = TableBatch(torch.randn(3, columns), present)
    return inputs


def gradients(model: nn.Module, inputs: dict[str, Modality]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every parameter's gradient."""
    logits, auxiliary = logits_of(model.eval(), inputs)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(
        hazard_loss(logits) + logits.square().sum() + auxiliary,
        list(parameters.values()),
        allow_unused=True,
    )
    zeros = (torch.zeros_like(parameter) for parameter in parameters.values())
    known = (zero if one is None else one for one, zero in zip(found, zeros, strict=True))
    return logits.detach(), dict(zip(parameters, known, strict=True))


class TestTwins:
    @pytest.mark.parametrize("name", BY_NAME)
    def test_every_way_gives_the_same_logits_and_gradients(self, name: str) -> None:
        if name == "MOTCat":
            pytest.importorskip("ot")
        case = BY_NAME[name]
        models, inputs = case.models(DIM, "cpu", tiny=True), batch(case)
        logits, expected = gradients(models.pop(OURS), inputs)
        scale = torch.stack([one.norm() for one in expected.values()]).norm()
        assert PLAIN in models
        for way, model in models.items():
            found, own = gradients(model, inputs)
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5, msg=way)
            assert own.keys() == expected.keys()
            for key, gradient in own.items():
                error = (gradient - expected[key]).norm()
                assert error < 1e-4 * expected[key].norm() + 1e-5 * scale, f"{way}: {key}"

    def test_every_model_that_reads_patches_has_one(self) -> None:
        assert {case.model for case in CASES} == set(MODELS) - {"snn"}

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("MultiModN", {"pool": "mean"}, "pool is 'mean'"),
            ("SubspaceFusion", {"pool": "attention"}, "pool must be 'mean'"),
            ("SubspaceFusion", {"layout": "fixed"}, "layout 'fixed' go with released=True"),
            ("AMMASurv", {"patch_attention_kind": "nystrom"}, "must not be 'nystrom'"),
        ],
    )
    def test_what_a_twin_leaves_out_is_refused(
        self, name: str, changes: dict, message: str
    ) -> None:
        case = BY_NAME[name]
        with pytest.raises(ValueError, match=message):
            case.twin(replace(case.config(DIM), **changes))

    def test_padding_of_the_perceiver(self) -> None:
        case = BY_NAME["Perceiver"]
        config = replace(case.config(DIM), padding="zero", weight_sharing="none")
        ours, inputs = model_class(case.model)(config), batch(case)
        twin = case.twin(config)
        twin.load_state_dict(ours.state_dict())
        torch.testing.assert_close(gradients(twin, inputs)[0], gradients(ours, inputs)[0])

    def test_both_sides_of_ammasurv(self) -> None:
        case = BY_NAME["AMMASurv"]
        config = replace(case.config(DIM), blocks=("pp", "pg", "gp", "gg"))
        ours, inputs = model_class(case.model)(config), batch(case)
        for layer in ours.layers:
            nn.init.normal_(layer.importance)
        twin = case.twin(config)
        twin.load_state_dict(ours.state_dict())
        (found, own), (logits, expected) = gradients(twin, inputs), gradients(ours, inputs)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
        key = "layers.0.importance"
        torch.testing.assert_close(own[key], expected[key], rtol=1e-3, atol=1e-5)


class TestRaces:
    def test_sets(self) -> None:
        found: dict[str, set[str]] = {"core": set(), "smoke": set()}
        for race in bench_models.races():
            for mark in race.marks:
                found[mark.name].add(race.values[0].name)
        assert found["core"] == found["smoke"] == set(BY_NAME)

    def test_tissue_is_all_patches_in_cells_of_their_own(self) -> None:
        cells = tissue(700)
        assert cells.shape == (700, 2)
        assert len(cells.unique(dim=0)) == 700
        width, height = (cells.amax(0) + 1).tolist()
        assert 700 / (width * height) > 0.25

    def test_the_loss_is_that_of_an_event_in_the_third_bin(self) -> None:
        logits = torch.tensor([[0.3, -1.0, 2.0, 5.0]])
        hazard = logits.sigmoid()[0]
        expected = -((1 - hazard[0]) * (1 - hazard[1]) * hazard[2]).log()
        torch.testing.assert_close(hazard_loss(logits), expected)

    @pytest.mark.parametrize(
        ("first", "second", "whole"),
        [(1.0, 2.0, 16.0), (1.0, 4.0, 256.0), (1.0, 1.0, 8.0), (0.0, 1.0, 64.0)],
        ids=["linear", "square", "constant", "from nothing"],
    )
    def test_what_parts_take_says_what_the_whole_will(self, first, second, whole) -> None:
        assert bench_models.extrapolated(first, second) == pytest.approx(whole)

    def test_a_wrong_way_stops_everything(self) -> None:
        case = BY_NAME["ABMIL"]
        models, inputs = case.models(DIM, "cpu"), case.inputs(20, DIM, "cpu")
        bench_models.check(case, models, inputs, "fp32", DIM, "cpu")
        nn.init.ones_(models[REFERENCE].readout.tasks["survival"].bias)
        with pytest.raises(AssertionError, match="ABMIL, survfuse reference: relative error"):
            bench_models.check(case, models, inputs, "fp32", DIM, "cpu")

    def test_where_ours_and_the_twin_part_they_are_compared_before(self) -> None:
        case = replace(BY_NAME["AMMASurv"], same_up_to=10)
        models, inputs = case.models(DIM, "cpu"), case.inputs(20, DIM, "cpu")
        poisoned = inputs[SLIDE]._replace(features=inputs[SLIDE].features * torch.nan)
        bench_models.check(case, models, inputs | {SLIDE: poisoned}, "fp32", DIM, "cpu")

    def test_what_does_not_fit_or_takes_too_long_is_left_out(self, monkeypatch) -> None:
        monkeypatch.setattr(bench_models, "FEWEST_JUDGED", 50)
        case = BY_NAME["MeanPool"]
        model = case.models(DIM, "cpu")[PLAIN]

        def obstacle(n_patches: int) -> str | None:
            return bench_models.obstacle(PLAIN, model, case, n_patches, "fp32", DIM, "cpu")

        assert obstacle(160) is None
        assert obstacle(40) is None
        monkeypatch.setattr(bench_models, "MOST_SECONDS", {"cpu": -1.0})
        assert obstacle(160) == "a step would take about 0 minutes"
        peak = (2e9, 0.0)
        monkeypatch.setattr(bench_models, "measured_once", lambda *_: peak)
        monkeypatch.setattr(bench_models, "free_memory", lambda _: 20e9)
        assert obstacle(160) == "would need about 16 GB"
        case = replace(case, all_pairs=(PLAIN,))
        assert obstacle(160) == "would need about 128 GB"
        # a map of one size needs no more for more patches
        case = replace(case, all_pairs=(), fixed_size=True)
        assert obstacle(160) == "a step would take about 0 minutes"
        monkeypatch.setattr(bench_models, "measured_once", lambda *_: (15e9, 0.0))
        assert obstacle(160) == "would need about 15 GB"
