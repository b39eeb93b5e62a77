"""Pack the feature files of a cohort into one store, so that a killed run can go on.

While packing, two files lie beside the store `<out>`: `.<out>.partial`, the store to be, and
`.<out>.journal`, a line of JSON about the plan followed by one per bag that is on disk. A bag's
line is written after its rows were flushed. The last step renames the partial file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from survfuse.data.atomic import atomic_path
from survfuse.data.layouts import BagFileError
from survfuse.data.readers import SUFFIXES, BagHeader, bag_name, read_bag, read_header
from survfuse.data.store_file import (
    FULL,
    StorePlan,
    StoreWriter,
    check_dtype,
    create_store,
    full_error,
    offsets_of,
)

_SHOWN_ERRORS = 10


class PackProgress(NamedTuple):
    """Where `pack` is: first it scans the headers of all files, then it writes their rows."""

    stage: str  # "scan" or "write"
    done: int  # bags done in this stage
    total: int  # bags in all
    rows_done: int  # patches written; 0 while scanning
    rows_total: int  # patches in all; 0 while scanning
    name: str  # the bag just done, "" at the start of a stage


class PackReport(NamedTuple):
    """What `pack` made."""

    path: Path
    n_bags: int
    n_rows: int
    width: int
    dtype: str
    n_resumed: int  # bags an earlier, killed run had written


class _File(NamedTuple):
    """One feature file: what identifies its content, and its header."""

    path: str
    size: int
    modified: int  # ns
    header: BagHeader


def pack(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    pattern: str = "*",
    resume: bool = True,
    overwrite: bool = False,
    check: bool = True,
    progress: Callable[[PackProgress], None] | None = None,
) -> PackReport:
    """Write the bags of many feature files into the store `out`.

    All headers are read first, so a file of another width, a name that occurs twice or a disk
    that is too small is found before the first row is written. A file that cannot be read later
    does not stop the others; all such files are named at the end.

    Killed, stopped or out of room in between, the bags written so far stay in
    `.<out>.partial`; the same call goes on from there and does not read them again. It starts
    over if the list of files, their patch counts or `dtype` changed. `out` itself appears only
    when it is whole.

    Args:
        sources: a folder, or files and folders. Every reader of `read_bag` is used.
        out: the store to write, for example "blca.h5". Its folder must exist.
        dtype: "bfloat16", "float16" or "float32", the type rows are stored in.
        pattern: which files of a folder are taken, as in `Path.glob` ("**/*.h5" goes deeper).
        resume: go on with what an earlier call left; False starts over.
        overwrite: replace `out` if it exists.
        check: refuse NaN and infinite features.
        progress: called after every file with a `PackProgress`.

    Returns:
        Number of bags, patches and features, and how many bags were not read again.

    Raises:
        FileNotFoundError: a source or the folder of `out` does not exist.
        IsADirectoryError: `out` is a folder.
        FileExistsError: `out` exists and `overwrite` is False.
        BagFileError: files disagree in width or name, or cannot be read; the message names them.
        BlockingIOError: another process packs into `out`.
        OSError: the disk is full; the message says how much is needed.
    """
    check_dtype(dtype)
    out = Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; name the file to write, as {out / 'bags.h5'}")
    paths = find_bag_files(sources, pattern=pattern, out=out)
    journal = _Journal(out.with_name(f".{out.name}.journal"))
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not overwrite:
            raise FileExistsError(
                f"{out} exists already; pass overwrite (--overwrite) to replace it"
            )
        report = progress or (lambda _: None)
        known, old_plan, done = journal.read() if resume else ({}, None, {})
        files = _scan(paths, known, report)
        plan = _make_plan(files, dtype)
        options = {"check": check}
        if old_plan != (plan, options) or not _is_sound(partial):
            done = {}
            partial.unlink(missing_ok=True)
            _check_room(partial, plan)
        done = {path: entry for path, entry in done.items() if known.get(path) in files}
        journal.write(files, plan, options, done)
        checksums = _write_rows(partial, plan, files, done, journal, check, report)
        _finish(partial, out, plan, checksums)
        journal.remove()
    finally:
        journal.close(keep=partial.exists())
    return PackReport(out, len(files), plan.n_rows, plan.width, dtype, len(done))


def find_bag_files(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    pattern: str = "*",
    out: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """The feature files among `sources`, sorted by name; hidden files and `out` are left out.

    Raises:
        FileNotFoundError: a source does not exist, a folder holds no feature file, or a link leads
            nowhere.
        BagFileError: two files have the same bag name.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    found: dict[Path, None] = {}
    own = None if out is None else Path(out).resolve()
    for source in map(Path, sources):
        if source.is_dir():
            inside = [
                path
                for path in source.glob(pattern)
                if path.suffix.lower() in SUFFIXES
                and (path.is_file() or path.is_symlink())
                and not path.name.startswith(".")
                and path.resolve() != own
            ]
            lost = [path for path in inside if not path.exists()]
            if lost:
                raise FileNotFoundError(f"{lost[0]} is a link to a file that is not there")
            if not inside:
                raise FileNotFoundError(
                    f"no file matches {pattern!r} with one of {', '.join(SUFFIXES)} in {source}"
                )
            found.update(dict.fromkeys(inside))
        elif source.exists():
            found[source] = None
        else:
            raise FileNotFoundError(f"there is no file or folder {source}")
    by_name: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (bag_name(path), str(path))):
        other = by_name.setdefault(bag_name(path), path)
        if other != path:
            raise BagFileError(
                f"{other} and {path} are both called {bag_name(path)!r}; every bag needs its own "
                "name (choose one folder by the pattern, for example 'h5_files/*.h5')"
            )
    if not by_name:
        raise FileNotFoundError("no feature file was given")
    return list(by_name.values())


