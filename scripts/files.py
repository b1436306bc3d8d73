"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import getpass
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

__all__ = ["locked", "sha256_of", "written_aside"]


def locked(path: str | Path) -> FileLock:
    """A lock for ``with``, which all of a user's processes on this machine share by the path; nothing is left beside it."""
    name = hashlib.sha256(f"{getpass.getuser()}:{Path(path).resolve()}".encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"{name}.lock")


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the name ``path`` at the block's end, or goes if the block fails.

    What killed processes of this machine left beside ``path`` goes as well.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one ending, without a dot in it: torch.save writes a file's name up to its last dot into the file
    mark = f".{path.name}.{platform.node().partition('.')[0]}-"
    aside, old = (path.with_name(f"{mark}{os.getpid()}{ending}") for ending in ("", ".old"))
    for left in path.parent.glob(f"{glob.escape(mark)}*"):
        writer = left.name.removeprefix(mark).removesuffix(".old")
        # this process's own number comes again in a container
        if writer.isdecimal() and (int(writer) == os.getpid() or not _is_running(int(writer))):
            _remove(left)
    try:
        yield aside
        if path.is_dir():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        _remove(aside)
        _remove(old)


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
