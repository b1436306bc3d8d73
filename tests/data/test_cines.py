from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import make_cine, save_nifti, save_turned
from made_inputs import SECTIONS, table, touch

from scripts.data.cines import LoadCined, assume_spacing, find_cines, lost_spacing
from scripts.data.cohort import CohortDataset
from scripts.data.sections import cine_section_of, section_of
from scripts.grids import Spacingd
from scripts.tasks.motion.metrics import volume_curve

# --- find_cines


def test_acdc_names_the_frames_in_its_info_file_and_counts_them_from_1(tmp_path):
    touch(tmp_path / "p1", "p1_4d.nii.gz", "p1_frame01_gt.nii.gz", "p1_frame12_gt.nii.gz", "p1_frame01.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: DCM\nNbFrame: 30\n")
    (case,) = find_cines(tmp_path)
    assert case == {
        "case": "p1",
        "patient": "p1",
        "group": "DCM",
        "image": str(tmp_path / "p1/p1_4d.nii.gz"),
        "frames": (0, 11),
        "label": str(tmp_path / "p1/p1_frame01_gt.nii.gz"),
        "target_label": str(tmp_path / "p1/p1_frame12_gt.nii.gz"),
    }
    assert find_cines(tmp_path / "p1") == [case]


@pytest.mark.parametrize(("encoding", "letters"), [("utf-8-sig", "é"), ("latin-1", "é"), ("utf-8", "é")])
def test_an_info_file_is_read_in_any_encoding(tmp_path, encoding, letters):
    touch(tmp_path / "p1", "p1_4d.nii.gz", "._p1_4d.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text(f"ED: 2\nES: 12\nGroup: {letters}\n", encoding=encoding)
    assert [case["frames"] for case in find_cines(tmp_path)] == [(1, 11)]


@pytest.mark.parametrize("text", ["ED: 0\nES: 12\n", "ES: 12\n", ""])
def test_an_info_file_without_the_frames_fails_its_patient_alone(tmp_path, text):
    touch(tmp_path, "p1/p1_4d.nii.gz", "p2/p2_4d.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text(text)
    (tmp_path / "p2" / "Info.cfg").write_text("ED: 1\nES: 2\n")
    bad, good = find_cines(tmp_path)
    assert bad["failure"].startswith(f"{tmp_path / 'p1' / 'Info.cfg'}: needs the lines") and "failure" not in good
    (item,) = CohortDataset([bad], lambda data: data)
    assert item is bad


def test_what_macos_and_windows_leave_in_a_folder_is_no_cine(tmp_path):
    touch(tmp_path, "p1/a_ed.nii.gz", "p1/a_es.nii.gz", "p1/._a_ed.nii.gz", "p1/._a_es.nii.gz", ".DS_Store", "Thumbs.db")
    touch(tmp_path, "._whole.nii.gz", "whole.nii.gz", "__MACOSX/p1/._a_ed.nii.gz")
    cases = find_cines(tmp_path)
    assert [case["case"] for case in cases] == ["p1", "whole"]
    assert cases[0]["image"] == [str(tmp_path / f"p1/a_{end}.nii.gz") for end in ("ed", "es")]


def test_an_ending_in_capitals_is_known_and_what_is_passed_over_is_told_in_a_line(tmp_path, caplog):
    touch(tmp_path, "p1/p1_ed2es.NII.GZ", "b.NII", "c.mha", "notes.txt", "p2/readme.txt")
    assert [case["case"] for case in find_cines(tmp_path)] == ["b", "p1"]
    (record,) = caplog.records
    assert record.message == f"{tmp_path}: left out, as they have none of the layouts of a cine: p2, c.mha"


def test_acdcs_own_file_given_alone_has_the_frames_and_labels_of_its_folder(tmp_path):
    touch(tmp_path / "p1", "p1_4d.nii.gz", "p1_frame01_gt.nii.gz", "p1_frame12_gt.nii.gz", "p1_frame01.nii.gz")
    (tmp_path / "p1" / "Info.cfg").write_text("ED: 1\nES: 12\n")
    (whole,) = find_cines(tmp_path / "p1")
    assert find_cines(tmp_path / "p1" / "p1_4d.nii.gz") == [{**whole, "case": "p1_4d"}] and whole["frames"] == (0, 11)
    (other,) = find_cines(tmp_path / "p1" / "p1_frame01.nii.gz")
    assert "frames" not in other and "label" not in other


def test_one_bad_info_file_fails_with_its_own_case_alone(tmp_path):
    for name, text in (("p1", "ED: 1\nES: 12\n"), ("p2", "ED: first\n")):
        touch(tmp_path / name, f"{name}_4d.nii.gz")
        (tmp_path / name / "Info.cfg").write_text(text)
    good, bad = find_cines(tmp_path)
    assert "failure" not in good and bad["failure"].startswith(f"{tmp_path / 'p2' / 'Info.cfg'}: needs the lines")
    with pytest.raises(ValueError, match=r"p2/Info\.cfg: needs the lines"):
        LoadCined("image")(bad)
    for path in (tmp_path / "p2", tmp_path / "p2" / "p2_4d.nii.gz"):
        with pytest.raises(ValueError, match=r"p2/Info\.cfg: needs the lines"):
            find_cines(path)


def test_cropped_acdc_goes_from_the_first_frame_to_the_last(tmp_path):
    touch(tmp_path / "p1", "p1_ed2es.nii.gz", "p1_ed_gt.nii.gz", "p1_es_gt.nii.gz")
    (tmp_path / "p1" / "info.json").write_text('{"frames": 12, "group": "MINF"}')
    (case,) = find_cines(tmp_path)
    assert case["group"] == "MINF"
    assert case["image"] == str(tmp_path / "p1/p1_ed2es.nii.gz") and "frames" not in case
    assert case["label"].endswith("p1_ed_gt.nii.gz") and case["target_label"].endswith("p1_es_gt.nii.gz")


def test_two_files_of_a_folder_are_the_ends_of_a_cine(tmp_path):
    touch(tmp_path, "a/x_ed.nii.gz", "a/x_es.nii", "a/x_ed_gt.nii.gz", "b/y_ed.nii.gz")
    (case,) = find_cines(tmp_path)
    assert case["case"] == "a" and case["image"] == [str(tmp_path / "a/x_ed.nii.gz"), str(tmp_path / "a/x_es.nii")]
    assert case["label"] == str(tmp_path / "a/x_ed_gt.nii.gz") and "target_label" not in case


def test_the_frames_of_a_file_in_a_flat_folder_are_left_to_be_found_unless_a_table_says_which(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii", "b_ed_gt.nii.gz")
    a, b = find_cines(tmp_path)
    assert a == {"case": "a", "patient": "a", "image": str(tmp_path / "a.nii.gz")}
    assert b["image"] == str(tmp_path / "b.nii") and b["label"] == str(tmp_path / "b_ed_gt.nii.gz")
    table(tmp_path / "frames.csv", ("file", "ed", "es"), ("a.nii.gz", 0, 7), ("b.nii", 3, 1))
    assert [case["frames"] for case in find_cines(tmp_path)] == [(0, 7), (3, 1)]
    assert find_cines(tmp_path / "a.nii.gz") == [{**a, "frames": (0, 7)}]
    (tmp_path / "frames.csv").unlink()
    assert find_cines(tmp_path / "a.nii.gz") == [a]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("file", "ed"), ("a.nii.gz", 0)], "needs the columns file, ed and es"),
        ([("file", "ed", "es"), ("a.nii.gz", 0, "last")], "line 2 needs two frame numbers"),
        ([("file", "ed", "es"), ("b.nii.gz", 0, 1)], "no row or no file for a.nii.gz, b.nii.gz"),
    ],
)
def test_a_bad_table_of_frames_is_refused_with_its_name(tmp_path, rows, words):
    touch(tmp_path, "a.nii.gz")
    table(tmp_path / "frames.csv", *rows)
    with pytest.raises(ValueError, match=rf"frames\.csv: .*{words}"):
        find_cines(tmp_path)


