"""Fetches a published bundle over HTTP, and unpacks it only after its SHA-256 has been checked."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import ssl
import stat
import time
import unicodedata
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urljoin, urlsplit

from monai.bundle import ConfigParser, download_large_files
from tqdm import tqdm

from scripts.files import own_tree, sha256_of

__all__ = ["DownloadError", "download", "large_files"]

logger = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a byte
RETRIES = 4  # in a row, without a byte more than before
PAUSE = 1.0  # seconds before the first retry; each further one waits twice as long
BLOCK = 1 << 18  # bytes
MAX_LIST = 1 << 20  # bytes of a published list
MAX_BYTES = 4 << 30  # of a zip, and of what is in it
MAX_RATIO = 100  # bytes unpacked for each byte of the zip
MAX_MEMBERS = 10_000

T = TypeVar("T")


class DownloadError(Exception):
    """A bundle could not be fetched; the message is one line with the cause and the mend."""


class _Missing(DownloadError):
    """The server has no such file, or shows it to nobody."""


class _Refused(DownloadError):
    """What was received is not what is wanted."""


class _Cut(Exception):
    """The transfer broke in a way that a retry may mend."""


def download(name: str, url: str, output_dir: Path, sha256: str | None = None, overwrite: bool = False) -> Path:
    """Fetch a bundle's zip, check its SHA-256, and unpack it as ``output_dir/name``, whole or not at all.

    What was received stays in ``output_dir/<name>-<hash>.part`` when the transfer breaks; the next call goes on from there,
    if the server still has the same file (ETag or Last-Modified) and answers ranges. The list of hashes comes from the same
    server as the zip: it shows a damaged file, not a forged server. For that, pass the hash from a place that you trust.

    Args:
        name: name of the bundle, the one top folder in the zip.
        url: http or https address of the zip, with its hash beside it as ``<zip>.sha256`` or in ``SHA256SUMS``, or of a
            folder with ``SHA256SUMS``, of which the newest version is taken.
        output_dir: folder to unpack in, made if need be.
        sha256: expected hash of the zip, in place of the published one.
        overwrite: whether to replace an existing folder ``output_dir/name``, if it is as this function wrote it.

    Returns:
        the bundle's folder.

    Raises:
        DownloadError: if anything stands in the way; nothing is unpacked then, and an existing folder stays.
    """
    target = Path(output_dir) / name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DownloadError(f"'{name}' is no name of a bundle")
    if target.is_symlink() or (target.exists() and not overwrite):
        raise DownloadError(f"{target} exists already; remove it, name another folder, or ask to overwrite it")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DownloadError(f"'{sha256}' is no SHA-256 (64 hexadecimal digits)")
    zip_url, expected = _find(name, _checked(url), sha256)
    part = Path(output_dir) / f"{name}-{expected[:12]}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _retried(lambda: _fetch(zip_url, part), lambda: _size(part))
        found = sha256_of(part)
        if found != expected:
            raise _Refused(f"{zip_url} has the SHA-256 {found}, expected is {expected}: not unpacked; try it again")
        with own_tree(target) as folder:
            _unpack(part, folder, name)
            large_files(folder)
        _forget(part)
    except _Refused:
        _forget(part)
        raise
    except ValueError as error:  # a file of somebody else's in the folder to be replaced
        raise DownloadError(str(error)) from error
    except OSError as error:
        raise DownloadError(f"{output_dir}: {error}; mend it and run it again: it goes on from here") from error
    return target


def large_files(bundle: Path) -> None:
    """Fetch what a bundle lists in ``large_files.json`` (or ``.yml``, ``.yaml``), by MONAI's own function.

    MONAI checks a hash only where the list states one, and fetches whatever scheme it finds, so both are required here.

    Raises:
        DownloadError: if the list is faulty, or a file can't be fetched or has another hash.
    """
    lists = [path for path in sorted(bundle.glob("large_files*")) if path.suffix in (".json", ".yml", ".yaml")]
    if not lists:
        return
    try:
        entries = ConfigParser.load_config_files(lists)["large_files"]
        for entry in entries:
            _checked(entry["url"])
            if not entry.get("hash_val"):
                raise DownloadError(f"{lists[0].name} states no hash_val of {entry['path']}; have the publisher add it")
        download_large_files(str(bundle))
        missing = [entry["path"] for entry in entries if not (bundle / entry["path"]).is_file()]
    except DownloadError:
        raise
    except Exception as error:  # MONAI passes on those of urllib, gdown, its own and of parsing
        raise DownloadError(f"{lists[0].name}: {type(error).__name__}: {_line(error)}") from error
    if missing:  # MONAI is silent about a folder that it may not write to
        raise DownloadError(f"{lists[0].name}: {', '.join(missing)} could not be written")


def _find(name: str, url: SplitResult, sha256: str | None) -> tuple[str, str]:
    """Address of the zip, and its expected hash."""
    if url.path.lower().endswith(".zip"):
        zip_name = url.path.rpartition("/")[2]
        if sha256:
            return url.geturl(), sha256.lower()
        for listed in (f"{zip_name}.sha256", "SHA256SUMS"):
            hashes = _hashes(_beside(url, listed))
            if zip_name in hashes:
                return url.geturl(), hashes[zip_name]
        raise DownloadError(f"no SHA-256 is published beside {url.geturl()}; check the address, or pass the sha256")
    folder = url._replace(path=url.path.removesuffix("SHA256SUMS").rstrip("/") + "/")
    list_url = _beside(folder, "SHA256SUMS")
    hashes = _hashes(list_url)
    if not hashes:
        raise DownloadError(f"no SHA-256 is published at {list_url}; give the folder that holds SHA256SUMS, or the zip")
    versions = {}
    for zip_name in hashes:
        if match := re.fullmatch(rf"{re.escape(name)}_v(\d+(?:\.\d+)*)\.zip", zip_name):
            versions[tuple(int(number) for number in match[1].split("."))] = zip_name
    if not versions:
        raise DownloadError(f"{list_url} lists no {name}; it lists {', '.join(sorted(hashes))}")
    newest = versions[max(versions)]
    return _beside(folder, newest), sha256.lower() if sha256 else hashes[newest]


def _hashes(url: str) -> dict[str, str]:
    """The hashes that a published list states, by file name; none if there is no such list."""

    def read() -> bytes:
        with _open(url) as response:
            text = _read(response, url, MAX_LIST)
            if response.length:
                raise _Cut(f"{url}: the list is cut, or longer than {MAX_LIST} bytes")
            return text

    try:
        text = _retried(read).decode(errors="replace")
    except _Missing:
        return {}
    return {file: digest.lower() for digest, file in re.findall(r"^([0-9a-fA-F]{64}) [ *](\S+)\s*$", text, re.MULTILINE)}


def _beside(url: SplitResult, name: str) -> str:
    return url._replace(path=urljoin(url.path or "/", name)).geturl()


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DownloadError(f"'{url}' is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"'{url}' is no http or https address")
    return parts


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to plain http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"{req.full_url} leads to {newurl}, which is not https; use another address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str] | None = None) -> HTTPResponse | HTTPError:
    try:
        request = urllib.request.Request(url, headers=headers or {})
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error  # is a response, too
        error.close()
        if error.code >= 500 or error.code == 429:
            raise _Cut(f"{url}: the server answers {error.code} {error.reason}") from error
        kind = _Missing if error.code in (403, 404, 410) else DownloadError
        raise kind(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, (ConnectionRefusedError, socket.gaierror, ssl.SSLError, InvalidURL, ValueError)):
            raise DownloadError(f"{url}: {_line(reason)}; check the address and the network") from error
        raise _Cut(f"{url}: {_line(reason)}") from error


def _read(response: HTTPResponse, url: str, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, HTTPException) as error:
        raise _Cut(f"{url}: {_line(error)}") from error


def _fetch(url: str, part: Path) -> None:
    """Receive a file into ``part``, from where it ends if the server still has the file that it was begun with."""
    tag = part.with_suffix(".tag")  # the server's mark of the file that the part belongs to
    begun = tag.read_text(encoding="utf-8") if tag.is_file() else ""
    done = _size(part) if begun else 0
    with _open(url, {"Range": f"bytes={done}-", "If-Range": begun} if done else None) as response:
        answer, mark = response.headers.get("Content-Range", ""), _mark(response)
        if response.status == 416 and answer == f"bytes */{done}":
            return  # complete already
        other = response.status == 206 and (not answer.startswith(f"bytes {done}-") or mark not in ("", begun))
        if response.status == 416 or other:
            _forget(part)
            raise _Cut(f"{url}: the server answers a range of another file, or another range than asked for")
        if response.status != 206:
            done = 0
        total = None if response.length is None else done + response.length
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None)
        with bar, open(part, "ab" if done else "wb") as file:
            if not done:
                tag.write_text(mark, encoding="utf-8")
            while block := _read(response, url, BLOCK):
                if max(total or 0, done) > MAX_BYTES:
                    raise _Refused(f"{url} has more than {MAX_BYTES} bytes; is it a bundle?")
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise _Cut(f"{url}: the connection was cut after {done} of {total} bytes")


def _mark(response: HTTPResponse) -> str:
    """What tells a file from a changed one: its strong ETag, or when it was modified; empty if the server tells neither."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _retried(step: Callable[[], T], reached: Callable[[], int] = lambda: 0) -> T:
    """Do a step until it is not cut, but at most ``RETRIES`` times more without getting further."""
    failures, best = 0, reached()
    while True:
        try:
            return step()
        except _Cut as error:
            failures, best = (0, reached()) if reached() > best else (failures + 1, best)
            if failures > RETRIES:
                raise DownloadError(f"{error}, {failures} times in a row; try again later: it goes on from here") from error
            logger.info("%s; trying again", error)
            time.sleep(PAUSE * 2**failures)


