"""Which headers are mended, and that left stays left and front stays front whatever the storage."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import BRAIN
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from scripts.data.headers import MendOrientationd

NOMINAL = torch.diag(torch.tensor([2.0, 2, 5, 1], dtype=torch.float64))


def volume(name="TCGA_CS_0001_t1.nii.gz", affine=NOMINAL):
    return MetaTensor(torch.rand(1, 4, 6, 3), affine=affine, meta={"filename_or_obj": f"/scans/{name}"})


def axes_of(image):
    return "".join(nib.aff2axcodes(image.affine.numpy()))


@pytest.mark.parametrize(
    ("name", "affine", "axcodes", "expected"),
    [
        ("TCGA_CS_0001_t1.nii.gz", NOMINAL, "auto", "RPS"),
        ("TCGA_CS_0001_t1.nii.gz", NOMINAL, "header", "RAS"),
        ("patient_t1.nii.gz", NOMINAL, "auto", "RAS"),
        ("TCGA_CS_0001_t1.nii.gz", NOMINAL @ torch.diag(torch.tensor([-1.0, -1, 1, 1])).double(), "auto", "LPS"),
        ("patient_t1.nii.gz", NOMINAL, "SLP", "SLP"),
    ],
)
def test_only_the_header_that_is_known_to_be_wrong_is_mended_unless_told(name, affine, axcodes, expected):
    image = volume(name, affine)
    mended = MendOrientationd("image", axcodes)({"image": image})["image"]
    assert axes_of(mended) == expected and torch.equal(mended.as_tensor(), image.as_tensor())
    assert np.allclose(np.linalg.norm(mended.affine[:3, :3], axis=0), [2, 2, 5])
    assert axes_of(image) == "".join(nib.aff2axcodes(affine.numpy())), "the input stays as it was"


def test_results_get_the_affine_of_the_file_back():
    transform = MendOrientationd("image")
    mended = transform({"image": volume()})
    assert torch.equal(transform.inverse(mended)["image"].affine, NOMINAL)


@pytest.mark.parametrize("axcodes", ["RAR", "RA", "front", "RASL", ""])
def test_codes_that_are_no_orientation_are_refused(axcodes):
    with pytest.raises(ValueError, match="header_axcodes"):
        MendOrientationd("image", axcodes)


@pytest.fixture(scope="module")
def preprocessing():
    parser = ConfigParser()
    parser.read_config(BRAIN / "configs" / "inference.json")
    parser["bundle_root"] = str(BRAIN)
    return parser.get_parsed_content("preprocessing")


def asymmetric_head():
    """A head (128, 128, 4), RAS, 2 x 2 x 5 mm, with a bright spot front left below the top."""
    x, y = np.mgrid[-1:1:128j, -1:1:128j]
    scan = np.repeat(80.0 * ((x / 0.6) ** 2 + (y / 0.8) ** 2 < 1)[..., None], 4, axis=2)
    scan[40:48, 90:98, 2] = 200
    return nib.Nifti1Image(scan.astype(np.int16), np.diag([2.0, 2, 5, 1]))


@pytest.mark.parametrize("stored", ["RAS", "LPS", "LAS", "ASL", "SPR"])
def test_left_and_right_and_front_and_back_survive_however_a_scan_is_stored(preprocessing, tmp_path, stored):
    ras = asymmetric_head()
    turn = nib.orientations.ornt_transform(nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(stored))
    scan = ras.as_reoriented(turn)
    nib.save(scan, tmp_path / "scan.nii.gz")
    data = preprocessing({"image": str(tmp_path / "scan.nii.gz")})
    # the network sees the patient's right at the end of the first axis, and the nose at the beginning of the second
    spot = (data["image"][1] > 0.9).nonzero().float().mean(dim=0).tolist()
    assert spot == pytest.approx([43.5, 127 - 93.5, 2.0])
    back = preprocessing.inverse({"image": data["image"]})["image"]
    assert np.allclose(back.affine, scan.affine)
    assert np.array_equal(back[1] > 0.9, np.asarray(scan.dataobj) == 200)