def _scan(
    paths: list[Path], known: dict[str, _File], report: Callable[[PackProgress], None]
) -> list[_File]:
    """Identity and header of every file; one that did not change since `known` is not opened."""
    files, errors = [], []
    report(PackProgress("scan", 0, len(paths), 0, 0, ""))
    for i, path in enumerate(paths):
        stat = path.stat()
        identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        old = known.get(identity[0])
        if old is not None and old[:3] == identity:
            files.append(old)
        else:
            try:
                files.append(_File(*identity, read_header(path)))
            except BagFileError as error:
                errors.append(error)
        report(PackProgress("scan", i + 1, len(paths), 0, 0, bag_name(path)))
    _raise_all(errors, len(paths))
    return files


def _make_plan(files: list[_File], dtype: str) -> StorePlan:
    widest = next((file for file in files if file.header.width), None)
    if widest is None:
        raise BagFileError(f"none of the {len(files)} files holds a patch")
    for file in files:
        if file.header.width not in (0, widest.header.width):
            raise BagFileError(
                f"{file.path} has {file.header.width} features per patch and {widest.path} has "
                f"{widest.header.width}; all bags of a store must come from one encoder"
            )
    headers = [file.header for file in files]
    return StorePlan(
        dtype=dtype,
        width=widest.header.width,
        lengths=[header.n_rows for header in headers],
        has_coords=any(header.has_coords for header in headers),
        columns={
            "names": [bag_name(file.path) for file in files],
            "encoder": [header.encoder or "" for header in headers],
            "layout": [header.layout for header in headers],
            "coords_unit": [header.coords_unit or "" for header in headers],
            "source": [Path(file.path).name for file in files],
        },
        patch_size_level0=[header.patch_size_level0 or 0.0 for header in headers],
    )


def _write_rows(
    partial: Path,
    plan: StorePlan,
    files: list[_File],
    done: dict[str, int],
    journal: _Journal,
    check: bool,
    report: Callable[[PackProgress], None],
) -> list[int]:
    """Write every bag that is not `done`; returns all checksums."""
    checksums = [done.get(file.path, 0) for file in files]
    n_done, errors = len(done), []
    rows_done = sum(file.header.n_rows for file in files if file.path in done)
    try:
        if not partial.exists():
            # under yet another name first: a kill must not leave half a header
            with atomic_path(partial) as temporary:
                create_store(temporary, plan)
        writer = StoreWriter(partial, plan)
        with contextlib.closing(writer):
            writer.reserve()
            report(PackProgress("write", n_done, len(files), rows_done, plan.n_rows, ""))
            for i, file in enumerate(files):
                if file.path in done:
                    continue
                try:
                    checksums[i] = _copy_bag(writer, i, file, check)
                except (BagFileError, FileNotFoundError) as error:
                    errors.append(error)
                    continue
                journal.add(file.path, checksums[i])
                n_done, rows_done = n_done + 1, rows_done + file.header.n_rows
                name = plan.columns["names"][i]
                report(PackProgress("write", n_done, len(files), rows_done, plan.n_rows, name))
    except BaseException as error:
        if n_done == 0:
            partial.unlink(missing_ok=True)
        elif isinstance(error, OSError) and error.errno in FULL:
            raise OSError(
                error.errno,
                f"{error.strerror}; {n_done} of {len(files)} bags are kept in {partial.name}: "
                "make room and pack again to go on, or delete it",
                str(partial),
            ) from error
        raise
    if errors and n_done == 0:
        partial.unlink()
    _raise_all(errors, len(files), n_kept=n_done)
    return checksums