def _unpack(archive: Path, folder: Path, name: str) -> None:
    """Unpack a zip's one top folder ``name`` as ``folder``; refuse one that would write anything else."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [info for info in opened.infolist() if not info.is_dir()]
            _check_members(opened.infolist(), name, archive.stat().st_size)
            for info in members:
                path = folder.joinpath(*info.filename.split("/")[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as source, open(path, "wb") as file:  # gives no more bytes than announced
                    shutil.copyfileobj(source, file, BLOCK)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise _Refused(f"the zip of {name} is damaged or of an unknown kind: {_line(error)}; tell its publisher") from error
    if not (folder / "configs" / "metadata.json").is_file():
        raise _Refused(f"the zip of {name} holds no configs/metadata.json, so no bundle; check the address")


def _check_members(members: list[zipfile.ZipInfo], name: str, size: int) -> None:
    def refuse(what: str) -> _Refused:
        return _Refused(f"the zip of {name} is not unpacked: {what}; don't trust its publisher")

    if len(members) > MAX_MEMBERS:
        raise refuse(f"it has {len(members)} members")
    unpacked = sum(info.file_size for info in members)
    if unpacked > min(MAX_BYTES, MAX_RATIO * size):
        raise refuse(f"its {size} bytes unpack to {unpacked}")
    seen: set[str] = set()
    for info in members:
        parts = info.filename.removesuffix("/").split("/")
        odd = any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts)
        if odd or parts[0] != name or (len(parts) == 1 and not info.is_dir()):
            raise refuse(f"'{info.filename}' is not below the folder {name}")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"'{info.filename}' is a link or a device")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"'{info.filename}' is packed in an unusual way")
        same = unicodedata.normalize("NFC", "/".join(parts)).casefold()  # as file systems that ignore case see it
        if same in seen:
            raise refuse(f"'{info.filename}' occurs twice")
        seen.add(same)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".tag").unlink(missing_ok=True)


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
