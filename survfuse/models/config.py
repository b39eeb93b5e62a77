"""What the configurations of all models are: modalities, outputs and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from survfuse.models.settings import ModalityConfig, parse_modalities, parse_outputs
from survfuse.ops.backends import check_backend

# the settings of each preset that differ from the defaults
Presets = Mapping[str, Mapping[str, Any]]

_Config = TypeVar("_Config", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """Everything a model is built from; `asdict` and the constructor round-trip.

    A subclass is a frozen dataclass whose further fields all have defaults. It names its presets,
    the first of which is the default, and checks its own fields in `_check`; a field `backend` is
    checked here.

    Attributes:
        modalities: by name.
        outputs: number of logits by task.

    Raises:
        ValueError: names the field, what it was and what it must be.

    Example:
        >>> @dataclass(frozen=True)
        ... class OwnConfig(ModelConfig):
        ...     PRESETS = {"paper": {}, "wide": {"dim": 512}}
        ...     dim: int = 256
        >>> OwnConfig.from_preset("wide", modalities={"rna": ("table", 8)}).dim
        512
    """

    PRESETS: ClassVar[Presets] = {}
    # what `survfuse ablate` trains: by name, settings merged over those of a run, or blocks
    ABLATION: ClassVar[Mapping[str, Any]] = {}

    modalities: Mapping[str, ModalityConfig]
    outputs: Mapping[str, int] = field(default_factory=lambda: {"survival": 4})

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", parse_modalities(self.modalities))
        object.__setattr__(self, "outputs", parse_outputs(self.outputs))
        check_backend(getattr(self, "backend", None))
        self._check()

    def _check(self) -> None:
        """Raise unless the fields of the subclass are in range and fit the modalities."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, as JSON and YAML hold them."""
        return asdict(self)

    @classmethod
    def from_preset(
        cls: type[_Config],
        name: str,
        *,
        modalities: Mapping[str, ModalityConfig | tuple],
        outputs: Mapping[str, int] | None = None,
    ) -> _Config:
        """The configuration of one of `PRESETS`; the class says what each is.

        Args:
            name: of the preset.
            modalities: a `ModalityConfig` each, or (kind, channels) and a table's groups, as
                `Cohort.channels()` gives.
            outputs: number of logits by task; by default four time bins of "survival".

        Raises:
            ValueError: an unknown preset, or modalities or outputs that the model cannot have.
        """
        presets = list(cls.PRESETS)
        if name not in presets:
            raise ValueError(f"name is {name!r}; it must be one of {presets}")
        settings = cls._preset_settings(name, modalities)
        if outputs is not None:
            settings["outputs"] = outputs
        return cls(modalities, **settings)

    @classmethod
    def _preset_settings(
        cls, name: str, modalities: Mapping[str, ModalityConfig | tuple]
    ) -> dict[str, Any]:
        """The settings of a known preset, which in a subclass may depend on the modalities."""
        return dict(cls.PRESETS[name])
