"""What a training run is: plain dataclasses, written to YAML and read from it.

Nothing here imports pydantic or yaml, so a configuration can be built in Python with the base
install. `survfuse.training.config_files` reads and checks YAML files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_type_hints

# read by pydantic when a YAML file is checked: a key that is not a field is an error
_STRICT = {"extra": "forbid"}
# the baseline that is put together from those of single modalities
UNIMODAL = "unimodal_by_patient"
# values of data.groups that are no path
GROUPS = ("families", "xena", "hallmarks", "combine", "subspaces")


@dataclass(frozen=True)
class SimulationConfig:
    """The simulated cohort, `survfuse.data.simulate_cohort`; also the sizes of simulated bags.

    Attributes:
        variant: "short", slides of 1024 patches of 16 features; "long", slides of 20,000 to 100,000
            patches of 1024 features.
        n_train, n_inner, n_test: patients used for fitting, for early stopping and for testing;
            null takes the variant's.
        width: features per patch; null takes the variant's.
        min_patches, max_patches: bag lengths; null takes the variant's.
        complete, omics_only, slide_only: shares of patients by the modalities they have; sum 1.
        seed: draws the cohort; the same seed is the same cohort.
    """

    __pydantic_config__ = _STRICT
    variant: Literal["short", "long"] = "short"
    n_train: int | None = None
    n_inner: int | None = None
    n_test: int | None = None
    width: int | None = None
    min_patches: int | None = None
    max_patches: int | None = None
    complete: float = 1.0
    omics_only: float = 0.0
    slide_only: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class PatchesConfig:
    """Which patches of each bag a model is given, the same in training and testing.

    Attributes:
        fraction: share of each bag's patches, in (0, 1], drawn once.
        shuffle_coords: deal the coordinates out anew among the patches of each bag, a negative
            control for models that read where patches lie.
        seed: of both draws.
        neighbourhood: above 0, the mean features of the patches at most so many cells away stand
            behind each patch's own; slides need coordinates.
    """

    __pydantic_config__ = _STRICT
    fraction: float = 1.0
    shuffle_coords: bool = False
    seed: int = 0
    neighbourhood: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Where the cohort comes from.

    Attributes:
        source: "simulated"; "tcga_omics", the tables of PORPOISE and HEALNet; "survpath", RNA and
            endpoints of SurvPath; "slides", slide files encoded by the plain encoder of this
            package and paired with invented follow-up, a smoke test.
        folder: folder with the data files, relative to the configuration file.
        cohort: TCGA cohort, for example kirp or blca.
        endpoint: survival endpoint; the sources hold different ones.
        modalities: the ones a model is given; empty means all the source has.
        tables: "by_type", one table per omic type (rnaseq, cnv, mut); "merged", one table `omics`;
            "healnet", one table `omics` that begins with age and sex.
        types: omic types to take; empty takes what the file has.
        exclude: genes whose every column is left out, for those that define a label.
        expression: expression table of SurvPath: "xena", "hallmarks" or "combine".
        bags: bag store (`survfuse pack`) or folder of bag files that adds the modality `slides`; or
            "simulated", bags that know nothing of the outcome: a negative control.
        groups: gene groups of the tables, for models with a token per group: null leaves those the
            source has; "families", MCAT's six; "xena", "hallmarks" or "combine", SurvPath's
            pathways; "subspaces", tumour and microenvironment by a rule over both; or a CSV file
            with one column of gene names per group, relative to the configuration file.
        patches: which patches of each bag are used.
        simulation: the simulated cohort's sizes, also those of simulated bags.
    """

    __pydantic_config__ = _STRICT
    source: Literal["simulated", "tcga_omics", "survpath", "slides"] = "simulated"
    folder: str | None = None
    cohort: str | None = None
    endpoint: Literal["OS", "DSS", "DFI", "PFI"] = "OS"
    modalities: tuple[str, ...] = ()
    tables: Literal["by_type", "merged", "healnet"] = "by_type"
    types: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    expression: Literal["xena", "hallmarks", "combine"] = "xena"
    bags: str | None = None
    groups: str | None = None
    patches: PatchesConfig = field(default_factory=PatchesConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


@dataclass(frozen=True)
class ProtocolConfig:
    """Which patients a model may learn from, and what is fitted on whom.

    Attributes:
        name: the preset that filled in what a file leaves open.
        rows: what a row of the cohort is: "patients" or "slides".
        split: "given" by the source; "published" files; "patients" or "sites", our own folds;
            "rows", a random 70/15/15 split for every seed that ignores who a row belongs to.
        mismatch: where published files and the cohort do not name the same cases: "error", or
            "drop" those that only one of them names. Endpoints some cases lack need "drop".
        n_folds: folds of "patients" and "sites".
        fold_seed: draws those folds.
        bins: rows whose event times set the edges of the time bins: "train", or "all" (the files of
            MCAT and SurvPath call the evaluated rows validation and fit the bins on them too).
        n_bins: number of time bins.
        fill: rows whose means replace missing numbers in tables and set their clipping and scale.
        scale: standardise tables.
        clip: tables are cut at so many robust standard deviations from the median; None leaves
            them.
        validation: rows that early stopping watches: "inner", those the split names or else a part
            cut from the training patients, if they hold at least `min_inner_events` events (if not,
            they are trained on and a fixed number of epochs is run); "split", those the split
            names; "test", the test rows themselves; "none".
        inner_fraction: share of training patients cut for "inner".
        min_inner_events: fewest events that make an inner set worth watching.
        weights: the weights that are evaluated: the "best" watched epoch's or the "last" epoch's.
    """

    __pydantic_config__ = _STRICT
    name: Literal["honest", "healnet", "mcat", "survpath"] = "honest"
    rows: Literal["patients", "slides"] = "patients"
    split: Literal["given", "published", "patients", "sites", "rows"] = "given"
    mismatch: Literal["error", "drop"] = "error"
    n_folds: int = 5
    fold_seed: int = 0
    bins: Literal["train", "all"] = "train"
    n_bins: int = 4
    fill: Literal["train", "all"] = "train"
    scale: bool = True
    clip: float | None = 5.0
    validation: Literal["inner", "split", "test", "none"] = "inner"
    inner_fraction: float = 0.15
    min_inner_events: int = 20
    weights: Literal["best", "last"] = "best"


@dataclass(frozen=True)
class ModelConfig:
    """The model and its settings.

    Attributes:
        name: of `survfuse.models.MODELS`; or "clinical_cox", Cox regression on age and sex;
            "elastic_net_cox", Cox regression with an elastic net on every table column.
        preset: where the settings start from, one of the `PRESETS` of the model's configuration
            class; None takes the first.
        settings: fields of that class (`survfuse.models.HEALNetConfig`, ...) that replace the
            preset's; `modalities` holds those of single modalities by name.
    """

    __pydantic_config__ = _STRICT
    name: Literal[
        "healnet",
        "ammasurv",
        "subspace_fusion",
        "mcat",
        "motcat",
        "survpath",
        "cmta",
        "perceiver",
        "multimodn",
        "late_fusion",
        "abmil",
        "transmil",
        "snn",
        "mean_pool",
        "clinical_cox",
        "elastic_net_cox",
    ] = "healnet"
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


# what evaluation.baselines may name, besides only:<modality>; a model also with :<preset>
BASELINES = (*get_args(get_type_hints(ModelConfig)["name"]), UNIMODAL)


@dataclass(frozen=True)
class LossConfig:
    """The loss of a neural model: survival / survival_divisor + l1 * sum |w| + the model's own.

    Further tasks are added to it with their weights; see `TaskConfig`.

    Attributes:
        name: "nll", discrete-time hazards; "cox", partial likelihood.
        alpha: weight shifted from all patients to those with an event, in [0, 1]; nll only.
        class_weights: weigh the likelihood of a patient by the inverse (or its root) of the number
            of training rows in the same time bin, normalised to sum 1; nll only.
        ties: how Cox treats tied events.
        survival_divisor: divides the survival loss and nothing else.
        l1: weight of the sum of absolute values of all parameters.
    """

    __pydantic_config__ = _STRICT
    name: Literal["nll", "cox"] = "nll"
    alpha: float = 0.0
    class_weights: Literal["none", "inverse", "inverse_root"] = "none"
    ties: Literal["efron", "breslow"] = "efron"
    survival_divisor: float = 1.0
    l1: float = 0.0


@dataclass(frozen=True)
class TaskConfig:
    """One thing that a model predicts of every patient.

    Attributes:
        kind: "survival", with the loss of the section `loss`; "classes", a diagnosis or subtype;
            "ordinal", levels with an order, such as grades.
        target: the cohort's target or covariate that holds the classes; None takes the one named
            like the task.
        classes: their names, for "ordinal" from the lowest level; empty takes the target's own.
        weight: of the task's loss in the sum.
        class_weights: weight of a patient by class: "none"; "inverse" or "inverse_root" of the
            class's share of the training rows, the mean over them 1; or a number for each class.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["survival", "classes", "ordinal"]
    target: str | None = None
    classes: tuple[str, ...] = ()
    weight: float = 1.0
    class_weights: str | tuple[float, ...] = "none"


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning rate and decoupled (adamw) or coupled (adam, radam) weight decay."""

    __pydantic_config__ = _STRICT
    name: Literal["adam", "adamw", "radam"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps.

    Attributes:
        name: "constant"; "cosine", from lr to lr * final_fraction; "onecycle", torch's OneCycleLR
            with its defaults, in which max_lr replaces the optimiser's lr.
        warmup_steps: linear rise from 0, before constant or cosine.
        max_lr: peak of onecycle; None takes the optimiser's lr.
        final_fraction: end of cosine, as a share of lr.
    """

    __pydantic_config__ = _STRICT
    name: Literal["constant", "cosine", "onecycle"] = "constant"
    warmup_steps: int = 0
    max_lr: float | None = None
    final_fraction: float = 0.0


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to every training batch; validation and test rows are never changed.

    Attributes:
        table_dropout: probability with which a column of a table is zeroed for a sample.
        patch_dropout: share of the patches of every bag that is left out.
        slide_shift: standard deviation of a vector added to all patches of a bag, in units of each
            feature's own spread, as another scanner or stain would add it.
    """

    __pydantic_config__ = _STRICT
    table_dropout: float = 0.0
    patch_dropout: float = 0.0
    slide_shift: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Attributes:
        epochs: most epochs.
        batch_size: samples per batch.
        accumulate: batches per optimiser step; a last, shorter window steps too.
        precision: "fp32", or "bf16" through autocast.
        clip_norm: longest gradient; None does not clip.
        patience: epochs without improvement before stopping; None runs all epochs.
        metric: what early stopping watches on the validation rows: "loss" (of several tasks the
            weighted sum), "c_index", or the name of a class task: the AUC of classes, the quadratic
            kappa of levels.
        seeds: one whole run (every fold) per seed.
        restarts: trainings of every fold, each from other initial weights; the one with the best
            `metric` on the validation rows, at the weights to be evaluated, is kept.
        device: "auto" takes CUDA where there is one.
        threads: CPU threads; None takes torch's own number. Small models gain
            nothing from more than one, and lose much on a busy machine.
        checkpoint_steps: also save a checkpoint every so many optimiser steps; None saves after
            every epoch only.
        augment: random changes to training batches.
    """

    __pydantic_config__ = _STRICT
    epochs: int = 20
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: float | None = 1.0
    patience: int | None = 5
    metric: str = "loss"
    seeds: tuple[int, ...] = (1,)
    restarts: int = 1
    device: str = "auto"
    threads: int | None = None
    checkpoint_steps: int | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class CoordinationConfig:
    """Gradient coordination of models with two branches; `GradientCoordination`.

    Attributes:
        mode: "none"; "projection", where the branches' gradients of a row of the classifier
            conflict, that of the branch that scores lower loses its part along the other;
            "released", what the public code does to it instead.
    """

    __pydantic_config__ = _STRICT
    mode: Literal["none", "projection", "released"] = "none"


@dataclass(frozen=True)
class EvaluationConfig:
    """The report.

    Attributes:
        bootstrap: resamples of an interval.
        level: coverage of an interval.
        seed: draws the resamples.
        baselines: further models trained on the same folds and compared with the run, each in its
            own folder below it: any that `model.name` may be, also as "<name>:<preset>";
            "only:<modality>", the run's own model given one modality; and "unimodal_by_patient",
            made of those: each patient's risk is the mean over the modalities the patient has.
        single_models: by modality, the model of its "only:" baseline in place of the run's own,
            which may need several modalities.
        missing: ways to withhold modalities from the test patients who have all, each scored with
            the trained models: "only:<modality>", "only:<modality>+<modality>", and "half": of half
            of the patients the tables, of the others all else.
        figures: draw the Kaplan-Meier figure.
    """

    __pydantic_config__ = _STRICT
    bootstrap: int = 2000
    level: float = 0.95
    seed: int = 0
    baselines: tuple[str, ...] = ()
    single_models: dict[str, ModelConfig] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    figures: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `survfuse train CONFIG.yaml` reads one; every field has a default.

    `tasks` maps the name of each task to what it is; empty is survival alone.
    """

    __pydantic_config__ = _STRICT
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    coordination: CoordinationConfig = field(default_factory=CoordinationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    title: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        from survfuse.training.config_checks import check

        check(self)

    @property
    def label(self) -> str:
        """The run in tables: its title, and the model where the title begins with another."""
        name = self.model.name
        if not self.title or self.title.lower().startswith((name, "only:")):
            return self.title or name
        return f"{self.title} ({name})"

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, ready for YAML or JSON."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
