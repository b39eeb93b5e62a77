"""Read and check the YAML configuration of a run.

Errors say the dotted path, what stood there and what it must be; an unknown key comes with the
nearest valid name. pydantic checks the types of the dataclasses in `survfuse.training.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from pathlib import Path
from typing import Any

from survfuse.data.atomic import atomic_path
from survfuse.extras import require
from survfuse.training.config import TrainConfig
from survfuse.training.protocols import fill_in


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is meant for the person who wrote it."""


def load_config(
    path: str | os.PathLike[str],
    *,
    overrides: typing.Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
) -> TrainConfig:
    """Read a configuration file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings that replace values of the file; the value is YAML,
            so `training.seeds=[1, 2]` and `training.patience=null` work.
        data: replaces `data.folder`, relative to the working folder.

    Returns:
        The configuration with the protocol's preset filled in and `data.folder`, `data.bags` and
        a path in `data.groups` absolute.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: it is not YAML, or a key or value is wrong.
    """
    yaml = require("yaml", extra="train")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _strict_loader(yaml))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {_one_line(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__}; it must hold sections such as data: and "
            "model:"
        )
    for override in overrides:
        _apply_override(values, override)
    if data is not None:
        _section(values, "data", "--data")["folder"] = str(Path(data).resolve())
    try:
        config = parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return absolute_paths(config, path.resolve().parent)


def _strict_loader(yaml: Any) -> type:
    """A safe loader that refuses a key that stands twice in one section."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            # a key that is no plain word is refused by yaml itself
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands twice in one section", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Strict


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """A checked configuration from nested dictionaries, the protocol's preset filled in.

    Raises:
        TypeError: `values` is no dictionary.
        ConfigError: a key or value is wrong; every problem found is listed.
    """
    if not isinstance(values, dict):
        raise TypeError(f"values is {values!r}; it must be a dict (load_config reads a file)")
    try:
        return from_plain(TrainConfig, fill_in(values))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def from_plain(kind: type, values: dict[str, Any], *, prefix: str = "") -> Any:
    """Build the dataclass `kind` from plain values, refusing keys that are no field.

    Args:
        kind: a dataclass, possibly nested.
        values: plain values as YAML gives them.
        prefix: dotted path that stands before every field in an error, for example
            "model.settings".

    Raises:
        ConfigError: every wrong key and value, one per line.
    """
    require("pydantic", extra="train")
    from pydantic import TypeAdapter, ValidationError

    unknown = _unknown_keys(kind, values, prefix)
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_describe(item, prefix) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump_config(
    config: TrainConfig, path: str | os.PathLike[str], *, comment: str | None = None
) -> None:
    """Write the resolved configuration as YAML, atomically, below one line of comment."""
    yaml = require("yaml", extra="train")
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    if comment:
        text = f"# {comment}\n{text}"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _unknown_keys(kind: type, values: Any, prefix: str) -> list[str]:
    """Depth first, so that a typo in a section is reported where it stands."""
    if not isinstance(values, dict) or not dataclasses.is_dataclass(kind):
        return []
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    found = []
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            if near:
                hint = f"did you mean {f'{prefix}.{near[0]}' if prefix else near[0]}?"
            else:
                hint = f"valid names here: {', '.join(names)}"
            found.append(f"{path} is not a setting; {hint}")
        else:
            found.extend(_unknown_keys(hints[key], value, path))
            # a section of named sections, such as tasks
            inner = typing.get_args(hints[key])
            if typing.get_origin(hints[key]) is dict and isinstance(value, dict):
                for name, part in value.items():
                    found.extend(_unknown_keys(inner[1], part, f"{path}.{name}"))
    return found


def _describe(item: dict[str, Any], prefix: str) -> str:
    if item["type"] == "value_error":
        # a dataclass checked itself; only the outermost one names its fields in full
        where = ".".join([prefix, *(str(part) for part in item["loc"])]) if prefix else ""
        return f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
    path = ".".join([*([prefix] if prefix else []), *(str(part) for part in item["loc"])])
    if item["type"] == "missing":
        return f"{path} is not set; it has no default"
    value = item.get("input")
    if item["type"] == "literal_error":
        return f"{path} is {value!r}; it must be {item['ctx']['expected']}"
    must = _MUST.get(item["type"])
    if must is None:
        must = item["msg"].removeprefix("Input should be ")
    return f"{path} is {value!r}; it must be {must}"


# pydantic's words for these kinds of error mean little to someone who writes YAML
_MUST = {
    "dataclass_type": "a section with keys of its own",
    "dict_type": "a section with keys of its own",
    "tuple_type": "a list, for example [1, 2]",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
}


def _apply_override(values: dict[str, Any], override: str) -> None:
    yaml = require("yaml", extra="train")
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: {text!r} is not YAML: {_one_line(error)}") from None
    section = values
    for depth, key in enumerate(keys[:-1]):
        section = _section(section, key, f"--set {'.'.join(keys[: depth + 1])}")
    section[keys[-1]] = value


def _section(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    inner = values.setdefault(key, {})
    if inner is None:
        inner = values[key] = {}
    # the short form `protocol: healnet` opens up when a flag of it is set
    if key == "protocol" and isinstance(inner, str):
        inner = values[key] = {"name": inner}
    if not isinstance(inner, dict):
        raise ConfigError(f"{where}: {key} is {inner!r}, not a section with keys of its own")
    return inner


def absolute_paths(config: TrainConfig, base: Path) -> TrainConfig:
    """The configuration with the paths of its data taken from `base`."""
    changes = {}
    for name in ("folder", "bags"):
        value = getattr(config.data, name)
        if value is not None and value != "simulated":
            changes[name] = str((base / value).resolve())
    # the other values of data.groups are names
    if config.data.groups is not None and config.data.groups.endswith(".csv"):
        changes["groups"] = str((base / config.data.groups).resolve())
    data = dataclasses.replace(config.data, **changes)
    return dataclasses.replace(config, data=data)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
