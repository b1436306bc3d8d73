from __future__ import annotations

import csv
import io
import os
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import stand_in_engine
from ignite.engine import Engine, Events
from monai.data import DataLoader, MetaTensor
from monai.inferers import SimpleInferer
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose
from PIL import Image
from torch import nn

from scripts import handlers
from scripts.data.cohort import generated_cases, unfinished
from scripts.data.reading import LoadSequencesd
from scripts.engines import CohortEvaluator, ema_of
from scripts.files import sha256_of
from scripts.handlers import Calibration, ModelSaver, ProgressBar, TrainingCheckpoint
from scripts.tasks.anomaly import results as anomaly_results
from scripts.tasks.anomaly.results import CaseSaver
from scripts.tasks.generation import results as generation_results
from scripts.tasks.generation.results import GeneratedSaver, SampleSheet
from scripts.tasks.generation.transforms import SeededNoised, seeded_noise

AFFINE = np.array([[0.0, -2, 0, 90], [1.5, 0, 0, -20], [0, 0, -3, 7], [0, 0, 0, 1]])  # neither RAS nor isotropic
META = {"name": "a bundle", "version": "1.2.3", "task": "to find"}
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
    with open(output_dir / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


# --- CaseSaver


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
        "trust": f"{case['probability'].numpy().max():.4f}",
        "arithmetic": "float32",
        "bundle": "a bundle",
        "version": "1.2.3",
        "weights": sha256_of(tmp_path / "model.pt")[:12],
    }
    assert float(row["finding_ml"]) > 0.1


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
    monkeypatch.setattr(anomaly_results, "write_segmentation", lambda path, *args: made.append(args) or path.touch())
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
    monkeypatch.setattr(anomaly_results, "write_segmentation", no_space)
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


# --- GeneratedSaver


def generated(seed, **more):
    """What postprocessing makes of a generated image, wider than high."""
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 12, 10), np.uint8))
    return {"case": f"generated_{seed}", "seed": seed, "pred": pixels, **more}


def generated_saver(output_dir, meta=META):
    handler = GeneratedSaver(output_dir, meta, "none.pt", sampler="heun", steps=20)
    handler.start(stand_in_engine())
    return handler


