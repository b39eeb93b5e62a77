"""One module with every public op in it is one graph, whatever the lengths."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor, nn

from survfuse import Ragged, ops
from survfuse.ops import BlockSide

B, LQ, H, D, WIDTH = 2, 3, 2, 4, 8
# what is exported beside the ops: types, and what tells about backends
NOT_OPS = {"Attended", "Selection", "PooledBag", "GatedBag", "BlockSide", "BlockAttended"}
NOT_OPS |= {"backend_obstacle", "select_backend", "selected_backend", "GridIndex"}
# prepares what a graph is given, and waits for values
NOT_OPS |= {"grid_index"}


class EveryOp(nn.Module):
    """Results of every op, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(B, LQ, H, D))
        self.w_k = nn.Parameter(torch.randn(H, D, WIDTH))
        self.w_v = nn.Parameter(torch.randn(H, D, WIDTH))
        corners = torch.stack([torch.arange(24) % 6, torch.arange(24) // 6], 1)
        self.grid = ops.grid_index(corners, patch_size=1)
        self.shapes = torch.tensor([[2, 3], [1, 2]])

    def forward(self, bag: Tensor, bias: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        rows = torch.einsum("bqhe,hed->bqhd", self.query, self.w_k).flatten(1, 2)
        pooled, lse, _ = ops.pool_bag(rows, bag, bias=bias, ragged=ragged, backend="tiled")
        found = {"pool_bag": pooled}
        found["pool_weights"] = ops.pool_weights(rows, bag, lse, bias=bias, ragged=ragged)
        return (
            found
            | self.attend_bag(bag, bias, ragged)
            | self.ask_tokens(bag, ragged)
            | self.pool_gated(bag, bias, ragged)
            | self.attend_keys(bag, bias, ragged)
            | self.deform(bag, ragged)
        )

    def deform(self, bag: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        """Places are read off the features."""
        pixels = self.w_v.flatten(0, 1).reshape(1, 8, H, D)
        # [1, T, H, L, P, 2] of one point, [1, T, H, L, P]
        points = bag[None].unflatten(2, (H, 2, 1, 2))
        weights = points.sum(-1)
        sampled = ops.multi_scale_deformable_attention(
            pixels, self.shapes, points, weights, backend="tiled"
        )
        centres = bag[None].unflatten(2, (2, 4)).sigmoid()
        boxed = ops.multi_scale_deformable_attention_from_offsets(
            pixels, self.shapes, centres, points, weights, backend="tiled"
        )
        places = self.query.sum(1)[:, None, :, :2]  # [B, 1, M, 2], M = H
        queries = torch.einsum("td,hed->the", bag, self.w_k)
        keys = self.query[:, :H]
        mlp = [(self.w_k[0, :, :2], bag.sum(0)[:D]), (self.w_v[0, :H, :D], bag.sum(0)[:H])]
        attention = (queries, keys, keys, bag[:, :2], places, mlp)
        options = {"query_ragged": ragged, "backend": "tiled"}
        out, lse = ops.position_biased_attention_with_lse(*attention, bias="table", **options)
        return {
            "multi_scale_deformable_attention": sampled,
            "multi_scale_deformable_attention_from_offsets": boxed,
            "position_biased_attention": ops.position_biased_attention(*attention, **options),
            "position_biased_attention_with_lse": out + lse[..., None],
            "sample_bag": ops.sample_bag(bag, self.grid, 4 * bag[None, None, :, :2].sigmoid()),
        }

    def ask_tokens(self, bag: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        keys = torch.einsum("bqhe,hed->bhqd", self.query, self.w_k)
        spread = ops.spread_tokens(keys, keys, bag, ragged=ragged, dropout_p=0.1, backend="tiled")
        tokens = (bag, self.w_k, self.query, self.query)
        outs = [
            ops.bag_attends_tokens(*tokens, ragged=ragged, absorb=absorb, backend="tiled")
            for absorb in ("always", "never")
        ]
        out, lse = ops.bag_attends_tokens_with_lse(*tokens, ragged=ragged, backend="tiled")
        return {
            "spread_tokens": spread.out,
            "bag_attends_tokens": outs[0] + outs[1],
            "bag_attends_tokens_with_lse": out + lse[..., None],
        }

    def attend_bag(self, bag: Tensor, bias: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        projections = (self.query, bag, self.w_k)
        options = {"bias": bias, "ragged": ragged}
        found = {}
        for absorb in ("always", "never"):
            out = ops.tokens_attend_bag(
                *projections, self.w_v, absorb=absorb, backend="tiled", **options
            )
            found["tokens_attend_bag"] = found.get("tokens_attend_bag", 0.0) + out
        out, lse = ops.tokens_attend_bag_with_lse(
            *projections, self.w_v, backend="tiled", **options
        )
        found["tokens_attend_bag_with_lse"] = out
        weights = ops.tokens_attend_bag_weights(*projections, lse, reduce="heads", **options)
        return found | {"tokens_attend_bag_weights": weights}

    def pool_gated(self, bag: Tensor, bias: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        hidden = self.w_k.flatten(0, 1)
        shift = hidden.sum(1)
        gate = (bag, hidden, shift, hidden.flip(0), shift, self.w_v.flatten(0, 1).T, None)
        options = {"bias": bias, "ragged": ragged}
        pooled, lse = ops.gated_attention_pool(*gate, backend="tiled", **options)
        weights = ops.gated_attention_weights(*gate, lse, reduce="rows", **options)
        return {"gated_attention_pool": pooled, "gated_attention_weights": weights}

    def attend_keys(self, bag: Tensor, bias: Tensor, ragged: Ragged) -> dict[str, Tensor]:
        key = torch.einsum("td,hed->the", bag, self.w_k)
        options = {"bias": bias, "key_ragged": ragged, "backend": "tiled"}
        found = {"cross_attention": ops.cross_attention(self.query, key, key, **options)}
        parts = [ops.cross_attention_with_lse(self.query, key * s, key, **options) for s in (1, 2)]
        found["cross_attention_with_lse"] = parts[0][0]
        out, lse = ops.merge_attention(*zip(*parts))
        found["merge_attention"] = out
        found["merge_over_group"] = ops.merge_over_group(out, lse, group=None)[0]
        found["cross_attention_weights"] = ops.cross_attention_weights(
            self.query, key, lse, reduce="rows", **options
        )
        attended = ops.block_attention(
            BlockSide(self.query, self.query, self.query),
            BlockSide(key, key, key, bias, ragged),
            ("tokens->tokens", "tokens->bag", "bag->tokens", "bag->bag"),
            dropout_p=0.1,
            backend="tiled",
        )
        return found | {
            "block_attention": attended.bag_out.sum(0) + attended.tokens_out.sum((0, 1))
        }


@pytest.fixture
def _alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(before)


def call(n: int) -> tuple[Tensor, Tensor, Ragged]:
    g = torch.Generator().manual_seed(n)
    bag = torch.randn(n + 3, WIDTH, generator=g, requires_grad=True)
    bias = torch.randn(n + 3, generator=g, requires_grad=True)
    return bag, bias, Ragged.from_ranges([0, 2], [n, n - 5])


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "default"])
def test_every_op_in_one_graph(dynamic: bool | None, graphs: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = EveryOp()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (40, 65, 31):
        outs = []
        for function in (module, compiled):
            torch.manual_seed(4)
            inputs = call(n)
            found = function(*inputs)
            total = sum(result.square().sum() for result in found.values())
            leaves = [*inputs[:2], *module.parameters()]
            outs.append((found, torch.autograd.grad(total, leaves)))
        (expected, expected_gradients), (got, got_gradients) = outs
        assert set(expected) == {name for name in ops.__all__ if name not in NOT_OPS}
        for name, want in expected.items():
            torch.testing.assert_close(got[name], want, msg=name)
        for have, want in zip(got_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(have, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


@pytest.mark.usefixtures("_alone")
def test_the_gathering_of_parts_is_a_proper_op() -> None:
    from survfuse.ops.merge_attention import _gather

    packed = torch.randn(2, 3, 5)
    torch.library.opcheck(_gather, (packed, dist.group.WORLD.group_name, 1))
    assert torch.equal(_gather(packed, dist.group.WORLD.group_name, 1), packed[None])
