"""What `coordination` of a configuration adds to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from survfuse.batch import Batch, ModelOutput
from survfuse.training.config import TrainConfig
from survfuse.training.config_files import ConfigError
from survfuse.training.gradient_coordination import CoordinatedHead, GradientCoordination
from survfuse.training.tasks import tasks_of


class LoopCoordination:
    """Gradient coordination of a model that is trained by the loop.

    The model names its branches (`branches`, two names or two modules by name), returns the
    features of both under these names in `ModelOutput.embeddings`, and reads them out by
    `readout.tasks[task]`, a Linear over both side by side in that order. A sample that lacks any
    modality counts in no score.

    Raises:
        ConfigError: the model has no two branches.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        check_branches(config, model)
        self.branches = tuple(model.branches)
        heads = {
            task: CoordinatedHead(kind, (head := model.readout.tasks[task]).weight, head.bias)
            for task, kind in _kinds(config).items()
        }
        self.coordination = GradientCoordination(
            heads, branches=self.branches, mode=config.coordination.mode
        )
        self._features: list[Tensor] = []
        model.register_forward_hook(self._keep_features)

    def observe(self, batch: Batch) -> None:
        """Score the branches on the batch that the model has just seen."""
        present = [modality.present for modality in batch.inputs.values()]
        valid = torch.stack(present).all(0)
        for task in self.coordination.heads:
            self.coordination.observe(
                task,
                *self._features,
                time=batch.time,
                event=batch.event,
                label=batch.targets.get(task),
                valid=valid,
            )
        self._features = []

    def coordinate(self) -> None:
        """Coordinate the gradients of the step that is about to be taken."""
        self.coordination.coordinate()

    def epoch_record(self) -> dict[str, float | int]:
        """Numbers of the epoch that ends here; the next begins at zero."""
        summary = self.coordination.summary()
        self.coordination.reset()
        names = ("conflicts", "modified", "strength", "skipped")
        return {f"coordination_{name}": summary[name] for name in names}

    def state_dict(self) -> dict[str, Any]:
        return self.coordination.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coordination.load_state_dict(state)

    def _keep_features(self, model: nn.Module, _: Any, output: ModelOutput) -> None:
        if model.training:
            # detached: the graph must not live on until the next batch
            self._features = [output.embeddings[name].detach() for name in self.branches]


def check_branches(config: TrainConfig, model: nn.Module) -> None:
    """Raise if a configuration coordinates the branches of a model that has none.

    Raises:
        ConfigError: it does.
    """
    if config.coordination.mode == "none":
        return
    # of a ModuleDict its names
    branches, readout = tuple(getattr(model, "branches", ())), getattr(model, "readout", None)
    named = len(branches) == 2 and all(isinstance(name, str) for name in branches)
    # a normalisation would stand between the features and the columns that read them
    plain = getattr(readout, "norm", None) is None
    tasks = dict(getattr(readout, "tasks", {}))
    heads = [tasks.get(task) for task in _kinds(config)]
    halves = all(isinstance(head, nn.Linear) and head.in_features % 2 == 0 for head in heads)
    if not (named and plain and halves):
        raise ConfigError(
            f'coordination.mode is "{config.coordination.mode}", but model.name '
            f'"{config.model.name}" has no two branches; it must be "none"'
        )


def _kinds(config: TrainConfig) -> dict[str, str]:
    """How each task scores its branches."""
    survival = "cox" if config.loss.name == "cox" else "survival"
    return {
        name: survival if task.kind == "survival" else task.kind
        for name, task in tasks_of(config).items()
    }
