"""Make the cohort that a configuration names."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from survfuse.data.splits import Split
from survfuse.extras import require
from survfuse.training.config import GROUPS, DataConfig, TrainConfig
from survfuse.training.config_files import ConfigError
from survfuse.training.tasks import class_tasks, with_targets

if TYPE_CHECKING:
    from survfuse.data.bags import Bags
    from survfuse.data.cohort import Cohort
    from survfuse.data.targets import ClassTarget

SMOKE_TEST_NOTE = (
    "regions of {slides} real slides with invented follow-up: a smoke test of the way from a slide "
    "to a model, no number of it says anything about patients"
)
# patches of one invented patient of the slide smoke test
REGION = 6


class LoadedCohort(NamedTuple):
    """A cohort and what its source knows beyond it."""

    cohort: Cohort
    split: Split | None  # train, validation and test where the source brings them
    oracle: dict[str, np.ndarray] | None  # simulated: the best risks under kinds of ignorance
    given: bool = False  # came from Python, not from `config.data`


def load_cohort(config: TrainConfig, *, external: bool = False) -> LoadedCohort:
    """The cohort of `config.data`, with the modalities, groups, patches and targets it asks for.

    Args:
        config: its data section, its tasks, and what a row is.
        external: for a trained model to score: patients of unknown outcome are kept, gene groups
            are left to what was frozen with the model, bags may be lacking, and classes are not
            read.

    Raises:
        ConfigError: a setting does not fit the source.
        FileNotFoundError, ValueError: the data files are missing or wrong.
    """
    readers = {
        "simulated": _simulated,
        "tcga_omics": _tcga,
        "survpath": _survpath,
        "slides": _slides,
    }
    read = readers[config.data.source]
    loaded = read(config, external) if read in (_tcga, _survpath) else read(config)
    cohort = loaded.cohort
    if config.data.bags == "simulated" and config.data.source != "simulated":
        cohort = _with_simulated_bags(config.data, cohort)
    cohort = shape_cohort(config.data, cohort, external=external)
    if external:
        return loaded._replace(cohort=cohort._replace(targets={}))
    return loaded._replace(cohort=with_targets(config, cohort))


def shape_cohort(data: DataConfig, cohort: Cohort, *, external: bool = False) -> Cohort:
    """A cohort with the modalities, gene groups and patches that a data section asks for.

    Args:
        data: the section.
        cohort: with all there is.
        external: see `load_cohort`.

    Raises:
        ConfigError: it has no such modality, table or bags.
        FileNotFoundError: there is no file of gene groups.
    """
    if data.groups is not None and not external:
        cohort = _with_groups(data, cohort)
    if data.modalities:
        try:
            cohort = cohort.only(data.modalities)
        except ValueError as error:
            raise ConfigError(f"data.modalities: {error}") from None
    patches = data.patches
    if patches.neighbourhood:
        modalities = {
            name: dataclasses.replace(source, neighbourhood=patches.neighbourhood)
            if source.kind == "bag"
            else source
            for name, source in cohort.modalities.items()
        }
        cohort = dataclasses.replace(cohort, modalities=modalities)
    if patches.fraction == 1 and not patches.shuffle_coords:
        return cohort
    from survfuse.data.patch_subset import with_patch_subset

    kinds = {source.kind for source in cohort.modalities.values()}
    # those that were chosen, for example by a single-modality baseline, need not hold bags
    if "bag" not in kinds and (external or data.modalities):
        return cohort
    try:
        return with_patch_subset(
            cohort,
            fraction=patches.fraction,
            shuffle_coords=patches.shuffle_coords,
            seed=patches.seed,
        )
    except ValueError as error:
        raise ConfigError(f"data.patches: {error}") from None


def _with_groups(data: DataConfig, cohort: Cohort) -> Cohort:
    from survfuse.data.gene_groups import with_gene_groups
    from survfuse.data.omics import read_signatures

    if data.groups == "subspaces":
        from survfuse.data.subspaces import subspace_genes

        families, hallmarks = (_signature_file(data, name) for name in ("families", "hallmarks"))
        genes = subspace_genes(families, hallmarks)
    else:
        genes = read_signatures(_signature_file(data, str(data.groups)))
    try:
        return with_gene_groups(
            cohort,
            genes,
            source=f'data.groups "{data.groups}"',
            expression_only=data.groups == "subspaces",
        )
    except ValueError as error:
        raise ConfigError(f"data.groups: {error}") from None


def _signature_file(data: DataConfig, name: str) -> Path:
    if name not in GROUPS:
        return Path(name)
    if name == "families":
        return _folder(data) / "tcga_omics" / "mcat_signatures.csv"
    return _folder(data) / "survpath" / f"{name}_signatures.csv"


def _simulated(config: TrainConfig) -> LoadedCohort:
    from survfuse.data.simulate import VARIANTS, simulate_cohort

    if config.data.bags is not None:
        raise ConfigError(
            f'data.bags is {config.data.bags!r} with data.source "simulated"; the simulated cohort '
            "has slides of its own, so it must be null"
        )
    for name, usual in (("cohort", None), ("endpoint", "OS")):
        given = getattr(config.data, name)
        if given != usual:
            raise ConfigError(
                f'data.{name} is {given!r} with data.source "simulated", which has none to choose; '
                f"it must be {'null' if usual is None else usual}"
            )
    wanted = config.data.simulation
    default = VARIANTS[wanted.variant]
    sizes = (wanted.n_train, wanted.n_inner, wanted.n_test)
    simulation = simulate_cohort(
        variant=wanted.variant,
        n_patients=tuple(
            usual if given is None else given for given, usual in zip(sizes, default.n_patients)
        ),
        width=wanted.width,
        n_patches=_lengths(config.data, default.n_patches),
        availability=(wanted.complete, wanted.omics_only, wanted.slide_only),
        seed=wanted.seed,
    )
    return LoadedCohort(simulation.cohort, simulation.split, simulation.truth.oracle_risks())


def _tcga(config: TrainConfig, external: bool) -> LoadedCohort:
    from survfuse.data.cohort_files import read_cohort

    data = config.data
    folder = _folder(data)
    # the tables of PORPOISE hold overall survival only; the other endpoints are TCGA-CDR's
    outcomes = None if data.endpoint == "OS" else folder / "tcga_cdr" / "outcome.xlsx"
    cohort = read_cohort(
        folder / "tcga_omics" / f"tcga_{data.cohort}_all_clean.csv.zip",
        rows=config.protocol.rows,
        tables=data.tables,
        types=data.types or None,
        exclude=data.exclude,
        outcomes=outcomes,
        endpoint=data.endpoint,
        missing_outcome="keep" if external else "error" if outcomes is None else "drop",
        bags=_bag_path(data),
    )
    if data.cohort == "gbmlgg" and not external:
        cohort = cohort._replace(targets=_glioma_targets(config, cohort, folder))
    return LoadedCohort(cohort, None, None)


def _glioma_targets(config: TrainConfig, cohort: Cohort, folder: Path) -> dict[str, ClassTarget]:
    """The diagnosis and the grade where a task asks for them."""
    from survfuse.data.glioma import glioma_diagnosis, glioma_grade

    wanted = {task.target or name for name, task in class_tasks(config).items()}
    found = {}
    if "diagnosis" in wanted:
        found["diagnosis"] = glioma_diagnosis(cohort)
    if "grade" in wanted:
        # a workbook of all of TCGA: seconds, so only for those who ask
        found["grade"] = glioma_grade(cohort, folder / "tcga_cdr" / "outcome.xlsx")
    return found


def _survpath(config: TrainConfig, external: bool) -> LoadedCohort:
    from survfuse.data.cohort_files import read_cohort

    data = config.data
    folder = _folder(data) / "survpath"
    cohort = read_cohort(
        folder / "raw_rna_data" / data.expression / str(data.cohort) / "rna_clean.csv",
        metadata=folder / f"tcga_{data.cohort}.csv",
        rows=config.protocol.rows,
        tables=data.tables,
        exclude=data.exclude,
        endpoint=data.endpoint,
        missing_outcome="keep" if external else "drop",
        bags=_bag_path(data),
    )
    return LoadedCohort(cohort, None, None)


def _slides(config: TrainConfig) -> LoadedCohort:
    """Regions of real slides as invented patients, to see real input going through."""
    pd = require("pandas", extra="train")
    from survfuse.data.cohort import Cohort
    from survfuse.data.modalities import BagModality

    bags = _encoded_slides(config.data)
    regions = _regions(bags)
    rng = np.random.default_rng(config.data.simulation.seed)
    time, censoring = rng.exponential(30.0, len(regions)), rng.uniform(6.0, 60.0, len(regions))
    names = tuple(regions.names)
    cohort = Cohort(
        unit_ids=names,
        patient_ids=names,
        time=np.minimum(time, censoring),
        event=time <= censoring,
        covariates=pd.DataFrame({"slide": [n.rpartition("/")[0] for n in names]}, index=names),
        modalities={"slides": BagModality(regions, tuple((i,) for i in range(len(regions))))},
        name="slide-smoke-test",
        notes=(SMOKE_TEST_NOTE.format(slides=len(bags)),),
    )
    return LoadedCohort(cohort, None, None)


def _encoded_slides(data: DataConfig) -> Bags:
    """The bags in `data.bags`, or all slides below `data.folder`, encoded now."""
    from survfuse.data.bags import Bags
    from survfuse.data.readers import read_bag
    from survfuse.data.slides import encode_slide
    from survfuse.data.store import BagStore

    path = _bag_path(data)
    if path is not None and path.is_file():
        return BagStore(path).bags()
    with tempfile.TemporaryDirectory() as encoded:
        if path is None:
            slides = sorted((_folder(data) / "slides").glob("*.svs"))
            for slide in slides:
                # level-0 pixels: one of the public slides does not say its resolution
                encode_slide(slide, Path(encoded) / f"{slide.stem}.h5", target_mpp=None)
            path = Path(encoded)
        files = sorted(path.glob("*.h5"))
        if not files:
            raise FileNotFoundError(
                f"no slide (*.svs) in {_folder(data) / 'slides'}"
                if data.bags is None
                else f"no bag (*.h5) in {path}"
            )
        read = [read_bag(file) for file in files]
        return Bags.from_list([bag.features for bag in read], [file.stem for file in files])


def _regions(bags: Bags) -> Bags:
    """Ranges of `REGION` patches of every slide, without a copy."""
    from survfuse.data.bags import Bags

    starts, lengths, names = [], [], []
    for name, start, length in zip(bags.names, bags.starts.tolist(), bags.lengths.tolist()):
        for number, first in enumerate(range(0, length, REGION)):
            starts.append(start + first)
            lengths.append(min(REGION, length - first))
            names.append(f"{name}/{number}")
    return Bags(bags.features, lengths, names, starts=starts)


def _with_simulated_bags(data: DataConfig, cohort: Cohort) -> Cohort:
    from survfuse.data.simulate import with_control_bags

    wanted = data.simulation
    return with_control_bags(
        cohort,
        width=wanted.width or 16,
        n_patches=_lengths(data, (1024, 1024)),
        seed=wanted.seed,
    )


def _lengths(data: DataConfig, usual: tuple[int, int]) -> tuple[int, int]:
    low = data.simulation.min_patches or usual[0]
    return low, max(low, data.simulation.max_patches or usual[1])


def _bag_path(data: DataConfig) -> Path | None:
    return None if data.bags in (None, "simulated") else Path(data.bags)


def _folder(data: DataConfig) -> Path:
    if data.folder is None:
        raise ConfigError(f'data.folder is not set; data.source "{data.source}" needs it')
    folder = Path(data.folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.folder {folder} does not exist; set it in the configuration or with --data"
        )
    return folder
