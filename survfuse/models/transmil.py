"""TransMIL: one bag through two Nystrom attention layers, a convolution of its square in between.

Source: Shao et al., "TransMIL: transformer based correlated multiple instance learning for whole
slide image classification", NeurIPS 2021, algorithms 1 to 3. The attention is
`survfuse.layers.nystrom_attention`, which says in what it differs from that of the public code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.nystrom_attention import NystromSelfAttention
from survfuse.layers.square_convolution import SquareConvolution
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.encoders import check_one_bag
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import PositionEncoding, Tokens, encode_inputs, token_width
from survfuse.models.settings import check_integers, check_positive, check_probabilities
from survfuse.ops import cross_attention_weights, cross_attention_with_lse
from survfuse.ops.backends import plain_backend
from survfuse.ops.project_bag import project_bag
from survfuse.ragged import Ragged


@dataclass(frozen=True)
class TransMILConfig(ModelConfig):
    """Settings of `TransMIL`.

    Attributes:
        modalities: exactly one, a bag or a graph.
        outputs: number of logits by task.
        dim: width of a projected patch.
        heads, head_dim: heads of the attention and their size.
        landmarks: of a bag.
        iterations: of the pseudo-inverse.
        residual_kernel: odd length of the convolution of values along the bag.
        dropout: probability, behind each attention.
        fourier_bands, max_frequency: of the positions of a bag whose `axes` are not 0, see
            `survfuse.layers.fourier`.
        backend: of the ops.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {"paper": {}}

    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    landmarks: int = 256
    iterations: int = 6
    residual_kernel: int = 33
    dropout: float = 0.1
    fourier_bands: int = 2
    max_frequency: float = 2.0
    backend: str | None = None

    def _check(self) -> None:
        check_one_bag("TransMIL", self.modalities)
        lows = {"dim": 1, "heads": 1, "head_dim": 1, "landmarks": 1, "iterations": 1}
        check_integers(self, {**lows, "residual_kernel": 1, "fourier_bands": 0})
        if self.residual_kernel % 2 == 0:
            raise ValueError(f"residual_kernel is {self.residual_kernel}; it must be odd")
        check_probabilities(self, "dropout")
        check_positive(self, "max_frequency")


class Squares(NamedTuple):
    """Sequences of a class token and a bag that was continued to a square number of patches."""

    rows: Tensor  # [total] int64, row of each in front of which the class token was put
    ragged: Ragged  # the sequences, one behind the other, side ** 2 + 1 rows each
    sides: list[int]


