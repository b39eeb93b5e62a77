"""The released arithmetic of deformable cross-attention against numpy; released weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain_deformable import PlainDeformableCrossAttention
from survfuse.layers import DeformableCrossAttention
from tests.layers.deformable_cases import DIM, make_layer, maps
from tests.layers.deformable_numpy import deformable_cross_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("shape", "groups", "grouped"),
    [
        ((12, 12), 4, (True, True)),
        ((13, 9), 2, (True, False)),
        ((8, 14), 2, (False, True)),
        ((7, 4), 4, (True, True)),
    ],
    ids=str,
)
def test_released_weights_give_what_the_released_module_gives(shape, groups, grouped) -> None:
    options = {"group_queries": grouped[0], "group_key_values": grouped[1]}
    source = make_layer(offset_groups=groups, **options)
    state = {f"attn2d.{name}": value for name, value in source.float().state_dict().items()}
    layer = DeformableCrossAttention.from_released(
        state | {"head.weight": torch.zeros(1)}, prefix="attn2d."
    )
    assert layer.released
    query, context = (tensor.float() for tensor in maps(*shape))
    got = layer(query, context, shape=shape)
    arrays = {name: value.double().numpy() for name, value in source.state_dict().items()}
    for b in range(2):
        images = (t[b].detach().double().numpy().T.reshape(DIM, *shape) for t in (query, context))
        expected, vgrid = deformable_cross_attention(
            arrays, *images, heads=4, n_groups=groups, stride=4, offset_scale=4.0, **options
        )
        tokens = torch.from_numpy(expected.reshape(DIM, -1).T.copy())
        torch.testing.assert_close(got.tokens[b].double(), tokens, rtol=1e-5, atol=1e-5)
        points = got.points[b].mT.reshape(vgrid.shape).double()
        torch.testing.assert_close(points, torch.from_numpy(vgrid), rtol=1e-5, atol=1e-5)
    # points leave the map and reach its half-padded border, so that both were compared
    cells = layer.sampled_cells(got.points, shape)
    assert bool((cells < 0).any())
    assert bool((cells > 0).any())


def test_the_baseline_of_the_benchmark_is_the_released_module() -> None:
    layer, shape = make_layer(released=True), (13, 9)
    query, context = maps(*shape)
    torch.testing.assert_close(
        PlainDeformableCrossAttention(layer)(query, context, shape),
        layer(query, context, shape=shape).tokens,
        rtol=1e-4,
        atol=1e-4,
    )


def test_true_grids_are_not_the_released_ones() -> None:
    layer = make_layer()
    query, context = maps(12, 12)
    true = layer(query, context, shape=(12, 12))
    layer.released = True
    released = layer(query, context, shape=(12, 12))
    torch.testing.assert_close(true.points, released.points)
    assert float((true.tokens - released.tokens).detach().abs().max()) > 1e-2


def test_names_and_shapes_are_the_released_ones() -> None:
    layer = DeformableCrossAttention(128)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "to_offsets.0.weight": (64, 1, 6, 6),
        "to_offsets.0.bias": (64,),
        "to_offsets.2.weight": (2, 64, 1, 1),
        "rel_pos_bias.mlp.0.0.weight": (32, 2),
        "rel_pos_bias.mlp.0.0.bias": (32,),
        "rel_pos_bias.mlp.1.0.weight": (32, 32),
        "rel_pos_bias.mlp.1.0.bias": (32,),
        "rel_pos_bias.mlp.2.weight": (1, 32),
        "rel_pos_bias.mlp.2.bias": (1,),
        "to_q.weight": (512, 16, 1, 1),
        "to_k.weight": (512, 16, 1, 1),
        "to_v.weight": (512, 16, 1, 1),
        "to_out.weight": (128, 512, 1, 1),
        "to_out.bias": (128,),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("p.to_q.weight"), r"no entry 'p\.to_q\.weight'"),
        (lambda s: s.update({"p.norm.weight": torch.zeros(1)}), r"entry 'p\.norm\.weight' that is"),
        (lambda s: s.update({"p.to_k.weight": torch.zeros(24, 16)}), r"p\.to_k\.weight.* convolut"),
        (
            lambda s: s.update({"p.to_v.weight": torch.zeros(24, 3, 1, 1)}),
            r"'p\.to_v\.weight' has shape .* must be \(24, 8, 1, 1\)",
        ),
        (
            lambda s: s.update({"p.to_out.weight": s["p.to_out.weight"][:-1]}),
            r"'p\.to_out\.bias' has shape \(16,\); it must be \[15\], as to_out\.weight",
        ),
        (
            lambda s: s.update({"p.to_out.weight": s["p.to_out.weight"][:, :-1]}),
            r"'p\.to_offsets\.0\.weight' has shape .* a divisor of the 23 channels",
        ),
        *(
            (
                lambda s, w=wrong: s.update({"p.rel_pos_bias.mlp.2.weight": w}),
                r"'p\.rel_pos_bias\.mlp\.2\.weight' has shape .* must be \[H / G, 4\]",
            )
            for wrong in (torch.tensor(1.0), torch.zeros(0, 4), torch.zeros(5, 4))
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if "to_" in name],
            r"no entry 'p\.to_offsets\.0\.weight'; it has 'p\.rel_pos.*, \.\.\.$",
        ),
        (lambda s: s.clear(), "no entry .*; it has none$"),
        (
            lambda s: s.update({f"model.{name}": s.pop(name) for name in list(s)}),
            r"no entry .*; with prefix='model\.p\.' there is one",
        ),
        (
            lambda s: s.update({"state_dict": {name: s.pop(name) for name in list(s)}}),
            "its entry 'state_dict' is a mapping itself",
        ),
    ],
)
def test_released_weights_that_do_not_fit_are_named(change, words) -> None:
    state = {f"p.{name}": value for name, value in make_layer().state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        DeformableCrossAttention.from_released(state, prefix="p.")


@pytest.mark.parametrize("wrong", [None, [1.0], torch.zeros(16, 24, 1, 1, dtype=torch.int64)])
def test_entries_that_are_no_floating_tensors_are_named(wrong) -> None:
    state = make_layer().state_dict() | {"to_out.weight": wrong}
    with pytest.raises(TypeError, match=r"entry 'to_out\.weight' is .*; it must be a floating"):
        DeformableCrossAttention.from_released(state)


@pytest.mark.parametrize("wrong", [None, "weights.pt", torch.nn.Identity()], ids=str)
def test_what_is_no_state_is_told(wrong) -> None:
    with pytest.raises(TypeError, match=r"state_dict is .*; it must map names to tensors"):
        DeformableCrossAttention.from_released(wrong)
