"""A packaged bundle: what is in it, that it runs by itself, and that MONAI's own download takes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import monai.bundle.scripts as monai_scripts
import nibabel as nib
import numpy as np
import pytest
from conftest import code_of, files_below, make_head, run, run_forked, save_nifti

from scripts.release.package import needed_modules, package, package_all

NAME = "brain_mri_anomaly_ddim"


@pytest.fixture(scope="module")
def packaged(bundle, tmp_path_factory) -> dict:
    """The real bundle, packaged."""
    return package(bundle, tmp_path_factory.mktemp("packaged"))


def make_bundle(folder: Path, name: str = "small_bundle", version: str = "0.1.0") -> Path:
    """A bundle with a bit of code, and a link to it, as in the repository."""
    code = {
        "__init__.py": "",
        "losses.py": "import math\n",
        "transforms.py": "def scale(): from scripts.files import read\n",
        "files.py": "import os\n",
        "networks/__init__.py": "",
        "networks/one.py": "from scripts.losses import loss\nfrom . import shared\n",
        "networks/shared.py": "from ..base import Base\n",
        "base.py": "",
        "networks/two.py": "from scripts.metrics import dice\n",
        "metrics.py": "",
        "by_path.py": "",
        "__main__.py": "",
    }
    files = {
        "LICENSE": "free",
        "configs/metadata.json": json.dumps(
            {
                "name": name,
                "version": version,
                "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
                "description": "python -m scripts.nothing is prose",
            }
        ),
        "configs/inference.json": json.dumps({"network_def": {"_target_": "scripts.networks.one.Net"}}),
        "configs/other.json": json.dumps(
            {"imports": ["$from scripts import transforms"], "code": "$run('./scripts/by_path.py') or '/scripts'"}
        ),
        "docs/README.md": "# Small\n",
        "models/model.pt": "weights",
    }
    bundle = folder / "bundles" / name
    for root, texts in ((folder / "scripts", code), (bundle, files)):
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    (bundle / "scripts").symlink_to("../../scripts")
    return bundle


@pytest.fixture
def small(tmp_path) -> Path:
    return make_bundle(tmp_path)


def names_in(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        return opened.namelist()


def test_the_packaged_bundle_holds_docs_demo_weights_and_licence_and_no_link(packaged, bundle):
    names = set(files_below(packaged["folder"]))
    tracked = {"LICENSE", "docs/README.md", "docs/demo.nii.gz", "docs/demo_overview.png", "docs/data_license.txt"}
    assert tracked | {"models/model.pt", "configs/logging.conf", "scripts/__init__.py"} <= names
    assert {f"configs/{path.name}" for path in (bundle / "configs").glob("*.json")} <= names
    assert not [path for path in packaged["folder"].rglob("*") if path.is_symlink()]
    assert sorted(names_in(packaged["zip"])) == sorted(f"{NAME}/{name}" for name in names)


def test_the_packaged_bundle_does_not_carry_what_it_does_not_need(packaged):
    for other in ("__main__", "release/package", "networks/latent_anomaly", "tasks/motion/results"):
        assert f"scripts/{other}.py" not in packaged["modules"]
    for needed in ("networks/ddim_anomaly", "tasks/anomaly/results", "tasks/anomaly/benchmark"):
        assert f"scripts/{needed}.py" in packaged["modules"]


def test_the_packaged_bundle_runs_alone_in_another_place_with_the_same_voxels(packaged, bundle, tmp_path):
    scan = save_nifti(tmp_path / "scans" / "case.nii.gz", make_head(num_slices=2)[0])
    moved = Path(shutil.copytree(packaged["folder"], tmp_path / "elsewhere" / NAME))
    steps = ("--dataset_dir", scan.parent, "--num_steps", 1, "--guidance_steps", 1, "--output_dir")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for done in (
        run(moved, "configs/inference.json", *steps, tmp_path / "out_alone", env=alone),
        run_forked(bundle, "configs/inference.json", *steps, tmp_path / "out"),
    ):
        assert done.returncode == 0, done.stderr
    for ending in ("seg", "map", "healthy"):
        one, other = (nib.load(tmp_path / out / "case" / f"case_{ending}.nii.gz") for out in ("out", "out_alone"))
        assert np.array_equal(one.get_fdata(), other.get_fdata()) and np.array_equal(one.affine, other.affine)


def test_every_module_of_the_packaged_bundle_is_imported_from_its_own_folder(packaged, tmp_path):
    moved = Path(shutil.copytree(packaged["folder"], tmp_path / NAME))
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in packaged["modules"]]
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {modules}), sep='\\n')"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=moved, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(moved) for line in done.stdout.splitlines())


def test_two_packagings_are_the_same_bytes_although_times_and_modes_differ(small, tmp_path):
    package(small, tmp_path / "one")
    for number, path in enumerate(sorted(path for path in tmp_path.rglob("*") if path.is_file())):
        os.utime(path, (10**9 + number, 10**9 + number))
    (small / "LICENSE").chmod(0o600)
    package(small, tmp_path / "two")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    package(small, tmp_path / "two")  # over the old one
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


def test_a_package_packaged_again_is_the_same(small, tmp_path):
    done = package(small, tmp_path / "one")
    assert package(done["folder"], tmp_path / "two")["sha256"] == done["sha256"]


def test_the_hash_file_is_what_sha256sum_checks(small, tmp_path):
    done = package(small, tmp_path / "out")
    text = (tmp_path / "out" / f"{done['zip'].name}.sha256").read_text(encoding="utf-8")
    assert text == f"{hashlib.sha256(done['zip'].read_bytes()).hexdigest()}  small_bundle_v0.1.0.zip\n"
    if shutil.which("sha256sum"):
        checked = ["sha256sum", "--strict", "-c", f"{done['zip'].name}.sha256"]
        assert subprocess.run(checked, cwd=tmp_path / "out", capture_output=True).returncode == 0


def test_generated_files_stay_out(small, tmp_path):
    before = package(small, tmp_path / "one")["sha256"]
    for path in (
        "eval/a.nii.gz",
        "training/events",
        "models/checkpoint.ckpt",
        "models/.model.pt.7",
        "docs/__pycache__/a.pyc",
    ):
        (small / path).parent.mkdir(exist_ok=True)
        (small / path).write_text("generated")
    assert package(small, tmp_path / "two")["sha256"] == before


def test_code_is_found_through_targets_paths_import_lines_and_imports_of_every_kind(small):
    modules = ["__init__", "base", "by_path", "files", "losses"]
    modules += ["networks/__init__", "networks/one", "networks/shared", "transforms"]
    assert needed_modules(small) == [f"scripts/{module}.py" for module in modules]


def test_overlay_configurations_bring_their_code(small):
    (small / "configs" / "evaluate.json").write_text(json.dumps({"x": [{"y": "$scripts.networks.two.Net(@z)"}]}))
    assert {"scripts/networks/two.py", "scripts/metrics.py"} <= set(needed_modules(small))


def break_link(bundle):
    (bundle / "scripts").unlink()
    (bundle / "scripts").symlink_to("../nowhere")


def break_docs(bundle):
    (bundle / "docs" / "demo.nii.gz").symlink_to("nowhere")


def name_missing_module(bundle):
    (bundle / "configs" / "train.json").write_text('{"a": {"_target_": "scripts.networks.three.Net"}}')


def edit_metadata(bundle, **changes):
    path = bundle / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (break_link, "scripts is neither a folder nor a link"),
        (break_docs, "demo.nii.gz is a link to no file"),
        (name_missing_module, "scripts.networks.three.Net is in no module"),
        (
            lambda bundle: (bundle.parents[1] / "scripts" / "base.py").unlink(),
            "imports scripts.base.Base, which is not there",
        ),
        (lambda bundle: (bundle.parents[1] / "scripts" / "base.py").write_text("def"), "no valid Python"),
        (lambda bundle: (bundle / "configs" / "train.json").write_text("{"), "train.json can't be read"),
        (lambda bundle: (bundle / "models" / "model.pt").unlink(), "model.pt is missing"),
        (lambda bundle: (bundle / "models" / "model.pt").write_text("others"), "weights_sha256"),
        (lambda bundle: (bundle / "LICENSE").unlink(), "LICENSE is missing"),
        (lambda bundle: (bundle / "configs" / "metadata.json").unlink(), "metadata.json can't be read"),
        (lambda bundle: edit_metadata(bundle, version="../../1"), "is no number"),
        (lambda bundle: edit_metadata(bundle, name="other"), "is named other"),
    ],
)
def test_a_faulty_bundle_is_one_clear_error_and_writes_nothing(small, tmp_path, spoil, fault):
    spoil(small)
    with pytest.raises(ValueError, match=fault) as error:
        package(small, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_weights_may_be_listed_as_a_large_file_instead(small, tmp_path):
    (small / "models" / "model.pt").unlink()
    (small / "large_files.json").write_text("{}")
    assert "small_bundle/large_files.json" in names_in(package(small, tmp_path / "out")["zip"])


def test_a_folder_that_cannot_be_written_is_one_clear_error(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="the package can't be written"):
        package(small, tmp_path / "file" / "out")


@pytest.mark.parametrize("output", ["bundles", "bundles/small_bundle", "bundles/small_bundle/docs"])
def test_a_package_never_replaces_or_enters_the_bundle(small, tmp_path, output):
    before = files_below(small)
    with pytest.raises(ValueError):
        package(small, tmp_path / output)
    assert files_below(small) == before and (small / "scripts").is_symlink()


def test_a_package_does_not_replace_another_folder_of_that_name(small, tmp_path):
    (tmp_path / "out" / "small_bundle").mkdir(parents=True)
    (tmp_path / "out" / "small_bundle" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="no package made earlier"):
        package(small, tmp_path / "out")
    assert list(files_below(tmp_path / "out")) == ["small_bundle/thesis.txt"]


def test_the_lists_name_every_zip_with_its_hashes(small, tmp_path):
    other = make_bundle(tmp_path, "another_bundle", "1.2.0")
    package_all([small, other], tmp_path / "out", "https://example.org/bundles/")
    zips = sorted((tmp_path / "out").glob("*.zip"))
    sums = (tmp_path / "out" / "SHA256SUMS").read_text(encoding="utf-8")
    assert sorted(sums.splitlines()) == sorted(f"{hashlib.sha256(z.read_bytes()).hexdigest()}  {z.name}" for z in zips)
    assert json.loads((tmp_path / "out" / "model_info.json").read_text(encoding="utf-8")) == {
        path.stem: {
            "checksum": hashlib.sha1(path.read_bytes()).hexdigest(),
            "source": f"https://example.org/bundles/{path.name}",
        }
        for path in zips
    }


def serve_list(monkeypatch, folder: Path) -> None:
    """Let MONAI find the folder's list wherever it asks for one."""
    serve_text(monkeypatch, (folder / "model_info.json").read_text(encoding="utf-8"))


