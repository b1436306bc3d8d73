"""Settings that are misspelt or of another kind are refused, and texts that stand for a value become it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import BRAIN, BUNDLES, CARDIAC, CHEST, HEAD_CT, ROOT, make_head, run_forked, save_nifti
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS


def checked(bundle: Path, *names: str, own: dict | None = None, **overrides: object) -> ConfigParser:
    """The configurations after their check, which is the first that they initialize; nothing else of them is made."""
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in names])
    parser.read_meta(bundle / "configs" / "metadata.json")
    parser.update({**(own or {}), "bundle_root": str(bundle), **overrides})
    parser.parse()
    run_check(parser)
    return parser


def run_check(parser: ConfigParser) -> None:
    """Make the step of ``initialize`` that is the check, which may come after one that finds the code."""
    parser.get_parsed_content(f"initialize::{parser['initialize'].index({'_target_': 'scripts.settings.check'})}")


def configurations(bundle: Path) -> list[tuple[str, ...]]:
    """What the bundle's files are run in: inference and training, alone and with every file that goes with them."""
    names = sorted(path.stem for path in (bundle / "configs").glob("*.json") if path.stem != "metadata")
    with_train = [n for n in names if n.startswith(("train_", "multi_gpu_train"))]
    others = [n for n in names if n.startswith(("calibrate", "control", "evaluate", "multi_gpu_inference"))]
    return [("inference",), ("train",), *(("train", n) for n in with_train), *(("inference", n) for n in others)]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_every_configuration_passes_its_own_check_unchanged(bundle):
    for names in configurations(bundle):
        parser = ConfigParser()
        parser.read_config([bundle / "configs" / f"{name}.json" for name in names])
        parser["bundle_root"] = str(bundle)
        parser.parse()
        expected = {key: value for key, value in parser.config.items() if key != "_meta_"}
        found = {key: value for key, value in checked(bundle, *names).config.items() if key != "_meta_"}
        assert json.dumps(found) == json.dumps(expected), names


def test_every_configuration_that_initializes_begins_with_the_check():
    for path in sorted((ROOT / "bundles").glob("*/configs/*.json")):
        steps = json.loads(path.read_text(encoding="utf-8")).get("initialize", [{"_target_": "scripts.settings.check"}])
        assert {"_target_": "scripts.settings.check"} in steps[:2], path


