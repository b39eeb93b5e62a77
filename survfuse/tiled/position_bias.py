"""The bias of a tile of pairs by their offsets, and its gradients: by the MLP or by a table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.position_bias import PositionBias


class BiasTile(NamedTuple):
    """The bias of pairs, and what its gradient needs."""

    offset: Tensor  # [B, G, n, M, 2]
    values: Tensor  # [B, G, n, M, O]
    inside: MlpInside | TableInside

    def differentiate(
        self, d_values: Tensor, d_parameters: Tensor | None, positions: bool
    ) -> Tensor | None:
        """Add to the gradient of the parameters; return that of the signed logs, if wanted."""
        return self.inside.differentiate(d_values, d_parameters, positions)


class MlpInside(NamedTuple):
    """Layers of an MLP and what each was given."""

    layers: list[tuple[Tensor, Tensor]]
    inputs: list[Tensor]  # [pairs, 2], then the hidden layers behind their ReLU

    def differentiate(self, d_values, d_parameters, positions):
        bias = None
        if d_parameters is not None:
            sizes = PositionBias(d_parameters, None, len(self.layers) - 1, self._width)
            bias = sizes.layers(d_values.shape[-1])
        d = d_values.reshape(-1, d_values.shape[-1])
        for index in reversed(range(len(self.layers))):
            given = self.inputs[index]
            if bias is not None:
                d_weight, d_shift = bias[index]
                d_weight.addmm_(d.mT, given)
                d_shift.add_(d.sum(0))
            if index == 0 and not positions:
                return None
            d = d @ self.layers[index][0]
            if index > 0:
                d = torch.where(given > 0, d, 0.0)
        return d.view(*d_values.shape[:-1], 2)

    @property
    def _width(self) -> int:
        return self.layers[0][0].shape[0] if len(self.layers) > 1 else 0


class TableInside(NamedTuple):
    """Where pairs fall in a table."""

    table: Tensor  # [O, n, n]
    cell: Tensor  # [B, G, n, M, 2] int64, its lower corner
    fraction: Tensor  # [B, G, n, M, 2], the place within the cell
    per_cell: Tensor  # [2], cells per unit of the signed log
    covered: Tensor  # [B, G, n, M, 2] bool, False beyond the table

    def corner(self, dx: int, dy: int) -> Tensor:
        """[B, G, n, M, O]."""
        return self.table.flatten(1).T[self._index(dx, dy)]

    def interpolated(self) -> Tensor:
        """[B, G, n, M, O]."""
        fx, fy = self.fraction[..., None].unbind(-2)
        low = self.corner(0, 0) * (1.0 - fy) + self.corner(0, 1) * fy
        high = self.corner(1, 0) * (1.0 - fy) + self.corner(1, 1) * fy
        return low * (1.0 - fx) + high * fx

    def differentiate(self, d_values, d_parameters, positions):
        fx, fy = self.fraction[..., None].unbind(-2)
        if d_parameters is not None:
            nodes = d_parameters.flatten(1).T
            for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
                share = (fx if dx else 1.0 - fx) * (fy if dy else 1.0 - fy)
                share = (d_values * share).flatten(0, -2)
                _add_at(nodes, self._index(dx, dy).flatten(), share)
        if not positions:
            return None
        low, high = (self.corner(dx, 1) - self.corner(dx, 0) for dx in (0, 1))
        along_y = low * (1.0 - fx) + high * fx
        low, high = (self.corner(1, dy) - self.corner(0, dy) for dy in (0, 1))
        along_x = low * (1.0 - fy) + high * fy
        slopes = torch.stack([(d_values * along).sum(-1) for along in (along_x, along_y)], -1)
        return torch.where(self.covered, slopes * self.per_cell, 0.0)

    def _index(self, dx: int, dy: int) -> Tensor:
        x, y = self.cell.unbind(-1)
        return (x + dx) * self.table.shape[-1] + (y + dy)


def _add_at(nodes: Tensor, index: Tensor, values: Tensor) -> None:
    """Add rows of values to rows of nodes, equal indices in a fixed order."""
    if nodes.device.type == "cpu":
        nodes.index_add_(0, index, values)
    else:
        # sorts; index_add_ would add in any order
        nodes.index_put_((index,), values, accumulate=True)


def bias_tile(offset: Tensor, bias: PositionBias, n_out: int) -> BiasTile:
    """The bias of pairs with offsets [B, G, n, M, 2], one number for each of `n_out` heads."""
    u = torch.where(offset >= 0, offset.clamp(min=0.0).log1p(), -(-offset).clamp(min=0.0).log1p())
    if bias.reach is not None:
        inside = _in_table(u, bias.parameters, bias.reach)
        return BiasTile(offset, inside.interpolated(), inside)
    layers = bias.layers(n_out)
    inputs = [u.reshape(-1, 2)]
    for weight, shift in layers[:-1]:
        inputs.append(torch.relu(torch.addmm(shift, inputs[-1], weight.mT)))
    weight, shift = layers[-1]
    values = torch.addmm(shift, inputs[-1], weight.mT)
    return BiasTile(offset, values.view(*offset.shape[:-1], n_out), MlpInside(layers, inputs))


def _in_table(u: Tensor, table: Tensor, reach: Tensor) -> TableInside:
    n = table.shape[1]
    per_cell = (n - 1) / (2.0 * reach)
    at = (u.clamp(-reach, reach) + reach) * per_cell
    # NaN stays in the fraction; as an index it must be one
    cell = at.nan_to_num(0.0).floor().clamp(0, n - 2)
    return TableInside(table, cell.long(), at - cell, per_cell, u.abs() <= reach)