def serve_text(monkeypatch, text: str) -> None:
    """Let MONAI find a text wherever it asks for a list."""
    answer = SimpleNamespace(text=text, raise_for_status=lambda: None)
    monkeypatch.setattr(monai_scripts, "has_requests", True)
    monkeypatch.setattr(monai_scripts, "requests", SimpleNamespace(get=lambda url, **_: answer))


def test_monai_reads_names_versions_and_addresses_from_the_list(small, tmp_path, monkeypatch):
    package_all([small, make_bundle(tmp_path, "small_bundle_2", "1.2.0")], tmp_path / "out", "https://example.org")
    serve_list(monkeypatch, tmp_path / "out")
    assert sorted(monai_scripts.get_all_bundles_list()) == [("small_bundle", "0.1.0"), ("small_bundle_2", "1.2.0")]
    found = monai_scripts.get_bundle_info("small_bundle", "0.1.0")
    assert found["browser_download_url"] == "https://example.org/small_bundle_v0.1.0.zip"


def test_monais_list_reader_cuts_a_name_at_v_and_the_readme_says_so(tmp_path, monkeypatch):
    package_all([make_bundle(tmp_path, "xray_generative_vdm")], tmp_path / "out", "https://example.org")
    serve_list(monkeypatch, tmp_path / "out")
    assert monai_scripts.get_all_bundles_list() == [("xray_generative", "dm_v0.1.0")]


