"""`CrossAttention` is `torch.nn.MultiheadAttention`, but for the shapes it is fast on."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from survfuse import Ragged
from survfuse.layers import CrossAttention
from tests.ops.tolerance import assert_within_budget


class Case(NamedTuple):
    """A module and its call."""

    lq: int = 6
    lk: int = 37
    batch: int | None = 3  # None: inputs without a batch
    heads: int = 4
    bias: bool = True
    batch_first: bool = True
    kdim: int | None = None
    vdim: int | None = None
    one_tensor: bool = True  # key and value are one bag
    mask: str | None = None  # "bool" or "float"
    absorb: str = "auto"

    def module(self, kind: type[nn.Module], **options) -> nn.Module:
        torch.manual_seed(0)
        module = kind(
            16,
            self.heads,
            bias=self.bias,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            **options,
        )
        with torch.no_grad():
            # both start at zero, where nobody would see them being mixed up
            for parameter in (module.in_proj_bias, module.out_proj.bias):
                if parameter is not None:
                    parameter.uniform_(-0.3, 0.3)
        return module

    def inputs(self) -> list[Tensor]:
        """Query, key and value, the last two one tensor where the case says so; and the mask."""
        g = torch.Generator().manual_seed(1)

        def random(length: int, width: int) -> Tensor:
            shape = (self.batch, length) if self.batch_first else (length, self.batch)
            shape = (length,) if self.batch is None else shape
            return torch.randn(*shape, width, generator=g)

        query, key = random(self.lq, 16), random(self.lk, self.kdim or 16)
        value = key if self.one_tensor else random(self.lk, self.vdim or 16)
        return [query, key, value]

    def key_padding_mask(self) -> Tensor | None:
        if self.mask is None:
            return None
        g = torch.Generator().manual_seed(2)
        shape = (self.lk,) if self.batch is None else (self.batch, self.lk)
        hidden = torch.rand(shape, generator=g) < 0.4
        hidden[..., 0] = False
        if self.mask == "bool":
            return hidden
        return torch.randn(shape, generator=g).masked_fill(hidden, -torch.inf)


CASES = {
    "bag": Case(),
    "bag, absorbed": Case(absorb="always"),
    "bag, formed": Case(absorb="never"),
    "length first": Case(batch_first=False),
    "length first, two tensors": Case(batch_first=False, one_tensor=False),
    "two tensors": Case(one_tensor=False),
    "other widths": Case(kdim=24, vdim=12, one_tensor=False),
    "a wide bag": Case(kdim=24, vdim=24, absorb="always"),
    "a wide bag, formed": Case(kdim=24, vdim=24, absorb="never"),
    "masked bag": Case(mask="bool", batch_first=False),
    "masked keys": Case(mask="bool", one_tensor=False),
    "biased bag": Case(mask="float"),
    "biased keys": Case(mask="float", one_tensor=False),
    "no biases": Case(bias=False),
    "no biases, other widths": Case(bias=False, kdim=24, vdim=24),
    "no batch": Case(batch=None),
    "no batch, masked": Case(batch=None, mask="bool", batch_first=False, one_tensor=False),
    "one query": Case(lq=1),
    "one key": Case(lk=1),
    "one query, one key, two tensors": Case(lq=1, lk=1, one_tensor=False),
    "one head": Case(heads=1),
    "more queries than keys": Case(lq=70, lk=5),
}
every_case = pytest.mark.parametrize("name", CASES)


def run(module: nn.Module, case: Case, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Result, weights, and the gradients of inputs and parameters of one sum of both."""
    module = module.to(dtype)
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in case.inputs())
    value = key if case.one_tensor else value
    mask = case.key_padding_mask()
    mask = mask.to(dtype) if case.mask == "float" else mask
    out, weights = module(query, key, value, key_padding_mask=mask, **options)
    total = (out * torch.linspace(-1.0, 2.0, out.numel(), dtype=dtype).view(out.shape)).sum()
    if weights is not None:
        channel = torch.linspace(-2.0, 1.0, weights.numel(), dtype=dtype).view(weights.shape)
        total = total + (weights * channel).sum()
    inputs = {"query": query, "key": key} | ({} if case.one_tensor else {"value": value})
    inputs |= dict(module.named_parameters())
    gradients = torch.autograd.grad(total, list(inputs.values()))
    found = {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True)} | {"out": out}
    return found | ({} if weights is None else {"weights": weights})


def compare(case: Case, yardstick: nn.Module, *, train: bool, **options) -> None:
    """Against torch's module in fp64, with the error of the yardstick in fp32 as budget."""
    ours = case.module(CrossAttention, absorb=case.absorb, backend="tiled").train(train)
    exact = run(case.module(nn.MultiheadAttention).train(train), case, torch.float64, **options)
    plain = run(yardstick.train(train), case, torch.float32, **options)
    got = run(ours, case, torch.float32, **options)
    assert got.keys() == exact.keys()
    # the only key has weight 1 whatever anybody does: what its weight's gradient leaves is rounding
    constant = case.lk == 1 and "weights" in exact
    for name in ("out", "weights") if constant else exact:
        want = exact[name]
        assert_within_budget(name, got[name], plain[name], want, torch.float32)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@every_case
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_results_and_gradients_are_those_of_torch(name: str, train: bool) -> None:
    case = CASES[name]
    compare(case, case.module(nn.MultiheadAttention), train=train, need_weights=False)


