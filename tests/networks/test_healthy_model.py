from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from monai.inferers import SliceInferer
from monai.networks.layers import GaussianFilter
from torch import nn

from scripts.networks.healthy_model import (
    NUM_QUANTILES,
    Calibration,
    HealthyModel,
    HealthySettings,
    blur,
    evenness,
    local_texture,
    map_by_healing,
    reduced,
)

SIZE = (32, 32)


@dataclass(frozen=True)
class GreySettings(HealthySettings):
    heal_all: bool = False
    masked_map: bool = True


class Grey(HealthyModel):
    """A model to which grey is health: unlikeness is the distance from 0.5, in places of 4 x 4 pixels."""

    settings_class = GreySettings

    def examine(self, image):
        unlike = nn.functional.avg_pool2d((image - 0.5).abs().mean(dim=1, keepdim=True), 4)

        heal_all, masked_map = self.settings.heal_all, self.settings.masked_map

        def mapped(threshold):
            return map_by_healing(image, image, image, unlike > threshold, self.heal, self.settings, heal_all, masked_map)

        return unlike, reduced(unlike, self.settings.score), mapped

    def heal(self, image, mask):
        return torch.where(nn.functional.interpolate(mask.float(), image.shape[2:]).bool(), 0.5, image)


def model(in_channels=1, threshold=0.3, **kwargs):
    """A model whose threshold is ``threshold`` and whose most unlike healthy slice scores 0.2."""
    net = Grey(in_channels, SIZE, **{"min_foreground": 0.0, **kwargs}).eval()
    net.healthy_places.fill_(threshold)
    net.healthy_scores.fill_(0.2)
    return net


def images(count=2, channels=1, seed=0):
    """Grey slices with noise, and a black place of 8 x 8 pixels in the middle."""
    image = 0.5 + 0.1 * torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(seed))
    image[:, :, 12:20, 12:20] = 0
    return image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- what comes out


@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_channels_are_the_map_the_healed_sequences_and_the_abnormality(in_channels):
    net, image = model(in_channels, smoothing=0.0), images(channels=in_channels)
    output = net(image)
    assert output.shape == (2, in_channels + 2, *SIZE)
    middle = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    middle[:, :, 12:20, 12:20] = True
    assert torch.equal(output[:, 1:-1], torch.where(middle, 0.5, image))
    assert torch.equal(output[:, :1], 0.5 * middle)
    torch.testing.assert_close(output[:, -1], torch.full((2, *SIZE), 0.5 / (0.5 + 0.2)))


def test_the_map_is_the_mean_over_the_sequences():
    net, image = model(2, smoothing=0.0, threshold=0.1), images(channels=2)
    image[:, 1] = 0.5
    torch.testing.assert_close(net(image)[0, 0, 12:20, 12:20], torch.full((8, 8), 0.25))


def test_the_map_is_multiplied_with_the_smoothed_mask_if_asked():
    image = images()
    plain, masked = model(masked_map=False, heal_all=True)(image), model(heal_all=True)(image)
    mask = torch.zeros(2, 1, *SIZE)
    mask[:, :, 12:20, 12:20] = 1
    torch.testing.assert_close(plain[:, :1], (image - 0.5).abs())
    torch.testing.assert_close(masked[:, :1], plain[:, :1] * GaussianFilter(2, sigma=1.0)(mask))
    assert torch.equal(masked[:, 1:], plain[:, 1:])


def test_healing_all_heals_what_is_not_unlike_too():
    image = images()
    assert torch.equal(model(heal_all=True)(image)[:, 1:2], torch.full_like(image, 0.5))
    assert torch.equal(model(threshold=1.0)(image)[:, 1:2], image)


def test_the_residual_is_the_mean_over_all_healings_and_the_healed_slice_is_the_first():
    class Drawn(Grey):
        """Grey, but what it heals gets a grey level that is drawn."""

        def analyse(self, image):
            self.generator = self._generator(1)
            return super().analyse(image)

        def heal(self, image, mask):
            grey = torch.rand(1, generator=self.generator)
            return torch.where(nn.functional.interpolate(mask.float(), image.shape[2:]).bool(), grey, image)

    image = images()
    one, three = (Drawn(1, SIZE, min_foreground=0.0, smoothing=0.0, healings=n).eval() for n in (1, 3))
    for net in (one, three):
        net.healthy_places.fill_(0.3)
    greys = torch.rand(3, generator=one._generator(1))
    assert greys.std() > 0.05
    torch.testing.assert_close(three(image)[:, 0, 12:20, 12:20], greys.mean().expand(2, 8, 8))
    torch.testing.assert_close(one(image)[:, 0, 12:20, 12:20], greys[0].expand(2, 8, 8))
    assert torch.equal(three(image)[:, 1:2], one(image)[:, 1:2])


