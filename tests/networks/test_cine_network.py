"""Tests of what the networks that make the frames between two phases have in common."""

import pytest
import torch
from made_inputs import SMALL_DEFORMABLE as SMALL
from made_inputs import ball_pair as pair

from scripts.networks.deformable_diffusion import DeformableDiffusionNet
from scripts.networks.registration import along
from scripts.networks.voxelmorph import VoxelMorphNet

SIZE = (16, 16, 8)
SMALL_VOXELMORPH = {"channels": (4, 4, 4, 4), "out_channels": 4, "final_channels": (4,)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: DeformableDiffusionNet(**SMALL, **k),
        lambda **k: VoxelMorphNet(**SMALL_VOXELMORPH, **k),
        lambda **k: DeformableDiffusionNet(**SMALL, **{"reduction": 2, "diffeomorphic": True, **k}),
        lambda **k: VoxelMorphNet(**SMALL_VOXELMORPH, **{"reduction": 2, "diffeomorphic": True, **k}),
    ],
    ids=["ddm", "voxelmorph", "ddm reduced", "voxelmorph reduced"],
)
class TestEveryNetwork:
    def test_gives_as_many_frames_as_asked_of_any_size(self, make):
        network = make(num_frames=4)
        image = torch.rand(2, 2, 13, 18, 5)
        assert network(image).shape == (2, 4, 13, 18, 5)
        assert network.displace(image).shape == (2, 4, 3, 13, 18, 5)

    def test_gives_the_source_itself_at_the_beginning(self, make):
        image = torch.rand(1, 2, *SIZE)
        network = make(num_frames=3)
        assert torch.equal(network(image)[:, 0], image[:, 0])
        fields = network.displace(image)
        assert not fields[:, 0].any() and fields[:, 1:].any()

    def test_does_not_depend_on_how_many_frames_go_through_at_once(self, make):
        image, network = pair(), make(num_frames=6)
        network.max_batch = 1
        one_by_one = network(image)
        network.max_batch = 6
        assert torch.allclose(network(image), one_by_one, atol=1e-5)

    def test_gives_the_fractions_that_are_named(self, make):
        image, network = pair(), make(num_frames=5)
        fields = network.displace(image)
        assert torch.allclose(network.displace(image, [0.75, 0.25]), fields[:, [3, 1]], atol=1e-5)
        assert torch.allclose(make(gammas=[1, 0])(image)[:, 1], image[:, 0])

    def test_refuses_another_number_of_channels(self, make):
        with pytest.raises(ValueError, match="source and target; got"):
            make()(torch.rand(1, 3, *SIZE))

    @pytest.mark.parametrize("settings", [{"num_frames": 1}, {"gammas": []}, {"gammas": [0, 1.5]}])
    def test_refuses_fractions_that_are_none(self, make, settings):
        with pytest.raises(ValueError, match="num_frames|gammas"):
            make(**settings)
        if "gammas" in settings:
            with pytest.raises(ValueError, match="gammas"):
                make().displace(pair(), settings["gammas"])

    def test_learns_to_move_a_ball(self, make):
        network, image = make(similarity_weight=1.0, window=5, smoothness=0.1, gammas=[0, 1]), pair()
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for step in range(60):
            losses = network.losses(image, None, generator(step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        error = (network(image) - image[:, 1:]).square().mean(dim=(0, 2, 3, 4))
        assert error[1] < 0.5 * error[0]

    def test_refines_what_it_says_of_a_pair(self, make):
        network, image = make(num_frames=3, window=5, smoothness=0.1, squared_error=1.0), pair()
        plain = network(image)
        network.refinement_steps = 20
        refined = network(image)
        before, after = ((frames - image[:, 1:]).square().mean(dim=(0, 2, 3, 4)) for frames in (plain, refined))
        assert after[2] < 0.3 * before[2]
        assert after[2] < after[1] < 0.9 * before[1]  # half of the way, the ball is on its way too
        assert torch.equal(refined[:, 0], image[:, 0])
        assert all(parameter.grad is None for parameter in network.parameters())
        network.refinement_steps = 0
        assert torch.equal(network(image), plain)

    def test_gives_the_same_in_inference_mode_and_still_learns_after_it(self, make):
        network, image = make(num_frames=3, window=5, squared_error=1.0, refinement_steps=3), pair()
        with torch.inference_mode():
            frames = network(image.clone())
        assert torch.equal(network(image), frames)
        with torch.inference_mode():
            network.displace(torch.rand(1, 2, 24, 16, 8))
        sum(network.losses(torch.rand(1, 2, 24, 16, 8), None, generator()).values()).backward()

    def test_goes_along_the_refined_way_as_far_as_along_its_own(self, make):
        network, image = make(num_frames=2), pair()
        motion = network.motion(image[:, :1], image[:, 1:])
        whole = network.velocities(motion, [1.0])
        velocities = network.velocities(motion, [0.5, 1.0])
        own = along(velocities, whole, whole)
        assert torch.allclose(own[:, 1:], whole, atol=1e-6)
        if isinstance(network, VoxelMorphNet):  # goes along a straight way
            assert torch.allclose(own, velocities, atol=1e-6)
        assert torch.allclose(along(velocities, whole, -whole), -own, atol=1e-6)

    def test_sees_all_of_both_images_on_its_coarser_grid(self, make):
        network, image = make(num_frames=2, reduction=2), torch.rand(1, 2, *SIZE)
        before = network.displace(image)
        for voxel in [(8, 8, 4), (9, 8, 4), (8, 9, 4), (8, 8, 5)]:
            changed = image.clone()
            changed[(0, slice(None), *voxel)] += 1
            assert not torch.equal(network.displace(changed), before)

    def test_pays_for_what_its_settings_weigh(self, make):
        network = make(folding=2.0, squared_error=1.0)
        names = network.losses(pair(), None, generator()).keys() - {"noise"}
        assert names == {"similarity", "smoothness", "folding", "squared_error"}

    def test_looks_at_the_frames_between_only_if_told_to(self, make):
        network, cine = make(window=5), torch.cat([pair()[:, :1], torch.rand(1, 1, *SIZE), pair()[:, 1:]], dim=1)
        changed = torch.cat([cine[:, :1], torch.rand(1, 1, *SIZE), cine[:, 2:]], dim=1)

        def similarity(image):
            # the first seed draws the source as the frame between, the second the one that differs
            return [network.losses(image, None, generator(seed))["similarity"].item() for seed in range(6)]

        assert similarity(cine) == similarity(changed)
        network.frames_weight = 1.0
        assert similarity(cine) != similarity(changed)
