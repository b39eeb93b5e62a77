"""`survfuse encode`: whole-slide images into bags, without learned weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from survfuse.data.slides import encode_slide


def encode_command(
    slides: Annotated[
        list[Path], typer.Argument(help="Slides OpenSlide reads (.svs, .ndpi, ...).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for one .h5 per slide.")],
    patch_size: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 256,
    mpp: Annotated[
        float, typer.Option(help="Micrometres per pixel patches are cut at; 0.5 is 20x.")
    ] = 0.5,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per level-0 pixel, for slides that do not say it."),
    ] = None,
    level0: Annotated[
        bool, typer.Option("--level0", help="Cut patches in level-0 pixels, ignoring --mpp.")
    ] = False,
    min_tissue: Annotated[
        float, typer.Option(help="Least share of a patch that is tissue, 0 to 1.")
    ] = 0.1,
    overwrite: Annotated[bool, typer.Option(help="Encode slides again that have a bag.")] = False,
) -> None:
    """Cut slides into tissue patches and describe each by 96 colour and texture numbers.

    A plain encoder that runs anywhere, good for a first look and for tests; features of a
    foundation model are made with other tools and read as they are. Bags are in TRIDENT's layout.

    Example:

        survfuse encode slides/*.svs --out bags/
        survfuse pack bags/ --out cohort.h5

    A slide that has its bag already is skipped, so a stopped run goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in track(slides, description="encode", console=Console(stderr=True)):
        bag = out / f"{path.stem}.h5"
        if bag.exists() and not overwrite:
            typer.echo(f"{bag}: exists already, skipped")
            continue
        try:
            n_patches = encode_slide(
                path,
                bag,
                patch_size=patch_size,
                target_mpp=None if level0 else mpp,
                slide_mpp=slide_mpp,
                min_tissue=min_tissue,
            )
        except (OSError, ValueError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            failed += 1
            continue
        typer.echo(f"{bag}: {n_patches} patches")
    if failed:
        typer.echo(f"{failed} of {len(slides)} slides failed", err=True)
        raise typer.Exit(1)