def generated_rows(output_dir):
    with open(output_dir / "generated.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_png_and_nifti_of_a_generated_image_are_read_back_as_the_same_voxels(tmp_path):
    image = generated(5)
    generated_saver(tmp_path).save([image])
    assert sorted(os.listdir(tmp_path)) == ["generated.csv", "generated_5.nii.gz", "generated_5.png"]
    load = LoadSequencesd(keys="image", sequences=["cxr"], min_ndim=2, as_volume=True)
    read = [load({"image": str(tmp_path / f"generated_5{ending}")})["image"] for ending in (".png", ".nii.gz")]
    for scan in read:
        assert torch.equal(scan.as_tensor()[..., 0], image["pred"].float())
        np.testing.assert_array_equal(scan.affine, np.diag([-1, -1, 1, 1]))
    assert Image.open(tmp_path / "generated_5.png").size == (12, 10)  # width and height


def test_every_generated_file_says_what_it_is_which_bundle_made_it_and_from_which_seed(tmp_path):
    meta = {"name": "chest_xray_generative_vdm", "version": "10.20.30"}
    handler = generated_saver(tmp_path, meta)
    handler.save([generated(4294967295)])
    handler.draw_contact_sheet()
    for name in ("generated_4294967295", "contact_sheet"):
        text = Image.open(tmp_path / f"{name}.png").text
        assert text["Description"] == "Generated (synthetic) image, shows no patient"
        assert (text["Software"], text["Version"]) == (meta["name"], meta["version"]) and "4294967295" in text["Seed"]
    description = nib.load(tmp_path / "generated_4294967295.nii.gz").header["descrip"].item().decode()
    assert description == "Generated, shows no patient: chest_xray_generative_vdm 10.20.30, seed 4294967295"


def test_a_bundle_name_that_would_cut_the_mark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too long for the header"):
        generated_saver(tmp_path, {"name": "x" * 60, "version": "1.0"}).save([generated(0)])


def test_the_table_of_generated_images_holds_what_made_them(tmp_path):
    handler = generated_saver(tmp_path)
    handler.save([generated(0), generated(1, class_label=torch.tensor(3))])
    handler.save([generated(0)])
    first, second = generated_rows(tmp_path)
    assert (first["case"], first["label"], second["case"], second["label"]) == ("generated_1", "3", "generated_0", "")
    assert 0 <= float(first.pop("seconds")) < 60
    assert first == {
        "case": "generated_1",
        "seed": "1",
        "label": "3",
        "sampler": "heun",
        "steps": "20",
        "arithmetic": "float32",
        "bundle": "a bundle",
        "version": "1.2.3",
        "weights": "none",
    }


def test_a_batch_that_does_not_fit_on_the_disk_is_in_no_table_and_leaves_no_half_file(tmp_path, monkeypatch):
    handler = generated_saver(tmp_path)
    monkeypatch.setattr(generation_results.gzip, "compress", no_space)
    with pytest.raises(OSError, match="generated_0: can't write the results .*free some space"):
        handler.save([generated(0), generated(1)])
    assert os.listdir(tmp_path) == ["generated_0.png"]


def test_the_contact_sheet_shows_the_images_of_the_lowest_seeds_whoever_wrote_them(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        generation_results, "contact_sheet", lambda path, images, **k: shown.update(k, images=images) or path.touch()
    )
    monkeypatch.setattr(generation_results, "SHEET_SIZE", 2)
    generated_saver(tmp_path).draw_contact_sheet()
    assert not os.listdir(tmp_path)
    for seed in (10, 9, 2):
        generated_saver(tmp_path).save([generated(seed)])
    generated_saver(tmp_path).draw_contact_sheet()
    assert shown["titles"] == ["2", "9"] and shown["text"]["Seed"] == "2 to 9"
    assert torch.equal(shown["images"], torch.stack([generated(seed)["pred"] / 255 for seed in (2, 9)]))


def test_a_batch_that_fails_in_the_evaluator_is_told_image_by_image_and_done_by_the_next_run(tmp_path, monkeypatch):
    class Network(nn.Module):
        def forward(self, image):
            return image.sigmoid()

    def run_cohort(cases):
        noise = SeededNoised(keys="image", shape=(1, 4, 5))
        evaluator = CohortEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader([noise(case) for case in cases], batch_size=2),
            network=Network(),
            inferer=SimpleInferer(),
            postprocessing=Compose([lambda d: {**d, "pred": (255 * d["pred"]).round().byte()}]),
            val_handlers=[generated_saver(tmp_path)],
        )
        evaluator.run()
        return evaluator.failures

    cases = generated_cases(5, seed=7)
    monkeypatch.setattr(generation_results.gzip, "compress", no_space)
    assert list(run_cohort(cases[:2])) == ["generated_7", "generated_8"]
    monkeypatch.undo()
    run_cohort(cases[:2])
    left = unfinished(cases, tmp_path, table="generated.csv")
    assert left == cases[2:] and not run_cohort(left)
    assert [row["seed"] for row in generated_rows(tmp_path)] == ["7", "8", "9", "10", "11"]
    pixels = (255 * seeded_noise(9, (1, 4, 5)).sigmoid()).round().byte()
    np.testing.assert_array_equal(nib.load(tmp_path / "generated_9.nii.gz").dataobj[..., 0], pixels[0])


# --- TrainingCheckpoint


def engine_at(iteration=0, epoch_length=5):
    state = SimpleNamespace(iteration=iteration, epoch=0, epoch_length=epoch_length, device=torch.device("cpu"))
    return SimpleNamespace(state=state)


def trained_objects(steps=3, t_total=10):
    network = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    lr_scheduler = WarmupCosineSchedule(optimizer, warmup_steps=1, t_total=t_total)
    ema = ema_of(network)
    for _ in range(steps):
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        lr_scheduler.step()
        ema.update_parameters(network)
    return {"network": network, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler}


