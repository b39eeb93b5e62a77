"""HEALNet with released weights against an independent transcription of the released module."""

from __future__ import annotations

import pytest
import torch
from healnet_transcription import Released, released_forward, released_parameters
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import ArrayBatch, BagBatch, TableBatch
from survfuse.models.healnet import HEALNet
from survfuse.models.healnet_config import RELEASED_COHORTS, HEALNetConfig, released_l1
from tests.ops.tolerance import assert_within_budget

SMALL = Released(
    channel_dims=(11, 6, 3),
    num_spatial_axes=(1, 2, 3),
    l_c=5,
    l_d=14,
    cross_dim_head=5,
    latent_dim_head=6,
)
SIZES = {1: (7,), 2: (4, 5), 3: (2, 3, 4)}


def arrays(spec: Released, n_samples: int = 3) -> list[Tensor]:
    return [
        torch.randn(n_samples, *SIZES[axes], channels)
        for axes, channels in zip(spec.num_spatial_axes, spec.channel_dims, strict=True)
    ]


def as_inputs(tensors: list[Tensor | None]) -> dict[str, ArrayBatch]:
    return {
        f"modality_{m}": ArrayBatch(tensor, torch.ones(tensor.shape[0], dtype=torch.bool))
        for m, tensor in enumerate(tensors)
        if tensor is not None
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_outputs_equal_the_transcription(tied: bool, heads: int, blocks: int, depth: int) -> None:
    spec = SMALL.but(
        weight_tie_layers=tied,
        x_heads=heads,
        l_heads=heads,
        self_per_cross_attn=blocks,
        depth=depth,
    )
    check_outputs(spec, arrays(spec))


@pytest.mark.parametrize(
    "changes",
    [
        {"snn": False},
        {"fourier_encode_data": False},
        {"final_classifier_head": False},
        {"num_freq_bands": 4, "max_freq": 3.0},
    ],
    ids=str,
)
def test_every_released_switch(changes: dict[str, object]) -> None:
    spec = SMALL.but(**changes)
    check_outputs(spec, arrays(spec))


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize("blocks", [0, 1])
def test_missing_modalities_as_released(missing: tuple[int, ...], blocks: int) -> None:
    """Self-attention among latents runs for a missing modality too, as in the released code."""
    spec = SMALL.but(self_per_cross_attn=blocks)
    tensors = [None if m in missing else tensor for m, tensor in enumerate(arrays(spec))]
    check_outputs(spec, tensors)
    # the same said by the mask instead of by leaving the modality out
    full = arrays(spec)
    given = [full[m] if tensor is None else tensor for m, tensor in enumerate(tensors)]
    parameters = released_parameters(spec)
    inputs = as_inputs(given)
    for m in missing:
        inputs[f"modality_{m}"] = inputs[f"modality_{m}"]._replace(present=torch.zeros(3) > 0)
    ours = HEALNet.from_released(parameters, **spec.arguments()).eval()
    torch.testing.assert_close(
        ours(inputs).logits["survival"],
        released_forward(parameters, spec, tensors),
        rtol=1e-5,
        atol=1e-5,
    )


def check_outputs(spec: Released, tensors: list[Tensor | None]) -> None:
    ours, exact = outputs(spec, tensors, torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    ours, released = outputs(spec, tensors, torch.float32)
    if spec.final_classifier_head:
        torch.testing.assert_close(ours, released, rtol=1e-5, atol=1e-5)
    else:
        # latents reach 20, where the released module itself is 2e-5 from the exact ones
        assert_within_budget("latents", ours, released, exact, torch.float32)


def outputs(
    spec: Released, tensors: list[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of our model and of the transcription: logits, without the classifier the latents."""
    parameters = {key: value.to(dtype) for key, value in released_parameters(spec).items()}
    given = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    model = HEALNet.from_released(parameters, **spec.arguments()).to(dtype).eval()
    output = model(as_inputs(given))
    ours = output.logits.get("survival", output.embeddings["latent_array"])
    return ours, released_forward(parameters, spec, given)


def cohort_spec(cohort: str, tied: bool = False) -> Released:
    found = RELEASED_COHORTS[cohort]
    return Released(
        channel_dims=(50, 24),
        num_spatial_axes=(1, 1),
        depth=found["depth"],
        max_freq=2.0,
        l_c=found["n_latents"],
        l_d=found["latent_dim"],
        x_heads=1,
        cross_dim_head=found["cross_head_dim"],
        latent_dim_head=found["latent_head_dim"],
        weight_tie_layers=tied,
        self_per_cross_attn=0,
    )


@pytest.mark.parametrize("cohort", [*RELEASED_COHORTS, None])
@pytest.mark.parametrize("tied", [False, True])
def test_every_preset_on_a_table_and_ragged_bags(cohort: str | None, tied: bool) -> None:
    """A table of one token and a ragged bag equal the released tensors, sample by sample."""
    if cohort is None:
        spec = Released(channel_dims=(50, 24), num_spatial_axes=(1, 1), weight_tie_layers=tied)
    else:
        spec = cohort_spec(cohort, tied)
    parameters = released_parameters(spec)
    model = HEALNet.from_released(
        parameters, **spec.arguments(), names=["omics", "slide"], kinds=["table", "bag"]
    ).eval()
    table, lengths = torch.randn(3, 50), [9, 1, 4]
    bag, present = torch.randn(sum(lengths), 24), torch.ones(3, dtype=torch.bool)
    ragged = Ragged.from_lengths(lengths)
    inputs = {"omics": TableBatch(table, present), "slide": BagBatch(bag, ragged, present)}
    alone = [
        released_forward(parameters, spec, [table[b : b + 1, None], rows[None]])
        for b, rows in enumerate(bag.split(lengths))
    ]
    torch.testing.assert_close(
        model(inputs).logits["survival"], torch.cat(alone), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cohort", [*RELEASED_COHORTS, None])
def test_preset_builds_the_released_model(cohort: str | None) -> None:
    """`from_preset("released")` is what `from_released` makes of the released arguments."""
    spec = (
        Released(channel_dims=(50, 24), num_spatial_axes=(1, 1))
        if cohort is None
        else cohort_spec(cohort)
    )
    drops = {}
    if cohort is not None:
        found = RELEASED_COHORTS[cohort]
        drops = {"attn_dropout": found["attention_dropout"], "ff_dropout": found["ff_dropout"]}
        assert released_l1(cohort.upper()) == found["l1"]
    loaded = HEALNet.from_released(
        released_parameters(spec),
        **spec.arguments(),
        **drops,
        names=["omics", "slide"],
        kinds=["table", "bag"],
    )
    preset = HEALNetConfig.from_preset(
        "released" if cohort is None else f"released:{cohort}",
        modalities={"omics": ("table", 50), "slide": ("bag", 24)},
    )
    assert preset == loaded.config
    HEALNet(preset).load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_training_steps_equal_the_transcription(tied: bool) -> None:
    """Copied weights, dropout 0, Adam: the losses of twenty steps and the weights at their end.

    In fp64 nothing but a different formula could drive the two apart. In fp32 Adam turns the
    rounding of a gradient near zero into a step of full size, which carries the transcription
    itself away from its fp64 self; we may be no farther from there.
    """
    exact, copied, model = _train_both(tied, torch.float64)
    torch.testing.assert_close(exact[1], exact[0], rtol=1e-9, atol=1e-9)
    for key, value in copied.items():
        torch.testing.assert_close(model[key], value, rtol=0, atol=1e-9, msg=key)
    rounded, *_ = _train_both(tied, torch.float32)
    drift, ours = ((losses.double() - exact[0]).abs().max() for losses in rounded)
    assert ours <= 1e-4 + 2 * drift


def _train_both(tied: bool, dtype: torch.dtype) -> tuple[Tensor, dict, dict]:
    """Losses [2, 20] of the transcription and of ours; both models' weights, ours by name."""
    spec = SMALL.but(depth=3, weight_tie_layers=tied, x_heads=2, l_heads=2)
    # `to` would part the entries that tied layers have in common
    shared: dict[int, Tensor] = {}
    parameters = {
        key: shared.setdefault(id(value), value.to(dtype, copy=True).requires_grad_())
        for key, value in released_parameters(spec).items()
    }
    model = HEALNet.from_released(parameters, **spec.arguments())
    theirs = torch.optim.Adam(shared.values(), lr=1e-3)
    ours = torch.optim.Adam(model.parameters(), lr=1e-3)
    tensors = [tensor.to(dtype) for tensor in arrays(spec, n_samples=6)]
    label = torch.arange(6) % 4
    losses = []
    for step in range(20):
        # one modality is missing now and then, as in training on a cohort
        given = [None if step % 5 == 3 and m == 1 else tensor for m, tensor in enumerate(tensors)]
        for optimizer, forward in (
            (theirs, lambda given=given: released_forward(parameters, spec, given)),
            (ours, lambda given=given: model(as_inputs(given)).logits["survival"]),
        ):
            optimizer.zero_grad(set_to_none=False)
            loss = torch.nn.functional.cross_entropy(forward(), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    trained = {key: value.detach() for key, value in parameters.items()}
    copied = HEALNet.from_released(trained, **spec.arguments()).state_dict()
    return torch.stack(losses).view(20, 2).T, copied, model.state_dict()


def test_wrong_weights_and_arguments_are_refused() -> None:
    parameters = released_parameters(SMALL)
    arguments = SMALL.arguments()
    with pytest.raises(ValueError, match=r"state_dict has no 'layers\.3\.0"):
        HEALNet.from_released(parameters, **arguments | {"depth": 4})
    with pytest.raises(ValueError, match=r"keys the arguments do not describe.*'layers\.2\.0"):
        HEALNet.from_released(parameters, **arguments | {"depth": 2})
    with pytest.raises(ValueError, match="differ in layer 1; tied released models"):
        HEALNet.from_released(parameters, **arguments | {"weight_tie_layers": True})
    with pytest.raises(ValueError, match=r"2 \* x_heads \* cross_dim_head = 60"):
        HEALNet.from_released(parameters, **arguments | {"x_heads": 6})
    with pytest.raises(ValueError, match=r"of shape .*; the arguments describe"):
        HEALNet.from_released(parameters, **arguments | {"channel_dims": (12, 6, 3)})
    with pytest.raises(ValueError, match="self_per_cross_attn is 2"):
        HEALNet.from_released(parameters, **arguments | {"self_per_cross_attn": 2})
    with pytest.raises(ValueError, match="channel_dims has 2 entries"):
        HEALNet.from_released(parameters, **arguments | {"channel_dims": (11, 6)})
    with pytest.raises(ValueError, match="kinds has 'bag' for 2 spatial axes"):
        HEALNet.from_released(parameters, **arguments, kinds=["array", "bag", "array"])
    with pytest.raises(ValueError, match=r"names is .*they must differ"):
        HEALNet.from_released(parameters, **arguments, names=["a", "a", "b"])


def test_untied_weights_are_not_taken_for_tied_ones() -> None:
    """One modality shares no feed-forward: only the comparison of the layers can tell."""
    spec = Released(channel_dims=(6,), num_spatial_axes=(1,), l_c=3, l_d=8, x_heads=1, l_heads=1)
    parameters = released_parameters(spec)
    with pytest.raises(ValueError, match="differs between layers 1 and 2"):
        HEALNet.from_released(parameters, **spec.arguments() | {"weight_tie_layers": True})
