"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import getpass
import hashlib
import os
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
    """Give a path beside ``path`` to write to; it takes the name ``path`` at the block's end, or goes if the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}{ending}") for ending in ("", ".old"))
    _remove(aside)  # left by a killed process of the same number, as in a container
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