@pytest.mark.parametrize(
    ("bundle", "config", "setting", "given", "wanted"),
    [
        (BRAIN, "inference", "gate", "false", False),
        (BRAIN, "inference", "gate", 0, False),
        (BRAIN, "inference", "overwrite", "true", True),
        (BRAIN, "inference", "amp", "false", False),
        (BRAIN, "inference", "handlers#0#picture", "false", False),
        (BRAIN, "inference", "num_steps", 1e1, 10),
        (BRAIN, "inference", "gradient_scale", 3, 3),
        (BRAIN, "inference", "threshold", 0.3, 0.3),
        (BRAIN, "inference", "output_dir", 2025, "2025"),
        (BRAIN, "inference", "output_dir", "$@bundle_root + '/2025'", "$@bundle_root + '/2025'"),
        (BRAIN, "inference", "device", "cpu", "cpu"),
        (BRAIN, "inference", "sequences", ("t1", "t2"), ("t1", "t2")),
        (BRAIN, "inference", "displayable_configs#num_steps", 20.0, 20.0),
        (BRAIN, "train", "checkpoint_minutes", 0.5, 0.5),
        (BRAIN, "train", "slice_labels", 2025, "2025"),
        (BRAIN, "train", "network_def#channels", [16, 32], [16, 32]),
        (BRAIN, "train", "train#trainer#max_epochs", 3, 3),
        (BRAIN, "train", "train#dataset#data", [{"image": "a"}], [{"image": "a"}]),
        (HEAD_CT, "inference", "class_folder", "null", None),
        (HEAD_CT, "inference", "framed_usual", "null", None),
        (CARDIAC, "inference", "ends", [0, 3], [0, 3]),
        (CHEST, "inference", "label", "null", None),
        (CHEST, "inference", "number", 1e1, 10),
    ],
)
def test_a_value_is_taken_as_what_it_stands_for(bundle, config, setting, given, wanted):
    value = checked(bundle, config, **{setting: given})[setting]
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("bundle", "config", "setting", "given", "told"),
    [
        (BRAIN, "inference", "treshold", 0.9, "--treshold: no such setting, is --threshold meant?"),
        (BRAIN, "inference", "epochs", 3, "--epochs: no such setting"),
        (BRAIN, "train", "learningrate", 1e-3, "is --learning_rate meant?"),
        (BRAIN, "inference", "dataset", "X", "--dataset: is a part of the configuration, and can't be X, is --dataset_dir"),
        (BRAIN, "inference", "gate", "maybe", "--gate: must be true or false, got maybe"),
        (BRAIN, "inference", "gate", "null", "--gate: must be true or false, got None"),
        (BRAIN, "inference", "num_steps", "many", "--num_steps: must be a number, got many"),
        (BRAIN, "inference", "num_steps", True, "--num_steps: must be a number, got True"),
        (BRAIN, "inference", "num_steps", 2.5, "--num_steps: must be a whole number, got 2.5"),
        (BRAIN, "inference", "num_steps", [1, 2], "--num_steps: a single value is wanted"),
        (BRAIN, "inference", "spatial_size", 64, "--spatial_size: must be a list such as [128, 128], got 64"),
        (BRAIN, "inference", "section", 3, "--section: must be a word such as all, got 3"),
        (BRAIN, "inference", "output_dir", 1e1, "--output_dir: must be a file or folder, got 10.0; write ./NAME"),
        (BRAIN, "inference", "output_dir", True, "--output_dir: must be a file or folder"),
        (HEAD_CT, "inference", "recalibrate", True, "--recalibrate: no such setting"),
    ],
)
def test_what_nothing_reads_or_is_of_another_kind_is_told(bundle, config, setting, given, told):
    with pytest.raises(RuntimeError) as error:
        checked(bundle, config, **{setting: given})
    assert told in str(error.value.__cause__)


def test_all_faults_are_told_at_once():
    with pytest.raises(RuntimeError) as error:
        checked(BRAIN, "inference", treshold=1, gate="x")
    assert "--treshold" in str(error.value.__cause__) and "; --gate" in str(error.value.__cause__)


def test_own_configurations_may_add_parts_and_whatever_they_read(tmp_path):
    own = {"factor": 2, "_note": "mine", "my_part": {"_target_": "Compose"}, "num_steps": "$5 * @factor", "extra": "$3"}
    checked(BRAIN, "inference", own=own)


def test_what_tracking_adds_passes(tmp_path):
    parser = ConfigParser()
    parser.read_config(BRAIN / "configs" / "train.json")
    parser.update({"bundle_root": str(BRAIN), "output_dir": str(tmp_path), "run_name": "mine"})
    ConfigWorkflow.patch_bundle_tracking(parser, DEFAULT_EXP_MGMT_SETTINGS["mlflow"])
    run_check(parser)


def test_a_workflow_in_python_takes_the_mended_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(BRAIN)
    save_nifti(tmp_path / "scans" / "p1.nii.gz", make_head(num_slices=1)[0])
    workflow = ConfigWorkflow(
        config_file="configs/inference.json",
        logging_file=False,
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "out"),
        amp="false",
        gate="false",
        num_steps=3.0,
    )
    workflow.initialize()
    assert workflow.network_def.amp is False and workflow.network_def.gate is False
    assert workflow.network_def.num_steps == 3 and workflow.parser.get_parsed_content("gate") is False


def test_a_run_does_nothing_with_a_misspelt_setting(tmp_path):
    paths = ("--dataset_dir", tmp_path, "--output_dir", tmp_path / "out")
    done = run_forked(BRAIN, "configs/inference.json", *paths, "--treshold", 0.9)
    assert done.returncode == 1 and "--treshold: no such setting, is --threshold meant?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_names_of_digits_and_numbers_in_powers_of_ten_are_taken(tmp_path):
    settings = ("--number", "1e0", "--num_steps", 1, "--spatial_size", "[16,16]", "--network_def#channels", "[32,32]")
    done = run_forked(CHEST, "configs/inference.json", "--output_dir", tmp_path / "2025", *settings)
    assert "must be" not in done.stderr and "float" not in done.stderr