def _copy_bag(writer: StoreWriter, index: int, file: _File, check: bool) -> int:
    bag = read_bag(file.path, check=check)
    header = file.header
    if (bag.features.shape[0], bag.coords is not None) != (header.n_rows, header.has_coords):
        raise BagFileError(f"{file.path} changed while it was packed; pack again")
    return writer.write_bag(index, bag.features, bag.coords)


def _raise_all(errors: list[Exception], n_files: int, *, n_kept: int = 0) -> None:
    """Raise one error that names every file at fault."""
    if not errors:
        return
    lines = [f"  {error}" for error in errors[:_SHOWN_ERRORS]]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  and {len(errors) - _SHOWN_ERRORS} more")
    if n_kept:
        lines.append(f"{n_kept} bags are kept: mend these files in place and pack again to go on")
    heading = f"{len(errors)} of {n_files} files cannot be packed:"
    raise BagFileError("\n".join([heading, *lines])) from errors[0]


def _check_room(partial: Path, plan: StorePlan) -> None:
    room = os.statvfs(partial.parent)
    if room.f_bavail * room.f_frsize < plan.n_bytes:
        raise full_error(OSError(FULL[0], ""), partial, plan.n_bytes)


def _is_sound(partial: Path) -> bool:
    """Whether the partial file has a whole header (a run may have died writing it)."""
    try:
        offsets_of(partial)
    except (OSError, KeyError):
        return False
    return True


def _finish(partial: Path, out: Path, plan: StorePlan, checksums: list[int]) -> None:
    with contextlib.closing(StoreWriter(partial, plan)) as writer:
        writer.write_checksums(checksums)
    partial.replace(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Journal:
    """What an unfinished store holds; locked while a process packs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # unbuffered: what a full disk refused would be tried again on closing, and fail again
        self._stream = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise BlockingIOError(
                error.errno, f"another process is packing this store (it holds {path})"
            ) from error

    def read(self) -> tuple[dict[str, _File], object, dict[str, int]]:
        """Files, (plan, options) and checksums of written bags; empty if there is nothing."""
        self._stream.seek(0)
        # a kill may cut the last line short: it has no newline then
        lines = [line for line in self._stream.read().split(b"\n")[:-1] if line]
        try:
            head, *rest = [json.loads(line) for line in lines]
            files = [_File(*file[:3], BagHeader(*file[3])) for file in head["files"]]
            plan = StorePlan(**head["plan"])
            return {f.path: f for f in files}, (plan, head["options"]), dict(rest)
        except (ValueError, TypeError, KeyError):
            return {}, None, {}

    def write(
        self, files: list[_File], plan: StorePlan, options: dict, done: dict[str, int]
    ) -> None:
        """Start the journal anew."""
        head = {"files": files, "plan": plan._asdict(), "options": options}
        lines = [json.dumps(head), *(json.dumps(entry) for entry in done.items())]
        self._stream.truncate(0)
        self._append("\n".join(lines) + "\n")

    def add(self, path: str, checksum: int) -> None:
        self._append(json.dumps([path, checksum]) + "\n")

    def _append(self, text: str) -> None:
        rest = memoryview(text.encode())
        while rest:
            rest = rest[self._stream.write(rest) :]
        os.fsync(self._stream.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self, *, keep: bool) -> None:
        """Unlock; without a partial file to describe, the journal goes too."""
        if not keep:
            self.remove()
        self._stream.close()