def test_only_slices_with_something_unlike_are_healed():
    net, image, healed = model(), images(4), []
    image[[0, 2]] = 0.5
    heal = net.heal
    net.heal = lambda image, mask: healed.append(image) or heal(image, mask)
    output = net(image)
    assert torch.equal(torch.cat(healed), image[[1, 3]])
    assert torch.equal(output[[0, 2], 1:2], image[[0, 2]]) and not output[[0, 2], 0].any()
    assert torch.equal(output[[1, 3]], net(image[[1, 3]]))


def test_what_is_found_counts_by_how_even_the_slice_is_there():
    image = images()
    plain, weighted = (model(masked_map=False, heal_all=True, texture_offset=offset) for offset in (0.0, 0.2))
    even = 0.2 / (0.2 + local_texture(image))
    assert torch.equal(evenness(image, 0.0), torch.ones_like(image))
    torch.testing.assert_close(evenness(image, 0.2), even)
    torch.testing.assert_close(weighted(image)[:, :1], plain(image)[:, :1] * even)
    assert torch.equal(weighted(image)[:, 1:], plain(image)[:, 1:])
    # the black place is even up to its edge, the noise around it is not
    assert (even[:, :, 12:20, 12:20] == 1).all() and even[:, :, :10].max() < 0.95


def test_an_even_region_has_no_texture_up_to_its_edge_and_noise_has():
    image = torch.rand(1, 2, 24, 24, generator=generator())
    image[:, :, 6:14, 6:14] = 0.3
    texture = local_texture(image)
    assert texture.shape == (1, 1, 24, 24) and not texture[:, :, 6:14, 6:14].any()
    outside = texture[0, 0, 16:, 16:]
    # uniform noise: neighbours differ by 1/3 along each axis; the least of nine windows is less
    assert outside.min() > 0.2 and 0.4 < outside.mean() < 2 / 3
    torch.testing.assert_close(local_texture(image.mT), texture.mT)
    torch.testing.assert_close(local_texture(image.flip(2, 3)), texture.flip(2, 3))
    torch.testing.assert_close(local_texture(3 * image + 1), 3 * texture)
    assert not local_texture(torch.full((1, 1, 8, 8), 0.7)).any()
    ramp = torch.arange(12.0).expand(1, 1, 12, 12) / 100
    torch.testing.assert_close(local_texture(ramp), torch.full((1, 1, 12, 12), 0.01))


@pytest.mark.parametrize("smoothing", [0.0, 1.0, 3.0])
def test_a_smoothed_mask_is_1_deep_inside_and_0_far_outside(smoothing):
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :16] = 1
    smooth = blur(mask, smoothing)[0, 0, 16]
    assert smooth.shape == (32,) and 0 <= smooth.min() and smooth.max() <= 1 + 1e-5
    assert smooth[4 if smoothing < 3 else 12] > 0.85 and smooth[-4] < 0.01
    if smoothing:
        assert smooth[15] + smooth[16] == pytest.approx(1, abs=1e-3) and 0.5 < smooth[15] < 0.9
    else:
        assert smooth.tolist() == [1.0] * 16 + [0.0] * 16


def test_the_score_is_of_the_most_unlike_place_or_of_the_mean():
    image = images()
    unlike = model().measure(image)[0]
    torch.testing.assert_close(model(score="max").measure(image)[1], unlike.amax(dim=(1, 2, 3)))
    torch.testing.assert_close(model(score="mean").measure(image)[1], unlike.mean(dim=(1, 2, 3)))
    for score in ("max", "mean"):
        net = model(score=score)
        torch.testing.assert_close(net(image)[:, -1, 0, 0], net.measure(image)[1] / (net.measure(image)[1] + 0.2))


@pytest.mark.parametrize("number", [1, 5, 30])
def test_one_in_forty_healthy_cases_is_called_abnormal_whatever_its_number_of_slices(number):
    healthy = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64) ** 2
    calibration = Calibration(healthy, healthy, HealthySettings())
    scores = torch.rand(4000, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    of_slices = [calibration.abnormality(case, HealthySettings()) for case in scores]
    of_cases = torch.tensor([calibration.of_case(case) for case in of_slices])
    assert (of_cases > 0.5).double().mean().item() == pytest.approx(0.025, abs=0.008)
    if number == 1:
        torch.testing.assert_close(of_cases, torch.cat(of_slices).float(), rtol=1e-3, atol=1e-4)


def test_slices_that_show_nothing_do_not_count_in_a_case():
    healthy = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64)
    calibration = Calibration(healthy, healthy, HealthySettings())
    slices = torch.tensor([0.3, 0.45, 0.4])
    assert calibration.of_case(torch.cat([slices, torch.zeros(20)])) == pytest.approx(calibration.of_case(slices))
    assert calibration.of_case(torch.zeros(3)) == 0