@pytest.mark.parametrize("names", [(), ("readme.txt",), ("p1/p1_4d.nii.gz",)])
def test_a_folder_without_cines_is_told_the_layouts(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(FileNotFoundError, match=r"no cine found; expected .*Info\.cfg.*_ed2es.*_es.*frames\.csv"):
        find_cines(tmp_path)


def test_patients_of_acdc_have_the_sections_that_its_groups_share_in_whatever_layout(tmp_path):
    for number in range(1, 101):
        name = f"patient{number:03}"
        if number % 2:
            touch(tmp_path / name, f"{name}_ed2es.nii.gz", f"{name}_ed_gt.nii.gz", f"{name}_es_gt.nii.gz")
        else:
            touch(tmp_path / name, f"{name}_4d.nii.gz")
            (tmp_path / name / "Info.cfg").write_text("ED: 1\nES: 12\n")
    found = {section: {case["case"] for case in find_cines(tmp_path, section)} for section in SECTIONS}
    for section, names in found.items():
        assert all(cine_section_of(name) == section for name in names)
    assert sum(map(len, found.values())) == 100


def test_other_cines_are_split_by_the_hash_of_their_patients(tmp_path):
    touch(tmp_path, *(f"p{i}.nii.gz" for i in range(60)), *(f"p{i}_ed_gt.nii.gz" for i in range(5)))
    for section in SECTIONS:
        found = find_cines(tmp_path, section)
        assert found and all(section_of(case["patient"]) == section for case in found)
    with pytest.raises(FileNotFoundError, match="none of the 60 cines falls into the test section"):
        find_cines(tmp_path, "test", fractions=(0.0, 0.1))


SPACING = np.diag([1.4, 1.4, 10.0, 1.0])

THIN = np.diag([1.0, 1.0, 10.0, 1.0])


@pytest.fixture
def path(tmp_path):
    """A 4-D file of five frames."""
    return save_nifti(tmp_path / "cine.nii.gz", make_cine()[0], SPACING)


# --- LoadCined


def test_the_ends_are_two_channels_and_all_frames_between_are_kept(path):
    cine = make_cine()[0]
    data = LoadCined("image")({"image": str(path)})
    assert data["image"].shape == (2, 32, 28, 6) and data["image"].dtype == torch.float32
    assert np.array_equal(data["image"].numpy(), np.moveaxis(cine[..., [0, -1]], -1, 0))
    assert np.array_equal(data["cine"].numpy(), np.moveaxis(cine, -1, 0))
    assert np.allclose(data["image"].affine, SPACING) and data["image"].meta["num_frames"] == 5


@pytest.mark.parametrize(("ends", "expected"), [((1, 3), [1, 2, 3]), ((3, 1), [3, 4, 0, 1]), ((0, 4), [0, 1, 2, 3, 4])])
def test_named_frames_are_the_ends_and_a_cycle_goes_on_at_its_start(path, ends, expected):
    data = LoadCined("image")({"image": path, "frames": ends})
    cine = np.moveaxis(make_cine()[0], -1, 0)[expected]
    assert np.array_equal(data["cine"].numpy(), cine) and np.array_equal(data["image"].numpy(), cine[[0, -1]])


def test_for_training_all_frames_are_the_image(path):
    data = LoadCined("image", frames="all")({"image": path, "frames": (1, 4)})
    assert np.array_equal(data["image"].numpy(), np.moveaxis(make_cine()[0], -1, 0)[1:]) and "cine" not in data


def beating(*shrunk):
    """A noisy beating heart, a frame for each share by which its cavity has shrunk, 0 at end-diastole."""
    cine = make_cine(11)[0][..., [round(10 * share) for share in shrunk]].astype(np.float32)
    return cine + np.random.default_rng(1).normal(0, 5, cine.shape).astype(np.float32)


CYCLE = (0, 0.2, 0.6, 1, 0.8, 0.5, 0.3, 0.1, 0)  # end-systole is frame 3


def test_in_a_file_of_the_whole_cycle_the_farthest_frame_is_end_systole_and_the_frames_between_end_there(tmp_path, caplog):
    cine = beating(*CYCLE)
    path = save_nifti(tmp_path / "a.nii.gz", cine, SPACING)
    with caplog.at_level(logging.WARNING):
        data = LoadCined("image")({"image": path})
    assert np.array_equal(data["cine"].numpy(), np.moveaxis(cine, -1, 0)[:4])
    assert np.array_equal(data["image"].numpy(), np.moveaxis(cine, -1, 0)[[0, 3]])
    meta = data["cine"].meta
    assert [meta[name] for name in ("source_frame", "target_frame", "frames_by", "num_frames")] == [0, 3, "found", 4]
    (told,) = caplog.messages
    assert told.startswith(f"{path}: frame 0 of 9 is taken as end-diastole and frame 3 as end-systole, the farthest from")
    assert LoadCined("image", frames="all")({"image": path})["image"].shape[0] == 4


def test_frames_that_are_given_are_taken_whatever_the_file_looks_like(tmp_path, caplog):
    path = save_nifti(tmp_path / "a.nii.gz", beating(*CYCLE), SPACING)
    for loader, data in ((LoadCined("image", ends=(0, 5)), {}), (LoadCined("image"), {"frames": (0, 5)})):
        meta = loader({"image": path, **data})["cine"].meta
        assert [meta[name] for name in ("source_frame", "target_frame", "frames_by")] == [0, 5, "given"]
    assert not caplog.messages


def test_a_file_called_ed2es_ends_with_end_systole_though_another_frame_is_farther(tmp_path, caplog):
    path = save_nifti(tmp_path / "p_ed2es.nii.gz", beating(0, 0.3, 0.7, 1, 0.4), SPACING)
    meta = LoadCined("image")({"image": path})["cine"].meta
    assert [meta[name] for name in ("source_frame", "target_frame", "frames_by")] == [0, 4, "file"] and not caplog.messages


def test_where_end_systole_is_not_clear_the_file_and_the_settings_are_named(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", beating(0, 0, 0, 0, 0, 0), SPACING)
    refuse(r'a\.nii\.gz: it can\'t be told .* by noise alone; give .* --ends "\[0,9\]", .*frames\.csv', path)


def test_two_files_are_source_and_target(tmp_path):
    cine = make_cine()[0]
    paths = [save_nifti(tmp_path / f"{i}.nii.gz", cine[..., i], SPACING) for i in (0, 4)]
    data = LoadCined("image")({"image": paths})
    assert np.array_equal(data["image"].numpy(), np.moveaxis(cine[..., [0, -1]], -1, 0))
    assert torch.equal(data["cine"], data["image"])


def test_the_time_between_two_frames_is_that_of_the_file(tmp_path):
    image = nib.Nifti1Image(make_cine()[0], SPACING)
    image.header.set_zooms((1.4, 1.4, 10, 40))
    image.header.set_xyzt_units("mm", "msec")
    nib.save(image, tmp_path / "a.nii.gz")
    assert LoadCined("image")({"image": tmp_path / "a.nii.gz"})["cine"].meta["time_step"] == pytest.approx(0.04)
    files = [save_nifti(tmp_path / f"{i}.nii.gz", make_cine()[0][..., i]) for i in (0, 4)]
    assert LoadCined("image")({"image": files})["cine"].meta["time_step"] == 0


def refuse(words, image, **data):
    with pytest.raises(ValueError, match=words) as error:
        LoadCined("image")({"image": image, **data})
    assert "\n" not in str(error.value)


def test_a_single_frame_is_refused(tmp_path):
    refuse(r"a\.nii\.gz: a single frame.*4-D file", save_nifti(tmp_path / "a.nii.gz", make_cine()[0][..., 0]))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ((0, 5), r"cine\.nii\.gz: frames 0 and 5 wanted, it has 0 to 4"),
        ((-1, 2), "frames -1 and 2 wanted"),
        ((2, 2), r"source and target are both frame 2; give two"),
    ],
)
def test_frames_that_are_no_two_of_the_file_are_refused(path, frames, words):
    refuse(words, path, frames=frames)


