from __future__ import annotations

import pytest
import torch
from monai.inferers import SliceInferer, VQVAETransformerInferer
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from scripts.networks.anomaly_baselines import DenseVAENet, EvennessNet, TransformerAnomalyNet, VAEOneStepNet
from scripts.networks.healthy_model import blur, evenness

SIZE = (32, 32)  # of the slices; the transformer's tokens are 8 x 8
VAE = {"spatial_size": SIZE, "latent_size": 6, "channels": (8, 16), "min_foreground": 0.0}
TRANSFORMER = {
    "spatial_size": SIZE,
    "autoencoder": {"channels": (8, 16), "num_embeddings": 16, "embedding_dim": 4},
    "attn_layers_dim": 32,
    "attn_layers_depth": 2,
    "attn_layers_heads": 4,
    "min_foreground": 0.0,
}


def perturbed(net, spread):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return net.eval()


def vae(**kwargs):
    torch.manual_seed(0)
    return perturbed(DenseVAENet(**{**VAE, **kwargs}), 0.05)


def transformer(**kwargs):
    """A small transformer with random weights, the tokens of whose slices differ, and a threshold in their middle."""
    torch.manual_seed(0)
    net = perturbed(TransformerAnomalyNet(**{**TRANSFORMER, **kwargs}), 0.08)
    with torch.no_grad():
        latent = net.autoencoder.encode(images(8, net.in_channels)).movedim(1, -1).flatten(0, -2)
        net.autoencoder.quantizer.quantizer.embedding.weight.copy_(latent[torch.randperm(len(latent))[:16]])
        net.healthy_places.fill_(net.measure(images(channels=net.in_channels))[0].median())
        net.healthy_scores.fill_(2.0)
    return net


def images(count=2, channels=1, seed=0):
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def left_half(count=2):
    mask = torch.zeros(count, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    return mask


def losses(net, image=None, seed=0):
    return net.losses(images(4) if image is None else image, None, torch.Generator().manual_seed(seed))


BOTH = pytest.mark.parametrize("make", [vae, transformer])


# --- both, on the rails of the method that they are compared with


@BOTH
@pytest.mark.parametrize("in_channels", [1, 2])
def test_the_channels_are_the_map_the_healed_sequences_and_the_abnormality(make, in_channels):
    net, image = make(in_channels=in_channels), images(channels=in_channels)
    net.healthy_scores.fill_(0.3)
    output = net(image)
    assert output.shape == (2, in_channels + 2, *SIZE) and output.isfinite().all() and not output.requires_grad
    torch.testing.assert_close(output[:, -1, 0, 0], net.measure(image)[1] / (net.measure(image)[1] + 0.3))


@BOTH
def test_two_runs_give_the_same_bytes_whatever_the_global_state(make):
    net, image = make(), images()
    torch.manual_seed(1)
    first = net(image)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(net(image), first) and torch.equal(torch.get_rng_state(), before)


@BOTH
def test_the_result_of_a_slice_does_not_depend_on_its_batch(make):
    net, image = make(), images(3)
    single = torch.cat([net(one[None]) for one in image])
    torch.testing.assert_close(net(image), single, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(image.flip(0)), single.flip(0), atol=1e-5, rtol=1e-4)


@BOTH
def test_a_volume_gives_the_same_as_its_slices_and_empty_ones_give_zero(make):
    net = make(min_foreground=0.05)
    volumes = images(6).unflatten(0, (2, 3)).movedim(1, -1).contiguous()
    volumes[..., 1] = 0
    slices = torch.stack([net(volumes[..., i]) for i in range(3)], dim=-1)
    assert not slices[..., 1].any() and slices[..., 2].any()
    torch.testing.assert_close(net(volumes), slices, atol=1e-5, rtol=1e-4)
    inferred = SliceInferer(roi_size=SIZE, spatial_dim=2, sw_batch_size=4)(volumes, net)
    torch.testing.assert_close(inferred, slices, atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 16, 32), (1, 32, 32)])
def test_slices_of_another_shape_are_refused_with_the_expected_one(make, shape):
    with pytest.raises(ValueError, match=r"expected slices of shape \(1, 32, 32\), got"):
        make()(torch.zeros(shape))


@BOTH
def test_calibration_makes_the_percentile_of_healthy_slices_half_abnormal(make):
    net, image = make(), images(41)
    net.calibrate([{"image": part} for part in image.split(16)])
    share = (net.measure(image)[0] > net.calibration.threshold(net.settings)).float().mean()
    assert share.item() == pytest.approx(0.025, abs=0.002)
    order = net.measure(image)[1].argsort()
    abnormality = net(image)[order, -1, 0, 0]
    assert abnormality[39].item() == pytest.approx(0.5, abs=1e-4) and abnormality[0] < 0.5 < abnormality[40]


