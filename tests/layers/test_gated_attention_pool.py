"""The module against the formula as CLAM writes it, and the loading of CLAM's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from survfuse import Ragged
from survfuse.layers import GatedAttentionPool

DIM, HIDDEN, POOLS = 12, 6, 2


class Net(nn.Module):
    """A gated attention network with CLAM's names: two branches, then one linear map."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        drop = [nn.Dropout(0.25)] if dropout else []
        self.attention_a = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), *drop)
        self.attention_b = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Sigmoid(), *drop)
        self.attention_c = nn.Linear(HIDDEN, POOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention_c(self.attention_a(x) * self.attention_b(x))


@pytest.mark.parametrize("dropout", [False, True])
def test_weights_of_clam_load_and_give_the_same(dropout: bool) -> None:
    net = Net(dropout).double().eval()
    model = nn.Sequential(nn.Linear(3, 3), net)  # a model that holds it
    x = torch.randn(40, DIM, dtype=torch.double)
    weights = net(x).T.softmax(1)
    for state, prefix in ((net.state_dict(), ""), (model.state_dict(), "1.")):
        pool = GatedAttentionPool.from_clam(state, prefix=prefix)
        torch.testing.assert_close(pool(x)[0], weights @ x)
        torch.testing.assert_close(pool.weights(x), weights.T)
        torch.testing.assert_close(pool.weights(x, reduce="rows"), weights.mean(0))


def test_a_missing_entry_is_named() -> None:
    state = Net(False).state_dict()
    with pytest.raises(ValueError, match=r"'net\.attention_a\.0\.weight'"):
        GatedAttentionPool.from_clam(state, prefix="net.")
    del state["attention_c.bias"]
    with pytest.raises(ValueError, match=r"'attention_c\.bias'"):
        GatedAttentionPool.from_clam(state)


def test_every_parameter_learns_and_bags_stay_apart() -> None:
    pool = GatedAttentionPool(DIM, HIDDEN, POOLS)
    x, ragged = torch.randn(30, DIM), Ragged.from_lengths([20, 0, 10])
    pooled = pool(x, ragged)
    assert pooled.shape == (3, POOLS, DIM)
    torch.testing.assert_close(pooled[2:], pool(x[20:]))
    assert not pooled[1].any()
    (pooled**2).sum().backward()
    for name, parameter in pool.named_parameters():
        # the weights sum to 1 whatever is added to all logits
        assert bool(parameter.grad.any()) == (name != "score.bias"), name


def test_excluded_patches_and_dropout() -> None:
    pool = GatedAttentionPool(DIM, HIDDEN, dropout=0.5)
    x, bias = torch.randn(9, DIM), torch.zeros(9)
    x[4], bias[4] = torch.nan, -torch.inf
    rest = torch.cat([x[:4], x[5:]])
    assert not torch.equal(pool(x, bias=bias), pool.eval()(rest))
    torch.testing.assert_close(pool(x, bias=bias), pool(rest))
    weights = pool.weights(x, bias=bias)
    assert weights[4] == 0
    torch.testing.assert_close(weights.sum(0), torch.ones(1))


def test_weights_run_where_pooling_has_a_backend_of_its_own() -> None:
    pool = GatedAttentionPool(DIM, HIDDEN, backend="reference").double()
    x = torch.randn(5, DIM, dtype=torch.double, requires_grad=True)
    # double backward, as only the reference has
    gradient = torch.autograd.grad(pool.weights(x)[0, 0], x, create_graph=True)[0]
    assert gradient.square().sum().requires_grad
    torch.autograd.grad(gradient.square().sum(), x)


def test_a_temperature_divides_the_logits() -> None:
    pool = GatedAttentionPool(DIM, HIDDEN, temperature=0.25).double()
    x = torch.randn(40, DIM, dtype=torch.double)
    logits = pool.score(pool.value(x).tanh() * pool.gate(x).sigmoid())
    weights = (logits / 0.25).softmax(0)
    torch.testing.assert_close(pool.weights(x), weights)
    torch.testing.assert_close(pool(x)[0], weights.T @ x)
    with pytest.raises(ValueError, match="temperature is 0; it must be greater than 0"):
        GatedAttentionPool(DIM, HIDDEN, temperature=0)
