"""What makes one vector of one modality: a pool of tokens, or a network over a row of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.projected_attention import PatchProjection
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork
from survfuse.layers.streaming import default_rows, stream
from survfuse.models.inputs import PositionEncoding, Tokens, token_width
from survfuse.models.settings import ModalityConfig, bags_and_graphs
from survfuse.ops import merge_attention
from survfuse.ragged import Ragged, as_packed


class PatchPool(nn.Module):
    """Projected patches, pooled by gated attention: one vector per sample.

    `z = sum_i softmax_i(w . (tanh(W_t h_i + b_t) * sigmoid(W_g h_i + b_g))) h_i` with
    `h_i = dropout(relu(W x_i + b))`.

    Args:
        width: of a token.
        dim: width of a projected token and of the result.
        hidden: units of the gate.
        dropout: probability with which a number of a projected token is dropped in training.
        attention_dropout: probability with which a weight is dropped in training.
        backend: of the ops; None for the fastest that can serve the call.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        hidden: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.project = PatchProjection(width, dim, dropout=dropout)
        self.pool = GatedAttentionPool(dim, hidden, dropout=attention_dropout, backend=backend)

    def forward(self, tokens: Tokens) -> Tensor:
        """[B, dim] of the type of the parameters; zeros for a bag without rows."""
        return self._pooled(*as_packed(tokens.features, tokens.ragged))[0][:, 0]

    def weights(self, tokens: Tokens) -> Tensor:
        """The weight of every token [total], packed in batch order; 0 where absent."""
        bag, ragged = as_packed(tokens.features, tokens.ragged)
        _, lse = self._pooled(bag, ragged)

        def run(part: Ragged) -> tuple[Tensor]:
            rows = self.project(bag, part)
            return (self.pool.weights(rows, part.packed(), lse=lse, reduce="rows"),)

        weights = torch.cat([found for (found,) in self._stream(run, bag, ragged)])
        return torch.where(ragged.per_patch(tokens.present), weights, 0.0)

    def _pooled(self, bag: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        """[B, 1, dim] and the logsumexp [B, 1], piece by piece; the projected bag is kept."""

        def run(part: Ragged) -> tuple[Tensor, Tensor]:
            return self.pool.with_lse(self.project(bag, part), part.packed())

        found = self._stream(run, bag, ragged)
        return found[0] if len(found) == 1 else merge_attention(*zip(*found, strict=True))

    def _stream(self, run, bag: Tensor, ragged: Ragged) -> list[tuple[Tensor, ...]]:
        return stream(run, bag, ragged, rows=default_rows(bag, self.project.out_features))


class VectorEncoder(nn.Module):
    """One vector [B, dim] of each modality: SNN of a row of columns, `PatchPool` of tokens.

    Where a sample lacks a modality, its vector is a learned one, at first zeros.

    Args:
        modalities: of the model.
        dim: width of a vector.
        table_widths: of the hidden layers of a table's network, before that of the vector.
        patch_dim: width of a projected token, which a further layer brings to `dim`.
        attention_hidden: units of the gate.
        activation: of the tables' networks, see `SelfNormalizingNetwork`.
        dropout: probability, of every layer.
        positions: what `encode_inputs` encodes.
        backend: of the ops.
    """

    def __init__(
        self,
        modalities: Mapping[str, ModalityConfig],
        dim: int,
        *,
        table_widths: Sequence[int],
        patch_dim: int,
        attention_hidden: int,
        activation: str,
        dropout: float,
        positions: PositionEncoding,
        backend: str | None,
    ) -> None:
        super().__init__()
        # a module's name may not hold a dot, a modality's may
        self.names = list(modalities)
        self.networks = nn.ModuleList()
        for modality in modalities.values():
            width = token_width(modality, positions)
            if is_vector(modality):
                network = SelfNormalizingNetwork(
                    width, [*table_widths, dim], activation=activation, dropout=dropout
                )
            else:
                network = nn.ModuleDict(
                    {
                        "pool": PatchPool(
                            width,
                            patch_dim,
                            hidden=attention_hidden,
                            dropout=dropout,
                            backend=backend,
                        ),
                        "embed": nn.Sequential(
                            nn.Linear(patch_dim, dim), nn.ReLU(), nn.Dropout(dropout)
                        ),
                    }
                )
            self.networks.append(network)
        self.absent = nn.Parameter(torch.zeros(len(self.names), dim))

    def forward(self, tokens: Mapping[str, Tokens], n_samples: int) -> tuple[Tensor, Tensor]:
        """Vectors [B, M, dim] of M modalities, and which are there [B, M] bool."""
        vectors, present = [], []
        for name, network, absent in zip(self.names, self.networks, self.absent, strict=True):
            found = tokens.get(name)
            if found is None:
                vector = absent.expand(n_samples, -1)
                vectors.append(zero_gradients(vector, list(network.parameters())))
                present.append(torch.zeros(n_samples, dtype=torch.bool, device=absent.device))
                continue
            if isinstance(network, nn.ModuleDict):
                vector = network["embed"](network["pool"](found))
            else:
                vector = network(found.features.to(absent.dtype))
            # selected, not multiplied: an absent sample may hold anything
            vectors.append(torch.where(found.present[:, None], vector, absent))
            present.append(found.present)
        return torch.stack(vectors, 1), torch.stack(present, 1)

    def patch_weights(
        self, tokens: Mapping[str, Tokens], modalities: Mapping[str, ModalityConfig]
    ) -> dict[str, dict[str, Tensor]]:
        """What the pools of bags and graphs look at, as `FusionModel.patch_attention` has it."""
        networks = dict(zip(self.names, self.networks, strict=True))
        return {
            name: {"pool": networks[name]["pool"].weights(tokens[name])}
            for name in bags_and_graphs(modalities)
            if name in tokens
        }


def is_vector(modality: ModalityConfig) -> bool:
    """Whether a sample is one token, the row of a table."""
    return modality.kind == "table" and modality.table_tokens == "one"


def check_one_bag(model: str, modalities: Mapping[str, ModalityConfig]) -> None:
    """Raise unless there is one modality, a bag or a graph."""
    kinds = {name: modality.kind for name, modality in modalities.items()}
    if len(kinds) != 1 or not bags_and_graphs(modalities):
        raise ValueError(
            f"modalities is {kinds}; {model} reads exactly one bag or graph "
            "(data.modalities chooses which a model is given)"
        )
