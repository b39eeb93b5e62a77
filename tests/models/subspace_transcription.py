"""Subspace fusion as its public code is described, in plain torch: the oracle of the tests.

Written from the description of the network and not from its code: 50 x 50 maps of 2500 patches,
everything formed, parameters taken from a state dict under the released names.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]
SIDE = 50
STRIDE, KERNEL, SCALE = 4, 6, 4.0


def released_state(
    *,
    dim: int = 16,
    heads: int = 2,
    dim_head: int = 8,
    channels: int = 12,
    widths: tuple[int, ...] = (10, 8, 6),
    genes: tuple[int, int] = (5, 7),
    label_dim: int = 4,
) -> State:
    """Random weights with the released names, unused entries included."""
    state: State = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        state[f"{name}.weight"] = torch.randn(n_out, n_in) / n_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(n_out)

    for suffix, n_genes in zip(("tumor", "immune"), genes):
        net, path = f"omic_net_{suffix}", f"pathomic_net_{suffix}"
        sizes = (n_genes, *widths, dim)
        for i in range(4):
            linear(f"{net}.encoder.{i}.0", sizes[i], sizes[i + 1])
        linear(f"{net}.classifier.0", dim, label_dim)
        linear(f"{path}._fc1.0", channels, dim)
        linear(f"{path}._fc2", dim, label_dim)
        linear(f"{path}.fusion_layer.fusion_layer", 2 * dim, dim)
        for norm in (f"{path}.layer3.norm", f"{path}.norm"):
            state[f"{norm}.weight"] = 1.0 + 0.2 * torch.randn(dim)
            state[f"{norm}.bias"] = 0.2 * torch.randn(dim)
        linear(f"{path}.pooler.dense", dim, dim)
        linear(f"{path}.multimodal_projection", dim, dim)
        state[f"{path}.cls_token"] = torch.randn(1, 1, dim)
        state[f"{path}.layer3.attn1d.to_q.weight"] = torch.randn(3, 4, 1)
        _attention_state(state, f"{path}.layer3.attn2d.", dim, heads, dim_head)
        linear(f"classifier_{suffix}.0", dim, label_dim)
    linear("classifier", 2 * dim, label_dim)
    return state


def _attention_state(state: State, prefix: str, dim: int, heads: int, dim_head: int) -> None:
    inner, units = heads * dim_head, dim // 4
    for name in ("to_q", "to_k", "to_v"):
        state[f"{prefix}{name}.weight"] = (
            torch.randn(inner, dim // heads, 1, 1) / (dim // heads) ** 0.5
        )
    state[f"{prefix}to_out.weight"] = torch.randn(dim, inner, 1, 1) / inner**0.5
    state[f"{prefix}to_out.bias"] = 0.1 * torch.randn(dim)
    state[f"{prefix}to_offsets.0.weight"] = torch.randn(dim_head, 1, KERNEL, KERNEL) / KERNEL
    state[f"{prefix}to_offsets.0.bias"] = 0.1 * torch.randn(dim_head)
    state[f"{prefix}to_offsets.2.weight"] = torch.randn(2, dim_head, 1, 1) / dim_head**0.5
    sizes = (2, units, units, 1)
    for i, name in enumerate(("mlp.0.0", "mlp.1.0", "mlp.2")):
        weight = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
        state[f"{prefix}rel_pos_bias.{name}.weight"] = weight
        state[f"{prefix}rel_pos_bias.{name}.bias"] = 0.1 * torch.randn(sizes[i + 1])


class Released:
    """Logits, branch features, gene vectors and points of released weights.

    Args:
        state: from `released_state`.
        heads: of the attention.
    """

    def __init__(self, state: State, *, heads: int) -> None:
        self.state, self.heads = state, heads

    def __call__(self, patches: Tensor, genes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Patches [B, 2500, D]; genes [B, F] by "tumor" and "immune"."""
        found: dict[str, Tensor] = {}
        for suffix in ("tumor", "immune"):
            gene = genes[suffix]
            for i in range(4):
                gene = functional.elu(self._linear(f"omic_net_{suffix}.encoder.{i}.0", gene))
            gene = gene.relu()
            found[f"genes_{suffix}"] = gene
            feature, points = self._branch(f"pathomic_net_{suffix}.", patches, gene)
            found[f"feature_{suffix}"], found[f"points_{suffix}"] = feature, points
        joint = torch.cat([found["feature_tumor"], found["feature_immune"]], 1)
        found["logits"] = self._linear("classifier", joint)
        return found

    def consistency(self, found: dict[str, Tensor], suffix: str) -> Tensor:
        """Per branch, before its weight: the released loss, genes repeated for each patch."""
        genes, points = found[f"genes_{suffix}"], found[f"points_{suffix}"]
        n = genes.shape[0]
        repeated = genes[:, None].expand(-1, SIDE * SIDE, -1).reshape(n, -1)
        a = functional.normalize(repeated @ repeated.T, dim=1)
        groups = points.view(self.heads, n, -1)  # of [(b g), 2, h', w']: mixes both
        b = torch.stack([functional.normalize(v @ v.T, dim=1) for v in groups]).mean(0)
        return ((a - b) ** 2 / n).sum()

    def _branch(self, name: str, patches: Tensor, gene: Tensor) -> tuple[Tensor, Tensor]:
        path = self._linear(f"{name}_fc1.0", patches).relu()
        both = torch.cat([path, gene[:, None].expand(-1, path.shape[1], -1)], -1)
        fused = self._linear(f"{name}fusion_layer.fusion_layer", both)
        norm = f"{name}layer3.norm"
        update, points = self._attend(
            f"{name}layer3.attn2d.", self._norm(norm, fused), self._norm(norm, path)
        )
        pooled = self._norm(f"{name}norm", fused + update).mean(1)
        pooled = self._linear(f"{name}pooler.dense", pooled).tanh()
        return self._linear(f"{name}multimodal_projection", pooled), points

    def _attend(self, p: str, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        state, heads, n = self.state, self.heads, tokens.shape[0]
        images, maps = (t.mT.reshape(n, -1, SIDE, SIDE) for t in (tokens, context))
        q = functional.conv2d(images, state[f"{p}to_q.weight"], groups=heads)
        grouped = q.reshape(n * heads, -1, SIDE, SIDE)
        weight = state[f"{p}to_offsets.0.weight"]
        hidden = functional.conv2d(
            grouped, weight, state[f"{p}to_offsets.0.bias"], STRIDE, 1, groups=weight.shape[0]
        )
        offsets = functional.conv2d(functional.gelu(hidden), state[f"{p}to_offsets.2.weight"])
        rows = offsets.shape[-1]
        points = _grid(rows) + offsets.tanh() * SCALE  # [(b g), 2, h', w']
        at = (2 * points / (rows - 1) - 1).movedim(1, -1)
        samples = functional.grid_sample(
            maps.reshape(n * heads, -1, SIDE, SIDE), at, align_corners=False
        ).reshape(n, -1, rows, rows)
        k, v = (
            functional.conv2d(samples, state[f"{p}{name}.weight"], groups=heads)
            for name in ("to_k", "to_v")
        )
        q, k, v = (t.reshape(n, heads, t.shape[1] // heads, -1).mT for t in (q, k, v))
        places = (2 * _grid(SIDE) / (SIDE - 1) - 1).flatten(1).T
        apart = places[None, :, None] - at.flatten(1, 2)[:, None]
        x = apart.sign() * (apart.abs() + 1).log()
        for name in ("mlp.0.0", "mlp.1.0"):
            x = self._linear(f"{p}rel_pos_bias.{name}", x).relu()
        bias = self._linear(f"{p}rel_pos_bias.mlp.2", x)[..., 0].unflatten(0, (n, heads))
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        out = (weights @ v).mT.reshape(n, -1, SIDE, SIDE)
        out = functional.conv2d(out, state[f"{p}to_out.weight"], state[f"{p}to_out.bias"])
        return out.flatten(2).mT, points

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias)


def _grid(side: int) -> Tensor:
    """[2, side, side]: (x, y) of each cell."""
    cell = torch.arange(side, dtype=torch.float32)
    return torch.stack([cell.expand(side, -1), cell[:, None].expand(-1, side)])
