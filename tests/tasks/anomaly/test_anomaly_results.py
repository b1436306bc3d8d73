from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import rows_of, stand_in_engine
from made_inputs import AFFINE, META, no_space
from monai.data import DataLoader, MetaTensor
from monai.inferers import SimpleInferer
from monai.transforms import Compose
from PIL import Image
from torch import nn

from scripts import results
from scripts.data.cohort import unfinished
from scripts.engines import CohortEvaluator
from scripts.files import sha256_of
from scripts.tasks.anomaly import results as anomaly_results
from scripts.tasks.anomaly.results import CaseSaver
from scripts.transforms import upright

LABELS = {"outputs": {"pred": {"channel_def": {"0": "background", "2": "edema", "1": "lesion"}}}}


def volume(channels, seed=0, dtype=np.float32):
    voxels = np.random.RandomState(seed).rand(channels, 4, 5, 6)
    return MetaTensor(torch.from_numpy((voxels if dtype == np.float32 else voxels > 0.8).astype(dtype)), AFFINE)


def finding(name="case1", seed=0):
    """What postprocessing makes of a case with two sequences."""
    return {
        "case": name,
        "image": volume(2, seed),
        "pred": volume(1, seed + 1, np.uint8),
        "map": volume(1, seed + 2),
        "healthy": volume(2, seed + 3),
        "probability": volume(1, seed + 4),
    }


def saver(output_dir, weights="none.pt", **kwargs):
    handler = CaseSaver(output_dir, META, weights, **kwargs)
    handler.start(stand_in_engine())
    return handler


def rows(output_dir):
    return rows_of(output_dir / "results.csv")


def test_the_files_hold_the_voxels_in_the_grid_of_the_scan(tmp_path):
    case = finding()
    saver(tmp_path).save(case)
    assert sorted(os.listdir(tmp_path)) == ["case1", "results.csv"]
    endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "overview.png", "seg.nii.gz")
    assert sorted(os.listdir(tmp_path / "case1")) == [f"case1_{ending}" for ending in endings]
    for key, ending, dtype in (
        ("pred", "seg", np.uint8),
        ("map", "map", np.float32),
        ("healthy", "healthy", np.float32),
    ):
        image = nib.load(tmp_path / "case1" / f"case1_{ending}.nii.gz")
        expected = case[key].numpy()
        np.testing.assert_array_equal(image.dataobj, np.moveaxis(expected, 0, -1) if key == "healthy" else expected[0])
        np.testing.assert_allclose(image.affine, AFFINE)
        assert image.get_data_dtype() == dtype and image.dataobj.slope == 1 and image.dataobj.inter == 0
    assert nib.load(tmp_path / "case1" / "case1_healthy.nii.gz").shape == (4, 5, 6, 2)


def test_a_further_score_of_the_slices_has_a_column_of_its_own(tmp_path):
    case = {**finding(), "one_sided": volume(1, 9)}
    saver(tmp_path, more_scores={"one_sided": lambda slices: float(slices.min()) * len(slices)}).save(case)
    (row,) = rows(tmp_path)
    slices = upright(case["one_sided"])[0].flatten(0, 1).amax(dim=0)
    assert float(row["one_sided"]) == pytest.approx(float(slices.min()) * len(slices), abs=1e-4)
    assert list(row).index("one_sided") == list(row).index("probability") + 1


def test_a_single_sequence_gives_3d_files(tmp_path):
    saver(tmp_path).save({**finding(), "image": volume(1), "healthy": volume(1)})
    assert nib.load(tmp_path / "case1" / "case1_healthy.nii.gz").shape == (4, 5, 6)


def test_the_picture_is_a_png_and_can_be_left_out(tmp_path):
    saver(tmp_path).save(finding())
    assert Image.open(tmp_path / "case1" / "case1_overview.png").format == "PNG"
    saver(tmp_path, picture=False).save(finding())
    assert not (tmp_path / "case1" / "case1_overview.png").exists()


