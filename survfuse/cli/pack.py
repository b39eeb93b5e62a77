"""`survfuse pack`: many feature files into one store."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from survfuse.data.layouts import BagFileError
from survfuse.data.packing import PackProgress, pack
from survfuse.data.store import BagStore
from survfuse.data.store_file import bytes_text


class StoreType(str, Enum):
    """Types a store's rows can have."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def pack_command(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Folders of feature files, or files: .h5 .pt .npy, one per slide."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write, e.g. blca.h5.")],
    dtype: Annotated[
        StoreType, typer.Option(help="Type of the stored features.")
    ] = StoreType.bfloat16,
    pattern: Annotated[
        str, typer.Option(help="Which files of a folder: '*.h5', or '**/*.h5' to go deeper.")
    ] = "*",
    resume: Annotated[
        bool, typer.Option(help="Go on with what a killed run left; --no-resume starts over.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the store if it exists.")] = False,
    check: Annotated[
        bool, typer.Option(help="Refuse NaN and infinite features; --no-check stores them.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the store back and compare all checksums.")
    ] = False,
) -> None:
    """Pack the patch features of a cohort into one file that training maps into memory.

    Reads what CLAM, TRIDENT, STAMP and HistoSSLscaling write, and plain .pt and .npy matrices.
    A store is read at the speed of the disk: a bag in it costs no decoding and no copy.

    Example, all TRIDENT features of a cohort, checked afterwards:

        survfuse pack features_uni_v1/ --out blca.h5 --pattern "*.h5" --verify

    Killed or out of disk? Run the same command again: bags already written are not read again.

    A store holds all files or is not written. If some are refused (unreadable,
    NaN, another width) the message says which and the exit code is 2; mend them
    in place and run the same command, the bags of the others are kept for it.
    """
    console = Console(stderr=True)
    goes_on = "the same command goes on from here"
    try:
        with _progress(console) as bar:
            report = pack(
                sources,
                out,
                dtype=dtype.value,
                pattern=pattern,
                resume=resume,
                overwrite=overwrite,
                check=check,
                progress=_Bars(bar),
            )
            store = BagStore(report.path)
            if verify:
                goes_on = f"{report.path} is whole, but its checksums were not all compared"
                _verify(store, bar)
    except KeyboardInterrupt:
        typer.echo(f"stopped; {goes_on}", err=True)
        raise typer.Exit(130) from None
    resumed = f", {report.n_resumed} of them from an earlier run" if report.n_resumed else ""
    checked = ", all checksums right" if verify else ""
    typer.echo(
        f"{report.path}: {report.n_bags} bags{resumed}, {report.n_rows} patches of "
        f"{report.width} features, {report.dtype}, "
        f"{bytes_text(report.path.stat().st_size)}{checked}"
    )


def _verify(store: BagStore, bar: Progress) -> None:
    task = bar.add_task("verify", total=len(store))
    try:
        store.verify(progress=lambda done, _: bar.update(task, completed=done))
    except BagFileError as error:
        # bad input elsewhere, but this process wrote the file: the disk lost it
        raise RuntimeError(str(error)) from error


class _Bars:
    """One bar per stage."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: PackProgress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(progress.stage, total=progress.total)
        self._bar.update(self._tasks[progress.stage], completed=progress.done)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        # elsewhere a message stands alone
        disable=not console.is_terminal,
    )
