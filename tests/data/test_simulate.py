"""The simulated cohort: its geometry, its features, its outcome, and what oracles reach on it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sksurv.metrics import concordance_index_censored

from survfuse.data.cohort import Cohort
from survfuse.data.modalities import TableModality
from survfuse.data.simulate import MISSING, simulate_cohort, with_control_bags
from survfuse.data.simulated_slides import AGGRESSIVE, LYMPHOID, TUMOUR, SimulatedBags

SMALL = (40, 10, 30)

# mean C on the 1000 test patients of seeds 0, 1, 2; docs/cohorts.md holds each seed
ORACLES = {"full": 0.801, "omics": 0.629, "slide": 0.624, "additive": 0.684, "without_space": 0.717}


@pytest.fixture(scope="module")
def large():
    """Three full cohorts without features: truth and outcomes only."""
    return [simulate_cohort(seed=seed, lazy=True) for seed in range(3)]


@pytest.fixture(scope="module")
def small():
    return simulate_cohort(n_patients=SMALL, seed=5)


def test_oracles_over_three_seeds_reach_what_is_recorded(large):
    found = {name: [] for name in ORACLES}
    for cohort, truth, split in large:
        for name, risk in truth.oracle_risks().items():
            rows = split.test
            c = concordance_index_censored(cohort.event[rows], cohort.time[rows], risk[rows])[0]
            found[name].append(c)
    means = {name: np.mean(values) for name, values in found.items()}
    assert means == pytest.approx(ORACLES, abs=0.005)
    # what a fusion method must find: every kind of ignorance costs
    assert means["full"] > means["without_space"] + 0.05
    assert means["without_space"] > means["additive"] + 0.02
    assert means["additive"] > max(means["omics"], means["slide"]) + 0.04


def test_sizes_split_and_censoring(large):
    cohort, truth, split = large[0]
    assert [len(part) for part in split] == [2000, 300, 1000]
    assert np.sort(np.concatenate(split)).tolist() == list(range(3300))
    assert 0.55 < cohort.event.mean() < 0.63
    assert cohort.time.max() <= 120
    assert cohort.channels() == {"genes": ("table", 60), "slides": ("bag", 16)}
    assert "simulated" in cohort.notes[0]
    for standardised in (truth.b, truth.c):
        assert (standardised.mean(), standardised.std()) == pytest.approx((0, 1), abs=1e-9)


def test_the_hazard_is_the_stated_one(large):
    cohort, t, _ = large[0]
    eta = 0.6 * t.g + 0.5 * t.b + t.g * t.b + 0.3 * t.m + 0.3 * t.c + t.m * t.c
    assert t.eta == pytest.approx(eta)
    # E = (T / 60) ^ 1.3 exp(eta) is a standard exponential: its events per exposure are 1
    exposure = ((cohort.time / 60) ** 1.3 * np.exp(t.eta)).sum()
    assert cohort.event.sum() / exposure == pytest.approx(1, abs=0.08)


def test_genes_follow_their_factor_only(large):
    cohort, truth, _ = large[0]
    genes = cohort.modalities["genes"].values
    with_g = np.array([np.corrcoef(gene, truth.g)[0, 1] for gene in genes.T])
    with_m = np.array([np.corrcoef(gene, truth.m)[0, 1] for gene in genes.T])
    # loadings U(.5, 1) against noise 1 are correlations of .447 to .707
    assert 0.4 < with_g[:20].min() < with_g[:20].max() < 0.75
    assert 0.4 < with_m[20:40].min() < with_m[20:40].max() < 0.75
    assert np.abs(np.r_[with_g[20:], with_m[:20], with_m[40:]]).max() < 0.08


def test_composition_tells_of_b_and_only_layout_tells_of_c(large):
    _, truth, _ = large[0]
    types = np.stack(truth.maps.types).reshape(-1, 32, 32)
    tumour = (types == TUMOUR) | (types == AGGRESSIVE)
    lymphoid = types == LYMPHOID
    # the same number of tumour and lymphoid patches everywhere: a mean over patches is blind to c
    assert np.unique(tumour.sum((1, 2))).tolist() == [410]
    assert np.unique(lymphoid.sum((1, 2))).tolist() == [72]
    counts = (types == AGGRESSIVE).sum((1, 2))
    assert np.array_equal(counts, truth.maps.n_aggressive)
    assert counts.min() >= 1
    assert counts.mean() / 1024 == pytest.approx(0.0192, abs=0.001)
    assert np.corrcoef(truth.zb, truth.b)[0, 1] > 0.88
    assert np.corrcoef(truth.zc, truth.c)[0, 1] > 0.83
    assert abs(np.corrcoef(counts, truth.c)[0, 1]) < 0.05
    near = sum_within(tumour, 3) > 0
    assert np.corrcoef((lymphoid & near).sum((1, 2)), truth.c)[0, 1] > 0.85


def sum_within(mask: np.ndarray, radius: int) -> np.ndarray:
    """Set cells in the square of side 2 radius + 1 around each cell."""
    wide = np.pad(mask.astype(int), ((0, 0), (radius + 1, radius), (radius + 1, radius)))
    total = wide.cumsum(1).cumsum(2)
    side = 2 * radius + 1
    return (
        total[:, side:, side:]
        - total[:, :-side, side:]
        - total[:, side:, :-side]
        + total[:, :-side, :-side]
    )


def test_aggregates_lie_two_or_three_cells_from_tumour_or_at_least_six(large):
    _, truth, _ = large[0]
    as_wanted = 0
    for types, share in zip(truth.maps.types[:300], truth.maps.near_share):
        grid = types.reshape(32, 32)
        tumour = np.argwhere((grid == TUMOUR) | (grid == AGGRESSIVE))
        lymphoid = np.argwhere(grid == LYMPHOID)
        distance = np.abs(lymphoid[:, None] - tumour[None]).max(2).min(1)
        # cells of a near aggregate are 1 to 4 away, those of a far one 5 or more
        as_wanted += (distance >= 5).sum() == round(72 * (1 - share))
    # the rest had no free cell six away and took the farthest class there was
    assert as_wanted >= 0.9 * 300


def test_features_are_four_directions_plus_slide_and_patch_noise(small):
    bags = small.cohort.modalities["slides"].bags
    slides = torch.stack([bags[i] for i in range(60)])
    types = torch.from_numpy(np.stack(small.truth.maps.types[:60]).astype(np.int64))
    means = torch.stack([slides[types == kind].mean(0) for kind in range(4)])
    gram = means @ means.T
    # u is orthonormal and scaled by 4; what is left is noise of the slides and of few patches
    assert torch.allclose(gram, 16 * torch.eye(4), atol=1.2)
    residual = slides - means[types]
    of_slide = residual.mean(1)
    assert float(of_slide.std()) == pytest.approx(0.3, abs=0.05)
    assert float((residual - of_slide[:, None]).std()) == pytest.approx(1.0, abs=0.02)


def test_coordinates_are_corners_on_a_grid_of_256_pixels(small):
    coords = small.cohort.modalities["slides"].bags.coords_of(3)
    assert coords[[0, 1, 32, 1023]].tolist() == [[0, 0], [256, 0], [0, 256], [7936, 7936]]


def test_the_same_seed_gives_the_same_cohort_and_another_one_another(small):
    again, other = (simulate_cohort(n_patients=SMALL, seed=seed) for seed in (5, 6))
    rows = np.arange(6)
    batches = [s.cohort.prepare(s.split.train).batch(rows) for s in (small, again, other)]
    assert torch.equal(batches[0].time, batches[1].time)
    for name in ("genes", "slides"):
        values = [
            getattr(b.inputs[name], "values" if name == "genes" else "features") for b in batches
        ]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


def test_lazy_bags_are_the_stored_ones(small):
    lazy = simulate_cohort(n_patients=SMALL, seed=5, lazy=True).cohort.prepare(None)
    stored = small.cohort.prepare(None)
    assert isinstance(lazy.cohort.modalities["slides"].bags, SimulatedBags)
    mine, theirs = (p.batch([7, 2]).inputs["slides"] for p in (lazy, stored))
    assert mine.features.shape == (2048, 16)
    for sample in range(2):
        rows = [
            b.features[b.ragged.starts[sample] : b.ragged.starts[sample] + 1024]
            for b in (mine, theirs)
        ]
        assert torch.equal(*rows)
    assert mine.present.tolist() == [True, True]


def test_missing_modalities_are_never_all_missing():
    cohort, truth, _ = simulate_cohort(n_patients=(1500, 0, 0), availability=MISSING, lazy=True)
    omics, slides = cohort.present("genes"), cohort.present("slides")
    assert (omics | slides).all()
    assert (omics & slides).mean() == pytest.approx(0.4, abs=0.04)
    assert (omics & ~slides).mean() == pytest.approx(0.3, abs=0.04)
    # the same patients otherwise: only what is shown of them differs
    complete = simulate_cohort(n_patients=(1500, 0, 0), lazy=True)
    assert np.array_equal(complete.cohort.time, cohort.time)
    assert np.array_equal(complete.truth.eta, truth.eta)


def test_the_long_variant_makes_bags_when_asked():
    cohort, truth, split = simulate_cohort(variant="long", n_patients=(6, 1, 1), seed=2)
    sizes = cohort.modalities["slides"].n_patches
    assert sizes.min() >= 20_000
    assert sizes.max() <= 100_000
    share = truth.maps.n_aggressive.sum() / sizes.sum()
    assert 0.0004 < share < 0.0025
    shortest = int(sizes.argmin())
    bag = cohort.prepare(split.train, n_bins=2).batch([shortest]).inputs["slides"]
    assert bag.features.shape == (sizes[shortest], 1024)
    assert bag.features.dtype == torch.bfloat16
    assert bag.ragged.max_length == sizes[shortest]


def test_long_slides_have_aggressive_patches_at_the_stated_rate():
    _, truth, _ = simulate_cohort(
        variant="long", n_patients=(150, 0, 0), n_patches=(20_000, 21_000), seed=1
    )
    share = truth.maps.n_aggressive.sum() / truth.maps.n_patches.sum()
    assert share == pytest.approx(0.001, rel=0.2)


def test_control_bags_know_nothing_of_the_patients_and_say_so():
    n = 40

    def cohort(time):
        return Cohort(
            unit_ids=tuple(f"u{i}" for i in range(n)),
            patient_ids=tuple(f"p{i // 2}" for i in range(n)),
            time=time,
            event=np.ones(n, dtype=bool),
            covariates=pd.DataFrame(index=[f"u{i}" for i in range(n)]),
            modalities={"omics": TableModality(np.ones((n, 1)), ("a",))},
        )

    early, late = (with_control_bags(cohort(np.arange(n) + shift)) for shift in (1.0, 500.0))
    assert "negative control" in early.notes[-1]
    assert "control_slides" in early.notes[-1]
    bags = [c.modalities["control_slides"].bags.features for c in (early, late)]
    assert torch.equal(*bags)
    # slides of one patient are one slide
    assert early.modalities["control_slides"].groups[:4] == ((0,), (0,), (1,), (1,))
    # nor are they the slides of the simulated cohort of the same seed
    simulated, _, _ = simulate_cohort(n_patients=(10, 0, 0), seed=0)
    control = with_control_bags(simulated).modalities["control_slides"].bags.features
    own = simulated.modalities["slides"].bags.features
    assert abs(torch.corrcoef(torch.stack([control[:5000, 0], own[:5000, 0]]))[0, 1]) < 0.1
    with pytest.raises(ValueError, match=r"has a modality 'control_slides' already"):
        with_control_bags(early)


def test_wrong_simulation_arguments():
    with pytest.raises(ValueError, match=r"unknown variant 'shrt'; did you mean 'short'"):
        simulate_cohort(variant="shrt")
    with pytest.raises(ValueError, match=r"availability is .* must sum to 1"):
        simulate_cohort(availability=(0.5, 0.2, 0.2))
    with pytest.raises(ValueError, match=r"n_patients is \(0, 1, 1\)"):
        simulate_cohort(n_patients=(0, 1, 1))
    with pytest.raises(ValueError, match=r"n_patches is \(100, 50\)"):
        simulate_cohort(n_patches=(100, 50))
    with pytest.raises(ValueError, match=r"n_patients is 50; it must be \(train, inner, test\)"):
        simulate_cohort(n_patients=50)
    with pytest.raises(ValueError, match=r"n_patches is 2000; it must be \(fewest, most\)"):
        simulate_cohort(n_patches=2000)
    with pytest.raises(ValueError, match=r"availability is 1; "):
        simulate_cohort(availability=1)
    with pytest.raises(ValueError, match=r"width is 3; four patch types need at least 4"):
        simulate_cohort(n_patients=(2, 0, 0), width=3)
