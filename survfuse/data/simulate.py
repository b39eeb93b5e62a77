"""A simulated cohort whose risk needs interplay, sparse signal, every patch and space.

docs/cohorts.md states the model and what the oracles reach on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.modalities import BagModality, TableModality
from survfuse.data.names import unknown_name
from survfuse.data.simulated_slides import SimulatedBags, SlideMaps, simulate_slide_maps
from survfuse.data.splits import Split
from survfuse.extras import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

# shares of patients with both modalities, omics only, slide only
COMPLETE = (1.0, 0.0, 0.0)
MISSING = (0.4, 0.3, 0.3)
GENES_PER_FACTOR = 20
SHAPE, SCALE = 1.3, 60.0  # of the Weibull time, in months
_CONTROL_STREAM = 1729
CONTROL_NOTE = (
    "the bags {name!r} are simulated, independent of the outcome and of every other modality: a "
    "negative control, which no model may gain from"
)


class _Variant(NamedTuple):
    n_patients: tuple[int, int, int]
    n_patches: tuple[int, int]
    width: int
    aggressive_rate: float  # per tumour patch, at zb = 0
    dtype: torch.dtype
    lazy: bool


VARIANTS = {
    "short": _Variant((2000, 300, 1000), (1024, 1024), 16, 0.04, torch.float32, False),
    # .4 of the patches are tumour and E exp(.6 zb) is 1.197: .001 of all patches
    "long": _Variant((60, 10, 30), (20_000, 100_000), 1024, 0.00209, torch.bfloat16, True),
}


@dataclass(frozen=True, eq=False)
class SimulatedTruth:
    """What the simulation knows and no model is told.

    Attributes:
        g, m: [n] the two latent factors of the genes.
        zb, zc: [n] what drives the slide's composition and its layout.
        b: [n] standardised log of the realised aggressive fraction.
        c: [n] standardised realised share of aggregates near tumour.
        eta: [n] log hazard ratio.
        maps: patch types of every slide, realised counts and shares.
    """

    g: NDArray[np.float64]
    m: NDArray[np.float64]
    zb: NDArray[np.float64]
    zc: NDArray[np.float64]
    b: NDArray[np.float64]
    c: NDArray[np.float64]
    eta: NDArray[np.float64]
    maps: SlideMaps

    def oracle_risks(self) -> dict[str, NDArray[np.float64]]:
        """The best risk under each kind of ignorance; higher = earlier event.

        "full" knows all; "omics" only g and m; "slide" only b and c; "additive" all four without
        their products; "without_space" all but where the aggregates lie.
        """
        g, m, b, c = self.g, self.m, self.b, self.c
        return {
            "full": self.eta,
            "omics": 0.6 * g + 0.3 * m,
            "slide": 0.5 * b + 0.3 * c,
            "additive": 0.6 * g + 0.5 * b + 0.3 * m + 0.3 * c,
            "without_space": 0.6 * g + 0.5 * b + g * b + 0.3 * m,
        }


class Simulation(NamedTuple):
    """A simulated cohort, what is true of it, and its split."""

    cohort: Cohort  # modalities "genes" (table) and "slides" (bags)
    truth: SimulatedTruth
    split: Split  # train, inner validation, test


def simulate_cohort(
    *,
    variant: Literal["short", "long"] = "short",
    n_patients: tuple[int, int, int] | None = None,
    width: int | None = None,
    n_patches: tuple[int, int] | None = None,
    availability: tuple[float, float, float] = COMPLETE,
    dtype: torch.dtype | None = None,
    lazy: bool | None = None,
    seed: int = 0,
) -> Simulation:
    """Draw patients with 60 genes, one slide and a survival time.

    Genes: 20 follow g and 20 follow m with loadings U(.5, 1) and noise N(0, 1), 20 are noise. The
    groups are "tumor" (those of g and half of the noise) and "microenvironment" (m, the rest).
    Slides: `simulate_slide_maps` and `SimulatedBags`, with log rates log(rate) + .6 zb and near
    probabilities sigmoid(1.5 zc). Outcome:

        eta = .6 g + .5 b + g b + .3 m + .3 c + m c
        T = 60 (E exp(-eta))^(1 / 1.3), E ~ Exp(1);  censored at min(U(6, 150), 120) months

    Args:
        variant: "short": slides of 32 x 32 patches of 16 features, 1.9 % of them aggressive, in
            memory (216 MB). "long": slides of 20,000 to 100,000 patches of 1024 features, 0.1 %
            aggressive, 16-bit, each made when a batch asks for it.
        n_patients: train, inner validation and test; by default 2000, 300, 1000 (long 60, 10, 30).
        width: features per patch.
        n_patches: fewest and most patches of a slide; the nearest squares are taken.
        availability: shares of patients with both modalities, omics only and slide only;
            `MISSING` is (.4, .3, .3).
        dtype: of the patch features.
        lazy: make features when a batch asks for them instead of holding them.
        seed: of every draw.

    Returns:
        `Simulation(cohort, truth, split)`.

    Raises:
        ValueError: an unknown variant, shares that do not sum to 1, or sizes out of range.

    Cost: short about 1 s and 0.25 GB; long about 60 ms a patient, then 0.7 s for each bag made
        (one core).
    """
    if variant not in VARIANTS:
        raise ValueError(unknown_name("variant", str(variant), VARIANTS))
    defaults = VARIANTS[variant]
    sizes = defaults.n_patients if n_patients is None else n_patients
    limits = defaults.n_patches if n_patches is None else n_patches
    _check_sizes(sizes, limits, availability)
    fewest, most = limits
    n = sum(sizes)
    rng = np.random.default_rng(seed)
    g, m, zb, zc = rng.standard_normal((4, n))
    genes, names = _genes(g, m, rng)
    # slides have squares of patches whose number is uniform between the two limits
    sides = np.round(np.sqrt(rng.uniform(fewest, most, n))).astype(np.int64)
    sides = np.clip(sides, np.ceil(np.sqrt(fewest)), np.floor(np.sqrt(most))).astype(np.int64)
    maps = simulate_slide_maps(
        sides,
        aggressive_log_rate=np.log(defaults.aggressive_rate) + 0.6 * zb,
        near_probability=1 / (1 + np.exp(-1.5 * zc)),
        seed=seed,
    )
    b = _standardise(np.log(maps.n_aggressive / maps.n_patches))
    c = _standardise(maps.near_share)
    eta = 0.6 * g + 0.5 * b + g * b + 0.3 * m + 0.3 * c + m * c
    time, event = _outcomes(eta, rng)
    has_omics, has_slide = _availability(n, availability, rng)
    patients = tuple(f"SIM-{i:05d}" for i in range(n))
    lazy_bags = SimulatedBags(
        maps,
        patients,
        width=defaults.width if width is None else width,
        seed=seed,
        dtype=defaults.dtype if dtype is None else dtype,
    )
    bags = lazy_bags if (defaults.lazy if lazy is None else lazy) else lazy_bags.materialise()
    genes[~has_omics] = np.nan
    parts = np.repeat(["train", "inner", "test"], sizes)
    cohort = Cohort(
        unit_ids=patients,
        patient_ids=patients,
        time=time,
        event=event,
        covariates=require("pandas", extra="train").DataFrame({"part": parts}, index=patients),
        modalities={
            "genes": TableModality(genes, names, gene_groups(names)),
            "slides": BagModality(
                bags, tuple((i,) if has else () for i, has in enumerate(has_slide))
            ),
        },
        name=f"simulated-{variant}-{seed}",
        notes=("simulated cohort: not patients",),
    )
    split = Split(*(np.flatnonzero(parts == part) for part in ("train", "inner", "test")))
    return Simulation(cohort, SimulatedTruth(g, m, zb, zc, b, c, eta, maps), split)


def with_control_bags(
    cohort: Cohort,
    *,
    name: str = "control_slides",
    width: int = 16,
    n_patches: tuple[int, int] = (1024, 1024),
    lazy: bool = False,
    seed: int = 0,
) -> Cohort:
    """Real patients with simulated slides that know nothing of them: a negative control.

    Rows of one patient share a slide, as they share their omics. The cohort's notes say what the
    bags are, and every report repeats them.

    Args:
        cohort: any cohort without a modality of that name.
        name: of the bag modality.
        width: features per patch.
        n_patches: fewest and most patches of a slide.
        lazy: make features when a batch asks for them instead of holding them.
        seed: of every draw; outcomes are never read.

    Raises:
        ValueError: the cohort has such a modality already.
    """
    if name in cohort.modalities:
        raise ValueError(f"{cohort.name} has a modality {name!r} already")
    patients, of_row = np.unique(np.array(cohort.patient_ids), return_inverse=True)
    # streams apart from those of a simulated cohort of the same seed
    seed = int(np.random.SeedSequence((seed, _CONTROL_STREAM)).generate_state(1, np.uint64)[0])
    rng = np.random.default_rng((seed, 1))
    zb, zc = rng.standard_normal((2, patients.size))
    sides = np.round(np.sqrt(rng.uniform(*n_patches, patients.size))).astype(np.int64)
    maps = simulate_slide_maps(
        sides,
        aggressive_log_rate=np.log(VARIANTS["short"].aggressive_rate) + 0.6 * zb,
        near_probability=1 / (1 + np.exp(-1.5 * zc)),
        seed=seed,
    )
    slides = SimulatedBags(maps, patients.tolist(), width=width, seed=seed)
    bags: Bags | SimulatedBags = slides if lazy else slides.materialise()
    source = BagModality(bags, tuple((int(i),) for i in of_row))
    return cohort.with_modality(name, source, note=CONTROL_NOTE.format(name=name))


def gene_groups(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The genes of each factor, each with half of those that are noise."""
    half = GENES_PER_FACTOR // 2
    of = {f: tuple(name for name in names if name[0] == f) for f in "GMN"}
    return {"tumor": of["G"] + of["N"][:half], "microenvironment": of["M"] + of["N"][half:]}


