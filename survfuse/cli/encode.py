"""`survfuse encode`: whole-slide images into bags, without learned weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from survfuse.cli import BAD_INPUT, INTERRUPTED, complain, describe, exit_code
from survfuse.data.slides import SlideError, encode_slide


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

    A slide that cannot be encoded is named and does not stop the others; in the
    end the exit code is 2. A full disk stops the command with 1.
    """
    _check_names(slides)
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    console = Console(stderr=True)
    quiet = not console.is_terminal
    for path in track(slides, description="encode", console=console, disable=quiet):
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
        except KeyboardInterrupt:
            # with --overwrite it begins anew
            said = "" if overwrite else "; the same command goes on from here"
            print(f"\nstopped{said}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except (OSError, SlideError) as error:
            if exit_code(error) != BAD_INPUT:
                # a full disk fails every slide to come
                raise
            complain(describe(error), BAD_INPUT)
            failed += 1
            continue
        typer.echo(f"{bag}: {n_patches} patches")
    if failed:
        typer.echo(f"{failed} of {len(slides)} slides failed", err=True)
        raise typer.Exit(BAD_INPUT)


def _check_names(slides: list[Path]) -> None:
    """A bag has its slide's name: of two slides of one name the second would be lost."""
    first: dict[str, Path] = {}
    for path in slides:
        other = first.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"{other} and {path} would both be {path.stem}.h5; encode them into two folders"
            )
