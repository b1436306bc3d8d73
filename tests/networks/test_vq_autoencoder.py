from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import VQVAE

from scripts.networks.vq_autoencoder import SliceVQVAE


def images(count=2):
    """Grey slices with noise, and a black place in the middle."""
    image = 0.5 + 0.1 * torch.rand(count, 1, 32, 32, generator=generator())
    image[:, :, 12:20, 12:20] = 0
    return image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quantised(seed=0, **kwargs):
    torch.manual_seed(seed)
    return SliceVQVAE(**{"channels": (8, 16), "num_embeddings": 16, "embedding_dim": 4, **kwargs})


def codebook(net):
    quantiser = net.quantizer.quantizer
    return {"entries": quantiser.embedding.weight, "sums": quantiser.ema_w, "sizes": quantiser.ema_cluster_size}


def copy_of(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def losses(net, image=None, seed=0):
    return net.losses(images(8) if image is None else image, generator(seed))


def is_latent(entries, latent):
    """Which entries (n, embedding_dim) of a codebook are among the latents (B, embedding_dim, h, w)."""
    return torch.cdist(entries, latent.movedim(1, -1).flatten(0, -2)).amin(dim=1) < 1e-3


def test_the_codebook_begins_with_latents():
    net = quantised().train()
    quantise, seen = net.quantize, []
    net.quantize = lambda latent: seen.append(copy_of(codebook(net))) or quantise(latent)
    latent = net.encode(images(8))
    assert not is_latent(codebook(net)["entries"], latent).any()
    losses(net)
    (book,) = seen
    assert is_latent(book["entries"], latent).all()
    assert torch.equal(book["sums"], book["entries"]) and (book["sizes"] == 1).all()
    assert is_latent(codebook(net)["entries"], latent).sum() >= 8  # the others have begun to follow their places


def test_an_entry_that_is_no_longer_used_comes_back_and_the_others_stay():
    net = quantised().train()
    for seed in range(3):
        losses(net, seed=seed)
    book = codebook(net)
    book["sizes"][3], book["sizes"][5:] = 0.04, book["sizes"][5:].clamp(min=0.06)
    book["entries"].data[3] = book["sums"][3] = 1000.0
    before = copy_of(book)
    net._revive_entries(net.encode(images(8)).detach(), generator())
    assert is_latent(book["entries"][3:4], net.encode(images(8))).all() and book["sizes"][3] == 1
    others = [i for i in range(16) if i != 3 and before["sizes"][i] >= 0.05]
    assert len(others) >= 11 and all(torch.equal(book[name][others], before[name][others]) for name in book)


def test_the_codebook_changes_in_training_and_not_in_evaluation():
    net = quantised()
    for training in (False, True):
        net.train(training)
        before = copy_of(codebook(net))
        losses(net)
        assert all(torch.equal(value, before[name]) != training for name, value in codebook(net).items())


@pytest.mark.parametrize("training", [True, False])
def test_the_losses_depend_on_the_generator_only(training):
    nets = [quantised().train(training) for _ in range(3)]
    torch.manual_seed(1)
    first = losses(nets[0])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = losses(nets[1]), losses(nets[2], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (first["commitment"] != other["commitment"]) == training  # the entries that were revived
    assert all(torch.equal(value, codebook(nets[1])[name]) for name, value in codebook(nets[0]).items())


def test_the_losses_are_those_of_the_restored_slices():
    net, image = quantised().eval(), images(8)
    values = losses(net)
    restored = net.decode_stage_2_outputs(net.encode(image))
    torch.testing.assert_close(values["reconstruction"], (restored - image).abs().mean())
    gap = torch.fft.fft2(restored, norm="ortho").abs() - torch.fft.fft2(image, norm="ortho").abs()
    torch.testing.assert_close(values["spectral"], (gap**2).mean(), rtol=1e-3, atol=1e-6)
    latent = net.encode(image)
    quantised_latent, _ = net.quantize(latent)
    torch.testing.assert_close(values["commitment"], 0.25 * ((quantised_latent - latent) ** 2).mean())
    heavy = losses(quantised(spectral_weight=3.0).eval())
    torch.testing.assert_close(heavy["spectral"], 3 * values["spectral"])


def test_the_losses_train_encoder_and_decoder_and_fall():
    net = quantised().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    totals = []
    for seed in range(25):
        values = losses(net, seed=seed)
        optimizer.zero_grad()
        sum(values.values()).backward()
        if seed == 0:
            assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
            assert codebook(net)["entries"].grad is None
        optimizer.step()
        totals.append(values["reconstruction"].item())
    assert totals[-1] < 0.5 * totals[0]


def test_the_autoencoder_and_nothing_else_is_taken_from_weights(tmp_path):
    source, net = quantised(seed=1), quantised()
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    weights = {"healthy_places": torch.full((3,), 3.0), "unet.weight": torch.zeros(3)}
    torch.save({**{f"autoencoder.{name}": value for name, value in state.items()}, **weights}, tmp_path / "model.pt")
    net.load_from(tmp_path / "model.pt")
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


def test_weights_without_an_autoencoder_are_refused(tmp_path):
    torch.save({"unet.weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        quantised().load_from(tmp_path / "model.pt")


def test_bfloat16_arithmetic_stays_close_to_float32():
    net, image = quantised().eval(), images(4)
    rough = copy.deepcopy(net)
    rough.amp = True
    latent = net.encode(image)
    restored, roughly = net.decode_stage_2_outputs(latent), rough.decode_stage_2_outputs(latent)
    assert rough.encode(image).dtype == roughly.dtype == torch.float32
    torch.testing.assert_close(rough.encode(image), latent, atol=0.03, rtol=0.03)
    torch.testing.assert_close(roughly, restored, atol=0.03, rtol=0.03)
    assert not torch.equal(rough.encode(image), latent)


def test_in_float32_the_autoencoder_is_monais():
    net, image = quantised().eval(), images()
    monais = VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        num_res_layers=2,
        num_res_channels=(8, 16),
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16,
        embedding_dim=4,
    ).eval()
    monais.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net.decode_stage_2_outputs(net.encode(image)), monais(image)[0])
        assert torch.equal(net.tokens(net.encode(image)), monais.index_quantize(image))


def test_the_latents_are_as_much_smaller_as_the_levels_halve():
    net, image = quantised(), torch.rand(1, 1, 32, 48)
    assert net.latent_size((32, 48)) == net.encode(image).shape[2:] == (8, 12)
