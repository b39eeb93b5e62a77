"""The examples in docstrings are run, and the public functions of the ops have one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from survfuse import Ragged, ops

ROOT = Path(__file__).resolve().parents[1]


def modules_with_examples() -> list[str]:
    found = []
    for path in sorted((ROOT / "survfuse").rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    # numbers are shown with torch's own settings, which another test may have changed
    torch.set_printoptions(profile="default")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0, "doctest printed what it expected and what it got"


@pytest.mark.parametrize(
    "item",
    [
        Ragged,
        ops.bag_attends_tokens,
        ops.cross_attention,
        ops.pool_bag,
        ops.pool_weights,
        ops.selected_backend,
        ops.spread_tokens,
        ops.tokens_attend_bag,
        ops.cross_attention_weights,
        ops.merge_attention,
        ops.merge_over_group,
        ops.block_attention,
        ops.grid_index,
        ops.sample_bag,
    ],
    ids=lambda item: item.__name__,
)
def test_public_ops_have_an_example(item) -> None:
    assert ">>> " in inspect.getdoc(item)


@pytest.mark.parametrize("name", [name for name in ops.__all__ if callable(getattr(ops, name))])
def test_public_names_are_described(name: str) -> None:
    item = getattr(ops, name)
    text = inspect.getdoc(item)
    # a NamedTuple without a docstring of its own describes its fields, and nothing else
    assert text
    assert not text.startswith(f"{name}(")
