"""The documentation holds: links lead somewhere, examples run, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_examples_run() -> None:
    fences = FENCE.findall((ROOT / "README.md").read_text())
    blocks = [body for kind, body in fences if kind == "python"]
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        shapes = {"out": (2, 6, 1, 256), "logits": (2, 4)}
        found = {name: tuple(names[name].shape) for name in shapes if name in names}
        assert found
        assert found.items() <= shapes.items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    from survfuse.cli import COMMANDS

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, body in FENCE.findall(page.read_text()):
        for command in re.findall(r"^\s*survfuse ([a-z]+)", body, re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: survfuse {command}"
        for target in re.findall(r"^\s*make ([a-z]+)", body, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"
