"""Protocol presets: what each fills in, and which leaks it has by design.

A preset sets defaults; whatever a configuration file says itself wins. The resolved configuration
in the run folder spells every value out.
"""

from __future__ import annotations

from typing import Any

from survfuse.training.config import TrainConfig
from survfuse.training.tasks import survival_task

# released settings: HEALNet's recipe is healnet/main.py and config/main_gpu.yml
# of konst-int-i/healnet at 90459b6; MCAT's and SurvPath's are main.py of their repositories
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "honest": {"protocol": {}},
    "healnet": {
        "data": {"tables": "healnet"},
        "protocol": {
            "rows": "slides",
            "split": "rows",
            "bins": "all",
            "fill": "all",
            "scale": False,
            "clip": None,
            "validation": "split",
            "weights": "last",
        },
        "loss": {
            "name": "nll",
            "alpha": 0.4,
            "class_weights": "inverse",
            "survival_divisor": 16.0,
        },
        "optimizer": {"name": "adam", "lr": 0.007765016508403882, "weight_decay": 0.0},
        "schedule": {"name": "onecycle", "max_lr": 0.008},
        "training": {
            "epochs": 50,
            "batch_size": 4,
            "clip_norm": None,
            "patience": 5,
            "metric": "loss",
            "seeds": [1, 2, 3, 4, 5],
        },
    },
    "mcat": {
        "protocol": {
            "split": "published",
            "bins": "all",
            "validation": "test",
            "weights": "last",
        },
        "training": {"patience": None},
    },
    "survpath": {
        "data": {"endpoint": "DSS"},
        "protocol": {
            "split": "published",
            "bins": "all",
            "validation": "none",
            "weights": "last",
        },
        "loss": {"alpha": 0.5},
        "training": {"patience": None},
    },
}


def fill_in(values: dict[str, Any]) -> dict[str, Any]:
    """Merge a configuration file's values over the preset it names.

    `protocol: healnet` is short for `protocol: {name: healnet}`.

    Raises:
        ValueError: there is no such protocol.
    """
    values = dict(values)
    protocol = values.get("protocol", {})
    if isinstance(protocol, str):
        protocol = {"name": protocol}
        values["protocol"] = protocol
    if not isinstance(protocol, dict):
        return values
    name = protocol.get("name", "honest")
    if name not in PRESETS:
        raise ValueError(
            f'protocol.name is "{name}"; it must be one of {", ".join(sorted(PRESETS))}'
        )
    merged = {section: dict(defaults) for section, defaults in PRESETS[name].items()}
    for section, given in values.items():
        if isinstance(given, dict) and section in merged:
            merged[section] = {**merged[section], **given}
        else:
            merged[section] = given
    return merged


def leaks(config: TrainConfig) -> list[str]:
    """What this protocol lets the test patients tell the model, in sentences for the report."""
    protocol, found = config.protocol, []
    if protocol.split == "rows" and protocol.rows == "slides":
        found.append(
            "rows are slides and are split at random: slides of one patient can lie on both sides"
        )
    if protocol.bins == "all" and survival_task(config) is not None:
        found.append("the edges of the time bins are fitted on all rows, test rows included")
    if protocol.fill == "all":
        what = "missing numbers are filled with means over all rows, test rows included"
        cut = ["clipped"] * (protocol.clip is not None) + ["scaled"] * protocol.scale
        if cut:
            what += f", and tables are {' and '.join(cut)} by statistics of them"
        found.append(what)
    if protocol.validation == "test":
        found.append("the rows that early stopping watches are the test rows")
    return found


def quirks(config: TrainConfig) -> list[str]:
    """Choices of a published recipe that a reader would not expect; not leaks."""
    protocol, loss, found = config.protocol, config.loss, []
    if protocol.weights == "last" and protocol.validation != "none" and config.training.patience:
        found.append(
            "early stopping only decides when to stop: the weights of the last epoch are evaluated "
            '(the released code keeps its "best" weights by reference, which is the same)'
        )
    if loss.survival_divisor != 1:
        found.append(
            f"the survival loss is divided by {loss.survival_divisor:g} and the L1 term is not, "
            f"so L1 acts {loss.survival_divisor:g} times as strong"
        )
    if config.training.restarts > 1:
        found.append(
            f"every fold is the best of {config.training.restarts} trainings on its validation rows"
        )
    if not protocol.scale:
        found.append("tables enter as they are in the file, neither scaled nor clipped")
    return found
