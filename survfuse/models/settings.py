"""Checks that the configurations of all models share, and what a modality is to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

KINDS = ("bag", "table", "array", "graph")


@dataclass(frozen=True)
class ModalityConfig:
    """One modality of a model.

    Attributes:
        kind: "bag" (`BagBatch`), "table" (`TableBatch`), "array" (`ArrayBatch`), "graph"
            (`GraphBatch`).
        channels: features per patch, columns of the table, channels of the array, features per
            node.
        axes: coordinates that are Fourier encoded and appended to the channels. An array: its
            spatial axes (at least 1). A bag: 0 none (the order of the patches does not matter and
            the bag is read in place), 1 the patch's index (released HEALNet), 2 the patch's slide
            coordinates. A table: 0, or 1 for the column's index. A graph: 0.
        table_tokens: "one" (the row is one token whose channels are the columns, so attention over
            it is always 1) or "features" (one token per column: its value and its index, encoded).
        walk_steps: graphs only, number of random-walk return probabilities appended to each node.
        groups: tables only, named sets of column numbers (gene families, pathways), which models
            with a token per group read; they may overlap. Empty: the whole table is one group.

    Raises:
        ValueError: a value is out of range or does not fit the kind.
    """

    kind: str
    channels: int
    axes: int = 0
    table_tokens: str = "one"
    walk_steps: int = 0
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        check_integers(self, {"channels": 1, "axes": 0, "walk_steps": 0})
        check_choice(self, "table_tokens", ("one", "features"))
        if self.kind != "table" and self.table_tokens != "one":
            raise ValueError(f"table_tokens is 'features' on a {self.kind}; only tables take it")
        if self.kind != "graph" and self.walk_steps:
            raise ValueError(f"walk_steps is {self.walk_steps} on a {self.kind}; it must be 0")
        low, high = {"bag": (0, 2), "table": (0, 1), "array": (1, None), "graph": (0, 0)}[self.kind]
        if self.axes < low or (high is not None and self.axes > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"axes is {self.axes} on a {self.kind}; it must be {allowed}")
        if self.table_tokens == "features" and self.axes == 0:
            raise ValueError(
                "axes is 0 with table_tokens 'features'; it must be 1, because without its "
                "encoded index a column cannot be told from another"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise ValueError(
                f"groups is {self.groups!r}; it must map names to tuples of column numbers"
            )
        if self.groups and self.kind != "table":
            raise ValueError(f"groups are given on a {self.kind}; only tables take them")
        # plain numbers, whatever kind of integer they came as
        groups = {name: tuple(int(i) for i in group) for name, group in self.groups.items()}
        object.__setattr__(self, "groups", groups)
        for name, group in groups.items():
            outside = [i for i in group if not 0 <= i < self.channels]
            if outside or not group:
                found = f"holds column {outside[0]}" if outside else "is empty"
                raise ValueError(
                    f"groups[{name!r}] {found}; it must hold column numbers below {self.channels}"
                )


def parse_modalities(modalities: Mapping[str, Any]) -> dict[str, ModalityConfig]:
    """`ModalityConfig` by name, of configurations, their dictionaries, or tuples.

    A tuple is (kind, channels), and for a table that has them (kind, channels, groups).

    Raises:
        ValueError: none, a name that is none, or a modality that is none of these.
    """
    if not isinstance(modalities, Mapping) or not modalities:
        raise ValueError(
            f"modalities is {modalities!r}; it must map at least one name to a ModalityConfig"
        )
    parsed = {}
    known = [item.name for item in fields(ModalityConfig)]
    for name, value in modalities.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"modalities has the name {name!r}; it must be a non-empty string")
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in known]
            if unknown:
                raise ValueError(
                    f"modality {name!r} has the unknown field {unknown[0]!r}; it takes {known}"
                )
            value = ModalityConfig(**value)
        elif isinstance(value, (tuple, list)) and len(value) in (2, 3):
            value = default_modality(*value)
        if not isinstance(value, ModalityConfig):
            raise ValueError(
                f"modality {name!r} is {value!r}; it must be a ModalityConfig, or (kind, channels) "
                "such as ('bag', 1024)"
            )
        parsed[name] = value
    return parsed


def bags_and_graphs(modalities: Mapping[str, ModalityConfig]) -> list[str]:
    """The modalities whose tokens are patches or nodes."""
    return [name for name, modality in modalities.items() if modality.kind in ("bag", "graph")]


def default_modality(
    kind: str, channels: int, groups: Mapping[str, tuple[int, ...]] | None = None
) -> ModalityConfig:
    """What (kind, channels) stands for: no encoded positions, and the walks of a graph's edges.

    Raises:
        ValueError: an array, whose number of axes is not known.
    """
    if kind == "array":
        raise ValueError(
            "an array needs ModalityConfig('array', channels, axes=...): (kind, channels) does not "
            "say how many spatial axes it has"
        )
    return ModalityConfig(
        kind, channels, walk_steps=8 if kind == "graph" else 0, groups=groups or {}
    )


def parse_outputs(outputs: Mapping[str, int]) -> dict[str, int]:
    """Checked numbers of logits by task.

    Raises:
        ValueError: a name that cannot name a task, or a number below 1.
    """
    if not isinstance(outputs, Mapping):
        raise ValueError(f"outputs is {outputs!r}; it must map names of tasks to numbers of logits")
    for name, width in outputs.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"outputs has the task {name!r}; a task must be named like a variable")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(f"outputs[{name!r}] is {width!r}; it must be an integer of at least 1")
    return dict(outputs)


def check_integers(config: Any, lows: Mapping[str, int]) -> None:
    """Raise unless each named field is an integer of at least so much."""
    for name, low in lows.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")


def check_widths(config: Any, *names: str, least: int = 1) -> None:
    """Make each named field a tuple of layer widths, or raise unless it holds so many of them."""
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, (tuple, list)) and len(value) >= least
        if not whole or any(not isinstance(w, int) or isinstance(w, bool) or w < 1 for w in value):
            number = (
                f"the width of at least {least} layer, each an integer" if least else "integers"
            )
            raise ValueError(f"{name} is {value!r}; it must hold {number} of at least 1")
        object.__setattr__(config, name, tuple(value))


def check_number(config: Any, name: str) -> None:
    """Raise unless the field is a number."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def check_probabilities(config: Any, *names: str) -> None:
    """Raise unless each named field is in [0, 1)."""
    for name in names:
        check_number(config, name)
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be in [0, 1)")


def check_positive(config: Any, *names: str) -> None:
    """Raise unless each named field is above 0."""
    for name in names:
        check_number(config, name)
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be greater than 0")


def check_not_negative(config: Any, name: str) -> None:
    """Raise unless the field is at least 0."""
    check_number(config, name)
    if not getattr(config, name) >= 0:
        raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 0")


def check_flags(config: Any, *names: str) -> None:
    """Raise unless each named field is True or False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be True or False")


def check_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise unless the field is one of the words."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {list(allowed)}")