class TransMIL(FusionModel):
    """logits = W LN(class token) + b, behind attention, position encoding and attention again.

    The sequence is a learned class token and `relu(U x_i + c)` of the patches, the first of which
    are repeated at the end until their number is a square. Both attentions are residual and read
    normalised rows. In between, the patches, row by row a square map, have their convolutions by
    depthwise kernels of 7, 5 and 3 added.

    A sample without the bag gets a learned vector, at first zeros, in place of its class token.

    Args:
        config: see `TransMILConfig`.

    Cost:
        O(N (landmarks + kernels) dim) operations; a training step takes about 25 N dim numbers.
        The lengths of the bags are read on the host once per batch.

    Example:
        >>> import torch
        >>> from survfuse import Ragged
        >>> from survfuse.batch import BagBatch
        >>> model = TransMIL.from_preset("paper", modalities={"slide": ("bag", 16)})
        >>> slide = BagBatch(torch.randn(9, 16), Ragged.from_lengths([5, 4]), torch.ones(2) > 0)
        >>> model({"slide": slide}).logits["survival"].shape
        torch.Size([2, 4])
    """

    config_class: ClassVar[type] = TransMILConfig
    export_obstacle: ClassVar[str | None] = (
        "the side of the square that a bag is continued to follows from its length"
    )
    config: TransMILConfig

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__()
        self.config = config
        [(self.name, modality)] = config.modalities.items()
        self.positions = PositionEncoding(config.fourier_bands, config.max_frequency)
        self.project = nn.Linear(token_width(modality, self.positions), config.dim)
        self.class_token = nn.Parameter(torch.randn(1, config.dim))
        self.first, self.last = (AttentionLayer(config) for _ in range(2))
        self.square = SquareConvolution(config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.absent = nn.Parameter(torch.zeros(config.dim))
        self.readout = TaskHeads(config.dim, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name.

        Returns:
            logits by task; embeddings: the normalised class token [B, dim] under the modality's
            name.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        if self.name not in tokens:
            vector = self.absent.expand(n_samples, -1)  # [B, dim]
            rest = [p for key, p in self.named_parameters() if not key.startswith("readout")]
            vector = zero_gradients(vector, rest)  # [B, dim]
            return ModelOutput(self.readout(vector), {self.name: vector}, {})
        found = tokens[self.name]
        squares = to_squares(found.ragged)
        x = self._before_last(found, squares)  # [total, dim]
        x = self.last(x, squares.ragged)  # [total, dim]
        vector = self.norm(x[squares.ragged.starts])  # [B, dim]
        vector = torch.where(found.present[:, None], vector, self.absent)  # [B, dim]
        return ModelOutput(self.readout(vector), {self.name: vector}, {})

    def _before_last(self, tokens: Tokens, squares: Squares) -> Tensor:
        """The sequences [total, dim] that the last attention reads."""
        weight, bias = self.project.weight, self.project.bias
        rows = project_bag(tokens.features, weight, bias, ragged=tokens.ragged)  # [patches, dim]
        rows = functional.relu(rows).to(weight.dtype)  # [patches, dim]
        x = torch.cat([self.class_token, rows]).index_select(0, squares.rows)  # [total, dim]
        x = self.first(x, squares.ragged)  # [total, dim]
        return self.square(x, [side * side for side in squares.sides])  # [total, dim]

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """What the class token looks at in the last layer, [total], under "class token".

        The exact softmax of its query over the keys of the patches, mean over heads: not the row of
        the Nystrom factors, which can be negative. A patch that was repeated has the sum.
        """
        with evaluating(self):
            tokens, _ = encode_inputs(inputs, self.config.modalities, self.positions)
            if self.name not in tokens:
                return {}
            found = tokens[self.name]
            squares = to_squares(found.ragged)
            weights = self.last.class_weights(self._before_last(found, squares), squares.ragged)
        ragged = squares.ragged
        class_row = torch.zeros(ragged.total, dtype=torch.bool, device=weights.device)
        class_row[ragged.starts] = True
        patches = squares.rows[~class_row] - 1
        summed = weights.new_zeros(found.ragged.total).index_add_(0, patches, weights)
        present = found.ragged.per_patch(found.present)
        return {self.name: {"class token": torch.where(present, summed, 0.0)}}


def to_squares(ragged: Ragged) -> Squares:
    """A class token in front of each bag, and its first patches again behind it, to a square.

    Row 0 is the class token and row 1 + i the i-th packed patch.
    """
    lengths = ragged.lengths.tolist()
    sides = [math.isqrt(length - 1) + 1 if length else 0 for length in lengths]
    counts = [side * side + 1 for side in sides]
    sequences = Ragged.from_lengths(counts, device=ragged.lengths.device)
    place = sequences.places()
    length = sequences.per_patch(ragged.lengths)
    start = sequences.per_patch(ragged.packed().starts)
    wrapped = 1 + start + (place - 1) % length.clamp(min=1)
    return Squares(torch.where(place == 0, 0, wrapped), sequences, sides)


class AttentionLayer(nn.Module):
    """x + attention(LN(x)) through landmarks."""

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.attention = NystromSelfAttention(
            config.dim,
            heads=config.heads,
            dim_head=config.head_dim,
            landmarks=config.landmarks,
            iterations=config.iterations,
            residual_kernel=config.residual_kernel,
            dropout=config.dropout,
            backend=config.backend,
        )

    def forward(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[total, dim] to [total, dim]."""
        return x + self.attention(self.norm(x), ragged)

    def class_weights(self, x: Tensor, ragged: Ragged) -> Tensor:
        """Weights of the rows behind the first of each sequence, mean over heads, packed."""
        attention = self.attention
        split = (3, attention.heads, attention.dim_head)
        query, key, _ = attention.query_key_value(self.norm(x)).unflatten(1, split).unbind(1)
        query = query[ragged.starts][:, None]  # [B, 1, H, d]
        patches = ragged._replace(
            starts=ragged.starts + 1,
            lengths=ragged.lengths - 1,
            total=ragged.total - ragged.n_bags,
            max_length=max(ragged.max_length - 1, 0),
        )
        backend = attention.backend
        _, lse = cross_attention_with_lse(query, key, key, key_ragged=patches, backend=backend)
        return cross_attention_weights(
            query,
            key,
            lse,
            key_ragged=patches,
            reduce="rows",
            backend=plain_backend(backend),
        )
