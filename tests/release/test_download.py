"""Downloads from a real server on this machine, which cuts, changes and spoils what it sends."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import socket
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import files_below

from scripts.release import download as module
from scripts.release.download import DownloadError, download, large_files

NAME = "small_bundle"
ZIP = f"{NAME}_v0.1.0.zip"
METADATA = f"{NAME}/configs/metadata.json"


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path, with a list of what was asked for, and the faults that a test sets."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []  # path and Range
        self.cut_after: list[int] = []  # bytes sent before the connection is cut, for one request each of cut_path
        self.cut_path = f"/{ZIP}"
        self.ranges = True
        self.marks = True  # whether an ETag is sent
        self.if_range = True  # whether If-Range is heeded
        self.status: list[int] = []  # answers before the first good one
        self.redirects: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, content: bytes, listed: str = "SHA256SUMS", name: str = ZIP) -> str:
        """Put a zip on the server and its hash into a list; gives the zip's address."""
        self.files[f"/{name}"] = content
        line = f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode()
        self.files[f"/{listed}"] = self.files.get(f"/{listed}", b"") + line
        return f"{self.url}/{name}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, span = self.server, self.headers.get("Range")
        server.asked.append((self.path, span))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.end_headers()
            return
        content = server.files.get(self.path)
        if content is None or server.status:
            self.send_error(404 if content is None else server.status.pop(0))
            return
        etag, begin = f'"{hashlib.md5(content).hexdigest()}"', 0
        if server.ranges and span and (not server.if_range or self.headers.get("If-Range") == etag):
            begin = int(span.removeprefix("bytes=").removesuffix("-"))
        if begin >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if server.marks:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        body = content[begin:]
        if self.path == server.cut_path and server.cut_after:
            body = body[: server.cut_after.pop(0)]
        self.wfile.write(body)  # HTTP/1.0: the connection ends here


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def make_zip(members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of a small bundle, or of other members."""
    members = members or {METADATA: b"{}", f"{NAME}/models/model.pt": bytes(range(256)) * 4000}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, content, compression)
    return stream.getvalue()


def left_in(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in names if name != f"{NAME}_files.csv"]  # the record of what was unpacked


def fails(url: str, output_dir: Path, match: str, **kwargs: object) -> None:
    """The download ends with one clear line and unpacks nothing."""
    with pytest.raises(DownloadError, match=match) as error:
        download(NAME, url, output_dir, **kwargs)
    assert "\n" not in str(error.value)
    assert not (output_dir / NAME).exists()
    assert not [name for name in left_in(output_dir) if name.startswith(".")]


def bundle_below(folder: Path) -> dict[str, bytes]:
    """Files of the bundle in a folder, without the record of them that lies beside it."""
    return {name: content for name, content in files_below(folder).items() if name != f"{NAME}_files.csv"}


def zip_requests(server: Server) -> list[str | None]:
    return [span for path, span in server.asked if path.endswith(".zip")]


@pytest.mark.parametrize("listed", ["SHA256SUMS", f"{ZIP}.sha256"])
def test_a_zip_is_checked_against_the_list_beside_it_and_unpacked(server, tmp_path, listed):
    url = server.publish(make_zip(), listed)
    assert download(NAME, url, tmp_path / "new") == tmp_path / "new" / NAME
    assert bundle_below(tmp_path / "new") == {METADATA: b"{}", f"{NAME}/models/model.pt": bytes(range(256)) * 4000}


@pytest.mark.parametrize("ending", ["", "/", "/SHA256SUMS"])
def test_of_a_folder_the_newest_version_is_taken(server, tmp_path, ending):
    for version in ("0.9.0", "0.10.0", "0.2.0"):
        server.publish(make_zip({METADATA: version.encode()}), name=f"{NAME}_v{version}.zip")
    server.publish(make_zip(), name="other_bundle_v9.0.0.zip")
    folder = download(NAME, server.url + ending, tmp_path)
    assert (folder / "configs" / "metadata.json").read_bytes() == b"0.10.0"


def test_a_given_hash_stands_in_for_the_published_one(server, tmp_path):
    content = make_zip()
    server.files[f"/{ZIP}"] = content
    download(NAME, f"{server.url}/{ZIP}", tmp_path, sha256=hashlib.sha256(content).hexdigest().upper())
    assert (tmp_path / METADATA).is_file()


def test_a_given_hash_outranks_the_published_one(server, tmp_path):
    server.publish(make_zip())
    fails(server.url, tmp_path, "expected is 0000", sha256="0" * 64)


def test_a_cut_download_goes_on_where_it_was_cut(server, tmp_path):
    url = server.publish(make_zip())
    server.cut_after = [300_000, 300_000]
    download(NAME, url, tmp_path)
    assert zip_requests(server) == [None, "bytes=300000-", "bytes=600000-"]
    assert left_in(tmp_path) == [NAME]


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    url = server.publish(make_zip())
    server.cut_after = [300_000] + [0] * (module.RETRIES + 1)
    fails(url, tmp_path, r"the connection was cut after 300000 of \d+ bytes, .* times in a row; try again later")
    assert [Path(name).suffix for name in left_in(tmp_path)] == [".part", ".tag"]
    server.asked.clear()
    download(NAME, url, tmp_path)
    assert zip_requests(server) == ["bytes=300000-"] and left_in(tmp_path) == [NAME]


def test_a_part_that_is_complete_is_not_fetched_again(server, tmp_path, monkeypatch):
    url = server.publish(make_zip())
    monkeypatch.setattr(module, "_unpack", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    fails(url, tmp_path, "No space left")
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.asked.clear()
    download(NAME, url, tmp_path)
    assert zip_requests(server) == [f"bytes={len(server.files[f'/{ZIP}'])}-"] and left_in(tmp_path) == [NAME]


@pytest.mark.parametrize("lacking", ["ranges", "marks"])
def test_a_server_that_cannot_resume_is_asked_for_the_whole_again(server, tmp_path, lacking):
    setattr(server, lacking, False)
    url = server.publish(make_zip())
    server.cut_after = [300_000]
    download(NAME, url, tmp_path)
    assert zip_requests(server) == [None, "bytes=300000-" if lacking == "ranges" else None]
    assert (tmp_path / NAME / "models" / "model.pt").read_bytes() == bytes(range(256)) * 4000


@pytest.mark.parametrize(
    ("headers", "mark"),
    [
        ({"ETag": '"a"', "Last-Modified": "Monday"}, '"a"'),
        ({"ETag": 'W/"a"', "Last-Modified": "Monday"}, "Monday"),  # weakly the same may be other bytes
        ({"Last-Modified": "Monday"}, "Monday"),
        ({"ETag": 'W/"a"'}, ""),
        ({}, ""),
    ],
)
def test_a_file_is_known_by_its_strong_etag_or_else_its_date(headers, mark):
    assert module._mark(SimpleNamespace(headers=headers)) == mark


def test_a_list_that_is_cut_is_fetched_again(server, tmp_path):
    url = server.publish(make_zip())
    server.cut_path, server.cut_after = "/SHA256SUMS", [10]
    download(NAME, url, tmp_path)
    assert left_in(tmp_path) == [NAME]


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, tmp_path, if_range):
    good = make_zip()
    url = server.publish(good)
    server.if_range = if_range
    server.files[f"/{ZIP}"] = b"other" * 100_000
    server.cut_after = [300_000] + [0] * (module.RETRIES + 1)
    fails(url, tmp_path, "the connection was cut")
    server.files[f"/{ZIP}"] = good
    download(NAME, url, tmp_path)
    assert (tmp_path / METADATA).is_file() and left_in(tmp_path) == [NAME]


def test_retries_end_when_nothing_more_arrives(server, tmp_path):
    server.ranges = False
    url = server.publish(make_zip())
    server.cut_after = [1000] * 100
    fails(url, tmp_path, "the connection was cut after 1000 of")
    assert len(zip_requests(server)) == module.RETRIES + 2  # the first 1000 bytes were a step further


def test_a_busy_server_is_asked_again(server, tmp_path):
    url = server.publish(make_zip())
    server.status = [503, 429]
    download(NAME, url, tmp_path)
    assert left_in(tmp_path) == [NAME]


def test_a_server_that_stays_broken_is_named_with_its_answer(server, tmp_path):
    url = server.publish(make_zip())
    server.status = [500] * 100
    fails(url, tmp_path, "the server answers 500")


def test_wrong_bytes_are_not_unpacked_and_not_kept(server, tmp_path, monkeypatch):
    url = server.publish(make_zip())
    server.files[f"/{ZIP}"] = make_zip({METADATA: b"forged"})
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("opened before it was checked"))
    fails(url, tmp_path, "has the SHA-256 .* expected is .* not unpacked")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("listed", [None, b"", b"<html>sign in</html>", b"0" * 40 + b"  " + ZIP.encode()])
def test_without_a_published_hash_nothing_is_fetched(server, tmp_path, listed):
    url = server.publish(make_zip())
    del server.files["/SHA256SUMS"]
    if listed is not None:
        server.files["/SHA256SUMS"] = listed
    for address in (url, server.url):
        fails(address, tmp_path, "no SHA-256 is published")
    assert zip_requests(server) == []


def test_a_list_without_the_bundle_is_told_with_what_it_lists(server, tmp_path):
    server.publish(make_zip(), name="other_bundle_v1.0.0.zip")
    fails(server.url, tmp_path, "lists no small_bundle; it lists other_bundle_v1.0.0.zip")


def test_a_listed_zip_that_is_missing_is_told_with_the_answer(server, tmp_path):
    url = server.publish(make_zip())
    del server.files[f"/{ZIP}"]
    fails(url, tmp_path, "the server answers 404 .*check the address")


def test_a_refused_connection_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    fails(f"http://127.0.0.1:{port}/{ZIP}", tmp_path, "refused.*check the address and the network")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd.zip", "ftp://example.org/a.zip", "a.zip", "http:///a.zip", "http://[/a"]
)
def test_only_http_and_https_addresses_are_taken(tmp_path, url):
    fails(url, tmp_path, "is no (http or https )?address")


def test_a_redirect_is_followed_but_not_to_a_file(server, tmp_path):
    url = server.publish(make_zip())
    server.redirects = {"/latest/SHA256SUMS": "/SHA256SUMS", f"/latest/{ZIP}": url}
    download(NAME, f"{server.url}/latest", tmp_path / "one")
    server.redirects = {"/latest/SHA256SUMS": "file:///etc/passwd"}
    fails(f"{server.url}/latest", tmp_path / "two", "the server answers 302")


def test_https_does_not_lead_to_plain_http():
    request = module.urllib.request.Request("https://example.org/a.zip")
    with pytest.raises(DownloadError, match="is not https"):
        module._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/a.zip")


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "/a"])
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    with pytest.raises(DownloadError, match="is no name of a bundle"):
        download(name, "http://127.0.0.1/a.zip", tmp_path)


def test_an_existing_folder_is_kept_unless_told_otherwise(server, tmp_path):
    download(NAME, server.publish(make_zip({METADATA: b"old", f"{NAME}/old.txt": b"old"})), tmp_path)
    asked, old = len(server.asked), {METADATA: b"old", f"{NAME}/old.txt": b"old"}
    url = server.publish(make_zip({METADATA: b"new"}))
    with pytest.raises(DownloadError, match="exists already"):
        download(NAME, url, tmp_path)
    assert len(server.asked) == asked and bundle_below(tmp_path) == old
    download(NAME, url, tmp_path, overwrite=True)
    assert bundle_below(tmp_path) == {METADATA: b"new"}


def test_what_a_user_trained_or_put_into_a_bundle_is_never_overwritten(server, tmp_path):
    url = server.publish(make_zip())
    download(NAME, url, tmp_path)
    for path in (tmp_path / NAME / "models" / "model.pt", tmp_path / NAME / "notes.txt"):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(b"mine")
        files = files_below(tmp_path)
        with pytest.raises(
            DownloadError, match=rf"{path.name}: is not replaced.*move it elsewhere, or choose another folder"
        ):
            download(NAME, url, tmp_path, overwrite=True)
        assert files == {name: files_below(tmp_path)[name] for name in files}
        path.write_bytes(before) if before else path.unlink()
    download(NAME, url, tmp_path, overwrite=True)


def test_a_failure_keeps_the_folder_that_was_to_be_replaced(server, tmp_path):
    download(NAME, server.publish(make_zip({METADATA: b"old"})), tmp_path)
    before = files_below(tmp_path)
    url = server.publish(make_zip({METADATA: b"new", "elsewhere/a": b""}))
    with pytest.raises(DownloadError, match="not below the folder"):
        download(NAME, url, tmp_path, overwrite=True)
    assert files_below(tmp_path) == before


def test_a_link_to_a_bundle_is_not_replaced(server, tmp_path):
    url = server.publish(make_zip())
    (tmp_path / NAME).symlink_to(tmp_path / "repository")
    with pytest.raises(DownloadError, match="exists already"):
        download(NAME, url, tmp_path, overwrite=True)


@pytest.mark.parametrize("full_for", [".part", ".pt"])
def test_a_full_disk_leaves_no_half_bundle_and_the_next_run_goes_on(server, tmp_path, monkeypatch, full_for):
    class File(io.FileIO):
        def write(self, block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path, mode="r"):
        return File(path, mode.replace("b", "")) if str(path).endswith(full_for) else builtins.open(path, mode)

    url = server.publish(make_zip())
    with monkeypatch.context() as patch:
        patch.setattr(module, "open", open_full, raising=False)
        fails(url, tmp_path, "No space left on device; mend it and run it again")
    assert any(name.endswith(".part") for name in left_in(tmp_path))
    download(NAME, url, tmp_path)
    assert left_in(tmp_path) == [NAME]


def test_an_output_folder_that_cannot_be_made_is_told(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="mend it and run it again"):
        download(NAME, server.publish(make_zip()), tmp_path / "file" / "out")


def member(name: str, mode: int = 0, **changes: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in changes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (member("/etc/passwd"), "not below the folder"),
        (member("../evil"), "not below the folder"),
        (member(f"{NAME}/../../evil"), "not below the folder"),
        (member(f"{NAME}/./evil"), "not below the folder"),
        (member(f"{NAME}//evil"), "not below the folder"),
        (member(f"{NAME}/..\\evil"), "not below the folder"),
        (member(f"{NAME}/C:evil"), "not below the folder"),
        (member("other/file"), "not below the folder"),
        (member(NAME), "not below the folder"),
        (member(f"{NAME}/link", stat.S_IFLNK | 0o777), "a link or a device"),
        (member(f"{NAME}/device", stat.S_IFCHR | 0o666), "a link or a device"),
        (member(f"{NAME}/pipe", stat.S_IFIFO | 0o666), "a link or a device"),
        (member(METADATA.upper().replace(NAME.upper(), NAME)), "occurs twice"),
    ],
    ids=lambda value: value.filename if isinstance(value, zipfile.ZipInfo) else "",
)
def test_a_zip_that_would_write_anything_else_is_refused(server, tmp_path, bad, fault):
    url = server.publish(make_zip({METADATA: b"{}", bad: b"/etc/passwd"}))
    fails(url, tmp_path / "out", fault)
    assert left_in(tmp_path / "out") == [] and left_in(tmp_path) == ["out"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_occurs_twice_is_refused(server, tmp_path):
    url = server.publish(make_zip({METADATA: b"{}", member(METADATA): b"other"}))
    fails(url, tmp_path, "occurs twice")


def test_a_zip_bomb_is_refused(server, tmp_path):
    url = server.publish(make_zip({METADATA: b"{}", f"{NAME}/zeros": bytes(50_000_000)}, zipfile.ZIP_DEFLATED))
    fails(url, tmp_path, r"its \d+ bytes unpack to 50000002")


def test_a_member_that_is_larger_than_announced_is_refused(server, tmp_path):
    content = make_zip({METADATA: b"{}", f"{NAME}/zeros": bytes(100_000)}, zipfile.ZIP_DEFLATED)
    size = (100_000).to_bytes(4, "little")
    assert content.count(size) == 2
    url = server.publish(content.replace(size, (10).to_bytes(4, "little")))
    fails(url, tmp_path, "damaged")


def test_too_many_members_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBERS", 1)
    fails(server.publish(make_zip()), tmp_path, "it has 2 members")


def test_too_large_a_zip_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    fails(server.publish(make_zip()), tmp_path, "more than 1000 bytes")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"no zip", "damaged"),
        (make_zip()[:5000], "damaged"),
        (make_zip({f"{NAME}/a": b""}), "no bundle"),
        (make_zip({METADATA: b"{}"}, zipfile.ZIP_BZIP2), "unusual way"),
    ],
)
def test_what_is_no_zip_of_a_bundle_is_refused(server, tmp_path, content, fault):
    fails(server.publish(content), tmp_path, fault)
    assert left_in(tmp_path) == []


def with_large_file(server: Server, content: bytes = b"large", **changes: object) -> str:
    """Publish a bundle that lists a large file on the same server."""
    server.files["/large"] = content
    entry = {"path": "models/large.pt", "url": f"{server.url}/large", "hash_type": "sha256"}
    entry |= {"hash_val": hashlib.sha256(b"large").hexdigest(), **changes}
    return server.publish(make_zip({METADATA: b"{}", f"{NAME}/large_files.json": json.dumps({"large_files": [entry]})}))


def test_listed_large_files_are_fetched_too(server, tmp_path):
    folder = download(NAME, with_large_file(server), tmp_path)
    assert (folder / "models" / "large.pt").read_bytes() == b"large"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"content": b"forged"}, "hash check"),
        ({"hash_val": ""}, "states no hash_val of models/large.pt"),
        ({"url": "file:///etc/passwd"}, "no http or https address"),
        ({"path": "../../evil"}, "path traversal"),
        ({"url": "http://127.0.0.1:1/large"}, "refused"),
    ],
)
def test_a_large_file_that_cannot_be_trusted_or_fetched_leaves_no_bundle(server, tmp_path, changes, fault):
    fails(with_large_file(server, **changes), tmp_path / "out", fault)
    assert not (tmp_path / "evil").exists()


def test_a_bundle_without_large_files_needs_no_network(tmp_path):
    large_files(tmp_path)
