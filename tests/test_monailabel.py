"""MONAI Label, end to end: its sample app with the packaged bundles, the real server on the loopback interface.

MONAI Label needs older packages than the bundles, so the server runs in an environment of its own
(``requirements-monailabel.txt``), which ``make test`` makes; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, make_cine, make_ct_slice, make_head, save_nifti

from scripts.files import sha256_of
from scripts.release.package import package
from scripts.release.phantoms import draw_abdomen

ENVIRONMENT = Path(os.environ.get("MONAILABEL_VENV", ROOT / ".venv-monailabel")).absolute()
PYTHON = ENVIRONMENT / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "installed").is_file(),
    reason=f"MONAI Label's environment is not there, or could not be built: no {ENVIRONMENT / 'installed'}",
)

ONE_STEP, SIMPLEX = "brain_mri_anomaly_one_step", "brain_mri_anomaly_simplex"
COUNTERFACTUAL = "brain_mri_anomaly_counterfactual"
MRI, CT, CINE = "brain_mri_anomaly_ddim", "head_ct_anomaly_ldm", "cardiac_mri_deformable_diffusion"
ENSEMBLE, REGISTRATION = "brain_mri_segmentation_ensemble", "cardiac_mri_registration_diffusemorph"
ABDOMEN = "pancreas_ct_anomaly_ddim"
# what is asked for: few steps, to be quick, and every voxel in the mask that has anything in the map
QUICK = {
    MRI: {"num_steps": 2, "guidance_steps": 1, "threshold": 0.02, "min_volume": 0.0},
    ONE_STEP: {"threshold": 0.02, "min_volume": 0.0},
    SIMPLEX: {"num_steps": 2, "num_repeats": 1, "threshold": 0.02, "min_volume": 0.0},
    COUNTERFACTUAL: {"num_steps": 2, "threshold": 0.02, "min_volume": 0.0},
    CT: {"num_steps": 2, "percentile": 50.0, "threshold": 0.02},
    CINE: {"num_frames": 2, "min_motion": 0.1},
    ENSEMBLE: {"num_samples": 2, "num_steps": 2, "threshold": 0.02},
    REGISTRATION: {"refinement_steps": 2, "min_motion": 0.1},
    ABDOMEN: {"num_steps": 2, "guidance_steps": 1, "threshold": 0.001, "min_volume": 0.0},
}
# one setting of the network (frames leave the mask of what moves as it is), one of the postprocessing
CHANGES = {
    MRI: ({"gradient_scale": 60.0}, {"threshold": 0.5}),
    ONE_STEP: ({"num_steps": 3}, {"threshold": 0.5}),
    SIMPLEX: ({"num_steps": 3}, {"threshold": 0.5}),
    COUNTERFACTUAL: ({"guidance_scale": 9.0}, {"threshold": 0.5}),
    CT: ({"start_level": 200}, {"threshold": 0.9}),
    CINE: ({"min_motion": 0.5},),
    ENSEMBLE: ({"num_steps": 1}, {"threshold": 0.6}),
    REGISTRATION: ({"refinement_steps": 1}, {"min_motion": 0.5}),
    ABDOMEN: ({"gradient_scale": 30.0}, {"threshold": 0.5}),
}

# beside a CPU build of PyTorch, PyPI's torchvision lacks its own operators, which nobody here needs
OPERATORS = """import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""


def is_released(bundle: Path) -> bool:
    """Whether the bundle has the weights that its metadata state (``python -m scripts verify`` tells why not)."""
    weights = bundle / "models" / "model.pt"
    meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return weights.is_file() and sha256_of(weights) == meta["weights_sha256"]


BUNDLES = [bundle for bundle in sorted((ROOT / "bundles").iterdir()) if is_released(bundle)]
NAMES = [bundle.name for bundle in BUNDLES]
ASKED = [name for name in NAMES if name in QUICK]  # no scan goes into the one that generates


