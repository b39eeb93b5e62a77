"""AMMASurv of one sample in plain torch, with every logit of every softmax."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from survfuse.batch import Modality
from survfuse.layers.nystrom_attention import pseudo_inverse
from survfuse.models.ammasurv import AMMASurv
from survfuse.models.ammasurv_layer import AsymmetricLayer


def plain_layer(
    layer: AsymmetricLayer, x: Tensor, g: Tensor, tables: list[int]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One sample: x [N, dim] and g [G, dim] of what it has, one softmax over explicit logits."""
    config, n = layer.config, len(x)
    updated, masses = [], {}
    for letter, side, tokens in (("p", layer.patches, x), ("g", layer.genes, g)):
        asked = [block[1] for block in layer.blocks if block[0] == letter]
        if not asked:
            updated.append(tokens)
            continue
        query = side.project(side.norm(tokens)).query
        logits, values, owners = [], [], []
        for other, source, them in (("p", layer.patches, x), ("g", layer.genes, g)):
            if other not in asked:
                continue
            heads = source.project(source.norm(them))
            owner = [0] * n if other == "p" else tables
            counts = torch.tensor([float(owner.count(m)) for m in owner])
            bias = torch.zeros(len(them)).double()
            if config.learned_importance and owner:
                bias = bias + layer.importance[owner]
            if config.count_normalised and owner:
                bias = bias - counts.log()
            score = torch.einsum("qhd,khd->hqk", query, heads.key) / math.sqrt(config.head_dim)
            score = score / (config.gene_temperature if letter + other == "gp" else 1.0)
            logits.append(score + bias)
            values.append(heads.value)
            owners += owner
        weights = torch.cat(logits, -1).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, torch.cat(values))
        if owners and len(tokens):
            mass = weights.mean((0, 1))
            masses[letter] = torch.stack(
                [mass[[m == o for o in owners]].sum() for m in range(len(layer.importance))]
            )
        tokens = tokens + side.output(out.flatten(1))
        updated.append(tokens + side.feed_forward(tokens))
    return updated, masses


def plain(model: AMMASurv, inputs: dict[str, Modality]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits of one sample that has at least something, and masses by layer."""
    slide = inputs["slide"]
    start, length = int(slide.ragged.starts[0]), int(slide.ragged.lengths[0])
    rows = slide.features[start : start + length]
    x = model.patch_projection(rows).relu()
    tokens = model.gene_tokens(inputs, 1)
    there = tokens.present[0]
    g, tables = tokens.values[0][there], model.tables[there].tolist()
    masses = []
    for layer in model.layers:
        (x, g), mass = plain_layer(layer, x, g, tables)
        masses.append(mass)
    pooled, gates = [], []
    for m, transform in enumerate(model.pooled):
        mine = g[[table == m for table in tables]] if m else x
        if len(mine):
            pool = model.pool
            hidden = torch.tanh(pool.value(x)) * torch.sigmoid(pool.gate(x))
            mean = mine.mean(0) if m else (pool.score(hidden).softmax(0) * x).sum(0)
            pooled.append(transform(mean))
            extra = 0.0 if model.gate_weight is None else model.gate_weight[m] @ pooled[-1]
            gates.append(model.gate_bias[m] + extra)
    score = torch.stack(gates)
    softmax = model.config.gate_activation == "softmax"
    gate = score.softmax(0) if softmax else score.sigmoid()
    joint = (gate[:, None] * torch.stack(pooled)).sum(0)
    return model.readout(model.hidden(joint))["survival"], masses


def plain_landmarks(layer: AsymmetricLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """One bag's attention to itself [N, H, d] through landmarks, and log of its mean weight."""
    config, n = layer.config, len(x)
    y = layer.patches.norm(x)
    edges = [j * n // config.landmarks for j in range(config.landmarks + 1)]
    marks = torch.stack([y[i:j].mean(0) for i, j in pairwise(edges)])
    query, key, value = (t.transpose(0, 1) for t in layer.patches.project(y))
    query_mark, key_mark, _ = (t.transpose(0, 1) for t in layer.patches.project(marks))
    scale = config.head_dim**-0.5
    near = (query_mark @ key_mark.mT * scale).softmax(-1)
    first = query @ key_mark.mT * scale
    mixed = pseudo_inverse(near, config.iterations) @ (query_mark @ key.mT * scale).softmax(-1)
    out = first.softmax(-1) @ mixed @ value
    return out.transpose(0, 1), (first.logsumexp(-1) - math.log(config.landmarks)).T