def _genes(
    g: NDArray[np.float64], m: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    loading = rng.uniform(0.5, 1.0, (2, GENES_PER_FACTOR))
    values = rng.standard_normal((g.size, 3 * GENES_PER_FACTOR))
    values[:, :GENES_PER_FACTOR] += g[:, None] * loading[0]
    values[:, GENES_PER_FACTOR : 2 * GENES_PER_FACTOR] += m[:, None] * loading[1]
    names = tuple(f"{f}{i:02d}" for f in ("G", "M", "N") for i in range(1, GENES_PER_FACTOR + 1))
    return values, names


def _outcomes(
    eta: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    death = SCALE * (rng.exponential(size=eta.size) * np.exp(-eta)) ** (1 / SHAPE)
    censoring = np.minimum(rng.uniform(6, 150, eta.size), 120)
    return np.minimum(death, censoring), death <= censoring


def _availability(
    n: int, shares: tuple[float, float, float], rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    kind = rng.choice(3, size=n, p=shares)
    return kind != 2, kind != 1


def _standardise(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    return (values - values.mean()) / (deviation if deviation > 0 else 1.0)


def _has(n: int, values: object) -> bool:
    return hasattr(values, "__len__") and not isinstance(values, str) and len(values) == n


def _check_sizes(
    sizes: tuple[int, int, int],
    limits: tuple[int, int],
    availability: tuple[float, float, float],
) -> None:
    if not _has(3, sizes) or min(sizes) < 0 or sizes[0] < 1:
        raise ValueError(
            f"n_patients is {sizes!r}; it must be (train, inner, test) with at least one in train"
        )
    if not _has(2, limits) or not 1024 <= limits[0] <= limits[1]:
        raise ValueError(
            f"n_patches is {limits!r}; it must be (fewest, most), rising from at least 1024"
        )
    if not _has(3, availability) or min(availability) < 0 or abs(sum(availability) - 1) > 1e-9:
        raise ValueError(
            f"availability is {availability!r}; (both, omics only, slide only) must sum to 1"
        )