def test_a_model_that_was_never_calibrated_calls_everything_abnormal_but_a_score_of_zero():
    net = Grey(1, SIZE)
    assert net(images())[:, -1].min() > 0.999
    assert not net(torch.full((1, 1, *SIZE), 0.5))[:, -1].any()


# --- empty slices, volumes, odd inputs


@pytest.mark.parametrize("empty", [[0], [1, 2], [3]])
def test_empty_slices_give_zero_and_do_not_touch_the_others(empty):
    net, image = model(min_foreground=0.05), images(4)
    image[empty] = 0
    image[empty, :, :4, :10] = 1  # 4 % of the pixels
    full = [i for i in range(4) if i not in empty]
    output = net(image)
    assert not output[empty].any()
    assert torch.equal(output[full], net(image[full]))


def test_a_batch_of_empty_slices_asks_for_nothing():
    net = model(min_foreground=0.05)
    net.examine = None
    assert torch.equal(net(torch.zeros(3, 1, *SIZE)), torch.zeros(3, 3, *SIZE))


def test_the_foreground_level_says_what_is_empty():
    image = torch.full((1, 1, *SIZE), 0.2)
    assert model(min_foreground=0.05, foreground_level=0.1)(image).any()
    assert not model(min_foreground=0.05, foreground_level=0.3)(image).any()


def test_a_volume_gives_the_same_as_its_slices():
    net = model(2, min_foreground=0.05)
    volumes = images(10, channels=2).unflatten(0, (2, 5)).movedim(1, -1).contiguous()
    volumes[..., 3] = 0
    slices = torch.stack([net(volumes[..., i]) for i in range(5)], dim=-1)
    assert slices.shape == (2, 4, *SIZE, 5) and not slices[..., 3].any() and slices[..., 2].any()
    torch.testing.assert_close(net(volumes), slices)
    torch.testing.assert_close(SliceInferer(roi_size=SIZE, spatial_dim=2, sw_batch_size=3)(volumes, net), slices)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 48), (2, 1, 16, 32), (1, 32, 32), (32, 32), (1, 1, 16, 32, 5)])
def test_slices_of_another_shape_are_refused_with_the_expected_one(shape):
    with pytest.raises(ValueError, match=r"expected slices of shape \(1, 32, 32\), got"):
        model()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_input_is_left_alone_and_its_type_is_kept(dtype):
    image = images().to(dtype)
    before = image.clone()
    assert model()(image).dtype == dtype and torch.equal(image, before)


def test_no_gradient_is_recorded():
    image = images().requires_grad_()
    assert not model()(image).requires_grad and not model().measure(image)[1].requires_grad


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"score": "median"}, "unknown score 'median': choose max or mean"),
        ({"percentile": -1}, r"percentile must lie in 0 \.\.\. 100, got -1"),
        ({"percentile": 100.1}, "got 100.1"),
        ({"healings": 0}, "healings must be 1 or more, got 0"),
        ({"texture_offset": -0.1}, "texture_offset must be 0 or more, got -0.1"),
    ],
)
def test_impossible_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Grey(1, SIZE, **settings)


# --- calibration


def noise(count, seed=0):
    return torch.rand(count, 1, *SIZE, generator=generator(seed))


@pytest.mark.parametrize("percentile", [0, 50, 97.5, 99.9, 100])
def test_the_threshold_is_exceeded_by_the_rest_of_the_healthy_places(percentile):
    net, image = model(percentile=percentile), noise(100)
    net.calibrate([{"image": image}])
    above = (net.measure(image)[0] > net.calibration.threshold(net.settings)).float().mean()
    assert above.item() == pytest.approx(1 - percentile / 100, abs=0.0005)


@pytest.mark.parametrize("score", ["max", "mean"])
def test_a_slice_at_the_percentile_of_healthy_slices_gets_an_abnormality_of_a_half(score):
    net, image = model(score=score), noise(41)
    net.calibrate([{"image": image}])
    order = net.measure(image)[1].argsort()
    abnormality = net(image)[order, -1, 0, 0]
    assert abnormality[39].item() == pytest.approx(0.5, abs=1e-6)  # 97.5 % of 40
    assert (abnormality[:39] < 0.5).all() and abnormality[40] > 0.5