@dataclass
class Server:
    """A running server, its app and its data."""

    url: str
    app: Path
    studies: Path
    log: Path
    process: subprocess.Popen
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    def ask(self, path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        """Answer to a GET request, or to a POST request with data."""
        request = Request(self.url + path, data, {"Content-Type": kind})
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=600) as answer:
                return answer.read()
        except HTTPError as error:
            raise AssertionError(f"{path}: {error}\n{self.last_lines()}") from error

    def infer(self, name: str, image: str, **settings: object) -> np.ndarray:
        """Label of an image of the studies, which is not kept there; a repeated request is not sent again."""
        key = f"{name} {image} {json.dumps(settings, sort_keys=True)}"
        if key not in self.labels:
            form = urlencode({"params": json.dumps(settings)}).encode()
            answer = self.ask(f"/infer/{name}?image={image}&output=image", form, "application/x-www-form-urlencoded")
            path = self.app.parent / "answer.nii.gz"
            path.write_bytes(answer)
            label, scan = nib.load(path), nib.load(self.studies / f"{image}.nii.gz")
            assert label.shape == scan.shape[:3] and np.allclose(label.affine, scan.affine)
            assert label.get_data_dtype() == np.uint8
            self.labels[key] = np.asarray(label.dataobj)
        return self.labels[key]

    def train(self, name: str, **settings: object) -> None:
        """Train a bundle, and wait for the end."""
        self.ask(f"/train/{name}", json.dumps(settings).encode())
        for _ in range(600):
            task = json.loads(self.ask("/train/"))
            if task["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(1)
        assert task["status"] == "DONE", "\n".join(task["details"])
        self.labels.clear()

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def module(*args: object) -> list[str]:
    """Command that runs a module in MONAI Label's environment."""
    return [str(PYTHON), "-m", *map(str, args)]


def turned(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The same image stored with other axes, none of them where it was."""
    axes = nib.orientations.axcodes2ornt("ASL")
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), axes))


def save_studies(folder: Path) -> Path:
    """Made scans of brain MRI, one of them turned, with masks, and made CTs and a cine without, in the server's layout."""
    for seed in range(3):
        scan, mask = make_head(2, seed=seed)
        for path, data in ((folder, scan), (folder / "labels" / "final", mask)):
            image = nib.Nifti1Image(data, np.diag([2.0, 2.0, 5.0, 1.0]))
            image = turned(image) if seed == 1 else image
            save_nifti(path / f"mri_{seed}.nii.gz", np.asarray(image.dataobj), image.affine)
    grey = np.stack([make_ct_slice(seed) for seed in range(2)], axis=-1)
    save_nifti(folder / "ct_0.nii.gz", np.interp(grey, (0, 25, 255), (-1024, -25, 130)).astype(np.int16))
    save_nifti(folder / "cine_0.nii.gz", make_cine()[0])
    draw_abdomen(folder / "abdomen_0.nii.gz", num_slices=3)  # with the mask of its pancreas beside it
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """MONAI Label with every released bundle."""
    root = tmp_path_factory.mktemp("monailabel")
    env = {**os.environ, "PYTHONPATH": str(root)}  # its training task fails without this variable
    download = module("monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", root / "apps")
    subprocess.run(download, cwd=root, env=env, check=True, capture_output=True)
    app = root / "apps" / "monaibundle"
    (app / "main.py").write_text(OPERATORS + (app / "main.py").read_text(encoding="utf-8"))
    for bundle in BUNDLES:
        package(bundle, app / "model")
        set_up(app / "model" / bundle.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    conf = {"models": ",".join(NAMES), "zoo_source": "ngc", "sam2": "false"}  # the other sources need the network
    command = module("monailabel.main", "start_server", "--app", app, "--studies", save_studies(root / "studies"))
    command += [word for name, value in conf.items() for word in ("--conf", name, value)]
    with open(root / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [*command, "-i", "127.0.0.1", "-p", str(port)], cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT
        )
    running = Server(f"http://127.0.0.1:{port}", app, root / "studies", root / "log.txt", process)
    try:
        wait_for(running)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def set_up(bundle: Path) -> None:
    """Float32, as labels are compared, and two iterations an epoch, to be quick; a request can't ask for either."""
    for kind, settings in (("inference", {}), ("train", {"epoch_length": 2, "batch_size": 2})):
        path = bundle / "configs" / f"{kind}.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"amp": False} | settings))


def wait_for(server: Server) -> None:
    for _ in range(300):
        assert server.process.poll() is None, f"the server has stopped\n{server.last_lines()}"
        try:
            server.ask("/info/")
            return
        except URLError:
            time.sleep(1)
    raise AssertionError(f"the server does not answer\n{server.last_lines()}")


def run_bundle(server: Server, name: str, image: str, output: Path, **settings: object) -> np.ndarray:
    """Label that ``monai.bundle run`` makes in the same environment, with the packaged bundle."""
    folder, scan = server.app / "model" / name, server.studies / f"{image}.nii.gz"
    command = module("monai.bundle", "run", "--config_file", "configs/inference.json", "--dataset_dir", scan)
    command += ["--output_dir", str(output)]
    command += [word for setting, value in settings.items() for word in (f"--{setting}", str(value))]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.asarray(nib.load(output / image / f"{image}_seg.nii.gz").dataobj)


def scan_for(name: str) -> str:
    return {CT: "ct_0", CINE: "cine_0", REGISTRATION: "cine_0", ABDOMEN: "abdomen_0"}.get(name, "mri_1")


def test_info_names_every_packaged_bundle_with_its_settings_and_its_trainer(server):
    info = json.loads(server.ask("/info/"))
    assert MRI in NAMES and sorted(info["models"]) == sorted(info["trainers"]) == NAMES
    for bundle in BUNDLES:
        config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
        offered = info["models"][bundle.name]["config"]
        assert {name: config[name] for name in config.get("displayable_configs", ())}.items() <= offered.items()


@pytest.mark.parametrize("name", ASKED)
def test_the_label_is_that_of_monai_bundle_run_with_the_same_settings(server, name, tmp_path):
    label = server.infer(name, scan_for(name), **QUICK[name])
    assert label.any() and not label.all()
    assert np.array_equal(label, run_bundle(server, name, scan_for(name), tmp_path, **QUICK[name]))


@pytest.mark.parametrize("name", ASKED)
def test_settings_of_the_request_reach_the_network_and_the_postprocessing(server, name):
    label = server.infer(name, scan_for(name), **QUICK[name])
    for change in CHANGES[name]:
        assert not np.array_equal(label, server.infer(name, scan_for(name), **QUICK[name] | change)), change


def test_the_segmentation_comes_with_its_volume_and_on_request_with_where_it_is_uncertain(server):
    mask = server.infer(ENSEMBLE, "mri_1", **QUICK[ENSEMBLE])
    shown = server.infer(ENSEMBLE, "mri_1", **QUICK[ENSEMBLE], show="uncertainty")
    assert (shown == 2).any() and not (shown > 2).any()
    assert np.array_equal(shown == 1, (mask == 1) & (shown != 2))
    form = urlencode({"params": json.dumps(QUICK[ENSEMBLE])}).encode()
    answer = server.ask(f"/infer/{ENSEMBLE}?image=mri_1&output=json", form, "application/x-www-form-urlencoded")
    told = json.loads(answer)
    assert told["low_ml"] < told["ml"] < told["high_ml"] and told["look"] in (0, 1)
    assert told["ml"] == pytest.approx(mask.sum() * 0.02)


def test_training_on_labelled_volumes_gives_weights_that_the_next_request_uses(server, tmp_path):
    before = server.infer(MRI, "mri_1", **QUICK[MRI])
    weights = server.app / "model" / MRI / "models" / "model.pt"
    hashes = [sha256_of(weights)]
    for _ in range(2):  # whoever has labelled more volumes trains again
        server.train(MRI, max_epochs=1, val_split=0.34)
        hashes.append(sha256_of(weights))
    assert len(set(hashes)) == 3
    after = server.infer(MRI, "mri_1", **QUICK[MRI])
    assert not np.array_equal(before, after)
    assert np.array_equal(after, run_bundle(server, MRI, "mri_1", tmp_path, **QUICK[MRI]))
