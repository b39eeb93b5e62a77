"""MOTCat: transport plans against POT and their own conditions, micro-batches, refusals."""

from __future__ import annotations

import pytest
import torch
from patch_gene_cases import MODALITIES, all_inputs, small

from survfuse import Ragged
from survfuse.layers.transport_attention import TransportAttention, unbalanced_plan
from survfuse.models.motcat import MOTCat, MOTCatConfig


@pytest.mark.parametrize(("reg", "tau"), [(0.1, 0.5), (0.02, 2.0), (0.5, 0.05)])
def test_plans_are_those_of_pot(reg: float, tau: float) -> None:
    ot = pytest.importorskip("ot")
    torch.manual_seed(0)
    cost, there = torch.rand(3, 7, 4), torch.ones(3, 7, dtype=torch.bool)
    there[1, 5:] = False
    usable = torch.tensor([True, True, False, True])
    plans = unbalanced_plan(cost, there, usable, reg=reg, tau=tau)
    for plan, one, rows in zip(plans, cost, there):
        small_cost = one[rows][:, usable].double().numpy()
        n, g = small_cost.shape
        expected = ot.unbalanced.sinkhorn_knopp_unbalanced(
            ot.unif(n), ot.unif(g), small_cost, reg, tau, c=1.0 + 0 * small_cost, stopThr=1e-12
        )
        torch.testing.assert_close(
            plan[rows][:, usable], torch.from_numpy(expected), rtol=2e-5, atol=1e-9
        )
        assert not plan[~rows].any()
        assert not plan[:, ~usable].any()


def test_a_plan_is_stationary() -> None:
    """The gradient of what it minimises vanishes: C + reg log T + tau log of both marginals."""
    torch.manual_seed(0)
    cost = torch.rand(1, 6, 3, dtype=torch.float64)
    full = torch.ones(1, 6, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    plan = unbalanced_plan(cost, *full, reg=0.1, tau=0.5)
    slope = cost + 0.1 * plan.log()
    slope = slope + 0.5 * (plan.sum(2, keepdim=True) * 6).log()
    slope = slope + 0.5 * (plan.sum(1, keepdim=True) * 3).log()
    assert slope.abs().max() < 1e-5


def test_both_solvers_agree_in_the_model() -> None:
    pytest.importorskip("ot")
    inputs = all_inputs()
    found = [small(MOTCat, solver=solver).eval()(inputs) for solver in ("torch", "pot")]
    for name in ("patches", "joint"):
        torch.testing.assert_close(found[0].embeddings[name], found[1].embeddings[name])


def test_reads_the_mean_over_micro_batches() -> None:
    torch.manual_seed(0)
    layer = TransportAttention(8, 5, micro_batch=4).eval()
    bag, tokens, usable = torch.randn(10, 5), torch.randn(1, 3, 8), torch.ones(1, 3) > 0
    hidden = layer.project(bag, Ragged.from_lengths([10]))
    expected = torch.zeros(3, 8)
    for j in range(3):  # every third patch
        x = hidden[j::3] - hidden[j::3].amin(1, keepdim=True)
        y = tokens[0] - tokens[0].amin(1, keepdim=True)
        cost = (x[:, None] - y).square().sum(2)[None]
        there = torch.ones(cost.shape[:2], dtype=torch.bool)
        plan = unbalanced_plan(cost / cost.max(), there, usable[0], reg=0.1, tau=0.5)[0]
        expected = expected + plan.float().T @ hidden[j::3] / 3
    found = layer(tokens, usable, bag, Ragged.from_lengths([10]))[0]
    torch.testing.assert_close(found, expected)
    # drawn anew in training, and then not those
    layer.train()
    other = layer(tokens, usable, bag, Ragged.from_lengths([10]))[0]
    assert (other - expected).abs().max() > 1e-6
    layer.micro_batch = 16
    whole = layer(tokens, usable, bag, Ragged.from_lengths([10]))[0]
    torch.testing.assert_close(
        whole, layer.eval()(tokens, usable, bag, Ragged.from_lengths([10]))[0]
    )


def test_the_plan_is_a_constant_to_the_gradient() -> None:
    layer, bag = TransportAttention(8, 5), torch.randn(10, 5)
    tokens = torch.randn(1, 3, 8, requires_grad=True)
    layer(tokens, torch.ones(1, 3) > 0, bag, Ragged.from_lengths([10])).sum().backward()
    assert tokens.grad is None
    assert layer.project.weight.grad.any()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"transport_reg is 0\.001; it must be at least 0\.005"):
        MOTCatConfig(MODALITIES, transport_reg=0.001)
    with pytest.raises(ValueError, match="recompute is True; it must be False"):
        MOTCatConfig(MODALITIES, recompute=True)
    with pytest.raises(ValueError, match="solver is 'x'"):
        MOTCatConfig(MODALITIES, solver="x")
    with pytest.raises(ValueError, match="micro_batch is 0"):
        MOTCatConfig(MODALITIES, micro_batch=0)
    assert MOTCatConfig.from_preset("released:16384", modalities=MODALITIES).micro_batch == 16384
