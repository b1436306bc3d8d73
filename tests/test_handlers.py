from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from made_inputs import no_space
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from scripts import handlers
from scripts.engines import ema_of
from scripts.handlers import Calibration, ModelSaver, ProgressBar, TrainingCheckpoint
from scripts.networks.vq_autoencoder import SliceVQVAE

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
    assert list(state) == list(network.state_dict()) and sorted(os.listdir(tmp_path / "models")) == [
        "model.pt",
        "models_files.csv",
    ]
    assert all(type(value) is torch.Tensor for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    assert torch.equal(state["0.weight"], ema.module[0].weight.half()) and state["0.weight"].any()
    nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).load_state_dict(state, strict=True)
    assert ema.module[0].weight.dtype == torch.float32


def test_counts_that_half_precision_cannot_hold_are_written_in_full_and_load_strictly(tmp_path):
    network = SliceVQVAE(channels=(8, 16), num_embeddings=4)
    counts = network.quantizer.quantizer.ema_cluster_size
    counts.copy_(torch.tensor([70_000.0, 1.0, 0.1, 65_504.0]))
    ema = ema_of(network)
    ModelSaver(tmp_path / "model.pt", ema)(engine_at())
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    name = "quantizer.quantizer.ema_cluster_size"
    assert torch.equal(state[name], counts) and {v.dtype for k, v in state.items() if k != name} == {torch.float16}
    fresh = SliceVQVAE(channels=(8, 16), num_embeddings=4)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.quantizer.quantizer.ema_cluster_size, counts)


def test_weights_that_are_not_finite_are_refused_by_name_and_the_file_stays(tmp_path):
    ema, path = ema_of(nn.Linear(2, 1)), tmp_path / "model.pt"
    ModelSaver(path, ema)(engine_at())
    before, files = path.read_bytes(), os.listdir(tmp_path)
    ema.module.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="model.pt is not written: bias would hold .* --learning_rate"):
        ModelSaver(path, ema)(engine_at())
    assert path.read_bytes() == before and os.listdir(tmp_path) == files


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
