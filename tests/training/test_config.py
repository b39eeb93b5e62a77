"""Configurations: what YAML may say, and what is said to whoever wrote it wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from survfuse.training.config import BASELINES, DataConfig, TrainConfig
from survfuse.training.config_files import ConfigError, dump_config, load_config, parse_config
from survfuse.training.protocols import PRESETS, leaks, quirks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == TrainConfig()


def test_a_resolved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = parse_config(
        {
            "protocol": "healnet",
            "data": {"source": "tcga_omics", "cohort": "kirp", "folder": "/data"},
            "model": {"preset": "released:kirp", "settings": {"ff_dropout": 0.1}},
            "evaluation": {"baselines": ["only:omics"]},
        }
    )
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dta": {}}, "dta is not a setting; did you mean data?"),
        ({"data": {"sorce": "x"}}, "data.sorce is not a setting; did you mean data.source?"),
        (
            {"data": {"simulation": {"n_trian": 3}}},
            "data.simulation.n_trian is not a setting; did you mean data.simulation.n_train?",
        ),
        ({"loss": {"qqq": 1}}, "valid names here: name, alpha, class_weights"),
        ({"loss": {"name": "nnl"}}, "loss.name is 'nnl'; it must be 'nll' or 'cox'"),
        ({"training": {"epochs": "many"}}, "training.epochs is 'many'; it must be a whole number"),
        ({"training": {"epochs": 1.5}}, "training.epochs is 1.5; it must be a whole number"),
        ({"training": 3}, "training is 3; it must be a section with keys of its own"),
        ({"training": {"seeds": [1, "a"]}}, "training.seeds.1 is 'a'; it must be a whole number"),
        ({"training": {"seeds": 1}}, "training.seeds is 1; it must be a list"),
        ({"training": {"seeds": []}}, "training.seeds is empty"),
        ({"training": {"seeds": [1, 1]}}, "seeds must differ"),
        ({"training": {"batch_size": 0}}, "training.batch_size is 0; it must be at least 1"),
        ({"evaluation": {"bootstrap": 50}}, "evaluation.bootstrap is 50; it must be at least 100"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr is 0.0; it must be above 0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan; it must be above 0"),
        ({"loss": {"alpha": 2}}, "loss.alpha is 2.0; it must be in [0, 1]"),
        ({"loss": {"name": "cox", "class_weights": "inverse"}}, "has no time bins"),
        ({"loss": {"name": "cox"}, "training": {"batch_size": 1}}, "at least 2"),
        ({"protocol": "honset"}, 'protocol.name is "honset"; it must be one of healnet, honest'),
        ({"protocol": {"split": "rows"}}, "brings its own validation rows"),
        ({"protocol": {"inner_fraction": 1.0}}, "protocol.inner_fraction is 1.0"),
        ({"data": {"source": "tcga_omics"}}, "data.cohort is not set"),
        ({"data": {"simulation": {"complete": 0.5}}}, "sum to 1"),
        ({"evaluation": {"baselines": ["cox"]}}, f"it must be one of {', '.join(BASELINES)}"),
        ({"evaluation": {"level": 1}}, "evaluation.level is 1.0; it must be in (0, 1)"),
        ({"model": {"preset": "papr"}}, 'model.preset is "papr"; it must be null or one of paper'),
        ({"model": {"preset": "released:luad"}}, "released:blca, released:brca"),
        (
            {"model": {"name": "mean_pool", "preset": "released:kirp"}},
            'model.preset is "released:kirp"; it must be null or one of default',
        ),
        (
            {"model": {"name": "clinical_cox", "preset": "paper"}},
            'model.preset is "paper", but model.name "clinical_cox" has no presets',
        ),
    ],
)
def test_wrong_values_are_named_with_their_path(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert message in str(caught.value)


def test_values_of_another_kind_are_named_with_what_they_must_be() -> None:
    with pytest.raises(TypeError, match=r"^training is \{'epochs': 3\}; .* a TrainingConfig"):
        TrainConfig(training={"epochs": 3})
    with pytest.raises(TypeError, match=r"^data\.simulation is 3; .* a SimulationConfig"):
        TrainConfig(data=DataConfig(simulation=3))
    for values in (None, "demo.yaml"):
        with pytest.raises(
            TypeError, match=f"^values is {values!r}; it must be a dict .*load_conf"
        ):
            parse_config(values)


def test_a_run_is_called_by_its_title_and_by_the_model_it_trains() -> None:
    for title, name, label in (
        ("", "mean_pool", "mean_pool"),
        ("HEALNet, KIRP", "healnet", "HEALNet, KIRP"),
        ("HEALNet, KIRP", "mean_pool", "HEALNet, KIRP (mean_pool)"),
        ("A study", "healnet", "A study (healnet)"),
        ("only:genes", "healnet", "only:genes"),
    ):
        assert parse_config({"title": title, "model": {"name": name}}).label == label


def test_every_wrong_key_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"loss": {"alfa": 1}, "training": {"epoch": 1}})
    assert "loss.alpha" in str(caught.value)
    assert "training.epochs" in str(caught.value)


def test_overrides_replace_values_and_open_the_short_form_of_a_protocol(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("protocol: healnet\ntraining: {epochs: 2}\n")
    config = load_config(
        path,
        overrides=["training.seeds=[7, 8]", "training.patience=null", "protocol.n_bins=5"],
    )
    assert config.training.seeds == (7, 8)
    assert config.training.patience is None
    assert config.training.epochs == 2
    assert (config.protocol.name, config.protocol.n_bins) == ("healnet", 5)
    assert config.protocol.split == "rows"


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training..epochs=3", "a.b=[1"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, overrides=[override])


def test_an_override_cannot_go_into_a_value(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training: 3\n")
    with pytest.raises(ConfigError, match="training is 3, not a section"):
        load_config(path, overrides=["training.epochs=3"])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not a YAML file"), ("- 1", "sections")])
def test_a_file_that_holds_no_sections_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "bad.yaml" in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  epochs: 1\n  seeds: [1]\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml is not a YAML file: .*epochs stands twice"):
        load_config(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": {"betas": [1, 2]}},
            r"betas is \[1(\.0)?, 2(\.0)?\]; it must be two numbers",
        ),
        ({"schedule": {"final_fraction": 7}}, "final_fraction is 7.*must be in"),
        ({"training": {"restarts": 0}}, "restarts is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_folders_are_relative_to_the_file_and_data_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {folder: ../data, bags: bags.h5}\n")
    config = load_config(path)
    assert config.data.folder == str((tmp_path / "../data").resolve())
    assert config.data.bags == str(tmp_path.resolve() / "bags.h5")
    assert load_config(path, data=tmp_path / "x").data.folder == str(tmp_path.resolve() / "x")


def test_a_preset_fills_in_what_the_file_leaves_open() -> None:
    config = parse_config({"protocol": "healnet", "training": {"epochs": 3}})
    assert config.loss.survival_divisor == 16
    assert config.loss.class_weights == "inverse"
    assert (config.schedule.name, config.schedule.max_lr) == ("onecycle", 0.008)
    assert config.training.epochs == 3
    assert config.protocol.weights == "last"


def test_every_preset_but_honest_names_its_leaks() -> None:
    for name in PRESETS:
        found = leaks(parse_config({"protocol": name}))
        assert bool(found) == (name != "honest"), name
    released = parse_config({"protocol": "healnet"})
    assert any("patient" in sentence for sentence in leaks(released))
    assert any("16" in sentence for sentence in quirks(released))
    assert quirks(TrainConfig()) == []


def test_every_shipped_configuration_is_valid() -> None:
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert {"demo", "demo_long", "slides", "kirp_negative_control"} <= {p.stem for p in paths}
    for path in paths:
        config = load_config(path)
        assert config.title, path
        # several threads only slow small models down; long bags need them
        assert config.training.threads == (None if path.stem == "demo_long" else 1), path
        # what a run writes into its folder reads back
        assert parse_config(config.to_dict()) == config, path


def test_a_configuration_needs_neither_pydantic_nor_yaml() -> None:
    program = (
        "import sys\n"
        "for name in ('pydantic', 'yaml', 'pandas', 'scipy', 'typer'): sys.modules[name] = None\n"
        "from survfuse.training import TrainConfig\n"
        "TrainConfig().to_dict()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