def test_a_checkpoint_brings_everything_back_and_is_safe_to_load(tmp_path):
    old, new, sampler = trained_objects(), trained_objects(steps=0), SimpleNamespace(start=0)
    TrainingCheckpoint(tmp_path / "a.ckpt", old, sampler).save(engine_at(13))
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)) == {*old, "iteration", "epoch_length"}
    engine = engine_at()
    TrainingCheckpoint(tmp_path / "a.ckpt", new, sampler).resume(engine)
    assert (engine.state.iteration, engine.state.epoch, sampler.start) == (13, 2, 13)
    assert torch.equal(old["network"].weight, new["network"].weight)
    assert torch.equal(old["ema"].module.weight, new["ema"].module.weight) and new["ema"].n_averaged == 3
    assert new["lr_scheduler"].get_last_lr() == old["lr_scheduler"].get_last_lr() != [0.1]
    assert new["optimizer"].param_groups[0]["lr"] == old["optimizer"].param_groups[0]["lr"]


def test_a_training_ends_when_it_is_told_now_and_not_when_it_was_begun_with(tmp_path):
    whole, new = trained_objects(5, t_total=5), trained_objects(0, t_total=5)
    TrainingCheckpoint(tmp_path / "a.ckpt", trained_objects(4, t_total=10), SimpleNamespace()).save(engine_at(4))
    TrainingCheckpoint(tmp_path / "a.ckpt", new, SimpleNamespace()).resume(engine_at())
    new["optimizer"].step()
    new["lr_scheduler"].step()
    assert new["lr_scheduler"].get_last_lr() == whole["lr_scheduler"].get_last_lr() == pytest.approx([0.0])


def test_without_a_checkpoint_training_begins_at_the_beginning(tmp_path):
    engine, sampler = engine_at(), SimpleNamespace(start=0)
    TrainingCheckpoint(tmp_path / "a.ckpt", {}, sampler).resume(engine)
    assert engine.state.iteration == engine.state.epoch == sampler.start == 0