def test_equal_ends_are_refused(tmp_path):
    still = make_cine()[0][..., [0, 0]]
    refuse(r"a\.nii\.gz: source and target are the same", save_nifti(tmp_path / "a.nii.gz", still))
    there_and_back = save_nifti(tmp_path / "d.nii.gz", make_cine()[0][..., [0, 1, 0]])
    refuse(r"d\.nii\.gz: source and target are the same", there_and_back, frames=(0, 2))
    files = [save_nifti(tmp_path / name, still[..., 0]) for name in ("b.nii.gz", "c.nii.gz")]
    refuse(r"b\.nii\.gz: source and target are the same", files)


def test_a_target_on_another_grid_is_brought_to_that_of_the_source_and_one_of_another_place_is_refused(tmp_path):
    cine = make_cine()[0]
    one = save_nifti(tmp_path / "a.nii.gz", cine[..., 0], SPACING)
    image = LoadCined("image")({"image": [one, save_nifti(tmp_path / "b.nii.gz", cine[:-1, ..., 4], SPACING)]})["image"]
    assert np.array_equal(image[1, :-1].numpy(), cine[:-1, ..., 4])
    turned = save_turned(tmp_path, cine[..., 4], SPACING)[1]
    assert np.allclose(LoadCined("image")({"image": [one, turned]})["image"][1].numpy(), cine[..., 4], atol=1e-2)
    elsewhere = SPACING.copy()
    elsewhere[0, 3] = 30
    refuse(
        "c.nii.gz: its field of view does not meet that of .*a.nii.gz",
        [one, save_nifti(tmp_path / "c.nii.gz", cine[..., 4], elsewhere)],
    )


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="ends or all"):
        LoadCined("image", frames="some")
    with pytest.raises(ValueError, match="three lengths above 0"):
        LoadCined("image", assumed_spacing=(1.5, 10))


