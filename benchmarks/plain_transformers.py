"""TransMIL, CMTA and AMMASurv in plain torch with everything formed: what ours race against.

The same modules, parameter names and mathematics as in `survfuse.models`, so that one state dict
serves both and their equality can be tested. What touches the patches is a Linear for the whole
bag, torch's own scaled_dot_product_attention and its convolutions, and autograd keeps what it
likes: nothing is computed a second time. Every modality must be present for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import Modality
from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.layers.nystrom_attention import NystromSelfAttention, pseudo_inverse
from survfuse.layers.nystrom_encoder import NystromEncoder
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.models.ammasurv_layer import AsymmetricLayer, Heads, Membership
from survfuse.models.cmta import CMTA, PatchLayers
from survfuse.models.cmta_config import CMTAConfig
from survfuse.models.inputs import Tokens, encode_inputs
from survfuse.models.transmil import Squares, TransMIL, TransMILConfig
from survfuse.ragged import Ragged

from .plain_models import attend, bags_of, joined
from .plain_pools import gated_mean


class PlainNystrom(nn.Module):
    """`survfuse.layers.NystromSelfAttention` of packed bags, with the weights of `like`."""

    def __init__(self, like: NystromSelfAttention) -> None:
        super().__init__()
        self.heads, self.dim_head = like.heads, like.dim_head
        self.landmarks, self.iterations = like.landmarks, like.iterations
        self.residual, self.query_key_value = like.residual, like.query_key_value
        self.output, self.dropout = like.output, like.dropout

    def forward(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[total, dim] to [total, dim]."""
        return joined([self._attend(rows) for rows in x.split(ragged.lengths.tolist())])

    def _attend(self, rows: Tensor) -> Tensor:
        split = (3, self.heads, self.dim_head)
        query, key, value = self.query_key_value(rows).unflatten(1, split).permute(1, 2, 0, 3)
        attention = functional.scaled_dot_product_attention
        if len(rows) <= self.landmarks:
            out = attention(query[None], key[None], value[None])[0]
        else:
            query_marks, key_marks = (self._means(x) for x in (query, key))
            inverse = self._inverse(query_marks, key_marks)
            means = attention(query_marks[None], key[None], value[None])[0]
            mixed = (inverse.to(means.dtype) @ means).to(query.dtype)
            out = attention(query[None], key_marks[None], mixed[None])[0]  # [H, n, d]
        if self.residual is not None:
            weight, reach = self.residual[:, None, :, None], self.residual.shape[1] // 2
            out = (
                out
                + functional.conv2d(value[None], weight, padding=(reach, 0), groups=self.heads)[0]
            )
        return self.dropout(self.output(out.transpose(0, 1).flatten(1)))

    def _means(self, x: Tensor) -> Tensor:
        """Landmarks [H, m, d] of [H, n, d]."""
        n, m = x.shape[1], self.landmarks
        edges = torch.arange(m + 1, device=x.device) * n // m
        owner = torch.searchsorted(edges[1:], torch.arange(n, device=x.device), right=True)
        # sums of 16-bit numbers would lose what they add
        sums = torch.zeros(x.shape[0], m, x.shape[2], device=x.device).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        sums = sums.index_add(1, owner, x.to(sums.dtype))
        return (sums / edges.diff()[:, None]).to(x.dtype)

    def _inverse(self, query: Tensor, key: Tensor) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            kind = torch.promote_types(query.dtype, torch.float32)
            logits = query.to(kind) @ key.to(kind).mT * self.dim_head**-0.5
            return pseudo_inverse(logits.softmax(-1), self.iterations)


class PlainSquare(nn.Module):
    """x + conv7(x) + conv5(x) + conv3(x) of rows on a square, one convolution after another."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.kernels, self.biases = like.kernels, like.biases

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Sequences [total + B, dim], a class token in front of each, which stays as it is."""
        found = []
        for part in x.split([n + 1 for n in lengths]):
            n, dim = len(part) - 1, part.shape[1]
            side = math.isqrt(n - 1) + 1
            rows = torch.cat([part[1:], part[1 : 1 + side * side - n]])
            image = rows.T.view(1, dim, side, side)
            out = image
            for kernel, bias in zip(self.kernels, self.biases, strict=True):
                reach = kernel.shape[-1] // 2
                out = out + functional.conv2d(image, kernel, bias, padding=reach, groups=dim)
            found += [part[:1], out[0].flatten(1).T[:n]]
        return torch.cat(found)


class PlainTransMIL(TransMIL):
    """`survfuse.models.transmil.TransMIL` with plain attention and convolutions."""

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__(config)
        for layer in (self.first, self.last):
            layer.attention = PlainNystrom(layer.attention)
        self.square = PlainSquare(self.square)

    def _before_last(self, tokens: Tokens, squares: Squares) -> Tensor:
        rows = joined([self.project(rows).relu() for rows in bags_of(tokens)])
        x = torch.cat([self.class_token, rows]).index_select(0, squares.rows)
        x = self.first(x, squares.ragged)
        return self.square(x, [side * side for side in squares.sides])


