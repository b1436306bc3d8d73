"""What headers say of where voxels lie: contradictions are told, units are brought to mm, nonsense is refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from made_inputs import load, noise

SFORM, QFORM = np.diag([2.0, 2, 5, 1]), np.diag([1.0, 1, 5, 1])


def save_header(path, sform=None, qform=None, unit="mm", **fields):
    image = nib.Nifti1Image(noise(16, 16, 8), None)
    image.header.set_xyzt_units(unit)
    if qform is not None:
        image.set_qform(qform, code=1)
    if sform is not None:
        image.set_sform(sform, code=2)
    if sform is None or qform is None:
        image.header["qform_code" if qform is None else "sform_code"] = 0
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return str(path)


@pytest.mark.parametrize(("sform", "taken"), [(SFORM, "qform"), (np.diag([-1.0, 1, 5, 1]), "sform")])
def test_of_two_affines_that_contradict_each_other_a_line_says_which_is_taken(tmp_path, caplog, sform, taken):
    image = load(save_header(tmp_path / "a.nii.gz", sform, QFORM))
    affine = sform if taken == "sform" else QFORM
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_allclose(image.meta["original_affine"], affine)
    (line,) = [line for line in caplog.messages if "contradict" in line]
    assert f"a.nii.gz: sform and qform contradict each other; the {taken} (" in line and "1 x 1 x 5 mm, RAS" in line


def test_an_affine_whose_code_says_that_it_is_none_is_never_taken(tmp_path, caplog):
    path = save_header(tmp_path / "a.nii.gz", SFORM, pixdim=[1, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(load(path).affine, SFORM)
    assert "contradict" not in caplog.text


def test_affines_that_agree_but_for_rounding_are_no_contradiction(tmp_path, caplog):
    load(save_header(tmp_path / "a.nii.gz", SFORM, SFORM * 1.0001))
    assert not caplog.messages


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3)])
def test_metres_and_microns_become_millimetres_with_a_warning(tmp_path, caplog, unit, factor):
    scale = np.diag([factor, factor, factor, 1])
    affine = np.array([[0, -2.0, 0, 10], [2, 0, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]])
    image = load(save_header(tmp_path / "a.nii.gz", scale @ affine, scale @ affine, unit))
    np.testing.assert_allclose(image.affine, affine, rtol=1e-5)
    np.testing.assert_allclose(image.meta["original_affine"], affine, rtol=1e-5)
    assert len(caplog.messages) == 1 and "voxels of 2 x 2 x 5 mm are taken" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unit": "meter", "sform": SFORM}, "40 m long.*unit in its header"),
        ({"unit": "micron", "sform": SFORM}, "0.04 mm long.*unit in its header"),
        ({"unit": "unknown", "sform": np.diag([0.002, 0.002, 0.005, 1])}, "0.04 mm long.*unit in its header"),
        ({"pixdim": 0, "qform_code": 1}, "no place or spacing"),
        ({"pixdim": np.nan, "qform_code": 0}, "no place or spacing"),
    ],
)
def test_lengths_that_no_scan_has_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=f"a.nii.gz: .*{words}"):
        load(save_header(tmp_path / "a.nii.gz", **settings))
