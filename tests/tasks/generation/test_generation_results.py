from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import rows_of, stand_in_engine
from ignite.engine import Engine
from made_inputs import META, no_space
from monai.data import DataLoader, MetaTensor
from monai.inferers import SimpleInferer
from monai.transforms import Compose
from PIL import Image
from stand_in import BrightAreCopies
from torch import nn

from scripts.data.cohort import generated_cases, unfinished
from scripts.data.reading import LoadSequencesd
from scripts.engines import CohortEvaluator, ema_of
from scripts.files import sha256_of
from scripts.inferers import RedrawingInferer
from scripts.tasks.generation import results as generation_results
from scripts.tasks.generation.results import GeneratedSaver, SampleSheet
from scripts.tasks.generation.transforms import SeededNoised, seeded_noise

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
    return rows_of(output_dir / "generated.csv")


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
        "copy_similarity": "",
        "redraws": "",
        "copy": "",
        "arithmetic": "float32",
        "bundle": "a bundle",
        "version": "1.2.3",
        "weights": "none",
    }


def test_the_table_tells_what_the_filter_against_copies_found_and_the_log_what_is_still_a_copy(tmp_path, caplog):
    def found(seed, similarity, redraws, copy):
        image = generated(seed)
        about = {"copy_similarity": similarity, "redraws": redraws, "copy": copy}
        return image | {"pred": MetaTensor(image["pred"], meta={k: torch.tensor(v) for k, v in about.items()})}

    generated_saver(tmp_path).save([found(0, 0.51239, 0, False), found(1, 0.9, 10, True)])
    rows = [[row[name] for name in ("copy_similarity", "redraws", "copy")] for row in generated_rows(tmp_path)]
    assert rows == [["0.5124", "0", "no"], ["0.9000", "10", "yes"]]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and "generated_1: looks like a copy of a training image still after 10 redraws" in warned[0]


def test_a_filter_beside_other_weights_than_it_was_shipped_for_is_told(tmp_path, caplog):
    weights = tmp_path / "own.pt"
    weights.write_bytes(b"own")
    for sha256, told in ((sha256_of(weights), False), ("0" * 64, True)):
        caplog.clear()
        engine = stand_in_engine()
        engine.inferer = RedrawingInferer(BrightAreCopies())
        GeneratedSaver(tmp_path, META | {"weights_sha256": sha256}, weights, "heun", 20).start(engine)
        assert ("not the weights that the copy filter was shipped for" in caplog.text) == told


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
    assert sorted(os.listdir(tmp_path / "log")) == sorted([*names, "log_files.csv"])
    assert Image.open(tmp_path / "log" / "samples_0002.png").size[0] > 100
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert len(calls) == 3 and all(torch.equal(call[0], noise) and call[1:] == (False, False) for call in calls)
    assert ema.module.training, "the mode of the network is put back"
