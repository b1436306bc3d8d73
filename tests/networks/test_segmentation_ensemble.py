from __future__ import annotations

import pytest
import torch

from scripts.engines import _generator
from scripts.networks.segmentation_ensemble import SegmentationEnsembleNet

SMALL = {"spatial_size": (16, 16), "fold": 2, "channels": (16, 32), "num_samples": 3, "num_steps": 3}


def make_network(seed: int = 0, **settings: object) -> SegmentationEnsembleNet:
    torch.manual_seed(seed)
    network = SegmentationEnsembleNet(**SMALL | settings).eval()
    for parameter in network.parameters():  # the last layers begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.15


class Oracle(SegmentationEnsembleNet):
    """A network that knows the mask, whatever it sees."""

    truth: torch.Tensor

    def raw(self, x, image, t):
        known = self.truth.repeat(len(x) // len(self.truth), 1, 1, 1)
        if self.prediction_type == "sample":
            return 40 * known
        a = self._alpha(t)
        noise = (x - a.sqrt() * known) / (1 - a).sqrt()
        return noise if self.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * known


@pytest.mark.parametrize("solver", ["ddim", "multistep", "dpmpp_2m", "ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_a_network_that_knows_the_mask_gives_it_by_every_solver_and_prediction(image, solver, prediction_type):
    network = Oracle(**SMALL | {"solver": solver, "prediction_type": prediction_type, "num_steps": 10})
    network.truth = (torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2)) > 0.5) * 2.0 - 1
    mean, deviation = network(image)[:, :2].split(1, dim=1)
    tolerance = 0.02 if prediction_type == "sample" and solver != "multistep" else 0.1
    torch.testing.assert_close(mean, (network.truth + 1) / 2, rtol=0, atol=tolerance)
    assert deviation.max() < tolerance


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_the_masks_of_a_slice_do_not_depend_on_the_batch_nor_on_how_it_is_cut(image, solver):
    network = make_network(solver=solver)
    whole = network(image)
    torch.testing.assert_close(network(image[2:3]), whole[2:3], rtol=1e-4, atol=1e-5)
    for max_batch in (1, 2, 5):
        network.max_batch = max_batch
        torch.testing.assert_close(network(image), whole, rtol=1e-4, atol=1e-5)


def test_a_sample_is_the_same_however_many_are_drawn_and_another_with_another_seed(image):
    network = make_network()
    whole = network(image)
    network.num_samples = 2
    torch.testing.assert_close(network(image)[:, 3:], whole[:, 3:5], rtol=1e-4, atol=1e-5)
    network.seed = 1
    assert not torch.allclose(network(image)[:, 3:], whole[:, 3:5], atol=1e-3)
    assert not torch.allclose(whole[:, 3], whole[:, 4], atol=1e-3)


def test_a_volume_is_its_slices_and_mean_deviation_and_entropy_are_those_of_the_samples(image):
    network = make_network()
    output = network(image)
    assert output.shape == (4, 6, 16, 16) and output.min() >= 0 and output.max() <= 1
    torch.testing.assert_close(network(image.movedim(0, -1)[None])[0].movedim(-1, 0), output)
    samples = output[:, 3:]
    torch.testing.assert_close(output[:, 0], samples.mean(dim=1))
    torch.testing.assert_close(output[:, 1], samples.std(dim=1, correction=0), atol=1e-6, rtol=1e-4)
    p = output[:, 0].double()
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(output[:, 2].double(), entropy, atol=1e-5, rtol=1e-4)


def test_an_empty_slice_has_no_lesion_and_is_not_computed(image):
    image = image.clone()
    image[1] = 0
    output = make_network()(image)
    assert not output[1].any() and output[0].any()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_the_loss_is_small_for_a_network_that_knows_the_mask_and_has_a_gradient(image, prediction_type):
    label = (torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    oracle = Oracle(**SMALL | {"prediction_type": prediction_type})
    oracle.truth = 2 * label - 1
    assert sum(oracle.losses(image, label, _generator(0)).values()) < 1e-3
    network = make_network(prediction_type=prediction_type)
    loss = sum(network.losses(image, label, _generator(0)).values())
    assert loss > 0.1 and loss == sum(network.losses(image, label, _generator(0)).values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_levels_of_the_training_lie_high_where_the_noised_mask_says_little(image):
    network = make_network()
    seen = []
    network.raw = lambda x, image, t: seen.append(t) or torch.zeros_like(x)
    for n in range(100):
        network.losses(image, torch.zeros(4, 1, 16, 16), _generator(n))
    levels = torch.cat(seen).float()
    assert levels.mean() == pytest.approx(800, abs=30)  # of T·u^0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"prediction_type": "score"}, "unknown prediction_type"),
        ({"spatial_size": (18, 16)}, "multiples of 4"),
        ({"num_samples": 0}, "num_samples must lie in 1"),
        ({"max_batch": 0}, "max_batch must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationEnsembleNet(**SMALL | settings)


def test_the_published_procedure_is_five_samples_of_a_thousand_stochastic_steps():
    network = make_network()
    assert network.published == {"num_samples": 5, "num_steps": 1000, "solver": "ancestral"}
