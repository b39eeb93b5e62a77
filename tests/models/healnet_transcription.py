"""The arithmetic of the public HEALNet v0.1.0 in plain torch, as functions of a parameter dict.

Written from a description of what that code computes (`verbose=False`), independently of the
survfuse modules it is the oracle of: nothing here is imported from survfuse, K, V and all weights
are formed, one head at a time. The parameter names are those of the released state dict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Released:
    """Arguments of the released constructor, by its names."""

    channel_dims: tuple[int, ...]
    num_spatial_axes: tuple[int, ...]
    out_dims: int = 4
    depth: int = 3
    num_freq_bands: int = 2
    max_freq: float = 10.0
    l_c: int = 128
    l_d: int = 128
    x_heads: int = 8
    l_heads: int = 8
    cross_dim_head: int = 64
    latent_dim_head: int = 64
    weight_tie_layers: bool = False
    fourier_encode_data: bool = True
    self_per_cross_attn: int = 1
    final_classifier_head: bool = True
    snn: bool = True

    @property
    def n_modalities(self) -> int:
        return len(self.channel_dims)

    def arguments(self) -> dict[str, object]:
        return {"n_modalities": self.n_modalities, **self.__dict__}

    def but(self, **changes: object) -> Released:
        return replace(self, **changes)


def released_parameters(spec: Released, *, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the released names; tied entries are one and the same tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def linear(prefix: str, out: int, width: int, bias: bool = True) -> dict[str, Tensor]:
        found = {f"{prefix}.weight": normal(out, width, scale=width**-0.5)}
        return found | ({f"{prefix}.bias": normal(out, scale=0.1)} if bias else {})

    def norm(prefix: str, width: int) -> dict[str, Tensor]:
        weight = 1.0 + normal(width, scale=0.1)
        return {f"{prefix}.weight": weight, f"{prefix}.bias": normal(width, scale=0.1)}

    def attention(width: int | None, heads: int, size: int) -> dict[str, Tensor]:
        found = norm("norm", spec.l_d)
        found |= {} if width is None else norm("norm_context", width)
        found |= linear("fn.to_q", heads * size, spec.l_d, bias=False)
        found |= linear("fn.to_kv", 2 * heads * size, width or spec.l_d, bias=False)
        return found | linear("fn.to_out.0", spec.l_d, heads * size)

    def feed_forward() -> dict[str, Tensor]:
        found = norm("norm", spec.l_d) | linear("fn.net.0", 8 * spec.l_d, spec.l_d)
        return found | linear("fn.net.2", spec.l_d, 4 * spec.l_d)

    per_axis = 2 * spec.num_freq_bands + 1 if spec.fourier_encode_data else 0
    widths = [
        c + a * per_axis for c, a in zip(spec.channel_dims, spec.num_spatial_axes, strict=True)
    ]
    parameters = {"latents": normal(spec.l_c, spec.l_d, scale=1.0)}
    layers: list[dict[str, dict[str, Tensor]]] = []
    for i in range(spec.depth):
        if spec.weight_tie_layers and i > 1:
            layers.append(layers[1])
            continue
        blocks: dict[str, dict[str, Tensor]] = {}
        for m, width in enumerate(widths):
            blocks[f"{2 * m}"] = attention(width, spec.x_heads, spec.cross_dim_head)
            one_for_all = spec.weight_tie_layers and i == 1 and m > 0
            blocks[f"{2 * m + 1}"] = blocks["1"] if one_for_all else feed_forward()
        last = 2 * spec.n_modalities
        if spec.self_per_cross_attn:
            blocks[f"{last}.0"] = attention(None, spec.l_heads, spec.latent_dim_head)
            blocks[f"{last}.1"] = feed_forward()
        layers.append(blocks)
    for i, blocks in enumerate(layers):
        for place, block in blocks.items():
            parameters |= {f"layers.{i}.{place}.{key}": value for key, value in block.items()}
    if spec.final_classifier_head:
        parameters |= norm("to_logits.1", spec.l_d)
        parameters |= linear("to_logits.2", spec.out_dims, spec.l_d)
    return parameters


def released_forward(
    parameters: dict[str, Tensor], spec: Released, tensors: list[Tensor | None]
) -> Tensor:
    """Logits of the released model for tensors [B, *axes, C], None where a modality is missing."""
    contexts = [None if tensor is None else _context(tensor, spec) for tensor in tensors]
    n_samples = next(context.shape[0] for context in contexts if context is not None)
    x = torch.stack([parameters["latents"]] * n_samples)
    for i in range(spec.depth):
        for m, context in enumerate(contexts):
            if context is not None:
                x = x + _attend(parameters, f"layers.{i}.{2 * m}", spec.x_heads, x, context)
                x = x + _feed_forward(parameters, f"layers.{i}.{2 * m + 1}", x, spec.snn)
            # the released code comes here for a missing modality as well
            if spec.self_per_cross_attn:
                last = f"layers.{i}.{2 * spec.n_modalities}"
                x = x + _attend(parameters, f"{last}.0", spec.l_heads, x, None)
                x = x + _feed_forward(parameters, f"{last}.1", x, spec.snn)
    if not spec.final_classifier_head:
        return x
    return _linear(parameters, "to_logits.2", _norm(parameters, "to_logits.1", x.mean(1)))


def _context(tensor: Tensor, spec: Released) -> Tensor:
    n_samples, *sizes, channels = tensor.shape
    if not spec.fourier_encode_data:
        return tensor.reshape(n_samples, -1, channels)
    parts = [tensor]
    for axis, size in enumerate(sizes):
        shape = [1] * tensor.dim()
        shape[axis + 1] = size
        position = torch.linspace(-1, 1, size, dtype=tensor.dtype).reshape(shape)
        scales = torch.linspace(1, spec.max_freq / 2, spec.num_freq_bands, dtype=tensor.dtype)
        waves = [torch.sin(torch.pi * s * position) for s in scales]
        waves += [torch.cos(torch.pi * s * position) for s in scales]
        parts += [wave.expand(*tensor.shape[:-1], 1) for wave in [*waves, position]]
    return torch.cat(parts, dim=-1).reshape(n_samples, -1, sum(p.shape[-1] for p in parts))


def _attend(
    parameters: dict[str, Tensor], at: str, heads: int, x: Tensor, context: Tensor | None
) -> Tensor:
    queries = _norm(parameters, f"{at}.norm", x)
    source = queries if context is None else _norm(parameters, f"{at}.norm_context", context)
    query = queries @ parameters[f"{at}.fn.to_q.weight"].T
    key, value = (source @ parameters[f"{at}.fn.to_kv.weight"].T).chunk(2, -1)
    size = query.shape[-1] // heads
    outs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / size**0.5
        # temperature one half
        outs.append((2.0 * logits).softmax(-1) @ value[..., part])
    out = _linear(parameters, f"{at}.fn.to_out.0", torch.cat(outs, -1))
    return torch.where(out > 0, out, 0.01 * out)


def _feed_forward(parameters: dict[str, Tensor], at: str, x: Tensor, snn: bool) -> Tensor:
    hidden = _linear(parameters, f"{at}.fn.net.0", _norm(parameters, f"{at}.norm", x))
    value, gate = hidden.chunk(2, -1)
    gate = functional.selu(gate) if snn else functional.gelu(gate)
    return _linear(parameters, f"{at}.fn.net.2", value * gate)


def _linear(parameters: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    return x @ parameters[f"{at}.weight"].T + parameters[f"{at}.bias"]


def _norm(parameters: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt()
    return normed * parameters[f"{at}.weight"] + parameters[f"{at}.bias"]