@every_case
def test_weights_are_those_of_torch(name: str) -> None:
    case = CASES[name]
    # streamed weights are exp(logit - lse) of a rounded lse, whoever computes them
    plain = case.module(CrossAttention, backend="reference")
    compare(case, plain, train=True)
    compare(case, plain, train=False, average_attn_weights=False)


@every_case
def test_initialisation_is_that_of_torch(name: str) -> None:
    states = []
    for kind in (CrossAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        case = CASES[name]
        module = kind(16, case.heads, bias=case.bias, kdim=case.kdim, vdim=case.vdim)
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    for parameter, values in states[1].items():
        assert torch.equal(states[0][parameter], values)


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "vdim": 12}, {"bias": False}], ids=str)
def test_checkpoints_load_both_ways(options: dict) -> None:
    ours, torchs = CrossAttention(16, 4, **options), nn.MultiheadAttention(16, 4, **options)
    torchs.load_state_dict(ours.state_dict())
    other = CrossAttention(16, 4, **options)
    other.load_state_dict(torchs.state_dict())
    for one, two in zip(other.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_stands_in_for_the_attention_of_a_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    tokens, bag = torch.randn(2, 5, 16), torch.randn(2, 40, 16)
    expected = layer(tokens, bag)
    ours = CrossAttention(16, 4, batch_first=True, backend="tiled")
    ours.load_state_dict(layer.multihead_attn.state_dict())
    layer.multihead_attn = ours
    torch.testing.assert_close(layer(tokens, bag), expected)


@pytest.mark.parametrize("one_tensor", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_packed_bags_are_their_bags_one_by_one(one_tensor: bool, average: bool) -> None:
    attention = CrossAttention(16, 4, kdim=24, vdim=24, batch_first=True, backend="tiled")
    lengths = [9, 0, 14]
    query, bag = torch.randn(3, 6, 16), torch.randn(23, 24)
    value = bag if one_tensor else torch.randn(23, 24)
    mask = torch.rand(23) < 0.3
    out, weights = attention(
        query,
        bag,
        value,
        key_padding_mask=mask,
        average_attn_weights=average,
        ragged=Ragged.from_lengths(lengths),
    )
    first = 0
    for b, n in enumerate(lengths):
        rows = slice(first, first + n)
        first += n
        if n == 0:
            torch.testing.assert_close(out[b], attention.out_proj.bias.expand(6, -1))
            continue
        part = bag[rows]
        alone, alone_weights = attention(
            query[b],
            part,
            part if one_tensor else value[rows],
            key_padding_mask=mask[rows],
            average_attn_weights=average,
        )
        torch.testing.assert_close(out[b], alone)
        turned = alone_weights.mT if average else alone_weights.permute(2, 1, 0)
        torch.testing.assert_close(weights[rows], turned)


@pytest.mark.parametrize("one_tensor", [True, False])
def test_nothing_to_attend_to_is_the_bias_of_the_result(one_tensor: bool) -> None:
    """Where torch returns NaN."""
    attention = CrossAttention(16, 4, batch_first=True, backend="tiled")
    query, key = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [False] * 5])
    if one_tensor:
        key[0] = torch.nan
    out, weights = attention(query, key, key if one_tensor else key.clone(), key_padding_mask=mask)
    torch.testing.assert_close(out[0], attention.out_proj.bias.expand(3, -1))
    assert not bool(weights[0].any())
    for gradient in torch.autograd.grad(out.sum(), [query, *attention.parameters()]):
        assert bool(gradient.isfinite().all())


def test_dropout_is_for_training_and_weights_are_before_it() -> None:
    attention = CrossAttention(16, 4, dropout=0.5, batch_first=True, backend="tiled")
    query, bag = torch.randn(1, 3, 16), torch.randn(1, 30, 16)
    for value in (bag, bag.clone()):
        kept = attention.eval()(query, bag, value)
        dropped = attention.train()(query, bag, value)
        assert not torch.equal(dropped[0], kept[0])
        assert torch.equal(dropped[1], kept[1])
        torch.testing.assert_close(kept[1].sum(-1), torch.ones(1, 3))