def test_two_bundles_of_one_name_are_refused(small, tmp_path):
    other = make_bundle(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="more than one bundle is named small_bundle"):
        package_all([small, other], tmp_path / "out")


@pytest.fixture
def served(packaged, monkeypatch) -> Iterator[str]:
    """Address on this machine that the packaged bundle's zip is served from."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=packaged["zip"].parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{packaged['zip'].name}"
    server.shutdown()
    server.server_close()


def test_monai_downloads_the_zip_and_finds_a_bundle(packaged, served, tmp_path):
    command = [sys.executable, "-m", "monai.bundle", "download", "--name", NAME, "--url", served]
    done = subprocess.run([*command, "--bundle_dir", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / NAME) == files_below(packaged["folder"])


@pytest.mark.usefixtures("own_imports")
def test_monai_finds_a_bundle_on_a_release_page_and_loads_its_network(packaged, served, tmp_path, monkeypatch):
    asset = {"name": packaged["zip"].name, "browser_download_url": served}
    serve_text(monkeypatch, json.dumps([{"tag_name": "hosting_storage_v1", "assets": [asset]}]))
    page = {"repo": "owner/name", "tag": "hosting_storage_v1"}
    version = packaged["version"]
    assert monai_scripts.get_all_bundles_list(**page) == [(NAME, version)]
    assert monai_scripts.get_bundle_versions(NAME, **page) == {"latest_version": version, "all_versions": [version]}
    assert monai_scripts.get_bundle_info(NAME, **page) == asset
    monkeypatch.setattr(monai_scripts, "_get_git_release_url", lambda *args, **kwargs: served)
    where = {"bundle_dir": str(tmp_path), "args_file": {"bundle_root": str(tmp_path / NAME)}}
    release = {"source": "github", "repo": "owner/name/hosting_storage_v1"}
    network = monai_scripts.load(NAME, workflow_type="inference", progress=False, **release, **where)
    assert files_below(tmp_path / NAME).items() >= files_below(packaged["folder"]).items()
    assert code_of(network) == {tmp_path / NAME / "scripts"}
