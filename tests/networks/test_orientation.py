from __future__ import annotations

import torch

from scripts.networks.orientation import NUM_ORIENTATIONS, OrientationNet, turn


def upright(number: int, seed: int = 0) -> torch.Tensor:
    """Images with a bright corner of random extent, and a grey bar along one of its sides: all orientations differ."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.rand(number, 1, 32, 32, generator=generator)
    for image, size in zip(images, torch.randint(8, 14, (number,), generator=generator), strict=True):
        image[:, :size, :size] += 0.8
        image[:, :size, size : size + 10] += 0.4
    return images


def test_the_eight_orientations_of_an_image_differ_and_the_first_is_upright():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    turned = [turn(image, k) for k in range(NUM_ORIENTATIONS)]
    assert torch.equal(turned[0], image)
    assert torch.equal(turned[4], image.flip(2)) and torch.equal(turned[1], torch.rot90(image, 1, (2, 3)))
    assert len({tuple(x.flatten().tolist()) for x in turned}) == 8


def test_training_with_a_seed_gives_the_same_weights_whatever_came_before():
    states = []
    for state in (1, 2):
        torch.manual_seed(state)
        network = OrientationNet()
        network.fit(upright(16), iterations=2, batch_size=8, seed=3)
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_orientations_of_held_out_images_are_learned_and_the_accuracy_is_kept_among_the_weights():
    network = OrientationNet()
    before = network.measure(upright(16, seed=1))
    network.fit(upright(64), iterations=60, batch_size=32)
    accuracy = network.measure(upright(16, seed=1))
    assert before < 0.5 < 0.8 < accuracy <= 1
    assert float(network.state_dict()["accuracy"]) == torch.tensor(accuracy)
    told = [(network.eval()(turn(upright(16, seed=1), k)).argmax(dim=1) == k).float().mean() for k in range(8)]
    assert torch.isclose(torch.stack(told).mean(), torch.tensor(accuracy))


def test_features_are_what_the_last_layer_weighs():
    network, images = OrientationNet(), upright(5)
    features = network.features(images)
    assert features.shape[0] == 5
    torch.testing.assert_close(network.densenet.class_layers.out(features), network(images))