@BOTH
def test_the_weights_carry_everything_in_full_and_in_half_precision(make):
    net, image = make(), images(8)
    losses(net.train())  # moves the statistics of a batch norm
    net.eval().calibrate([{"image": image}])
    state = net.state_dict()
    full, half = (type(net)(**(VAE if make is vae else TRANSFORMER)).eval() for _ in range(2))
    full.load_state_dict(state, strict=True)
    assert torch.equal(full(image), net(image))
    half.load_state_dict({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    torch.testing.assert_close(half.measure(image[:1])[0].mean(), net.measure(image[:1])[0].mean(), rtol=0.05, atol=0.01)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_the_losses_depend_on_the_generator_only(make, training):
    first_net, again_net = make().train(training), make().train(training)
    torch.manual_seed(1)
    first = losses(first_net)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = losses(again_net)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(value.shape == () and torch.equal(again[name], value) for name, value in first.items())


@BOTH
def test_the_losses_fall_in_training(make):
    net = make().train()
    trained = net.transformer if make is transformer else net
    optimizer = torch.optim.Adam(trained.parameters(), lr=5e-3)
    totals = []
    for seed in range(30):
        total = sum(losses(net, seed=seed).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.85 * totals[0]


@BOTH
def test_bfloat16_networks_stay_close_to_float32(make):
    exact, rough, image = make(), make(amp=True), images()
    unlike = rough.measure(image)[0]
    assert unlike.dtype == torch.float32 and not torch.equal(unlike, exact.measure(image)[0])
    assert unlike.mean().item() == pytest.approx(exact.measure(image)[0].mean().item(), rel=0.05)
    assert rough(image).dtype == torch.float32 and all(v.isfinite() for v in losses(rough).values())


# --- the VAE


def test_the_map_of_the_vae_is_the_error_of_the_restored_slice():
    net, image = vae(in_channels=2), images(channels=2)
    restored = net.vae(image)[0]  # by MONAI's own forward, at the mean of the latents
    output = net(image)
    torch.testing.assert_close(output[:, 1:-1], restored)
    torch.testing.assert_close(output[:, :1], (image - restored).abs().mean(dim=1, keepdim=True))
    torch.testing.assert_close(net.measure(image)[0], output[:, :1])
    assert 0 <= restored.min() and restored.max() <= 1


def test_the_vae_is_told_apart_by_grey_level():
    restored = vae().vae(torch.stack([torch.full((1, *SIZE), level) for level in (0.2, 0.8)]))[0]
    assert (restored[0] - restored[1]).abs().mean() > 1e-3


def test_the_score_of_the_vae_is_the_mean_error_if_not_asked_for_the_largest():
    image = images()
    torch.testing.assert_close(vae().measure(image)[1], vae().measure(image)[0].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(vae(score="max").measure(image)[1], vae().measure(image)[0].amax(dim=(1, 2, 3)))
    largest = vae(score="max")
    score = largest.measure(image)[1]
    torch.testing.assert_close(largest(image)[:, -1, 0, 0], score / (score + 1e-12))  # it was never calibrated


def test_the_losses_of_the_vae_are_the_bounds_two_terms():
    net, image = vae(kl_weight=0.5), images(4)
    mean, log_variance = net.vae.distribution(image)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    posterior = Normal(mean, (log_variance / 2).exp())
    restored = net.vae.decoded(posterior.mean + posterior.stddev * noise)
    divergence = kl_divergence(Independent(posterior, 1), Independent(Normal(torch.zeros(4, 6), 1.0), 1))
    values = losses(net)
    assert set(values) == {"reconstruction", "kl"}
    torch.testing.assert_close(values["reconstruction"], (restored - image).abs().mean())
    torch.testing.assert_close(values["kl"], 0.5 * divergence.mean() / (32 * 32))
    assert not torch.equal(losses(net, seed=1)["reconstruction"], values["reconstruction"])


def test_the_losses_of_the_vae_train_every_weight():
    net = vae().train()
    sum(losses(net).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert sum(bool(p.grad.any()) for p in net.parameters()) > 0.9 * len(list(net.parameters()))


# --- the transformer


def tokens(net, image):
    return net.autoencoder.tokens(net.autoencoder.encode(image))


def healed(net, image, mask):
    return net.heal(tokens(net, image), mask, net._generator(1))


def tokens_of(net, image, mask):
    """Tokens (B, h, w) that healing would decode."""
    decoded, decode = [], net.autoencoder.decode_samples
    net.autoencoder.decode_samples = lambda tokens: decoded.append(tokens) or decode(tokens)
    healed(net, image, mask)
    net.autoencoder.decode_samples = decode
    return decoded[0]


def conditional(net, tokens, i):
    """Log-probabilities (B, num_embeddings + 1) of token i of sequences (B, n), from those before it."""
    begin = torch.full_like(tokens[:, :1], net.num_embeddings)
    return net.transformer(torch.cat([begin, tokens[:, :i]], dim=1))[:, -1].log_softmax(dim=1)


def test_the_tokens_are_those_of_the_autoencoder():
    net, image = transformer(), images()
    found = tokens(net, image)
    assert torch.equal(found, net.autoencoder.index_quantize(image)) and found.shape == (2, 8, 8)
    assert len(found.unique()) > 8


def test_the_likelihood_is_that_of_monai_and_of_a_loop_over_the_tokens():
    net, image = transformer(), images()
    unlike = net.measure(image)[0]
    likelihood = VQVAETransformerInferer().get_likelihood(image, net.autoencoder, net.transformer, net.ordering)
    torch.testing.assert_close(unlike, -likelihood[:, None], rtol=1e-4, atol=1e-5)
    drawn = tokens(net, image).flatten(1)
    looped = [-conditional(net, drawn, i).gather(1, drawn[:, i : i + 1]) for i in range(64)]
    torch.testing.assert_close(unlike, torch.cat(looped, dim=1).view(2, 1, 8, 8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(net, image)["likelihood"], unlike.mean())


def test_an_impossible_token_is_unlike_and_not_infinite():
    net, image = transformer(), images()
    with torch.no_grad():
        net.transformer.to_logits.bias[tokens(net, image)[0, 0, 0]] = -500.0
    assert net.measure(image)[0][0, 0, 0, 0] > 400 and net(image).isfinite().all()


def test_a_token_depends_on_those_before_it_only():
    net = transformer()
    first = tokens(net, images(1)).flatten(1)
    changed = first.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 16
    for i, same in ((5, True), (20, True), (21, False), (40, False)):
        assert torch.allclose(conditional(net, first, i), conditional(net, changed, i), atol=1e-6) == same


def test_an_empty_mask_gives_the_decoded_original():
    net, image = transformer(), images()
    expected = net.autoencoder.decode_samples(net.autoencoder.index_quantize(image))
    assert torch.equal(healed(net, image, torch.zeros_like(left_half())), expected)


def test_tokens_outside_the_mask_never_change_and_inside_they_do():
    net, image = transformer(), images()
    original, found = tokens(net, image), tokens_of(net, image, left_half())
    assert torch.equal(found[..., 4:], original[..., 4:])
    assert (found != original)[..., :4].float().mean() > 0.5


def test_a_full_mask_leaves_seeded_draws_alone():
    net, mask = transformer(), torch.ones_like(left_half())
    first, other = tokens_of(net, images(), mask), tokens_of(net, images(seed=1), mask)
    assert torch.equal(first, other) and torch.equal(first[0], first[1])
    assert not torch.equal(tokens_of(transformer(seed=1), images(), mask), first)


def test_a_token_is_drawn_given_the_healed_ones_before_it():
    net, image, mask = transformer(), images(), left_half()
    original, found = tokens(net, image).flatten(1), tokens_of(net, image, mask).flatten(1)
    noise = -torch.empty(64, 16).exponential_(generator=net._generator(1)).log()
    for i in range(64):
        drawn = (conditional(net, found, i)[:, :16] + noise[i]).argmax(dim=1)
        assert torch.equal(found[:, i], drawn if i % 8 < 4 else original[:, i])


def test_each_slice_has_its_own_mask():
    net, image = transformer(), images()
    mask = torch.zeros_like(left_half())
    mask[0, 0, 2, 3:5] = mask[1, 0, 6, 1] = True
    together = tokens_of(net, image, mask)
    for i in range(2):
        assert torch.equal(together[i], tokens_of(net, image[i : i + 1], mask[i : i + 1])[0])


def test_the_draws_follow_the_transformers_probabilities_and_never_begin_a_sequence():
    net, image, mask = transformer(), images(1), torch.zeros_like(left_half(1))
    mask[..., 0, 0] = True
    with torch.no_grad():
        net.transformer.to_logits.bias[16] = 2.0  # the token that begins a sequence, were it possible
    counts = torch.zeros(16)
    for seed in range(400):
        net.seed = seed
        counts[tokens_of(net, image, mask)[0, 0, 0]] += 1
    expected = conditional(net, torch.zeros(1, 1, dtype=torch.long), 0)[0, :16].softmax(dim=0)
    assert (counts / 400 - expected).abs().max() < 0.08 and counts.argmax() == expected.argmax()


def test_the_map_is_the_residual_within_the_smoothed_mask():
    net, image = transformer(), images()
    mask = net.measure(image)[0] > net.healthy_places[0]
    assert 0.3 < mask.float().mean() < 0.7
    found = healed(net, image, mask)
    torch.testing.assert_close(net(image)[:, 1:2], found)
    smooth = blur(nn.functional.interpolate(mask.float(), SIZE), net.settings.smoothing)
    torch.testing.assert_close(net(image)[:, :1], (image - found).abs() * smooth)


@BOTH
def test_what_is_found_counts_by_how_even_the_slice_is_there(make):
    plain, weighted, image = make(), make(texture_offset=0.1), images()
    image[..., :16] = 0.4
    even = evenness(image, 0.1)
    assert (even[..., :16] == 1).all() and even[..., 18:].max() < 0.5
    factor = even if make is vae else nn.functional.avg_pool2d(even, 4)
    torch.testing.assert_close(weighted.measure(image)[0], plain.measure(image)[0] * factor)


def test_the_control_finds_even_foreground_and_changes_nothing():
    net, image = EvennessNet(spatial_size=SIZE, texture_offset=0.1, score="mean", min_foreground=0.0).eval(), images()
    image[:, :, 4:12, 4:12], image[:, :, 20:28, 4:12] = 0.6, 0.0
    output = net(image)
    assert torch.equal(output[:, 1:2], image)
    assert (output[:, 0, 4:12, 4:12] == 1).all() and not output[:, 0, 20:28, 4:12].any()
    assert output[:, 0, :, 16:].max() < 0.5
    torch.testing.assert_close(net.measure(image)[1], output[:, 0].mean(dim=(1, 2)))
    torch.testing.assert_close(output[:, -1, 0, 0], net.measure(image)[1] / (net.measure(image)[1] + 0.5))


@pytest.mark.parametrize("amp", [True, False])
def test_the_loss_trains_the_transformer_and_leaves_the_autoencoder_alone(amp):
    net = transformer(amp=amp).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    losses(net)["likelihood"].backward()
    for name, parameter in net.named_parameters():
        used = name.startswith("transformer.") and "norm_cross_attn" not in name  # which MONAI makes and does not use
        assert (parameter.grad is not None) == used, name
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # the codebook, too


def test_bfloat16_arithmetic_finds_the_nearest_entries_in_full_precision():
    net = transformer(amp=True)
    latent, entries = net.autoencoder.encode(images()), net.autoencoder.quantizer.quantizer.embedding.weight
    nearest = torch.cdist(latent.movedim(1, -1).flatten(0, -2), entries).argmin(dim=1).view(2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tokens(net, images())
    assert (found == nearest).float().mean() > 0.99


def test_slices_need_not_be_square():
    net = TransformerAnomalyNet(**{**TRANSFORMER, "spatial_size": (32, 64)}).eval()
    image = torch.rand(1, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    assert net.measure(image)[0].shape == (1, 1, 8, 16) and net(image).shape == (1, 3, 32, 64)
    assert DenseVAENet(**{**VAE, "spatial_size": (32, 64)}).eval()(image).shape == (1, 3, 32, 64)


# --- VAEOneStepNet


def test_what_a_vae_restores_stands_for_the_healthy_slice_and_it_learns_as_the_other_does():
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.15
    net = perturbed(VAEOneStepNet(spatial_size=(32, 32), channels=(16, 32)), 0.05)
    output = net(image)
    torch.testing.assert_close(output[:, 1:-1], net.vae(image)[0])
    torch.testing.assert_close(output[:, :1], (image - output[:, 1:-1]).abs().sum(dim=1, keepdim=True))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    losses = net.losses(image, torch.zeros(2), generators[0])
    assert losses.keys() == {"reconstruction", "kl"} and not any(name.startswith("unet") for name in net.state_dict())
    torch.testing.assert_close(losses["kl"], net.vae.losses(image, generators[1])["kl"])
