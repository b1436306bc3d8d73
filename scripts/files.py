"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import csv
import getpass
import glob
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

__all__ = [
    "check_own",
    "files_written_aside",
    "locked",
    "own_file",
    "own_tree",
    "recorded_files",
    "sha256_of",
    "written_aside",
]

logger = logging.getLogger(__name__)


def locked(path: str | Path) -> FileLock:
    """A lock for ``with``, which all of a user's processes on this machine share by the path; nothing is left beside it."""
    name = hashlib.sha256(f"{getpass.getuser()}:{Path(path).resolve()}".encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"{name}.lock")


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the name ``path`` at the block's end, or goes if the block fails.

    A file replaces a file, a folder a folder. What killed processes of this machine left beside ``path`` goes as well.
    """
    path = Path(path)
    aside = _beside(path)
    old = aside.with_name(f"{aside.name}.old")
    try:
        yield aside
        if path.is_dir() and aside.is_dir():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        _remove(aside)
        _remove(old)


@contextmanager
def files_written_aside(folder: str | Path) -> Iterator[Path]:
    """Give a new folder to write files to; they appear in ``folder`` at the block's end, or go if the block fails.

    ``<name of the folder>_files.csv`` beside them lists them with their hashes. Only what is listed there and has not been
    changed is replaced, or removed where it is not written again; every other file is somebody's own, and stays.

    Raises:
        ValueError: naming a file that is somebody's own and has the name of one to be written; nothing is changed then.
    """
    folder = Path(folder)
    aside = _beside(folder)
    try:
        aside.mkdir()
        yield aside
        written = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        with locked(folder):  # other processes may write the same
            if os.path.lexists(folder):
                _merge(aside, folder, written)
            else:
                _write_record(aside / _record_of(folder).name, written.items())
                os.replace(aside, folder)
    finally:
        _remove(aside)


@contextmanager
def own_file(path: str | Path, keep: bool = False) -> Iterator[Path]:
    """:func:`written_aside` of one file, which replaces none but the program's own, as it wrote it.

    ``<name of the folder>_files.csv`` beside it lists it with its hash.

    Args:
        path: the file.
        keep: copy somebody else's file to ``<name>.<first 12 digits of its SHA-256>``, and replace it then.

    Raises:
        ValueError: if the file is somebody else's, unless it is kept; nothing is changed then.
    """
    path = Path(path).absolute()
    if not keep:
        check_own(path)
    with written_aside(path) as aside:
        yield aside
        new = (path.name, sha256_of(aside))
        with locked(path.parent):
            _keep(path) if keep else check_own(path)
            # both, so that whichever a killed process leaves is known
            _write_record(_record_of(path.parent), {*recorded_files(path.parent), new})
    with locked(path.parent):
        others = {(name, sha256) for name, sha256 in recorded_files(path.parent) if name != path.name}
        _write_record(_record_of(path.parent), {*others, new})


def check_own(*paths: str | Path) -> None:
    """Refuse to replace a file that was not written by :func:`own_file` or :func:`files_written_aside`, or changed since.

    Raises:
        ValueError: naming the file and the mend.
    """
    for path in (Path(path).absolute() for path in paths):
        if os.path.lexists(path) and not _is_as_recorded(path, recorded_files(path.parent)):
            raise ValueError(_not_replaced(path))


def _keep(path: Path) -> None:
    """Copy a file that is somebody else's, before it is replaced."""
    if not path.is_file() or _is_as_recorded(path, recorded_files(path.parent)):
        return
    kept = path.with_name(f"{path.name}.{sha256_of(path)[:12]}")
    if not kept.exists():
        with written_aside(kept) as aside:
            shutil.copy2(path, aside)
    logger.warning(f"{path}: was not written by this program, and is replaced; its content is kept as {kept.name}")


@contextmanager
def own_tree(folder: str | Path) -> Iterator[Path]:
    """:func:`written_aside` of a folder with all below it, which replaces none but one that the program wrote just so.

    ``<name of the folder>_files.csv`` beside it lists all its files with their hashes.

    Raises:
        ValueError: naming a file in the folder that was changed, added or never recorded; nothing is changed then.
    """
    folder = Path(folder).absolute()
    record = folder.with_name(f"{folder.name}_files.csv")
    recorded = _recorded(record)
    for name, sha256 in _files_below(folder):
        if (name, sha256) not in recorded:
            raise ValueError(_not_replaced(folder / name))
    with written_aside(folder) as aside:
        yield aside
        written = _files_below(aside)
        _write_record(record, {*recorded, *written})
    _write_record(record, written)


def _files_below(folder: Path) -> list[tuple[str, str]]:
    """Path and SHA-256 of all files below a folder, but for what Python leaves behind."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "__pycache__"]
    return [(path.relative_to(folder).as_posix(), sha256_of(path)) for path in paths]


def _not_replaced(path: Path) -> str:
    return (
        f"{path}: is not replaced, as it was changed or not written by this program; move it elsewhere, or choose another "
        "folder for what is to be written"
    )


def _merge(aside: Path, folder: Path, written: dict[str, str]) -> None:
    """Move files into a folder that is there already."""
    recorded = recorded_files(folder)
    for name in written:
        if os.path.lexists(folder / name) and not _is_as_recorded(folder / name, recorded):
            raise ValueError(_not_replaced(folder / name))
    # both, so that whichever files a killed process leaves are known
    _write_record(_record_of(folder), {*recorded, *written.items()})
    for name in {name for name, _ in recorded} - written.keys():
        if _is_as_recorded(folder / name, recorded):
            (folder / name).unlink()
    for name in written:
        os.replace(aside / name, folder / name)
    _write_record(_record_of(folder), written.items())


def recorded_files(folder: Path) -> set[tuple[str, str]]:
    """Name and SHA-256 of the files that the program wrote into a folder; none without its record."""
    return _recorded(_record_of(folder))


def _recorded(record: Path) -> set[tuple[str, str]]:
    if not record.is_file():
        return set()
    with open(record, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != ["file", "sha256"]:
            raise ValueError(f"{record}: is not of this program; move it elsewhere, or choose another --output_dir")
        return {(row["file"], row["sha256"]) for row in rows}


def _record_of(folder: Path) -> Path:
    return folder / f"{folder.name}_files.csv"


def _is_as_recorded(path: Path, recorded: set[tuple[str, str]]) -> bool:
    return path.is_file() and (path.name, sha256_of(path)) in recorded


def _write_record(path: Path, files: Iterable[tuple[str, str]]) -> None:
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "sha256"), *sorted(files)])


def _beside(path: Path) -> Path:
    """A path of this process beside another one, which is free; what killed processes left there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # one ending, without a dot in it: torch.save writes a file's name up to its last dot into the file
    mark = f".{path.name}.{platform.node().partition('.')[0]}-"
    for left in path.parent.glob(f"{glob.escape(mark)}*"):
        writer = left.name.removeprefix(mark).removesuffix(".old")
        # this process's own number comes again in a container
        if writer.isdecimal() and (int(writer) == os.getpid() or not _is_running(int(writer))):
            _remove(left)
    return path.with_name(f"{mark}{os.getpid()}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
