"""The Triton kernels compile for Hopper and spill nothing; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "compile_triton.py"


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills() -> None:
    pytest.importorskip("triton")
    # a process of its own: this one may have the kernels in the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--targets", "sm_90"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_90")]
    kernels = {line[1] for line in compiled}
    # the tile of the bag must stay in the asynchronous pipeline: the last column counts its copies
    streams = {"pool_bag_fwd", "pool_bag_bwd_rows", "cross_attention_many_fwd"}
    streams |= {"cross_attention_few_fwd", "cross_attention_few_bwd", "spread_tokens_fwd"}
    streaming = [line for line in compiled if line[1] in streams]
    assert all(int(line[-1]) > 0 for line in streaming if line[2] == "bf16")
    assert kernels == {
        *("pool_bag_fwd", "pool_bag_merge", "pool_bag_bwd_rows", "pool_bag_sum"),
        *("pool_bag_prepare", "pool_bag_scores", "pool_bag_product", "pool_bag_bwd_bag"),
        *("cross_attention_few_fwd", "cross_attention_few_bwd", "cross_attention_many_fwd"),
        *("cross_attention_bwd_query", "cross_attention_bwd_key"),
        *("cross_attention_merge", "cross_attention_sum"),
        *("spread_tokens_fwd", "spread_tokens_rows", "spread_tokens_bwd", "spread_tokens_bag"),
        "spread_tokens_sum",
        *("gated_scores", "gated_hidden", "gated_weights", "gated_bag"),
        *("deformable_fwd", "deformable_bwd"),
    }


def test_the_script_refuses_the_interpreter_and_unknown_targets() -> None:
    pytest.importorskip("triton")
    for arguments, interpret, word in (
        (["--quick"], "1", "TRITON_INTERPRET"),
        (["--quick", "--targets", "sm_1"], "0", "sm_1"),
    ):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": interpret},
            check=False,
        )
        assert done.returncode == 2
        assert word in done.stderr