def test_a_checkpoint_with_another_length_of_the_epochs_is_refused_before_anything_is_loaded(tmp_path):
    objects, sampler = trained_objects(steps=0), SimpleNamespace(start=0)
    TrainingCheckpoint(tmp_path / "a.ckpt", trained_objects(), sampler).save(engine_at(13))
    before, engine = objects["network"].weight.clone(), engine_at(epoch_length=7)
    with pytest.raises(ValueError, match="a.ckpt was saved with 5 iterations an epoch.*has 7.*--ckpt_dir"):
        TrainingCheckpoint(tmp_path / "a.ckpt", objects, sampler).resume(engine)
    assert torch.equal(objects["network"].weight, before) and engine.state.iteration == sampler.start == 0


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_a_checkpoint_that_holds_a_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch_length": 5, "iteration": 1, "network": Harmful()}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        TrainingCheckpoint(tmp_path / "a.ckpt", {}, None).resume(engine_at())
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_checkpoint_is_saved_every_few_minutes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(handlers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    handler, saved = TrainingCheckpoint(tmp_path / "a.ckpt", {}, None, minutes=2), []
    for clock[0] in range(0, 600, 50):
        handler(engine_at(clock[0]))
        if (tmp_path / "a.ckpt").is_file():
            saved.append(torch.load(tmp_path / "a.ckpt")["iteration"])
    assert sorted(set(saved)) == [150, 300, 450]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    handler = TrainingCheckpoint(tmp_path / "a.ckpt", {}, None)
    handler.save(engine_at(1))
    before = (tmp_path / "a.ckpt").read_bytes()

    def half(state, path):
        path.write_bytes(b"half")
        no_space()

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        handler.save(engine_at(2))
    assert os.listdir(tmp_path) == ["a.ckpt"] and (tmp_path / "a.ckpt").read_bytes() == before


# --- ModelSaver


def test_the_averaged_weights_are_written_in_half_precision_with_the_networks_names(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = ema_of(network)
    ema.update_parameters(network)
    nn.init.zeros_(network[0].weight)
    trainer = Engine(lambda engine, batch: None)
    ModelSaver(tmp_path / "models" / "model.pt", ema).attach(trainer)
    trainer.run([0, 1], max_epochs=1)

    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert list(state) == list(network.state_dict()) and os.listdir(tmp_path / "models") == ["model.pt"]
    assert all(type(value) is torch.Tensor for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    assert torch.equal(state["0.weight"], ema.module[0].weight.half()) and state["0.weight"].any()
    nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).load_state_dict(state, strict=True)
    assert ema.module[0].weight.dtype == torch.float32


# --- Calibration


class Calibrated(nn.Module):
    """A network with a weight and a threshold, which it measures as the weight times the mean of the batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, batches):
        self.threshold.copy_(self.weight * torch.stack([batch["image"].mean() for batch in batches]).mean())


def test_the_average_is_calibrated_every_few_epochs_and_at_the_end_and_shares_its_thresholds():
    network = Calibrated()
    ema = ema_of(network)
    loader = [{"image": torch.full((2,), 3.0)}, {"image": torch.full((2,), 5.0)}]
    seen = []

    def step(engine, batch):
        network.weight.data.fill_(engine.state.epoch)
        ema.update_parameters(network)  # copies the buffers, too

    trainer = Engine(step)
    Calibration(ema, network, loader, interval=2).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seen.append((ema.module.threshold.item(), network.threshold.item()))
    )
    trainer.run([0], max_epochs=5)
    thresholds = [own for own, _ in seen]
    assert [own == shared for own, shared in seen] == [True] * 5
    assert thresholds[0] == 0 and thresholds[1] == thresholds[2] != thresholds[3] != thresholds[4]
    assert thresholds[4] == pytest.approx(4 * ema.module.weight.item())


# --- SampleSheet


class Generative(nn.Module):
    """A network that keeps how it is called and whether it was in training then."""

    spatial_size, calls = (8, 8), []

    def schedule(self, times):
        return 10 * times - 5

    def forward(self, noise):
        self.calls.append((noise, self.training, torch.is_grad_enabled()))
        return noise.clamp(0, 1)


def test_samples_and_schedule_are_drawn_every_few_epochs_and_at_the_end_from_the_same_noise(tmp_path):
    network = Generative()
    ema = ema_of(network)
    ema.module.calls = calls = []
    trainer = Engine(lambda engine, batch: None)
    trainer.state.device = torch.device("cpu")
    SampleSheet(tmp_path / "log", ema, number=3, interval=2, seed=1).attach(trainer)
    trainer.run([0], max_epochs=5)
    names = [f"{what}_{epoch:04}.png" for what in ("samples", "schedule") for epoch in (2, 4, 5)]
    assert sorted(os.listdir(tmp_path / "log")) == names
    assert Image.open(tmp_path / "log" / "samples_0002.png").size[0] > 100
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert len(calls) == 3 and all(torch.equal(call[0], noise) and call[1:] == (False, False) for call in calls)
    assert ema.module.training, "the mode of the network is put back"


# --- ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [Terminal, io.StringIO])
def test_the_bar_counts_the_iterations_from_where_training_goes_on(monkeypatch, screen):
    monkeypatch.setattr(sys, "stderr", screen())
    trainer, bar = Engine(lambda engine, batch: {"loss": 0.25}), ProgressBar()
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", 5))
    trainer.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", 1))
    bar.attach(trainer)
    trainer.run(range(5), max_epochs=3)
    words = sys.stderr.getvalue()
    if screen is Terminal:
        assert "training" in words and "15/15" in words and "loss=0.2500" in words and bar.bar.initial == 5
    else:
        assert words == ""  # a log file gets no bar


def test_the_bar_shows_a_mean_that_follows_the_losses_slowly():
    bar, losses = ProgressBar(), [1.0, 3.0, 3.0]
    trainer = Engine(lambda engine, batch: {"loss": losses[engine.state.iteration - 1]})
    bar.attach(trainer)
    trainer.run(range(3), max_epochs=1)
    assert bar.mean["loss"] == pytest.approx(0.99 * (0.99 * 1 + 0.01 * 3) + 0.01 * 3)