def test_the_picture_shows_all_upright_with_the_label_and_the_channel_that_was_asked_for(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(anomaly_results, "overview", lambda path, **kwargs: shown.update(kwargs))
    case = {**finding(), "label": volume(1, dtype=np.uint8)}
    saver(tmp_path, channel=1).save(case)
    assert (shown.pop("title"), shown.pop("channel")) == ("case1", 1)
    assert shown.pop("region") is None and shown.pop("grey_range") is None
    names = {"image": "image", "healthy": "healthy", "label": "label", "anomaly_map": "map", "mask": "pred"}
    assert set(shown) == set(names)
    for name, key in names.items():
        stored = nib.Nifti1Image(np.moveaxis(case[key].numpy(), 0, -1), AFFINE)
        assert np.array_equal(np.moveaxis(shown[name].numpy(), 0, -1), np.asarray(nib.as_closest_canonical(stored).dataobj))


def test_the_row_holds_the_volume_in_ml_and_what_made_it(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    case = finding()
    saver(tmp_path / "out", tmp_path / "model.pt").save(case)
    (row,) = rows(tmp_path / "out")
    seconds = float(row.pop("seconds"))
    assert 0 <= seconds < 60 and row == {
        "case": "case1",
        "finding_ml": f"{case['pred'].numpy().sum() * 2 * 1.5 * 3 / 1000:.3f}",
        "score": f"{case['map'].numpy()[0].mean(axis=(0, 1)).max():.5f}",
        "probability": f"{case['probability'].numpy().max():.4f}",
        "arithmetic": "float32",
        "bundle": "a bundle",
        "version": "1.2.3",
        "weights": sha256_of(tmp_path / "model.pt")[:12],
    }
    assert float(row["finding_ml"]) > 0.1


def test_a_network_without_a_probability_has_a_column_of_what_it_has_in_its_place(tmp_path):
    case = finding()
    case["abnormality"] = case.pop("probability")
    saver(tmp_path, slice_score="abnormality").save(case)
    (row,) = rows(tmp_path)
    assert row["abnormality"] == f"{case['abnormality'].numpy().max():.4f}" and "probability" not in row


def test_a_table_in_which_the_probability_was_called_trust_is_gone_on_with(tmp_path):
    (tmp_path / "results.csv").write_text("case,finding_ml,score,trust,seconds\nold,1.0,0.1,0.9,2.0\n")
    saver(tmp_path).save(finding("new"))
    old, new = rows(tmp_path)
    assert (old["case"], old["probability"], new["case"]) == ("old", "0.9", "new") and "trust" not in old


def test_saving_a_case_again_replaces_its_files_and_its_row(tmp_path):
    handler = saver(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("a", 50)):
        handler.save(finding(name, seed))
    assert [row["case"] for row in rows(tmp_path)] == ["b", "a"]
    mask = finding("a", 50)["pred"][0].numpy()
    np.testing.assert_array_equal(nib.load(tmp_path / "a" / "a_seg.nii.gz").dataobj, mask)
    assert rows(tmp_path)[1]["finding_ml"] == f"{mask.sum() * 0.009:.3f}"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "results.csv"]


def test_the_results_of_another_kind_of_bundle_are_not_mixed_in(tmp_path):
    (tmp_path / "results.csv").write_text("case,frames\nold,10\n")
    with pytest.raises(ValueError, match=r"results\.csv: has the results of another kind of bundle; choose another"):
        saver(tmp_path).save(finding())


def test_the_table_of_a_version_with_fewer_columns_is_gone_on_with(tmp_path):
    saver(tmp_path).save(finding("a"))
    (old,) = rows(tmp_path)
    del old["arithmetic"]
    (tmp_path / "results.csv").write_text("\n".join(",".join(line) for line in (old.keys(), old.values())) + "\n")
    saver(tmp_path).save(finding("b"))
    assert rows(tmp_path)[0] == {**old, "arithmetic": ""} and rows(tmp_path)[1]["arithmetic"] == "float32"


def test_the_row_names_the_arithmetic_that_the_network_computed_in(tmp_path):
    handler = CaseSaver(tmp_path, META, "none.pt", picture=False)
    handler.start(stand_in_engine(amp=True))
    handler.save(finding())
    assert rows(tmp_path)[0]["arithmetic"] == "bfloat16"


def test_two_runs_write_the_same_bytes(tmp_path):
    for run in ("one", "two"):
        saver(tmp_path / run).save(finding())
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / run / "case1").iterdir()} for run in ("one", "two"))
    assert len(one) == 5 and one == two


def test_a_full_disk_leaves_no_half_case_and_is_told_with_the_folder_and_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(anomaly_results, "overview", no_space)
    with pytest.raises(OSError, match=r"case1: can't write.*\(No space left on device\); free some space.*--output_dir"):
        saver(tmp_path).save(finding())
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_earlier_results_of_the_case(tmp_path, monkeypatch):
    handler = saver(tmp_path)
    handler.save(finding())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    monkeypatch.setattr(anomaly_results, "overview", no_space)
    with pytest.raises(OSError):
        handler.save(finding(seed=50))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


def from_dicom(tmp_path):
    """A saver, and a case that was read from the folder of a DICOM series."""
    handler = CaseSaver(tmp_path / "out", {**META, "network_data_format": LABELS}, "none.pt", picture=False)
    handler.start(stand_in_engine())
    (tmp_path / "series").mkdir()
    case = finding()
    case["image"].meta["filename_or_obj"] = str(tmp_path / "series")
    return handler, case


