"""MultiModN: a state that one encoder per modality updates in turn, decoded for every task.

Source: Swamy et al., "MultiModN - multimodal, multi-task, interpretable modular networks",
NeurIPS 2023, section 3, and for sizes its public code (github.com/EPFLiGHT/MultiModN, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bag_mean import bag_mean
from survfuse.layers.latent_attention import zero_gradients
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.encoders import PatchPool, is_vector
from survfuse.models.inputs import PositionEncoding, Tokens, encode_inputs, token_width
from survfuse.models.settings import (
    ModalityConfig,
    bags_and_graphs,
    check_choice,
    check_integers,
    check_not_negative,
    check_positive,
    check_probabilities,
    check_widths,
)


@dataclass(frozen=True)
class MultiModNConfig(ModelConfig):
    """Settings of `MultiModN`.

    Attributes:
        modalities: by name, in the order in which they update the state.
        outputs: number of logits by task.
        state_dim: width of the state.
        encoder_widths: hidden layers of every encoder.
        decoder_widths: hidden layers of every task's decoder.
        pool: what a modality of several tokens enters its encoder as: "mean", or "attention", the
            gated attention pooling of projected tokens.
        patch_dim, attention_hidden: "attention" only, width of a projected token, units of the
            gate of its weight.
        dropout: probability, of the hidden layers of encoders and of projected tokens.
        state_change: weight of the mean squared change of the state per step, an auxiliary loss.
        fourier_bands, max_frequency: of the positions of modalities whose `axes` are not 0, see
            `survfuse.layers.fourier`.
        backend: of the ops.

    Presets:
        "paper", where a bag is its mean; "attention", where that pools it.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {"paper": {}, "attention": {"pool": "attention"}}

    state_dim: int = 50
    encoder_widths: tuple[int, ...] = (32, 32)
    decoder_widths: tuple[int, ...] = (32, 32)
    pool: str = "mean"
    patch_dim: int = 256
    attention_hidden: int = 128
    dropout: float = 0.2
    state_change: float = 0.0
    fourier_bands: int = 2
    max_frequency: float = 2.0
    backend: str | None = None

    def _check(self) -> None:
        lows = {"state_dim": 1, "patch_dim": 1, "attention_hidden": 1, "fourier_bands": 0}
        check_integers(self, lows)
        check_widths(self, "encoder_widths", "decoder_widths")
        check_choice(self, "pool", ("mean", "attention"))
        check_probabilities(self, "dropout")
        check_not_negative(self, "state_change")
        check_positive(self, "max_frequency")


class MultiModN(FusionModel):
    """s_0 learned; s_k = A_k [mlp_k(x_k), s_{k-1}] + a_k per modality; logits = decoder_t(s_M).

    A modality of several tokens enters as their mean or their pool. A step whose modality a sample
    lacks is skipped: that sample's state stays as it is, so a sample without anything gets the
    decoding of s_0.

    Training as published also decodes every intermediate state and averages the losses of all of
    them. A model knows no targets; `forward` therefore gives the states as embeddings, and
    `decode` turns each into logits for whoever does.

    Args:
        config: see `MultiModNConfig`.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> model = MultiModN.from_preset("paper", modalities={"rna": ("table", 8)})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> output = model({"rna": rna})
        >>> output.embeddings["state_1"].shape
        torch.Size([3, 50])
        >>> torch.equal(model.decode(output.embeddings["state_1"])["survival"],
        ...             output.logits["survival"])
        True
    """

    config_class: ClassVar[type] = MultiModNConfig
    config: MultiModNConfig

    def __init__(self, config: MultiModNConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = PositionEncoding(config.fourier_bands, config.max_frequency)
        self.initial_state = nn.Parameter(torch.randn(config.state_dim))
        self.steps = nn.ModuleList(
            StateStep(config, modality, token_width(modality, self.positions))
            for modality in config.modalities.values()
        )
        self.decoders = nn.ModuleDict(
            {
                task: _layers(config.state_dim, (*config.decoder_widths, out), last=True)
                for task, out in config.outputs.items()
            }
        )

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "state_0" to "state_M" [B, state_dim], the states before the
            first and behind each modality; auxiliary "state_change" where it has a weight.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        state = self.initial_state.expand(n_samples, -1)  # [B, state_dim]
        states = [state]
        for name, step in zip(self.config.modalities, self.steps, strict=True):
            if name in tokens:
                updated = step(tokens[name], state)  # [B, state_dim]
                state = torch.where(tokens[name].present[:, None], updated, state)  # [B, state_dim]
            else:
                state = zero_gradients(state, list(step.parameters()))  # [B, state_dim]
            states.append(state)
        auxiliary = {}
        if self.config.state_change:
            path = torch.stack(states)  # [1 + M, B, state_dim]
            auxiliary["state_change"] = self.config.state_change * path.diff(dim=0).square().mean()
        embeddings = {f"state_{k}": state for k, state in enumerate(states)}
        return ModelOutput(self.decode(state), embeddings, auxiliary)

    def decode(self, state: Tensor) -> dict[str, Tensor]:
        """Logits [B, out] by task of any state [B, state_dim]."""
        return {task: decoder(state) for task, decoder in self.decoders.items()}

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """The weight of every patch or node in its pool, [total]; empty where pools are means."""
        if self.config.pool == "mean":
            return {}
        steps = dict(zip(self.config.modalities, self.steps, strict=True))
        with evaluating(self):
            tokens, _ = encode_inputs(inputs, self.config.modalities, self.positions)
            return {
                name: {"pool": steps[name].pool.weights(tokens[name])}
                for name in bags_and_graphs(self.config.modalities)
                if name in tokens
            }


class StateStep(nn.Module):
    """One modality's update of the state: `A [mlp(x), s] + a` of its features x."""

    def __init__(self, config: MultiModNConfig, modality: ModalityConfig, width: int) -> None:
        super().__init__()
        self.backend, self.pool = config.backend, None
        if config.pool == "attention" and not is_vector(modality):
            self.pool = PatchPool(
                width,
                config.patch_dim,
                hidden=config.attention_hidden,
                dropout=config.dropout,
                backend=config.backend,
            )
            width = config.patch_dim
        self.features = _layers(width, config.encoder_widths, dropout=config.dropout)
        self.update = nn.Linear(config.encoder_widths[-1] + config.state_dim, config.state_dim)

    def forward(self, tokens: Tokens, state: Tensor) -> Tensor:
        """The state behind this modality [B, state_dim], of that before it."""
        if tokens.features.dim() == 2 and tokens.ragged is None:
            features = tokens.features  # [B, width]
        elif self.pool is not None:
            features = self.pool(tokens)  # [B, patch_dim]
        else:
            features = bag_mean(tokens.features, tokens.ragged, backend=self.backend)  # [B, width]
        features = self.features(features.to(state.dtype))  # [B, encoder_widths[-1]]
        return self.update(torch.cat([features, state], 1))  # [B, state_dim]


def _layers(
    width: int, widths: tuple[int, ...], *, dropout: float = 0.0, last: bool = False
) -> nn.Sequential:
    """Linear layers with rectifiers, but behind the last one if that is the `last` of all."""
    layers: list[nn.Module] = []
    for i, out in enumerate(widths):
        layers.append(nn.Linear(width, out))
        if not last or i + 1 < len(widths):
            layers += [nn.ReLU(), nn.Dropout(dropout)]
        width = out
    return nn.Sequential(*layers)