def test_a_narrow_bag_beside_wide_parameters() -> None:
    attention = CrossAttention(16, 4, batch_first=True, backend="tiled")
    query, bag = torch.randn(1, 3, 16), torch.randn(1, 30, 16).bfloat16()
    out, _ = attention(query, bag, bag)
    expected, _ = attention(query, bag.float(), bag.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_autocast_gives_the_type_of_torch() -> None:
    query, bag = torch.randn(1, 3, 16), torch.randn(1, 30, 16)
    types = []
    for kind in (CrossAttention, nn.MultiheadAttention):
        options = {"backend": "tiled"} if kind is CrossAttention else {}
        attention = kind(16, 4, batch_first=True, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            types.append(
                [attention(query, bag, v, need_weights=False)[0].dtype for v in (bag, -bag)]
            )
    assert types[0] == types[1]


@pytest.mark.parametrize("name", ["bag, absorbed", "masked keys", "other widths"])
# as in the contract of the ops: default numbers are not compiled as symbols first
@torch._dynamo.config.patch(specialize_float=True)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = CASES[name]
    module = case.module(CrossAttention, absorb=case.absorb, backend="tiled")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for lk in (37, 51, 80):
        longer = case._replace(lk=lk)
        query, key, value = longer.inputs()
        mask = longer.key_padding_mask()
        expected = module(query, key, value, key_padding_mask=mask)
        got = compiled(query, key, value, key_padding_mask=mask)
        for have, want in zip(got, expected, strict=True):
            torch.testing.assert_close(have, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


MADE = {
    "bias_kv": ({"add_bias_kv": True}, ValueError, "add_bias_kv is True; it must be False"),
    "zero": ({"add_zero_attn": True}, ValueError, "add_zero_attn is True; it must be False"),
    "heads": ({"num_heads": 3}, ValueError, "embed_dim is 16 and num_heads 3; the first must be"),
    "no heads": ({"num_heads": 0}, ValueError, "embed_dim is 16 and num_heads 0; the first must"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout is 1.0; it must be at least 0 and below 1"),
}


@pytest.mark.parametrize("case", MADE)
def test_bad_modules_are_named(case: str) -> None:
    changes, kind, message = MADE[case]
    with pytest.raises(kind, match=re.escape(message)):
        CrossAttention(**({"embed_dim": 16, "num_heads": 4} | changes))


BAG, QUERY = torch.zeros(2, 9, 16), torch.zeros(2, 3, 16)
RAGGED = {"key": BAG[0], "value": BAG[0], "ragged": Ragged.from_lengths([4, 5])}
CALLS = {
    "attn_mask": (
        {"attn_mask": torch.zeros(3, 9)},
        ValueError,
        "attn_mask is given; CrossAttention",
    ),
    "causal": (
        {"is_causal": True},
        ValueError,
        "is_causal is given; CrossAttention has no mask per",
    ),
    "query": ({"query": QUERY.tolist()}, TypeError, "query is list; it must be a tensor"),
    "value": ({"value": None}, TypeError, "value is NoneType; it must be a tensor"),
    "width": (
        {"query": QUERY[..., :9]},
        ValueError,
        "query has shape (2, 3, 9); it must be [B, L, 16]",
    ),
    "dims": ({"key": BAG[0]}, ValueError, "key has shape (9, 16); it must be [B, L, 16]"),
    "batch": (
        {"key": BAG[:1], "value": BAG[:1]},
        ValueError,
        "key has shape (1, 9, 16) and query (2,",
    ),
    "rows": (
        {"value": BAG[:, :8]},
        ValueError,
        "value has shape (2, 8, 16) and key (2, 9, 16); they",
    ),
    "packed": (
        RAGGED | {"key": BAG},
        ValueError,
        "key has shape (2, 9, 16); it must be [T, 16]; with",
    ),
    "bags": (
        RAGGED | {"query": QUERY[0]},
        ValueError,
        "ragged has 2 bags and query 1; they must have the same number",
    ),
    "mask": (
        {"key_padding_mask": torch.zeros(9, 2).bool()},
        ValueError,
        "key_padding_mask has shape (9, 2); it must be [2, 9]",
    ),
    "packed mask": (
        RAGGED | {"key_padding_mask": torch.zeros(2, 9)},
        ValueError,
        "key_padding_mask has shape (2, 9); it must be [9]",
    ),
    "integers": (
        {"key_padding_mask": torch.zeros(2, 9).int()},
        TypeError,
        "key_padding_mask is torch.int32; it must be bool or floating",
    ),
    "mask elsewhere": (
        {"key_padding_mask": torch.zeros(2, 9, device="meta")},
        ValueError,
        "key_padding_mask is on meta and the key on cpu; move one of them",
    ),
    "no mask": ({"key_padding_mask": [0] * 9}, TypeError, "key_padding_mask is list; it must be a"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_input_is_named(case: str) -> None:
    changes, kind, message = CALLS[case]
    attention = CrossAttention(16, 4, batch_first=True, backend="tiled")
    with pytest.raises(kind, match=re.escape(message)):
        attention(**({"query": QUERY, "key": BAG, "value": BAG} | changes))


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="backend is 'cudnn'; it must be None or one of"):
        CrossAttention(16, 4, batch_first=True, backend="cudnn")(QUERY, BAG, BAG)