# --- spacing that the header has lost


@pytest.mark.parametrize(
    ("spacing", "shape", "expected"),
    [
        ((1.4, 1.4, 10), (100, 90, 7), (1.4, 1.4, 10)),
        ((1, 1, 10), (100, 90, 7), (1.5, 1.6, 10)),
        ((1.0, 1.3, 8), (100, 90, 7), (1.5, 1.3, 8)),
        ((10, 1, 1), (7, 100, 90), (10, 1.5, 1.6)),
        ((1, 1, 2), (100, 90, 40), (1, 1, 2)),
        ((1, 1, 1), (100, 90, 80), (1, 1, 1)),
        ((1, 1, 1), (100, 90, 7), (1.5, 1.6, 9)),
        ((1.4, 1.4, 0), (100, 90, 7), (1.4, 1.4, 9)),
        ((0, 0, 0), (100, 90, 7), (1.5, 1.6, 9)),
    ],
)
def test_only_a_lost_spacing_is_assumed(spacing, shape, expected):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (3, 4, 5)
    assert lost_spacing(affine, shape).any() == (expected != spacing)
    mended = assume_spacing(affine, shape, (1.5, 1.6, 9))
    assert np.allclose(np.diag(mended)[:3], expected) and np.array_equal(mended[:3, 3], (3, 4, 5))


