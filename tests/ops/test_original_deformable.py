"""The baseline of the deformable benchmark computes the same thing; benchmarks/."""

from __future__ import annotations

import pytest
import torch

from benchmarks import original_deformable
from benchmarks.original_deformable import SOURCE, original_deformable_attention
from tests.cuda_emulator.build import build
from tests.ops.contract import CUDA
from tests.ops.deformable_cases import Case, make_call
from tests.ops.test_multi_scale_deformable_attention import result_and_gradients
from tests.ops.tolerance import assert_within_budget

CASES = (
    Case("three levels"),
    Case("serial sums", dim=33, batch=1),
    Case("sums by halves", dim=65, queries=3, batch=1),
    Case("powers of two", dim=64, queries=3, batch=1),
    Case("on borders", where="borders", shapes=((4, 8), (2, 2), (1, 1)), points=2),
    Case("NaN positions", where="nan"),
    Case("no queries", queries=0),
)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_type = pytest.mark.parametrize("dtype", original_deformable.TYPES, ids=str)


def check_baseline(case: Case, dtype: torch.dtype, device: str) -> None:
    call = make_call(case).to(dtype, device)
    value, locations, weights = call.tensors.values()
    shapes = torch.tensor(case.shapes, device=device)
    out = original_deformable_attention(value, shapes, locations, weights)
    got = result_and_gradients(call, out)
    exact_call, plain_call = call.to(torch.float64), call.to(dtype)
    exact = result_and_gradients(exact_call, exact_call.run("reference"))
    plain = result_and_gradients(plain_call, plain_call.run("reference"))
    for name, tensor in got.items():
        if tensor.numel():
            assert_within_budget(name, tensor, plain[name], exact[name], dtype)


@every_type
@every_case
def test_the_baseline_in_the_emulator(case: Case, dtype: torch.dtype, monkeypatch) -> None:
    library = original_deformable.load(build([SOURCE]))
    monkeypatch.setattr(original_deformable, "library_for", lambda device: library)
    monkeypatch.setattr(original_deformable, "_stream", lambda device: 0)
    check_baseline(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@every_type
@every_case
def test_the_baseline_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check_baseline(case, dtype, "cuda")


def test_without_a_gpu_it_says_so() -> None:
    call = make_call(CASES[0]).to(torch.float32)
    value, locations, weights = call.tensors.values()
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU; value is on cpu"):
        original_deformable_attention(value, torch.tensor(CASES[0].shapes), locations, weights)


def test_without_nvcc_it_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(RuntimeError, match="compiled by nvcc: none on PATH, nor under CUDA_HOME"):
        original_deformable._compiled.__wrapped__(9, 0)
