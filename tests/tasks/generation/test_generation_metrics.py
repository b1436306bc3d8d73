from __future__ import annotations

import logging

import pytest
import torch
from made_inputs import images_of
from stand_in import FewFeatures, StandInNet

from scripts.tasks.generation.metrics import (
    bits_of_each,
    bound_terms,
    feature_network,
    fourier_features,
    image_scores,
    membership,
    nearest,
    nearest_of_versions,
    pair_similarity,
)

# --- the bound


def test_the_bound_is_the_mean_over_all_images_and_the_sum_of_its_terms():
    images = images_of(5)
    terms = bound_terms(StandInNet(), images, batch_size=2)
    assert list(terms) == ["recon", "latent", "diffusion", "bits"]
    assert terms["recon"] == pytest.approx(images.mean().item() + 2) and terms["latent"] == 0.25
    assert terms["bits"] == pytest.approx(terms["recon"] + terms["latent"] + terms["diffusion"])
    assert bound_terms(StandInNet(), images, seed=0, batch_size=2) == terms
    assert bound_terms(StandInNet(), images, seed=1)["diffusion"] != terms["diffusion"]


def test_a_bernoulli_bound_has_its_floor_beside_it_and_is_compared_by_its_eight_bit_likelihood():
    terms = bound_terms(StandInNet(model="medvdm"), images_of(3))
    assert terms["floor"] == 0.5
    assert terms["recon_8bit"] == pytest.approx(terms["recon"] + 3)
    assert terms["bits"] == pytest.approx(terms["recon_8bit"] + terms["latent"] + terms["diffusion"])
    assert terms["total"] == pytest.approx(terms["bits"] - 3)


# --- the feature network


def test_the_feature_network_is_trained_once_and_then_read(tmp_path, caplog):
    training, held_out = images_of(16), images_of(4, seed=100)
    path = tmp_path / "out" / "feature_network.pt"
    with caplog.at_level(logging.INFO, logger="scripts.tasks.generation.metrics"):
        first = feature_network(path, training, held_out, iterations=2)
    assert f"{float(first.accuracy):.1%} of the orientations" in caplog.text
    before = path.read_bytes()
    second = feature_network(path, training[:0], held_out[:0])
    assert path.read_bytes() == before and torch.equal(second.features(held_out), first.features(held_out))


def test_a_file_with_other_weights_is_refused_with_its_name_and_the_mend(tmp_path):
    torch.save(StandInNet().state_dict(), tmp_path / "feature_network.pt")
    with pytest.raises(ValueError, match="feature_network.pt: not the weights .* delete it"):
        feature_network(tmp_path / "feature_network.pt", images_of(2), images_of(2))


# --- distances between sets of images


def test_inner_products_of_fourier_features_are_the_gaussian_kernel():
    images = images_of(12)
    features = fourier_features(images, number=20_000)(images)
    distances = torch.cdist(images.flatten(1), images.flatten(1))
    width = torch.pdist(images.flatten(1)).median()
    torch.testing.assert_close(features @ features.T, (-(distances**2) / (2 * width**2)).exp(), rtol=0, atol=0.03)


def test_scores_of_a_set_against_itself_shifted_are_known_exactly():
    real = 0.8 * images_of(40)
    scores = image_scores(real + 0.1, real, FewFeatures())
    assert scores["frechet"] == pytest.approx(4 * 0.01, abs=1e-6)  # equal covariances: the squared shift of the means
    flat = real.flatten(1)
    own = (flat @ flat.T - torch.diag(flat.square().sum(dim=1))).sum() / (40 * 39)
    unbiased = own - flat.mean(dim=0).square().sum()  # the same for both sets, beside the squared shift of 4,096 pixels
    shifted = flat + 0.1
    other = (shifted @ shifted.T - torch.diag(shifted.square().sum(dim=1))).sum() / (40 * 39)
    other_unbiased = other - shifted.mean(dim=0).square().sum()
    assert scores["mmd_mean"] == pytest.approx((4096 * 0.01 + unbiased + other_unbiased).item(), rel=1e-3)


def test_another_distribution_is_farther_by_every_measure_than_another_draw_of_the_same():
    real, fresh = images_of(60), images_of(60, seed=1000)
    same, other = image_scores(fresh, real, FewFeatures()), image_scores(fresh.flip(3) * 0.5, real, FewFeatures())
    assert same["mmd"] < other["mmd"] and same["frechet"] < other["frechet"] and same["mmd_mean"] < other["mmd_mean"]
    assert abs(same["mmd"]) < 0.1


def test_sets_of_different_size_are_cut_and_too_few_images_have_no_frechet_distance():
    scores = image_scores(images_of(9), images_of(4), FewFeatures())
    assert "frechet" not in scores and "ms_ssim" in scores
    assert scores["mmd"] == image_scores(images_of(4), images_of(4), FewFeatures())["mmd"]


def test_pairs_of_one_image_are_alike_and_pairs_of_many_are_not():
    images = images_of(10)
    alike = pair_similarity(images[:1].expand(5, -1, -1, -1), num_pairs=20)
    assert alike == pytest.approx(1, abs=1e-5)
    different = pair_similarity(images, num_pairs=20)
    assert different < 0.9 and different == pair_similarity(images, num_pairs=20)


def test_the_nearest_training_image_of_a_copy_is_the_original_at_no_distance():
    training = images_of(20)
    distances, numbers = nearest(torch.cat([training[7:8], training[3:4] + 0.05]), training)
    assert numbers.tolist() == [7, 3]
    assert distances.tolist() == pytest.approx([0, 0.05], abs=1e-5)


def test_a_mirrored_and_shifted_copy_is_found_by_the_nearest_of_ten_versions():
    training = images_of(20)
    copies = torch.cat([training[7:8].flip(2), training[3:4].roll(4, dims=3), training[5:6].flip(2).roll(-4, dims=2)])
    assert nearest(copies, training)[0].min() > 0.01
    assert nearest_of_versions(copies, training).tolist() == pytest.approx([0, 0, 0], abs=1e-5)


# --- membership


def test_the_bits_of_each_image_are_its_own_with_the_same_noise_for_all():
    images = images_of(4)
    bits = bits_of_each(StandInNet(), images, num_times=8)
    assert torch.equal(bits[2:3], bits_of_each(StandInNet(), images[2:3], num_times=8))
    torch.testing.assert_close(bits - bits[0], images.flatten(1).mean(dim=1) - images[0].mean())
    eight_bit = bits_of_each(StandInNet(model="medvdm"), images, num_times=8)
    torch.testing.assert_close(eight_bit, bits + 3)


def test_scores_that_tell_nothing_have_an_interval_around_a_half_and_perfect_ones_are_one():
    generator = torch.Generator().manual_seed(0)
    members, others = (torch.randn(200, generator=generator) for _ in range(2))
    told = membership(members, others)
    assert told["auroc_low"] < 0.5 < told["auroc_high"] and told["auroc_high"] - told["auroc_low"] < 0.15
    assert told["auroc"] == pytest.approx((members[:, None] > others).double().mean().item())
    assert membership(members + 20, others) == {"auroc": 1, "auroc_low": 1, "auroc_high": 1}
    ties = membership(torch.zeros(5), torch.zeros(5))
    assert ties["auroc"] == 0.5
