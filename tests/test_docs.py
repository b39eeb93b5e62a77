"""The documentation holds: links lead somewhere, examples run, commands exist."""

from __future__ import annotations

import doctest
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


# a template with gaps; a page whose first example trains the demo for minutes
NOT_RUN = ("adding-an-op.md", "training.md")
RUNNABLE = [
    page
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name not in NOT_RUN and "```python\n" in page.read_text()
]
NEEDS_DATA = "# needs the public data: folder"


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(request.config.getoption("--shared-data"))
    names: dict = {"folder": folder}
    for kind, body in FENCE.findall(page.read_text()):
        first = body.split("\n", 1)[0]
        if kind == "yaml" and first.startswith("# "):
            # the file that the first line names, for the fences behind it
            (tmp_path / first[2:]).write_text(body)
        elif kind == "python" and first.startswith(">>> "):
            test = doctest.DocTestParser().get_doctest(body, {}, page.name, str(page), 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        elif kind == "python" and (first != NEEDS_DATA or folder.is_dir()):
            exec(compile(body, page.name, "exec"), names)


def test_the_example_of_a_cohort_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    fences = FENCE.findall((ROOT / "docs/cohorts.md").read_text())
    blocks = [body for kind, body in fences if kind == "python"]
    for block in blocks[:2]:
        exec(compile(block, "cohorts.md", "exec"), names)
    cohort = names["cohort"]
    assert cohort.channels() == {"genes": ("table", 8), "slides": ("bag", 16)}
    assert cohort.present("genes").sum() == 50
    # two slides of thirty patches each
    assert cohort.modalities["slides"].n_patches[:6].tolist() == [60, 60, 60, 60, 60, 30]
    shown = re.search(r"^cohort  # (.*)$", blocks[1], re.MULTILINE)[1]
    assert shown.replace("...", "").split(", ")[0] in repr(cohort)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    from survfuse.cli import COMMANDS

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, body in FENCE.findall(page.read_text()):
        for command in re.findall(r"^\s*survfuse ([a-z]+)", body, re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: survfuse {command}"
        for target in re.findall(r"^\s*make ([a-z]+)", body, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"