def test_a_case_from_a_dicom_series_gets_a_dicom_segmentation_with_the_labels_of_the_bundle(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(results, "write_segmentation", lambda path, *args: made.append(args) or path.touch())
    handler, case = from_dicom(tmp_path)
    handler.save(case)
    endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "seg.dcm", "seg.nii.gz")
    assert sorted(os.listdir(tmp_path / "out" / "case1")) == [f"case1_{ending}" for ending in endings]
    assert made == [(str(tmp_path / "series"), case["pred"], ["lesion", "edema"], "a bundle", "1.2.3", "none")]


def test_a_series_that_can_have_no_dicom_segmentation_keeps_its_nifti_files_and_one_line_says_why(tmp_path, caplog):
    handler, case = from_dicom(tmp_path)
    handler.save(case)
    endings = ("files.csv", "healthy.nii.gz", "map.nii.gz", "seg.nii.gz")
    assert sorted(os.listdir(tmp_path / "out" / "case1")) == [f"case1_{ending}" for ending in endings]
    assert [row["case"] for row in rows(tmp_path / "out")] == ["case1"]
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("no case1_seg.dcm, the NIfTI files hold the results: ") and "no DICOM images" in line


def test_a_disk_that_fills_up_at_the_dicom_segmentation_leaves_no_half_case(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "write_segmentation", no_space)
    handler, case = from_dicom(tmp_path)
    with pytest.raises(OSError, match="free some space"):
        handler.save(case)
    assert os.listdir(tmp_path / "out") == []


def test_an_output_folder_that_cannot_be_made_ends_the_program_with_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(SystemExit) as error:
            saver(path)
        assert error.value.code.startswith(f"{path}: can't write there (") and "\n" not in error.value.code
        assert error.value.code.endswith("choose another --output_dir")


def evaluation(output_dir, cases, **kwargs):
    class Network(nn.Module):
        def forward(self, image):
            return image * 2

    def read(data):
        return {**data, "image": volume(2, data["seed"])}

    def finish(data):
        return {**data, **{k: v for k, v in finding(seed=data["seed"]).items() if k not in ("case", "image")}}

    return CohortEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([read(case) for case in cases], batch_size=1),
        network=Network(),
        inferer=SimpleInferer(),
        postprocessing=Compose([finish]),
        val_handlers=[CaseSaver(output_dir, META, "none.pt", **kwargs)],
    )


def test_an_evaluator_saves_every_case_and_a_second_run_finishes_those_that_failed(tmp_path, monkeypatch):
    cases = [{"case": name, "seed": 10 * i} for i, name in enumerate("abc")]
    overview = anomaly_results.overview
    monkeypatch.setattr(
        anomaly_results, "overview", lambda path, **k: (no_space if k["title"] == "b" else overview)(path, **k)
    )
    first = evaluation(tmp_path, cases)
    first.run()
    assert list(first.failures) == ["b"] and "free some space" in first.failures["b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "c", "results.csv"]

    monkeypatch.undo()
    left = unfinished(cases, tmp_path)
    assert left == [cases[1]]
    second = evaluation(tmp_path, left)
    second.run()
    assert not second.failures and [row["case"] for row in rows(tmp_path)] == ["a", "c", "b"]
    for case in cases:
        path = tmp_path / case["case"] / f"{case['case']}_seg.nii.gz"
        np.testing.assert_array_equal(nib.load(path).dataobj, finding(seed=case["seed"])["pred"][0])


def test_an_evaluator_ends_before_the_first_case_when_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    evaluator = evaluation(tmp_path / "file", [{"case": "a", "seed": 0}])
    with pytest.raises(SystemExit, match="can't write there"):
        evaluator.run()
    assert evaluator.state.iteration == 0


def test_the_table_says_which_sequences_were_there(tmp_path):
    case = finding()
    case["image"].meta["sequences"] = "t1,flair,t1ce<-flair"
    saver(tmp_path / "some").save(case)
    assert rows(tmp_path / "some")[0]["sequences"] == "t1,flair,t1ce<-flair"
    case["image"].meta["sequences"] = "CT"
    saver(tmp_path / "one").save(case)
    assert "sequences" not in rows(tmp_path / "one")[0], "a bundle of one sequence has nothing to tell"


def test_the_table_says_in_what_a_scan_is_unlike_the_training(tmp_path):
    case = finding()
    case["image"].meta |= {"unlike_training": "1.31", "unlike_in": "size, layout"}
    saver(tmp_path).save(case)
    (row,) = rows(tmp_path)
    assert (row["unlike_training"], row["unlike_in"]) == ("1.31", "size, layout")


def test_a_bundle_without_a_fingerprint_says_nothing_of_it(tmp_path):
    saver(tmp_path).save(finding())
    assert not {"unlike_training", "unlike_in"} & rows(tmp_path)[0].keys()
