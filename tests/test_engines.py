from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Average
from monai.data import DataLoader, MetaTensor
from monai.engines.utils import IterationEvents
from monai.handlers import ROCAUC, LrScheduleHandler, ValidationHandler
from monai.inferers import SimpleInferer
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, RandFlipd, RandScaleIntensityd
from sklearn.metrics import roc_auc_score
from torch import nn

from scripts.data.cohort import CohortDataset
from scripts.data.slices import BalancedBatchSampler, SliceDataset
from scripts.engines import CohortEvaluator, DiffusionTrainer, DiffusionValidator, ema_of
from scripts.handlers import ModelSaver, ProgressBar, TrainingCheckpoint
from scripts.precision import hardware

BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_mri_anomaly_ddim"
CPU = torch.device("cpu")


class TinyNet(nn.Module):
    """The smallest network with the interface that the engines ask for."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.denoiser = nn.Conv2d(1, 1, 3, padding=1)
        self.classifier = nn.Linear(16, 1)

    def losses(self, image, class_label, generator):
        noise = torch.randn(image.shape, generator=generator)
        score = self.probability(image)
        return {
            "noise": nn.functional.mse_loss(self.denoiser(image + noise), noise),
            "classifier": nn.functional.binary_cross_entropy_with_logits(score, class_label.float()),
        }

    def probability(self, image):
        return self.classifier(image.flatten(1))[:, 0]


def slices(seed=0, augmentation=None):
    """16 healthy slices and 8 diseased ones, which are a little brighter."""
    images = torch.from_numpy(np.random.RandomState(seed).rand(24, 1, 4, 4).astype(np.float32))

    def transform(data):
        return [
            {"image": images[i] + 0.3 * (i % 3 == 0), "class_label": int(i % 3 == 0), "position": i / 24} for i in range(24)
        ]

    return SliceDataset([{"case": "a", "image": "a"}], transform, augmentation)


def training(folder, epochs=3, lr=0.02, network=None, seed=0, minutes=0, **kwargs):
    """A training with the handlers of train.json in the order of train.json, with validation, in fresh objects."""
    network = network or TinyNet()
    ema = ema_of(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    lr_scheduler = WarmupCosineSchedule(optimizer, warmup_steps=3, t_total=epochs * 5)
    augmentation = Compose([RandFlipd("image", 0.5, 0), RandScaleIntensityd("image", 0.5, 0.3)])
    dataset = slices(augmentation=augmentation)
    sampler = BalancedBatchSampler(dataset, batch_size=4, seed=seed)
    validator = DiffusionValidator(device=CPU, val_data_loader=DataLoader(slices(seed=1), batch_size=10), network=ema.module)
    objects = {"network": network, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    ours = {
        "scripts.handlers.TrainingCheckpoint": TrainingCheckpoint(folder / "a.ckpt", objects, sampler, minutes),
        "LrScheduleHandler": LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=False),
        "ValidationHandler": ValidationHandler(interval=1, validator=validator),
        "scripts.handlers.ModelSaver": ModelSaver(folder / "model.pt", ema),
        "scripts.handlers.ProgressBar": ProgressBar(),
    }
    configured = json.loads((BUNDLE / "configs" / "train.json").read_text(encoding="utf-8"))["train"]["handlers"]
    order = [handler["_target_"] for handler in configured if handler["_target_"] in ours]
    assert len(order) == len(ours)
    trainer = DiffusionTrainer(
        device=CPU,
        max_epochs=epochs,
        epoch_length=5,
        train_data_loader=DataLoader(dataset, batch_sampler=sampler),
        network=network,
        ema=ema,
        optimizer=optimizer,
        inferer=SimpleInferer(),
        seed=seed,
        train_handlers=[ours[name] for name in order],
        **kwargs,
    )
    history = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: history.append((engine.state.iteration, engine.state.output))
    )
    return SimpleNamespace(trainer=trainer, history=history, sampler=sampler, weights=folder / "model.pt", **objects)


def state_bytes(item):
    """All numbers of a state, byte for byte, by their path in it."""
    if isinstance(item, torch.Tensor):
        return {"": (item.dtype, tuple(item.shape), item.numpy().tobytes())}
    if not isinstance(item, (dict, list)):
        return {"": item}
    pairs = item.items() if isinstance(item, dict) else enumerate(item)
    return {f"/{key}{path}": value for key, part in pairs for path, value in state_bytes(part).items()}


# --- ema_of


def test_the_average_follows_the_weights_slowly_after_a_warm_up():
    network, values = nn.Linear(1, 1, bias=False), [1.0, 5.0, -2.0, 4.0, 4.5]
    ema = ema_of(network, decay=0.25)
    expected = values[0]  # the first update copies
    for n, value in enumerate(values):
        nn.init.constant_(network.weight, value)
        ema.update_parameters(network)
        if n:
            decay = min(0.25, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert (1 + 1) / (10 + 1) < 0.25 < (1 + 3) / (10 + 3)  # both sides of the bound were seen


def test_the_average_is_a_network_of_its_own():
    network = TinyNet()
    ema = ema_of(network)
    assert list(ema.module.state_dict()) == list(network.state_dict())
    nn.init.zeros_(network.classifier.weight)
    assert ema.module.classifier.weight.any()


# --- DiffusionTrainer


def test_the_loss_falls_and_the_average_follows(tmp_path):
    run = training(tmp_path, epochs=12, lr=0.05, minutes=5)
    before = state_bytes(run.ema.module.state_dict())
    run.trainer.run()
    losses = [output["loss"] for _, output in run.history]
    assert len(losses) == 60 and np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    assert before != state_bytes(run.ema.module.state_dict()) != state_bytes(run.network.state_dict())


def test_the_output_holds_the_losses_and_their_sum(tmp_path):
    run = training(tmp_path, epochs=1)
    run.trainer.run()
    for _, output in run.history:
        assert list(output) == ["loss", "noise", "classifier"]
        assert output["loss"] == pytest.approx(output["noise"] + output["classifier"])


def test_the_gradient_of_each_sub_network_is_bounded_by_itself(tmp_path):
    norms = []

    def look(engine):
        parts = engine.network.children()
        norms.append([nn.utils.get_total_norm([p.grad for p in part.parameters()]).item() for part in parts])

    for max_norm in (1e6, 0.01):
        run = training(tmp_path / str(max_norm), epochs=1, max_norm=max_norm)
        run.trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
        run.trainer.run()
    assert np.min(norms[:5]) > 0.01
    np.testing.assert_allclose(norms[5:], 0.01, rtol=1e-3)


def test_other_seeds_give_other_noise_and_the_same_seed_the_same(tmp_path):
    states = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        run = training(tmp_path / str(i), epochs=1, network=TinyNet(seed=0), seed=seed)
        run.trainer.run()
        states.append(state_bytes(run.network.state_dict()))
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training_before_it_spoils_the_weights(tmp_path, bad):
    class Breaking(TinyNet):
        def losses(self, image, class_label, generator):
            losses = super().losses(image, class_label, generator)
            self.calls = getattr(self, "calls", 0) + 1
            return {**losses, "noise": losses["noise"] * (bad if self.calls == 4 else 1)}

    run = training(tmp_path, network=Breaking())
    with pytest.raises(FloatingPointError, match=rf"at iteration 4 \(noise {bad}, classifier 0.*learning rate.*resume"):
        run.trainer.run()
    assert len(run.history) == 3 and all(p.isfinite().all() for p in run.network.parameters())


def test_a_gradient_that_is_no_number_ends_the_training_although_the_loss_is_one(tmp_path):
    class Breaking(TinyNet):
        def losses(self, image, class_label, generator):
            losses = super().losses(image, class_label, generator)
            return {**losses, "root": (0 * self.classifier.bias).sqrt().sum()}  # 0, with a gradient of 0 / 0

    run = training(tmp_path, network=Breaking())
    with pytest.raises(FloatingPointError, match="or its gradient is no longer finite at iteration 1"):
        run.trainer.run()
    assert all(p.isfinite().all() for p in run.network.parameters())


def test_another_objective_of_the_network_is_trained_and_validated_alone(tmp_path):
    class Staged(TinyNet):
        def first_stage(self, image, class_label, generator):
            return {"noise": self.losses(image, class_label, generator)["noise"]}

    network = Staged()
    before = state_bytes(network.classifier.state_dict())
    run = training(tmp_path, epochs=1, network=network, objective=network.first_stage)
    run.trainer.run()
    assert [list(output) for _, output in run.history] == [["loss", "noise"]] * 5
    assert state_bytes(network.classifier.state_dict()) == before

    loader = DataLoader(slices(), batch_size=24)
    validator = DiffusionValidator(device=CPU, val_data_loader=loader, network=network, objective=network.first_stage)
    validator.run()
    assert validator.state.output["noise"] > 0 and "classifier" not in validator.state.output


def test_a_network_without_a_classifier_is_validated_by_its_losses():
    class Plain(nn.Module):
        def losses(self, image, class_label, generator):
            return {"mean": image.mean()}

    loader = DataLoader(slices(), batch_size=24)
    validator = DiffusionValidator(device=CPU, val_data_loader=loader, network=Plain())
    validator.run()
    assert list(validator.state.output) == ["mean"]


# --- exact resume


class Killed(Exception):
    pass


def kill(*args):
    raise Killed


NAMES = ("network", "ema", "optimizer", "lr_scheduler")
MOMENTS = {
    "in the middle of an epoch": Events.ITERATION_COMPLETED(once=7),
    "at the end of an epoch": Events.EPOCH_COMPLETED(once=2),
    "before the first step of an epoch": Events.ITERATION_STARTED(once=6),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = training(tmp_path_factory.mktemp("straight"))
    run.trainer.run()
    return run


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_training_that_was_killed_and_resumed_ends_with_the_same_bytes(tmp_path, straight, moment):
    first = training(tmp_path)
    first.trainer.add_event_handler(moment, kill)
    with pytest.raises(Killed):
        first.trainer.run()
    torch.manual_seed(123)
    second = training(tmp_path, network=TinyNet(seed=9))
    second.trainer.run()
    assert 0 < len(first.history) < 15 and second.trainer.state.epoch == 3 and second.trainer.state.iteration == 15
    assert first.history + second.history == straight.history
    for name in NAMES:
        expected, resumed = (state_bytes(getattr(run, name).state_dict()) for run in (straight, second))
        assert resumed == expected, name
    assert state_bytes(torch.load(second.weights)) == state_bytes(torch.load(straight.weights))


def test_resuming_keeps_the_place_in_the_epoch(tmp_path):
    first = training(tmp_path)
    first.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), kill)
    with pytest.raises(Killed):
        first.trainer.run()
    second, ends = training(tmp_path), []
    second.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ends.append((e.state.epoch, e.state.iteration)))
    second.trainer.run()
    assert second.sampler.start == 7 and ends == [(2, 10), (3, 15)]


def test_a_finished_training_has_nothing_left_to_do(tmp_path):
    first, second = training(tmp_path), training(tmp_path, network=TinyNet(seed=9))
    first.trainer.run()
    second.trainer.run()
    assert second.history == []
    assert state_bytes(first.network.state_dict()) == state_bytes(second.network.state_dict())


# --- DiffusionValidator


def validation(network):
    return DiffusionValidator(
        device=CPU,
        val_data_loader=DataLoader(slices(seed=1), batch_size=10),
        network=network,
        key_val_metric={"auroc": ROCAUC(output_transform=lambda output: (output["score"], output["class_label"]))},
        additional_metrics={"noise": Average(output_transform=lambda output: output["noise"])},
    )


def test_validation_gives_the_same_figures_every_time_and_leaves_the_network_as_it_was():
    network = TinyNet().train()
    before, figures = state_bytes(network.state_dict()), []
    for evaluator in (validation(network),) * 2 + (validation(network),):
        torch.manual_seed(len(figures))
        evaluator.run()
        figures.append(dict(evaluator.state.metrics))
    assert figures[0] == figures[1] == figures[2] and set(figures[0]) == {"auroc", "noise"}
    assert state_bytes(network.state_dict()) == before and all(p.grad is None for p in network.parameters())


def test_roc_auc_is_that_of_all_slices():
    network, dataset = TinyNet(), slices(seed=1)
    evaluator = validation(network)
    evaluator.run()
    with torch.no_grad():
        scores = network.probability(torch.stack([item["image"] for item in dataset])).numpy()
    assert evaluator.state.metrics["auroc"] == pytest.approx(roc_auc_score(dataset.class_labels, scores))


def test_validation_sees_the_network_in_evaluation_mode():
    modes = []

    class Watched(TinyNet):
        def probability(self, image):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().probability(image)

    validation(Watched()).run()
    assert set(modes) == {(False, False)}


# --- CohortEvaluator


def cohort(names, handler=None):
    """An evaluator whose cases fail where their names say."""

    def read(data):
        if data["case"] == "unreadable":
            raise ValueError("unreadable.nii.gz: not\na scan")
        return {**data, "image": MetaTensor(torch.full((1, 4, 4, 4), float("network" in data["case"])))}

    class Network(nn.Module):
        def forward(self, image):
            if image.any():
                raise RuntimeError("out of memory")
            return image + 1

    def finish(data):
        if data["case"] == "postprocessing":
            raise ValueError("no foreground")
        return {**data, "pred": data["pred"] + 1}

    done = []

    def keep(engine):
        (batch,), (output,) = engine.state.batch, engine.state.output
        if batch["case"] == "handler":
            raise OSError(28, "No space left on device")
        done.append((batch["case"], output["pred"].unique().tolist()))

    evaluator = CohortEvaluator(
        device=CPU,
        val_data_loader=DataLoader(CohortDataset([{"case": name} for name in names], Compose([read])), batch_size=1),
        network=Network(),
        inferer=SimpleInferer(),
        postprocessing=Compose([finish]),
    )
    evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, handler or keep)
    return evaluator, done


FAILURES = {
    "unreadable": "unreadable.nii.gz: not a scan",
    "network": "out of memory",
    "postprocessing": "no foreground",
    "handler": "[Errno 28] No space left on device",
}


def test_cases_that_fail_anywhere_are_recorded_and_the_others_are_done(caplog):
    evaluator, done = cohort(["a", *FAILURES, "b"])
    outputs = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(len(engine.state.output)))
    evaluator.run()
    assert evaluator.failures == FAILURES and done == [("a", [2.0]), ("b", [2.0])]
    assert outputs == [1, 0, 0, 0, 0, 1]
    assert all(f"{case}: {failure}" in caplog.messages for case, failure in FAILURES.items())


def test_a_run_begins_with_a_line_about_hardware_and_arithmetic(caplog):
    evaluator, _ = cohort(["a"])
    evaluator.network.amp = True
    with caplog.at_level(logging.INFO, logger="scripts.engines"):
        evaluator.run()
    told = [record.getMessage() for record in caplog.records if record.name == "scripts.engines"]
    assert told[0] == f"computing on {hardware(CPU)}, in bfloat16"


def test_the_report_of_failures_ends_the_program_with_status_1_and_names_all():
    evaluator, _ = cohort(["a", *FAILURES])
    evaluator.run()
    with pytest.raises(SystemExit) as error:
        evaluator.report_failures()
    assert isinstance(error.value.code, str)  # Python prints it and ends with status 1
    lines = [f"{case}: {failure}" for case, failure in FAILURES.items()]
    assert error.value.code.splitlines() == ["4 case(s) failed:", *lines]


def test_failures_are_kept_in_a_table_until_a_run_has_none(tmp_path):
    evaluator, _ = cohort(["a", *FAILURES])
    evaluator.run()
    evaluator.failures["with, comma"] = 'a "quoted" reason'
    with pytest.raises(SystemExit, match="5 case"):
        evaluator.report_failures(tmp_path)
    with open(tmp_path / "failures.csv", newline="", encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert kept == [{"case": case, "reason": reason} for case, reason in evaluator.failures.items()]
    assert [path.name for path in tmp_path.iterdir()] == ["failures.csv"]
    cohort("ab")[0].report_failures(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failures_are_listed_although_their_table_can_not_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    evaluator, _ = cohort(["network"])
    evaluator.run()
    with pytest.raises(SystemExit, match="out of memory"):
        evaluator.report_failures(tmp_path / "file")
    assert "failures.csv: can't be written" in caplog.text


@pytest.mark.filterwarnings("ignore:`dataloader` is empty")
@pytest.mark.parametrize("names", ["ab", ""], ids=["two cases", "no case left"])
def test_nothing_is_reported_when_all_went_well(names):
    evaluator, done = cohort(names)
    evaluator.run()
    assert evaluator.report_failures() is None and len(done) == len(names)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_program_is_obeyed(error):
    def stop(engine):
        raise error

    evaluator, _ = cohort("ab", handler=stop)
    with pytest.raises(error):
        evaluator.run()
    assert evaluator.failures == {}
