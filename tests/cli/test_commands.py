"""The command line: what it teaches, what it refuses, and how it exits."""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_cases import TINY, call, interrupt

from survfuse.cli import COMMANDS, main
from survfuse.training.run_folder import RunFolderError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(TINY)
    assert call("train", folder / "tiny.yaml", "--out", folder / "run", "--quiet") == 0
    return folder / "run"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for name, (_, _, about) in COMMANDS.items():
        assert name in text
        assert about in text
    assert "Exit codes" in text
    assert call() == 2


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_teaches_by_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    assert f"survfuse {name} " in capsys.readouterr().out


def test_the_examples_of_train_do_what_they_say(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    # as wide as a terminal: an example that is broken over two lines cannot be copied
    monkeypatch.setenv("COLUMNS", "80")
    assert call("train", "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [shlex.split(line)[1:] for line in lines if line.startswith("survfuse train ")]
    assert len(examples) == 4
    for example in examples:
        if "--resume" in example:
            continue
        example = [str(shared_data) if part == "/data/public" else part for part in example]
        assert call(*example, "--check") == 0, example
        assert "cohort" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import survfuse

    assert call("--version") == 0
    assert capsys.readouterr().out == f"survfuse {survfuse.__version__}\n"


def test_an_unknown_command_has_a_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("trian") == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a configuration file"),
        (["train", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["train", "demo.yaml", "-s", "training.epoch=3"], "did you mean training.epochs?"),
        (["train", "demo.yaml", "-s", "training.epochs"], "must look like section.key=value"),
        (["train", "demo.yaml", "--resume", "x"], "--resume takes everything from the run folder"),
        (["train", "--resume", "nowhere"], "nowhere holds no run to resume"),
        (["evaluate", "nowhere"], "there is no run folder nowhere"),
        (["evaluate", "."], "holds no predictions.json"),
        (["train", "tcga_kirp_honest.yaml", "--data", "gone"], "does not exist"),
        (["demo", "--patches", "-5"], "--patches is -5; it must be at least 1024"),
        (["demo", "--small", "--patches", "9999"], "--patches is 9999; it must be at least 10240"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo.yaml", "tcga_kirp_honest.yaml"):
        (tmp_path / name).write_text((CONFIGS / name).read_text())
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1
    # nothing half-written
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--no-such-option") == 2
    assert "no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (BlockingIOError(errno.EAGAIN, "another process is packing this store"), 2),
        (OSError("truncated file"), 2),
        (ValueError("settings"), 2),
        (ImportError("needs h5py"), 2),
        (RunFolderError("holds no run"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1),
        (OSError(errno.EIO, "Input/output error", "x"), 1),
        (RuntimeError("the loss is not finite"), 1),
        (KeyError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
@pytest.mark.parametrize("command", ["pack", "evaluate"])
def test_the_exit_code_tells_bad_input_from_a_failure(
    command: str,
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("survfuse.cli.pack.pack", fail)
    monkeypatch.setattr("survfuse.cli.evaluate._check_runs", fail)
    assert call(command, "x", "--out", "y") == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "Errno" not in err
    assert err.count("\n") == 1


def test_debug_shows_where(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.yaml")
    for arguments in (["train", nowhere], ["pack", nowhere, "--out", "x.h5"]):
        with pytest.raises(FileNotFoundError):
            main([*arguments, "--debug"])


def test_train_prints_the_result_and_where_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (run / "report.md").is_file()
    assert call("train", "--resume", run) == 0
    out = capsys.readouterr().out
    assert "mean_pool" in out
    assert "oracle" in out
    assert call("train", run.parent / "tiny.yaml", "--out", run) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_check_says_what_would_run_and_writes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", run.parent / "tiny.yaml", "--check") == 0
    out = capsys.readouterr().out
    assert "70 patients" in out
    assert "train 30" in out
    assert "parameters" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.device=warp", 'training.device is "warp"'),
        ("evaluation.baselines=[only:gene]", "the modalities are genes, slides"),
        ("model={name: elastic_net_cox, settings: {strenth: 1}}", "model.settings.strenth"),
    ],
)
def test_check_refuses_what_the_run_refuses_at_once(
    override: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", run.parent / "tiny.yaml", "-s", override]
    for more in (["--check"], ["--out", tmp_path / "run"]):
        assert call(*arguments, *more) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from survfuse.training import run_folds

    monkeypatch.setattr(run_folds, "train_fold", interrupt)
    out = tmp_path / "run"
    assert call("train", run.parent / "tiny.yaml", "--out", out, "--quiet") == 130
    assert f"survfuse train --resume {out}" in capsys.readouterr().err
    monkeypatch.undo()
    assert call("train", "--resume", out, "--quiet") == 0
    assert (out / "report.json").read_bytes() == (run / "report.json").read_bytes()


def test_a_run_interrupted_before_it_began_cannot_be_resumed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("survfuse.training.run.load_cohort", interrupt)
    assert call("train", run.parent / "tiny.yaml", "--out", tmp_path / "run", "--quiet") == 130
    assert capsys.readouterr().err.strip() == "stopped; nothing was trained yet"


def test_an_interrupted_demo_goes_on_when_it_is_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.setattr("survfuse.cli.demo.demo_config", lambda small: yaml.safe_load(TINY))
    for place, said in (
        ("survfuse.training.run.load_cohort", "nothing was trained yet"),
        ("survfuse.training.run_folds.train_fold", "the same command goes on from here"),
        ("survfuse.cli.demo.print_kernels", "the same command goes on from here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert call("demo", "--out", tmp_path / "demo") == 130
        assert capsys.readouterr().err.endswith(f"stopped; {said}\n")


def test_an_interrupted_encode_says_whether_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("survfuse.cli.encode.encode_slide", interrupt)
    cases = (([], "stopped; the same command goes on from here"), (["--overwrite"], "stopped"))
    for more, said in cases:
        assert call("encode", "a.svs", "--out", tmp_path / "bags", *more) == 130
        assert capsys.readouterr().err.strip() == said


def test_evaluate_reports_one_run_and_compares_two(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", run, "--resamples", 100) == 0
    assert "Harrell's C" in capsys.readouterr().out
    other = tmp_path / "other"
    assert call("train", run.parent / "tiny.yaml", "-o", other, "-q", "-s", "optimizer.lr=0.1") == 0
    capsys.readouterr()
    tables = tmp_path / "tables"
    assert call("evaluate", run, other, "--resamples", 100, "--json", "--out", tables) == 0
    found = json.loads(capsys.readouterr().out)
    # two runs of one model are told apart by their folders
    assert found["comparison"]["pairs"][0]["model_b"] == "mean_pool (other)"
    assert len(found["reports"]) == 2
    assert (tables / "comparison.md").is_file()
    assert (tables / "concordance.png").is_file()


def test_evaluate_writes_a_report_where_there_are_no_risk_groups(
    run: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_group(*_: object) -> None:
        raise ValueError("all patients are of one risk group")

    monkeypatch.setattr("survfuse.evaluation.report_files.write_kaplan_meier", one_group)
    assert call("evaluate", run, "--resamples", 100, "--out", tmp_path) == 0
    captured = capsys.readouterr()
    assert "no Kaplan-Meier figure: all patients are of one risk group" in captured.err
    assert "Harrell's C" in captured.out
    assert (tmp_path / "report.json").is_file()


def test_the_embedded_demo_is_the_shipped_configuration() -> None:
    from survfuse.cli.demo import demo_config
    from survfuse.training.config_files import load_config, parse_config

    assert parse_config(demo_config()) == load_config(CONFIGS / "demo.yaml")
    small = parse_config(demo_config(small=True)).data.simulation
    assert (small.n_train, small.n_inner, small.n_test) == (600, 100, 100)


def test_the_demo_runs_and_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from survfuse.cli import demo

    monkeypatch.setattr(demo, "demo_config", lambda small: yaml.safe_load(TINY))
    monkeypatch.setattr(demo, "print_kernels", lambda patches: print(f"bag of {patches}"))
    for _ in range(2):
        assert call("demo", "--out", tmp_path / "demo", "--patches", 50_000, "--small") == 0
        out = capsys.readouterr().out
        assert "oracle" in out
        assert "bag of 5000" in out
    assert (tmp_path / "demo/figures/concordance.png").is_file()


def test_the_kernel_is_measured_in_its_own_process_and_checked() -> None:
    from survfuse.cli.demo import largest_error, measure

    ours, plain = (measure(kind, 2000) for kind in ("survfuse", "torch"))
    assert largest_error(ours["outputs"], plain["outputs"]) < 1e-3
    assert ours["patches"] == plain["patches"] > 1900
    assert ours["seconds"] > 0
    wrong = [ours["outputs"][0] + 1, *ours["outputs"][1:]]
    with pytest.raises(RuntimeError, match="disagree"):
        largest_error(wrong, plain["outputs"])
    with pytest.raises(RuntimeError, match="measurement of survfuse attention failed"):
        measure("survfuse", 3)


def test_help_is_quick_to_import() -> None:
    program = (
        "import sys, survfuse.cli\n"
        "heavy = {'typer', 'rich', 'pandas', 'pydantic', 'triton', 'matplotlib', 'h5py', 'scipy'}\n"
        "survfuse.cli._main(['--help'])\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True)