def test_directions_are_kept_where_a_spacing_is_assumed():
    turned = np.array([[0, -1, 0, 9], [0.6, 0, 8, 0], [0.8, 0, -6, 0], [0, 0, 0, 1.0]])
    mended = assume_spacing(turned, (100, 90, 7), (1.5, 1.5, 9))
    assert np.allclose(mended[:3, :3], turned[:3, :3] * [1.5, 1.5, 1])


ASSUMED = (1.5, 1.5, 10.0)


def test_an_assumed_spacing_is_told_once_and_reaches_the_resampling_but_not_the_files_own_affine(tmp_path, caplog):
    path = save_nifti(tmp_path / "a_ed2es.nii.gz", make_cine()[0], THIN)
    with caplog.at_level(logging.WARNING):
        data = LoadCined("image", assumed_spacing=ASSUMED)({"image": path})
    (warning,) = caplog.messages
    assert f"{path}: lost spacing, 1 x 1 x 10 mm in the header; 1.5 x 1.5 x 10 mm is assumed" == warning
    assert np.allclose(np.diag(data["image"].affine), [1.5, 1.5, 10, 1])
    assert np.allclose(data["image"].meta["original_affine"], THIN)
    assert Spacingd("image", pixdim=[3.0, 3.0, 5.0])(data)["image"].shape == (2, 16, 14, 11)


@pytest.mark.parametrize("spacing", [(1, 1, 8), (1, 1, 1)])
def test_a_spacing_that_looks_lost_is_taken_as_it_is_unless_another_one_is_given(tmp_path, caplog, spacing):
    path = save_nifti(tmp_path / "a_ed2es.nii.gz", make_cine()[0], np.diag([*spacing, 1.0]))
    with caplog.at_level(logging.WARNING):
        cine = LoadCined("image")({"image": path})["cine"]
    assert np.allclose(np.diag(cine.affine)[:3], spacing)
    label = make_cine()[1][None, ..., 0]
    assert volume_curve(label, cine.affine) == pytest.approx([(label == 3).sum() * spacing[2] / 1000])
    (told,) = caplog.messages
    assert "mm in the header is taken as it is; if it was lost, give" in told and '--assumed_spacing "[1.5,1.5,10]"' in told


def test_a_header_with_zeros_is_read_with_the_assumed_spacing_alone(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", make_cine()[0], SPACING)
    image = nib.load(path)
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.header["pixdim"][1:4], image.header["vox_offset"] = 0, 352
    with open(tmp_path / "b.nii", "wb") as file:
        file.write(image.header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes("F"))
    refuse(r"b\.nii: a spacing of 0 mm in the header; give .*--assumed_spacing", tmp_path / "b.nii")
    data = LoadCined("image", assumed_spacing=ASSUMED)({"image": tmp_path / "b.nii"})
    assert np.allclose(np.diag(data["image"].affine), [1.5, 1.5, 10, 1])
    assert np.allclose(data["image"].meta["original_affine"], data["image"].affine)
    assert np.array_equal(data["cine"].numpy(), np.moveaxis(make_cine()[0], -1, 0))
