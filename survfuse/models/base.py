"""What every fusion model is: one signature, and the same ways to look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput, TableBatch
from survfuse.models.config import ModelConfig

Score = Callable[[Tensor], Tensor]


class FusionModel(nn.Module):
    """A model of a cohort: any modality may be absent for any sample.

    A subclass names its configuration, a `ModelConfig`, is built from one alone, and implements
    `forward` and `patch_attention`.

    `torch.export.export(model, (inputs,), strict=False)` captures a model, with the numbers of
    samples, of patches and of the longest bag (`Ragged.total`, `Ragged.max_length`) fixed or
    `Dim.DYNAMIC`, unless `export_obstacle` says why it does not. Values are not checked in what was
    captured, and which modalities there are is fixed.

    Attributes:
        config_class: of the configuration.
        export_obstacle: what the host must read of a batch that a captured graph cannot; or None.
    """

    config_class: ClassVar[type[ModelConfig]]
    export_obstacle: ClassVar[str | None] = None
    config: Any

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        modalities: Mapping[str, Any],
        outputs: Mapping[str, int] | None = None,
        **settings: Any,
    ) -> FusionModel:
        """A freshly initialised model of a preset, with `settings` in place of the preset's.

        Args:
            name: one of the presets of the model's configuration.
            modalities: a `ModalityConfig` each, or (kind, channels) as `Cohort.channels()` gives.
            outputs: number of logits by task; by default four time bins of "survival".
            settings: fields of the configuration.

        Raises:
            ValueError, TypeError: a preset, a modality or a setting is not one of the model's.
        """
        config = cls.config_class.from_preset(name, modalities=modalities, outputs=outputs)
        return cls(replace(config, **settings))

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        raise NotImplementedError

    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much each group of tokens looks at each patch, streamed; without dropout.

        Returns:
            By bag or graph and by what looks at it (a gene group, a layer of latents, a pool):
            weights [total], packed in batch order. A sample's weights sum to 1, and are absent
            where it lacks the modality. Empty for a model that weighs no patches.
        """
        raise NotImplementedError

    @torch.no_grad()
    def modality_effect(
        self, inputs: Mapping[str, Modality], *, score: Score, task: str | None = None
    ) -> dict[str, Tensor]:
        """Change of a score caused by each modality: with it minus with it withheld.

        Args:
            inputs: as for `forward`.
            score: logits [B, out] of the task to [B], such as
                `survfuse.training.risk_from_hazards`.
            task: None for the first.

        Returns:
            By modality [B]; 0 where the sample lacks it.
        """
        with evaluating(self):
            full = score(self._logits(inputs, task))
            effects = {}
            for name, batch in inputs.items():
                # withheld by its mask: the rest of the batch is the very same
                rest = {**inputs, name: withhold(batch)}
                effect = full - score(self._logits(rest, task))
                # by selection: other batches round otherwise, where nothing was withheld
                effects[name] = torch.where(_has(batch), effect, 0.0)
        return effects

    def gradient_importance(
        self, inputs: Mapping[str, Modality], name: str, *, score: Score, task: str | None = None
    ) -> Tensor:
        """Gradient of a score times the input, per column of a table.

        Args:
            inputs: as for `forward`.
            name: a table.
            score: logits [B, out] of the task to [B].
            task: None for the first.

        Returns:
            [B, F], zero where the sample lacks the table.

        Raises:
            ValueError: `name` is not a table of `inputs`.
        """
        if not isinstance(inputs.get(name), TableBatch):
            tables = [key for key, batch in inputs.items() if isinstance(batch, TableBatch)]
            raise ValueError(f"name is {name!r}; it must be one of the tables in inputs: {tables}")
        with evaluating(self), torch.enable_grad():
            values = inputs[name].values.detach().requires_grad_()
            batch = inputs[name]._replace(values=values)
            total = score(self._logits({**inputs, name: batch}, task)).sum()
            (gradient,) = torch.autograd.grad(total, values)
        # by selection: a sample without the table may hold anything in it
        present = inputs[name].present[:, None]
        return torch.where(present, gradient * values.detach(), 0.0)

    def _logits(self, inputs: Mapping[str, Modality], task: str | None) -> Tensor:
        logits = self(inputs).logits
        if task is not None and task not in logits:
            raise ValueError(f"task is {task!r}; it must be one of {list(logits)}")
        return logits[next(iter(logits)) if task is None else task]


def withhold(batch: Modality) -> Modality:
    """The modality as if no sample had it."""
    if hasattr(batch, "ragged"):
        none = torch.zeros_like(batch.ragged.lengths)
        empty = batch.ragged._replace(lengths=none, total=0, max_length=0)
        batch = batch._replace(ragged=empty)
    return batch._replace(present=torch.zeros_like(batch.present))


def _has(batch: Modality) -> Tensor:
    """[B] bool; a bag or graph without rows is an absent one."""
    return batch.present & (batch.ragged.lengths > 0) if hasattr(batch, "ragged") else batch.present


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
