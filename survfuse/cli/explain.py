"""`survfuse explain`: what the models of a run look at, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def explain_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of a neural model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table to write, e.g. table.csv.")],
    what: Annotated[
        str,
        typer.Option("--what", help="Of attention, modality_effect, gradient, gates; by commas."),
    ] = "attention,modality_effect",
    patients: Annotated[
        str | None, typer.Option("--patients", help="These alone, separated by commas.")
    ] = None,
    top: Annotated[
        int, typer.Option("--top", help="Patches per patient and group; 0 for all.")
    ] = 50,
    task: Annotated[
        str | None,
        typer.Option("--task", help="Explain this one; by default survival, else the first."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write which patches, modalities and genes every model goes by, for its test patients.

    \b
    The patches that each layer or gene group looks at most, and what each modality changes:
        survfuse explain runs/kirp --out table.csv

    \b
    Two patients, everything there is to say, every patch:
        survfuse explain runs/kirp -o two.csv --what attention,modality_effect,gradient,gates \
--patients TCGA-A4-7915,TCGA-B9-4113 --top 0

    Columns: seed, fold, unit_id, kind, modality, group, item (number of the patch, or name of the
    column), x, y (level-0 pixels), value. The same call writes the same bytes on a CPU. Effects and
    gradients are of the risk, of a task of levels of the expected level, and of classes of the
    probability of each, named in the column group.
    """
    from survfuse.data.atomic import atomic_path, check_target
    from survfuse.training.inspection import COLUMNS, explain_parts

    check_target(out)
    kinds = [part.strip() for part in what.split(",") if part.strip()]
    names = [part.strip() for part in (patients or "").split(",") if part.strip()]
    parts = explain_parts(
        run, what=kinds, patients=names or None, top=top, task=task, device=device
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with atomic_path(out) as temporary, temporary.open("w", newline="") as stream:
        stream.write(",".join(COLUMNS) + "\n")
        for frame in parts:
            frame.to_csv(stream, header=False, index=False, lineterminator="\n")
            for kind, n in frame["kind"].value_counts().items():
                counts[kind] = counts.get(kind, 0) + int(n)
    said = ", ".join(f"{n} of {kind}" for kind, n in sorted(counts.items()))
    print(f"{out}: {sum(counts.values())} rows" + (f": {said}" if said else ""))
