"""Attention through landmarks: against a dense transcription, exact for short bags, per bag."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from survfuse import Ragged
from survfuse.layers import NystromSelfAttention
from survfuse.layers.nystrom_attention import pseudo_inverse, segment_means

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(**changes: object) -> NystromSelfAttention:
    settings: dict[str, object] = {"heads": 2, "dim_head": 4, "landmarks": 5, "residual_kernel": 3}
    return NystromSelfAttention(6, **{**settings, **changes}).double()


def plain(module: NystromSelfAttention, x: Tensor, *, exact: bool) -> Tensor:
    """One bag [N, dim], every matrix formed."""
    n, m = x.shape[0], min(module.landmarks, x.shape[0])
    edges = [j * n // m for j in range(m + 1)]
    split = (3, module.heads, module.dim_head)
    query, key, value = module.query_key_value(x).unflatten(1, split).permute(1, 2, 0, 3)
    marks = [torch.stack([t[:, i:j].mean(1) for i, j in pairwise(edges)], 1) for t in (query, key)]

    def weights(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.mT * module.dim_head**-0.5).softmax(-1)

    if exact:
        out = weights(query, key) @ value
    else:
        inverse = pseudo_inverse(weights(*marks), module.iterations)
        out = weights(query, marks[1]) @ inverse @ weights(marks[0], key) @ value
    if module.residual is not None:
        reach = module.residual.shape[1] // 2
        images = functional.pad(value, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)
        out = out + torch.einsum("hndk,hk->hnd", images, module.residual)
    return module.output(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kernel", [None, 1, 3, 33])
@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 40])
def test_one_bag_against_a_dense_transcription(n: int, kernel: int | None) -> None:
    module, x = layer(residual_kernel=kernel), torch.randn(n, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(module, x, exact=n <= 5))
    torch.testing.assert_close(module(x[None]), module(x)[None])


def test_the_formula_is_exact_attention_where_every_row_is_a_landmark() -> None:
    """What short bags get is what the paper's formula converges to."""
    module, x = layer(iterations=40), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(plain(module, x, exact=False), module(x), rtol=1e-5, atol=1e-6)


def test_the_pseudo_inverse() -> None:
    matrices = torch.randn(3, 8, 8, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(
        pseudo_inverse(matrices, 30), matrices.inverse(), rtol=1e-6, atol=1e-6
    )
    singular = matrices.clone()
    singular[:, 5:] = 0.0
    singular[..., 5:] = 0.0
    found = pseudo_inverse(singular, 30)
    torch.testing.assert_close(found, torch.linalg.pinv(singular), rtol=1e-6, atol=1e-6)
    # a matrix is inverted as if it were alone
    torch.testing.assert_close(pseudo_inverse(matrices, 3)[1:2], pseudo_inverse(matrices[1:2], 3))
    assert (pseudo_inverse(torch.zeros(2, 2), 6) == 0).all()


LENGTHS = [7, 0, 23, 1, 5, 4]


@pytest.mark.parametrize("kernel", [None, 5])
def test_every_bag_as_if_alone(kernel: int | None) -> None:
    module, ragged = layer(residual_kernel=kernel), Ragged.from_lengths(LENGTHS)
    x = torch.randn(ragged.total, 6, dtype=torch.float64)
    parts = [module(part) for part in x.split(LENGTHS)]
    assert [len(part) for part in parts] == LENGTHS
    torch.testing.assert_close(module(x, ragged), torch.cat(parts))
    dense = torch.randn(3, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(module(dense), torch.stack([module(bag) for bag in dense]))


def test_bags_may_leave_gaps_and_repeat() -> None:
    """Results are packed in batch order; a row in no bag may hold NaN."""
    module, x = layer(), torch.randn(20, 6, dtype=torch.float64)
    x[:2] = torch.nan
    ragged = Ragged.from_ranges([12, 2, 12], [8, 4, 8])
    x.requires_grad_()
    found = module(x, ragged)
    expected = [module(x[12:].detach()), module(x[2:6].detach()), module(x[12:].detach())]
    torch.testing.assert_close(found, torch.cat(expected))
    found.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert (x.grad[:2] == 0).all()
    assert (x.grad[6:12] == 0).all()


def test_means_of_runs() -> None:
    x = torch.arange(9.0)[:, None]
    marks = segment_means(x, Ragged.from_lengths([7, 0, 2]), 3)
    assert marks.rows[..., 0].tolist() == [[0.5, 2.5, 5.0], [0.0, 0.0, 0.0], [7.0, 8.0, 0.0]]
    assert marks.present.tolist() == [[True] * 3, [False] * 3, [True, True, False]]


@pytest.mark.parametrize("lengths", [[9, 3, 0], [0], [0, 0], [1]])
def test_gradients(lengths: list[int]) -> None:
    module, ragged = layer(iterations=3), Ragged.from_lengths(lengths)
    x = torch.randn(ragged.total, 6, dtype=torch.float64, requires_grad=True)
    names, leaves = zip(*((k, v.detach().requires_grad_()) for k, v in module.named_parameters()))

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, ragged))

    if ragged.total:
        assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)
    run(x, *leaves).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_and_autocast(dtype: torch.dtype) -> None:
    module, x = layer(landmarks=4).float(), torch.randn(30, 6)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = module(x.to(dtype))
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.05)
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_dropout_acts_in_training_only() -> None:
    module, x = layer(dropout=0.5), torch.randn(12, 6, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_compiles_to_one_graph_for_all_lengths() -> None:
    module, counter = layer(landmarks=3).eval(), CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for lengths in ([6, 5, 4], [7, 4, 9, 8], [30, 11, 8, 5, 6]):
            ragged = Ragged.from_lengths(lengths)
            x = torch.randn(ragged.total, 6, dtype=torch.float64)
            torch.testing.assert_close(compiled(x, ragged), module(x, ragged))
    assert counter.frame_count <= 2


def test_sizes_are_checked() -> None:
    for name in ("heads", "dim_head", "landmarks", "iterations"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            layer(**{name: 0})
    with pytest.raises(ValueError, match="residual_kernel is 4; it must be odd, or None"):
        layer(residual_kernel=4)