class PlainCMTA(CMTA):
    """`survfuse.models.cmta.CMTA` with plain encoders, and Q, K and V formed across."""

    def __init__(self, config: CMTAConfig) -> None:
        super().__init__(config)
        self.project = PlainPatchLayers(self.project)
        encoders = [module for module in self.modules() if isinstance(module, NystromEncoder)]
        for encoder in encoders:
            encoder.recompute = False
            encoder.attentions = nn.ModuleList(map(PlainNystrom, encoder.attentions))
            if encoder.square is not None:
                encoder.square = PlainSquare(encoder.square)

    def _patches_ask(self, patches: Tensor, genes: Tensor, bias: Tensor, ragged: Ragged) -> Tensor:
        part, bags = self.patches_read, patches.split(ragged.lengths.tolist())
        read = [
            attend(part.query(rows), part.key(own), part.value(own), part.heads)
            for rows, own in zip(bags, genes, strict=True)
        ]
        return part.output(joined(read))

    def _genes_ask(self, genes: Tensor, patches: Tensor, ragged: Ragged) -> Tensor:
        part, bags = self.genes_read, patches.split(ragged.lengths.tolist())
        read = [
            attend(part.query(own), part.key(rows), part.value(rows), part.heads)
            for rows, own in zip(bags, genes, strict=True)
        ]
        return part.output(torch.stack(read))


class PlainPatchLayers(nn.Module):
    """The layers in front of CMTA's encoder of patches."""

    def __init__(self, like: PatchLayers) -> None:
        super().__init__()
        self.first, self.rest = like.first, like.rest

    def forward(self, bag: Tokens) -> Tensor:
        """[total, dim]."""
        weight, bias = self.first.weight, self.first.bias
        rows = joined([functional.linear(rows, weight, bias).relu() for rows in bags_of(bag)])
        return self.rest(functional.dropout(rows, self.first.dropout, self.training))


class PlainAMMASurv(AMMASurv):
    """`survfuse.models.ammasurv.AMMASurv` with Q, K and V formed and exact attention throughout."""

    def __init__(self, config: AMMASurvConfig) -> None:
        if config.modalities[config.bag].axes or config.patch_attention_kind == "nystrom":
            raise ValueError(
                "the plain baseline has no positions and exact attention; the bag must have "
                "axes=0, and patch_attention_kind must not be 'nystrom'"
            )
        super().__init__(config)
        tables = [self.names.index(table) for table, _ in self.gene_tokens.names]
        self.layers = nn.ModuleList(
            PlainAsymmetricLayer(config, blocks, tables) for blocks in config.layer_blocks
        )
        self.pool = PlainGatedPool(self.pool)

    def _tokens(self, inputs: Mapping[str, Modality]) -> tuple[Tensor, Tensor, Membership]:
        encoded, n_samples = encode_inputs(inputs, self.config.modalities)
        bag = encoded[self.config.bag]
        patches = joined([self.patch_projection(rows) for rows in bags_of(bag)])
        if self.config.patch_activation == "relu":
            patches = patches.relu()
        genes = self.gene_tokens(inputs, n_samples)
        batch = Membership(bag.ragged.packed(), bag.present, genes.present)
        return patches, genes.values, batch


class PlainGatedPool(GatedAttentionPool):
    """`survfuse.layers.GatedAttentionPool` of packed bags, with the weights of `like`."""

    def __init__(self, like: GatedAttentionPool) -> None:
        nn.Module.__init__(self)
        self.dropout = like.dropout
        self.value, self.gate, self.score = like.value, like.gate, like.score

    def forward(self, bag: Tensor, ragged: Ragged) -> Tensor:
        """[B, K, D]."""
        parts = bag.split(ragged.lengths.tolist())
        return torch.stack([gated_mean(self, rows) for rows in parts])


class PlainAsymmetricLayer(AsymmetricLayer):
    """One call of torch's attention per bag and side, over the keys of all sides that it asks."""

    def _updates(self, patches: Tensor, genes: Tensor, batch: Membership) -> list[Tensor | None]:
        lengths = batch.ragged.lengths.tolist()
        heads = {"p": self._patch_heads(patches, lengths), "g": self._gene_heads(genes)}
        patch_bias, gene_bias = self.key_biases(batch)
        biases = {
            "p": [one.expand(n) for one, n in zip(patch_bias, lengths, strict=True)],
            "g": list(gene_bias),
        }
        updates: list[Tensor | None] = []
        for asking, side in (("p", self.patches), ("g", self.genes)):
            asked = [k for k in "pg" if asking + k in self.blocks]
            if not asked:
                updates.append(None)
                continue
            read = []
            for b in range(len(lengths)):
                mask = None
                # a bias that is the same for all keys changes nothing, and costs torch its kernel
                if asked != ["p"]:
                    mask = torch.cat([biases[k][b] for k in asked])[None]
                read.append(self._ask(heads[asking][b].query, [heads[k][b] for k in asked], mask))
            rows = joined(read) if asking == "p" else torch.stack(read)
            updates.append(side.dropout(side.output(rows)))
        return updates

    def _ask(self, query: Tensor, asked: list[Heads], mask: Tensor | None) -> Tensor:
        """[n, H d] of flat queries."""
        key, value = (
            joined([getattr(heads, name) for heads in asked]) for name in ("key", "value")
        )
        mask = None if mask is None else mask.to(query.dtype)
        dropout = self.config.attention_dropout if self.training else 0.0
        return attend(query, key, value, self.config.heads, mask=mask, dropout=dropout)

    def _patch_heads(self, patches: Tensor, lengths: list[int]) -> list[Heads]:
        side = self.patches
        if side.norm is None:
            return []
        normed = side.norm(patches).split(lengths)
        return [_flat(side, rows) for rows in normed]

    def _gene_heads(self, genes: Tensor) -> list[Heads]:
        side = self.genes
        return [] if side.norm is None else [_flat(side, rows) for rows in side.norm(genes)]


def _flat(side: nn.Module, rows: Tensor) -> Heads:
    layers = (side.query, side.key, side.value)
    return Heads(*(None if layer is None else layer(rows) for layer in layers))