def test_calibration_does_not_depend_on_batches_and_skips_empty_slices():
    image = noise(10)
    image[3:5] = 0
    whole, parts, full = (model(min_foreground=0.05) for _ in range(3))
    whole.calibrate([{"image": image}])
    parts.calibrate({"image": part} for part in image.split(2))
    full.calibrate([{"image": image[[0, 1, 2, 5, 6, 7, 8, 9]].double()}])
    for buffer in ("healthy_places", "healthy_scores"):
        values = getattr(whole, buffer)
        assert (values.diff() >= 0).all() and values[-1] > values[0]
        assert torch.equal(getattr(parts, buffer), values) and torch.equal(getattr(full, buffer), values)


@pytest.mark.parametrize("training", [True, False])
def test_calibration_runs_in_evaluation_mode_and_goes_back(training):
    net, modes = model().train(training), []
    examine = net.examine
    net.examine = lambda image: modes.append(net.training) or examine(image)
    net.calibrate([{"image": noise(2)}])
    assert set(modes) == {False} and net.training == training


@pytest.mark.parametrize("batches", [[], [{"image": torch.zeros(3, 1, *SIZE)}]])
def test_calibration_without_foreground_is_refused(batches):
    with pytest.raises(ValueError, match="no held-out healthy slice shows any foreground"):
        model(min_foreground=0.05).calibrate(batches)


def test_half_precision_weights_carry_the_calibration():
    net, fresh = model(), Grey(1, SIZE)
    net.calibrate([{"image": noise(50)}])
    fresh.load_state_dict({k: v.half() for k, v in net.state_dict().items()}, strict=True)
    assert set(net.state_dict()) == {"healthy_places", "healthy_scores"} and fresh.healthy_places.dtype == torch.float32
    torch.testing.assert_close(fresh.healthy_places, net.healthy_places, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(fresh.healthy_scores, net.healthy_scores, rtol=1e-3, atol=1e-6)


# --- settings


def test_settings_are_frozen_and_a_configurations_list_is_as_good_as_a_tuple():
    settings = model().settings
    with pytest.raises(FrozenInstanceError):
        settings.healings = 3
    assert HealthySettings(score="max") == HealthySettings() and hash(settings) == hash(model().settings)


def test_a_network_with_other_settings_shares_the_weights_and_has_a_calibration_of_its_own():
    net, image = Grey(1, SIZE, min_foreground=0.0), images()
    net.part = nn.Linear(2, 2)
    net.calibrate([{"image": noise(5)}])
    before = net(image)
    other = net.with_settings(healings=2, score="mean")
    assert other.part is net.part and other.settings == replace(net.settings, healings=2, score="mean")
    assert net.settings.healings == 1 and torch.equal(other.healthy_scores, net.healthy_scores)
    other.calibrate([{"image": noise(5)}])
    assert not torch.equal(other.healthy_scores, net.healthy_scores) and torch.equal(net(image), before)
    with pytest.raises(ValueError, match="healings must be 1 or more, got 0"):
        net.with_settings(healings=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"texture_offset": 0.1}, "texture_offset 0.0, not 0.1"), ({"score": "mean"}, "score max, not mean")],
)
def test_quantiles_that_were_measured_with_other_settings_are_refused_until_they_are_measured_anew(changes, told, tmp_path):
    net, image = model(), images()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    other = net.with_settings(**changes)
    shipped = Grey(1, SIZE, min_foreground=0.0, calibrated_for={"texture_offset": 0.0, "score": "max"}, **changes)
    for call in (lambda: other(image), lambda: shipped(image), lambda: shipped.load_weights(tmp_path / "model.pt")):
        with pytest.raises(ValueError, match=f"measured with {told}: .*network.calibrate.*--recalibrate True"):
            call()
    other.calibrate([{"image": noise(3)}])
    shipped.load_weights(tmp_path / "model.pt", [{"image": noise(3)}])
    assert torch.equal(other(image), shipped(image)) and net(image).any()


def test_settings_that_no_quantile_depends_on_may_change():
    net = model(percentile=50.0, calibrated_for={"texture_offset": 0, "score": "max"})
    assert net.with_settings(percentile=90.0, healings=3, smoothing=0.0)(images()).any()
    assert net.calibration == Calibration(net.healthy_places, net.healthy_scores, net.settings)


def test_weights_are_loaded_for_inference(tmp_path):
    net, fresh = model(), Grey(1, SIZE)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    assert fresh.load_weights(tmp_path / "model.pt") is fresh and fresh.healthy_places.all() and not fresh.training
