"""Tokens read a bag through optimal transport: what a patch gives to which token is a plan."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from survfuse.extras import require
from survfuse.layers.projected_attention import PatchProjection
from survfuse.layers.streaming import default_rows, stream
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged

SOLVERS = ("torch", "pot")
# the largest relative error of the scalings when the iteration of "torch" ends
_TOLERANCE = 1e-6


class TransportAttention(nn.Module):
    """`o_g = 1/k sum_j sum_{i in j} T_j[i, g] h_i` over k micro-batches j of projected patches.

    `h_i = dropout(relu(W x_i + b))`, and T_j is the plan of unbalanced optimal transport between
    the patches of a micro-batch and the tokens, all of equal mass:
    `min_T <T, C> + reg sum T (log T - 1) + tau (KL(T 1 | 1/n) + KL(T^t 1 | 1/G))`.
    C is the squared distance of patch and token, each shifted so that its least number is 0, over
    its maximum within the micro-batch. The plan is a constant to the gradient, as in the public
    code: gradients reach the patches through the sum, and the tokens not at all.

    Micro-batches of a bag are drawn at random in training; in evaluation every k-th patch belongs
    to one, so that each is spread over the bag.

    Args:
        dim: width of tokens and of projected patches.
        bag_dim: width of the bag D.
        micro_batch: the most patches of one plan.
        reg, tau: of the entropy and of the marginals.
        dropout: probability with which a number of a projected patch is dropped in training.
        solver: "torch" solves all micro-batches at once where the bag lies, in fp64, with as many
            Sinkhorn iterations as `reg` and `tau` need; "pot" calls the library POT for each on
            the CPU. They agree to 1e-5.
        piece_rows: see `survfuse.layers.streaming.stream`.

    Cost:
        Kept for the backward are the projected bag [N, dim] and the plan [N, G]. The lengths of
        the bags are read on the host.
    """

    def __init__(
        self,
        dim: int,
        bag_dim: int,
        *,
        micro_batch: int = 256,
        reg: float = 0.1,
        tau: float = 0.5,
        dropout: float = 0.0,
        solver: str = "torch",
        piece_rows: int | None = None,
    ) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"solver is {solver!r}; it must be one of {list(SOLVERS)}")
        super().__init__()
        self.micro_batch, self.reg, self.tau = micro_batch, reg, tau
        self.solver, self.piece_rows = solver, piece_rows
        self.project = PatchProjection(bag_dim, dim, dropout=dropout)

    def forward(self, tokens: Tensor, usable: Tensor, bag: Tensor, ragged: Ragged) -> Tensor:
        """What each token reads of the bag.

        Args:
            tokens: [B, G, dim].
            usable: [B, G] bool; a token that is not gets no mass.
            bag: [T, D].
            ragged: its ranges. A bag of no rows gives zeros.

        Returns:
            [B, G, dim] of the type of `tokens`.
        """
        rows, plan = self._plan(tokens, usable, bag, ragged)
        ends = ragged.lengths.cumsum(0).tolist()
        kind = accumulation_type(tokens.dtype)
        sums = [[tokens.new_zeros(tokens.shape[1:], dtype=kind)] for _ in ends]
        at, b = 0, 0
        for piece in rows:
            done = 0
            while done < len(piece):
                # the rows of this piece that belong to bag b
                n = min(len(piece) - done, ends[b] - at)
                if n > 0:
                    mine = piece[done : done + n].to(kind)
                    sums[b].append(plan[at : at + n].to(kind).T @ mine)
                done, at = done + n, at + n
                b += at == ends[b]
        return torch.stack([torch.stack(parts).sum(0) for parts in sums]).to(tokens.dtype)

    def weights(self, tokens: Tensor, usable: Tensor, bag: Tensor, ragged: Ragged) -> Tensor:
        """The share of each patch in what a token reads: [total, G], sums of 1 over a bag."""
        plan = self._plan(tokens, usable, bag, ragged)[1]
        parts = plan.split(ragged.lengths.tolist())
        return torch.cat([part / part.sum(0).clamp(min=1e-30) for part in parts])

    def _plan(
        self, tokens: Tensor, usable: Tensor, bag: Tensor, ragged: Ragged
    ) -> tuple[list[Tensor], Tensor]:
        """The projected bag in pieces, and the plan [total, G] of all bags, over their k."""

        def run(part: Ragged) -> tuple[Tensor]:
            return (self.project(bag, part),)

        rows = [found for (found,) in stream(run, bag, ragged, rows=self.piece_rows)]
        with torch.no_grad():
            joined = rows[0] if len(rows) == 1 else torch.cat(rows)
            bags = joined.split(ragged.lengths.tolist())
            plans = [self._plan_of_bag(bags[b], tokens[b], usable[b]) for b in range(len(bags))]
            return rows, torch.cat(plans)

    def _plan_of_bag(self, rows: Tensor, tokens: Tensor, usable: Tensor) -> Tensor:
        """[N, G] of [N, dim]; the mean over micro-batches is taken by its factor."""
        n, device = len(rows), rows.device
        kind = accumulation_type(rows.dtype)
        k = max(1, -(-n // self.micro_batch))
        size = -(-n // k)
        plan = torch.zeros((n + 1, len(tokens)), dtype=kind, device=device)
        if n == 0:
            return plan[:0]
        mix = self.training and k > 1
        order = torch.randperm(n, device=device) if mix else torch.arange(n, device=device)
        # row j of [k, size] is every k-th patch; row n of the plan takes what fills them up
        order = torch.cat([order, order.new_full((k * size - n,), n)]).view(size, k).T
        tokens = _from_zero(tokens.to(kind))
        at_once = max(1, (self.piece_rows or default_rows(rows)) // size)
        for index in order.split(at_once):
            there = index < n
            patches = _from_zero(rows[index.clamp(max=n - 1)].to(kind))
            cost = torch.cdist(patches, tokens.expand(len(index), -1, -1)).square()
            pairs = there[..., None] & usable
            cost = torch.where(pairs, cost, 0.0)
            top = cost.amax((1, 2), keepdim=True)
            cost = cost / torch.where(top > 0, top, 1.0)
            solve = unbalanced_plan if self.solver == "torch" else _plan_by_pot
            plan[index] = solve(cost, there, usable, reg=self.reg, tau=self.tau).to(kind)
        return plan[:n] / k


def unbalanced_plan(
    cost: Tensor, rows: Tensor, columns: Tensor, *, reg: float, tau: float
) -> Tensor:
    """Plans of unbalanced entropic transport between uniform masses, many at once.

    Sinkhorn's scalings `u = (a / K v)^f`, `v = (b / K^t u)^f` with `K = exp(-C / reg)` and
    `f = tau / (tau + reg)`. Two of them shrink the logarithmic error by f^2 at least, which tells
    in advance how many are needed; so nothing is compared and no device waited for.

    Args:
        cost: [K, n, G], in [0, 1].
        rows: [K, n] bool, which rows have mass; at least one each.
        columns: [G] bool, which columns have mass; at least one.
        reg: of the entropy, above 0.
        tau: of the marginals, above 0.

    Returns:
        [K, n, G] in fp64; 0 where a row or a column has no mass.

    Source: Chizat et al., "Scaling algorithms for unbalanced optimal transport problems", 2018.
    """
    power = tau / (tau + reg)
    # the logarithms start at most 1 / reg and that of the masses away from where they end
    reach = 1.0 / reg + math.log(cost.shape[1] * cost.shape[2] + 1)
    n_steps = math.ceil(math.log(_TOLERANCE / reach) / (2 * math.log(power)))
    a = rows.double() / rows.sum(1, keepdim=True)
    b = (columns.double() / columns.sum()).expand(len(cost), -1)
    kernel = torch.where(rows[..., None] & columns, (cost.double() / -reg).exp(), 0.0)
    v = torch.where(columns, 1.0 / cost.shape[2], 0.0).double().expand_as(b)
    for _ in range(n_steps):
        u = _scaling(a, torch.bmm(kernel, v[..., None])[..., 0], power)
        v = _scaling(b, torch.bmm(u[:, None], kernel)[:, 0], power)
    return u[..., None] * kernel * v[:, None]


def _scaling(mass: Tensor, reached: Tensor, power: float) -> Tensor:
    return torch.where(mass > 0, mass / torch.where(mass > 0, reached, 1.0), 0.0) ** power


def _plan_by_pot(cost: Tensor, rows: Tensor, columns: Tensor, *, reg: float, tau: float) -> Tensor:
    """As `unbalanced_plan`, one call of POT per plan."""
    ot = require("ot", extra="transport")
    plans = torch.zeros(cost.shape, dtype=torch.float64)
    kept = columns.cpu().nonzero()[:, 0]
    for plan, one, there in zip(plans, cost.double().cpu(), rows.cpu()):
        index = there.nonzero()[:, 0]
        small = one[index[:, None], kept].numpy()
        masses = (ot.unif(size) for size in small.shape)
        # Kullback-Leibler to a reference of ones is the entropy, which POT itself warns about
        found = ot.unbalanced.sinkhorn_knopp_unbalanced(
            *masses, small, reg, tau, reg_type="kl", c=np.ones_like(small)
        )
        plan[index[:, None], kept] = torch.from_numpy(found)
    return plans.to(cost.device)


def _from_zero(x: Tensor) -> Tensor:
    """Each row shifted so that its least number is 0."""
    return x - x.amin(-1, keepdim=True)
