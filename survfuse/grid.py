"""Where the patches of packed bags lie: a map from grid cells to rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.ragged import Ragged, check_ragged


class GridIndex(NamedTuple):
    """The grid of patches of each bag; `survfuse.ops.grid_index` makes it.

    Cell (x, y) of bag b is entry `cell_offsets[b] + y * shapes[b, 1] + x` of `index`. Bags may hold
    the same rows: each has cells of its own.

    Attributes:
        index: [cells of all bags] int32, the row of the packed matrix that a cell shows; -1 where
            there is no tissue.
        cell_offsets: [B + 1] int64, the first cell of each bag, and the number of all.
        shapes: [B, 2] int64, height and width of each bag's bounding box in cells; (0, 0) for a bag
            of no patches.
    """

    index: Tensor
    cell_offsets: Tensor
    shapes: Tensor

    @property
    def n_bags(self) -> int:
        """Number of bags B."""
        return self.shapes.shape[0]

    def to(self, device: torch.device | str) -> GridIndex:
        """The same grid with all three tensors on `device`."""
        return GridIndex(*(tensor.to(device) for tensor in self))

    def select(self, bag: int) -> GridIndex:
        """The grid of one bag, a view; reads two offsets on the host.

        Raises:
            ValueError: there is no bag of this number.
        """
        if not 0 <= bag < self.n_bags:
            raise ValueError(f"bag is {bag}; the grid has {self.n_bags}, numbered from 0")
        first, end = self.cell_offsets[bag : bag + 2].tolist()
        offsets = self.cell_offsets.new_tensor([0, end - first])
        return GridIndex(self.index[first:end], offsets, self.shapes[bag : bag + 1])

    def cells(self, ragged: Ragged) -> Tensor:
        """The cell (x, y) of each patch, [total, 2] int64, packed per (bag, patch).

        (-1, -1) for a patch that no cell shows: one that another patch of its cell came before.

        Args:
            ragged: the ranges that the grid was made for.

        Raises:
            TypeError, ValueError: `ragged` is none, lies elsewhere or has another number of bags,
                or, on the CPU, a cell shows a row outside its bag.
        """
        check_ragged("ragged", ragged, "the grid", self.index.device)
        if ragged.n_bags != self.n_bags:
            raise ValueError(
                f"ragged has {ragged.n_bags} bags and the grid {self.n_bags}; it must be the one "
                "that the grid was made for"
            )
        cell = torch.arange(self.index.shape[0], device=self.index.device)
        bag = torch.searchsorted(self.cell_offsets[1:], cell, right=True)
        within = cell - self.cell_offsets[bag]
        width = self.shapes[bag, 1]
        row = self.index - ragged.starts[bag]
        inside = (row >= 0) & (row < ragged.lengths[bag])
        if self.index.device.type == "cpu" and bool(((self.index >= 0) & ~inside).any()):
            first = int(bag[(self.index >= 0) & ~inside][0])
            raise ValueError(
                f"ragged: bag {first} of the grid shows rows outside its range; it must be the one "
                "that the grid was made for"
            )
        # what shows no patch goes to one row more, which is cut off
        packed = torch.where(inside, ragged.packed().starts[bag] + row, ragged.total)
        cells = within.new_full((ragged.total + 1, 2), -1)
        cells[packed] = torch.stack([within % width, within // width], -1)
        return cells[: ragged.total]

    def check(self, n_rows: int, name: str = "grid") -> None:
        """Raise unless the three tensors agree and every row lies in a matrix of `n_rows` rows.

        Synchronises with the device; ops on CUDA take what lies outside for no tissue instead.

        Raises:
            ValueError: says what disagrees.
        """
        offsets, shapes = self.cell_offsets.cpu(), self.shapes.cpu()
        if bool((shapes < 0).any()) or not torch.equal(offsets.diff(), shapes.prod(1)):
            raise ValueError(
                f"{name}: cell_offsets and shapes disagree; a bag has height * width cells"
            )
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.index.shape[0]:
            raise ValueError(
                f"{name}: index has {self.index.shape[0]} cells and cell_offsets runs from "
                f"{int(offsets[0])} to {int(offsets[-1])}; it must run from 0 to their number"
            )
        if self.index.shape[0] == 0:
            return
        low, high = (int(value) for value in self.index.aminmax())
        if low < -1 or high >= n_rows:
            raise ValueError(
                f"{name}: index shows rows {low} to {high}, but the bag matrix has {n_rows} rows "
                "(and -1 is no tissue)"
            )
