"""What makes one vector of one modality: a pool of tokens, or a network over a row of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from survfuse.layers.fourier import fourier_channels
from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork
from survfuse.models.inputs import PositionEncoding, Tokens
from survfuse.models.settings import ModalityConfig
from survfuse.ops import pool_bag
from survfuse.ops.project_bag import project_bag
from survfuse.pooling import accumulation_type
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
        self.project = nn.Linear(width, dim)
        self.pool = GatedAttentionPool(dim, hidden, dropout=attention_dropout, backend=backend)
        self.dropout = dropout

    def forward(self, tokens: Tokens) -> Tensor:
        """[B, dim] of the type of the parameters; zeros for a bag without rows."""
        rows, ragged = self.projected(tokens)
        return self.pool(rows, ragged)[:, 0]

    def weights(self, tokens: Tokens) -> Tensor:
        """The weight of every token [total], packed in batch order; 0 where absent."""
        rows, ragged = self.projected(tokens)
        weights = self.pool.weights(rows, ragged, reduce="rows")
        return torch.where(present_rows(tokens, ragged), weights, 0.0)

    def projected(self, tokens: Tokens) -> tuple[Tensor, Ragged]:
        """The projected tokens [total, dim], packed in batch order, and their ranges."""
        bag, ragged = as_packed(tokens.features, tokens.ragged)
        dropout = self.dropout if self.training else 0.0
        # what is not dropped is scaled by way of the weights, which commutes with the rectifier:
        # both are one mask of single bytes, and nothing else of the bag's length is kept
        weight, bias = (p / (1.0 - dropout) for p in (self.project.weight, self.project.bias))
        rows = project_bag(bag, weight, bias, ragged=ragged)
        zeros = rows <= 0
        if dropout > 0:
            zeros |= torch.empty_like(zeros).bernoulli_(dropout)
        return rows.masked_fill(zeros, 0.0), ragged.packed()


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


def mean_of_tokens(tokens: Tokens, *, backend: str | None = None) -> Tensor:
    """[B, width], the mean of each sample's tokens in fp32 (fp64); zeros without any."""
    bag, ragged = as_packed(tokens.features, tokens.ragged)
    # a zero query gives every token the same weight
    rows = bag.new_zeros(ragged.n_bags, 1, bag.shape[1], dtype=accumulation_type(bag.dtype))
    return pool_bag(rows, bag, ragged=ragged, backend=backend).pooled[:, 0]


def present_rows(tokens: Tokens, ragged: Ragged) -> Tensor:
    """[total] bool, whether the sample of each packed token has the modality."""
    return tokens.present.repeat_interleave(ragged.lengths, output_size=ragged.total)


def token_width(modality: ModalityConfig, positions: PositionEncoding | None) -> int:
    """Channels of one token as `encode_inputs` gives it."""
    own = 1 if modality.table_tokens == "features" else modality.channels
    encoded = 0 if positions is None else fourier_channels(modality.axes, positions.bands)
    return own + encoded + modality.walk_steps


def is_vector(modality: ModalityConfig) -> bool:
    """Whether a sample is one token, the row of a table."""
    return modality.kind == "table" and modality.table_tokens == "one"


def bags_and_graphs(modalities: Mapping[str, ModalityConfig]) -> list[str]:
    """The modalities whose tokens are patches or nodes."""
    return [name for name, modality in modalities.items() if modality.kind in ("bag", "graph")]


def check_one_bag(model: str, modalities: Mapping[str, ModalityConfig]) -> None:
    """Raise unless there is one modality, a bag or a graph."""
    kinds = {name: modality.kind for name, modality in modalities.items()}
    if len(kinds) != 1 or not bags_and_graphs(modalities):
        raise ValueError(
            f"modalities is {kinds}; {model} reads exactly one bag or graph "
            "(data.modalities chooses which a model is given)"
        )
