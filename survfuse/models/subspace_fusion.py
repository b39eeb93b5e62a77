"""Subspace fusion: a tumour and a microenvironment branch, each of its genes and the patches.

Source: Zhang et al., "Knowledge-driven subspace fusion and gradient coordination for multi-modal
learning", MICCAI 2024 (arXiv 2406.13979). Only its abstract and its public code are
open; what the code says is followed, and where it errs the defect is fixed by default and kept in
the preset "released". docs/models.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bag_mean import bag_mean
from survfuse.models.base import FusionModel, Score, evaluating
from survfuse.models.gene_consistency import (
    gene_consistency,
    offset_histogram,
    released_gene_consistency,
)
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import encode_inputs
from survfuse.models.subspace_branch import BranchGenes, BranchOutput, SubspaceBranch
from survfuse.models.subspace_config import BRANCHES, SubspaceFusionConfig
from survfuse.models.subspace_layout import SlideLayout, lay_out
from survfuse.models.subspace_released import convert_released, released_config

__all__ = ["SubspaceFusion"]


class SubspaceFusion(FusionModel):
    """Two vectors, each of a list of genes and all patches, read out together.

    Per branch, with g a self-normalising network of its genes and P the projected patches:

        h = W [P, g] + b
        x = h + deformable_attention(LN h, LN P)
        feature = W_o tanh(W_p pool(LN x) + b_p) + b_o

    The queries are fused tokens, so a branch's genes decide where its patches look. The pool is the
    mean, or weighs patches by gated attention or by the attention of the genes (`GenePool`). What
    is the tumour's and what its microenvironment's is decided by the two lists of genes alone: no
    loss tells the branches apart. The auxiliary losses are the gene-guided consistency of each
    branch.

    Genes that are absent for a sample are replaced by a learned vector, so that its patches are
    still fused; a slide that is absent by one learned patch that attends to nothing, so that its
    genes go the same way to the feature; both by both. The consistency compares samples that have
    both.

    Args:
        config: see `SubspaceFusionConfig`.

    Cost:
        Per branch one read of the bag (two backward), memory for a few [total, dim] beside it, and
        attention of all patches to M points, M the coarse cells that hold tissue. The host waits
        for the device, which says how many those are; ragged bags attend one by one.

    Example:
        >>> import torch
        >>> from survfuse.batch import BagBatch, TableBatch
        >>> from survfuse.ragged import Ragged
        >>> modalities = {
        ...     "genes": ("table", 5, {"tumor": (0, 1, 2), "microenvironment": (3, 4)}),
        ...     "slides": ("bag", 16),
        ... }
        >>> config = SubspaceFusionConfig(modalities, dim=16, heads=2, dim_head=8)
        >>> genes = TableBatch(torch.randn(1, 5), torch.tensor([True]))
        >>> cell = torch.arange(35)
        >>> corners = torch.stack([cell % 7, cell // 7], 1) * 256
        >>> bags = Ragged.from_lengths([35])
        >>> slides = BagBatch(torch.randn(35, 16), bags, torch.tensor([True]), corners)
        >>> output = SubspaceFusion(config)({"genes": genes, "slides": slides})
        >>> output.logits["survival"].shape, output.embeddings["tumor"].shape
        (torch.Size([1, 4]), torch.Size([1, 16]))
    """

    config_class: ClassVar[type] = SubspaceFusionConfig
    export_obstacle: ClassVar[str | None] = (
        "how many cells hold tissue, and so how many points are sampled"
    )
    config: SubspaceFusionConfig

    def __init__(self, config: SubspaceFusionConfig) -> None:
        if not isinstance(config, SubspaceFusionConfig):
            raise TypeError(
                f"config is {type(config).__name__}; it must be a SubspaceFusionConfig "
                "(SubspaceFusionConfig(**values) makes one of a dict)"
            )
        super().__init__()
        self.config = config
        columns = config.gene_columns()
        self.branches = nn.ModuleDict(
            {branch: SubspaceBranch(config, columns[branch]) for branch in BRANCHES}
        )
        self.readout = TaskHeads(len(BRANCHES) * config.dim, config.outputs)

    def branch_columns(self) -> dict[str, slice]:
        """Which columns of each head's weight `readout.tasks[task].weight` read which branch."""
        dim = self.config.dim
        return {branch: slice(i * dim, (i + 1) * dim) for i, branch in enumerate(BRANCHES)}

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "tumor" and "microenvironment" [B, dim]; auxiliary losses
            "consistency_tumor" and "consistency_microenvironment", weighted.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        slides, n_samples = self._lay_out(inputs)
        bag, features, losses = self._bag(inputs, slides), {}, {}
        for name, branch in self.branches.items():
            genes = branch.encode_genes(inputs, n_samples)  # [B, dim]
            out = branch(bag, slides, genes.values)  # [B, dim]
            features[name] = out.feature
            if self.config.consistency != "none":
                loss = self._consistency(branch, genes, out, slides)
                losses[f"consistency_{name}"] = self.config.consistency_weight * loss
        joint = torch.cat(list(features.values()), 1)  # [B, 2 dim]
        return ModelOutput(self.readout(joint), features, losses)

    def _lay_out(self, inputs: Mapping[str, Modality]) -> tuple[SlideLayout | None, int]:
        config = self.config
        tokens, n_samples = encode_inputs(inputs, config.modalities)
        if config.bag is None or config.bag not in tokens:
            return None, n_samples
        attention = self.branches[BRANCHES[0]].attention
        # no point of one map reaches the next: at most so many coarse cells beyond its own
        gap = attention.downsample * (int(attention.offset_scale) + 2)
        slides = lay_out(
            inputs[config.bag],
            layout=config.layout,
            without_coords=config.without_coords,
            patch_size=config.patch_size,
            map_side=config.map_side,
            gap=gap,
            name=config.bag,
        )
        return slides, n_samples

    def _bag(self, inputs: Mapping[str, Modality], slides: SlideLayout | None) -> Tensor | None:
        if slides is None:
            return None
        features = inputs[self.config.bag].features
        return features if slides.rows is None else features[slides.rows]

    def _consistency(
        self,
        branch: SubspaceBranch,
        genes: BranchGenes,
        out: BranchOutput,
        slides: SlideLayout | None,
    ) -> Tensor:
        """The unweighted loss of a branch, over the samples with genes and a slide."""
        if slides is None:
            # the genes' gradient is zero and not missing
            return genes.values[:0].sum()
        offsets, points = out.attended.offsets, out.attended.points
        if slides.index is None:
            reach = branch.attention.offset_scale
            moved = offset_histogram(offsets, out.attended.point_ragged, reach=reach)
            present = genes.present & (slides.stored.lengths > 0)
            return gene_consistency(genes.values, moved, present)
        values, both = genes.values[slides.samples], genes.present[slides.samples]
        if self.config.consistency == "released":
            return released_gene_consistency(values[both], points[both])
        return gene_consistency(values, offsets.flatten(2), both)

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much attention each patch receives in each branch, streamed; without dropout.

        Points lie between patches: what is given to one counts for those around it, as bilinear
        sampling weighs them.

        Returns:
            By bag and branch ("tumor"), and by the branch's pool ("tumor pool") unless that is the
            mean, weights [total] in batch order; a sample's sum to 1, and are 0 where it lacks the
            slide or, in a branch, all of its points lie beside the tissue.
        """
        found: dict[str, Tensor] = {}
        with evaluating(self):
            slides, n_samples = self._lay_out(inputs)
            bag = self._bag(inputs, slides)
            for name, branch in self.branches.items() if slides is not None else ():
                genes = branch.encode_genes(inputs, n_samples).values
                patches = branch.project_patches(bag, slides)
                received = branch.received(patches, slides, genes)
                found[name] = self._of_batch(received, inputs, slides)
                weights = branch.pool_weights(patches, slides, genes)
                if weights is not None:
                    found[f"{name} pool"] = self._of_batch(weights, inputs, slides)
        return {self.config.bag: found} if found else {}

    def patch_maps(
        self,
        inputs: Mapping[str, Modality],
        *,
        score: Score | None = None,
        task: str | None = None,
        signed: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """How much each patch adds to a score by each branch, beside the slide's mean patch.

        Gradient times input: the score of a sample is differentiated with respect to the projected
        patches of one branch, the other branch's held fixed; what sets a patch apart from the mean
        of its slide is multiplied with that and summed over channels. To first order it is what the
        score would lose were the patch like the mean. It includes what a patch says where it stands
        and where the attention of others samples it. What all patches share has no place, and takes
        no part.

        Args:
            inputs: as for `forward`.
            score: logits [B, out] of the task to [B]; None is their sum, which is a risk where they
                are hazard logits, a Cox log-risk or ordered levels.
            task: None for the first.
            signed: tell what raises the score (above 0) from what lowers it; without, how much it
                moves the score. One patch may raise the risk beside some genes and lower it beside
                others, so that signs are a sample's own.

        Returns:
            By bag and branch, [total] in batch order. 0 where the sample lacks the slide; nothing
            without any patch.
        """
        maps: dict[str, Tensor] = {}
        with evaluating(self), torch.enable_grad():
            slides, n_samples = self._lay_out(inputs)
            if slides is None:
                return maps
            bag = self._bag(inputs, slides)
            outs = {
                name: branch(bag, slides, branch.encode_genes(inputs, n_samples).values)
                for name, branch in self.branches.items()
            }
            logits = self.readout(torch.cat([out.feature for out in outs.values()], 1))
            if task is not None and task not in logits:
                raise ValueError(f"task is {task!r}; it must be one of {list(logits)}")
            of_task = logits[next(iter(logits)) if task is None else task]
            total = (of_task.sum(1) if score is None else score(of_task)).sum()
            patches = [out.patches for out in outs.values()]
            gradients = torch.autograd.grad(total, patches)
        for name, value, gradient in zip(outs, patches, gradients, strict=True):
            value, bags = value.detach(), slides.packed
            apart = value - bags.per_patch(bag_mean(value, bags)).to(value.dtype)
            added = (apart * gradient).sum(1)
            maps[name] = self._of_batch(added if signed else added.abs(), inputs, slides)
        return {self.config.bag: maps}

    def _of_batch(
        self, values: Tensor, inputs: Mapping[str, Modality], slides: SlideLayout
    ) -> Tensor:
        """[total of the batch] of values of those patches that the model saw; zeros elsewhere."""
        ragged, seen = inputs[self.config.bag].ragged, slides.seen
        if ragged.total == slides.stored.total:
            return values
        if seen is None:
            seen = ragged.per_patch(slides.stored.lengths > 0)
        everything = values.new_zeros(ragged.total)
        everything[seen] = values
        return everything

    @classmethod
    def from_released(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        tumor_genes: int | Sequence[str],
        immune_genes: int | Sequence[str],
        task: str = "survival",
        label_dim: int = 4,
        backend: str | None = None,
    ) -> SubspaceFusion:
        """A model with the weights of the released `DeformPathomicNet`, computing what it computes.

        It reads a bag "slides", whose patches fill 50 x 50 cells, and a table "genes" with the
        columns of the tumour first and those of the immune list behind them.

        Args:
            state_dict: of the released model; its type is that of the model.
            tumor_genes, immune_genes: the genes of each list in the order of the weights, or how
                many there are.
            task: name of the output.
            label_dim: number of logits.
            backend: see `SubspaceFusionConfig`.

        Raises:
            TypeError: an entry is no floating tensor.
            ValueError: an entry is missing, unknown or of another shape; it is named.
        """
        config = released_config(
            state_dict,
            n_genes={"tumor": _count(tumor_genes), "microenvironment": _count(immune_genes)},
            outputs={task: label_dim},
            backend=backend,
        )
        model = cls(config)
        converted = convert_released(state_dict, model.state_dict(), task)
        model.to(converted[f"readout.tasks.{task}.weight"].dtype).load_state_dict(converted)
        return model


def _count(genes: int | Sequence[str]) -> int:
    return genes if isinstance(genes, int) else len(genes)
