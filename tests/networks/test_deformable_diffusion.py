"""Tests of the networks that make the frames between two phases."""

import pytest
import torch
from monai.networks.nets import VoxelMorphUNet

from scripts.networks.deformable_diffusion import DeformableDiffusionNet, LeanVoxelMorphUNet, VoxelMorphNet

SIZE = (16, 16, 8)
SMALL = {
    "channels": (4, 4, 8),
    "deformation_channels": (4, 4, 4, 4),
    "deformation_out": 4,
    "final_channels": (4,),
}
SMALL_VOXELMORPH = {"channels": (4, 4, 4, 4), "out_channels": 4, "final_channels": (4,)}


def blob(centre, size=SIZE):
    """A ball of 1 in -1, with a soft edge: (1, 1, H, W, D)."""
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij")
    square = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, (4, 4, 3), strict=True))
    return (2 * torch.sigmoid(3 * (1.5 - square)) - 1)[None, None]


def pair():
    return torch.cat([blob((6, 8, 4)), blob((9, 8, 4))], dim=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(network, gammas, shift):
    """The network with a code of ones, and fields that are the code along the first axis, ``shift`` voxels long."""

    class Field(torch.nn.Module):
        def prepare(self, source, code):
            return code

        def along(self, code, factors):
            length = shift * torch.stack([factor * code for factor in factors], dim=1)
            return torch.cat([length, torch.zeros_like(length), torch.zeros_like(length)], dim=2)

    class Code(torch.nn.Module):
        def forward(self, x, t):
            return 1 - (x[:, 2:] - x[:, :1])  # beside the difference of noised target and source

    network.gammas, network.deformation, network.diffusion = gammas, Field(), Code()
    return network


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
        assert network.displacement.shape == (2, 4, 3, 13, 18, 5)

    def test_gives_the_source_itself_at_the_beginning(self, make):
        image = torch.rand(1, 2, *SIZE)
        network = make(num_frames=3)
        assert torch.equal(network(image)[:, 0], image[:, 0])
        assert not network.displacement[:, 0].any()
        assert network.displacement[:, 1:].any()

    def test_does_not_depend_on_how_many_frames_go_through_at_once(self, make):
        image, network = pair(), make(num_frames=6)
        network.max_batch = 1
        one_by_one = network(image)
        network.max_batch = 6
        assert torch.allclose(network(image), one_by_one, atol=1e-5)

    def test_gives_the_fractions_that_are_named(self, make):
        image, network = pair(), make(num_frames=5)
        frames = network(image)
        network.gammas = [0.75, 0.25]
        assert torch.allclose(network(image), frames[:, [3, 1]], atol=1e-5)

    def test_refuses_another_number_of_channels(self, make):
        with pytest.raises(ValueError, match="source and target; got"):
            make()(torch.rand(1, 3, *SIZE))

    @pytest.mark.parametrize("settings", [{"num_frames": 1}, {"gammas": []}, {"gammas": [0, 1.5]}])
    def test_refuses_fractions_that_are_none(self, make, settings):
        with pytest.raises(ValueError, match="num_frames|gammas"):
            make(**settings)

    def test_learns_to_move_a_ball(self, make):
        network, image = make(similarity_weight=1.0, window=5, smoothness=0.1), pair()
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for step in range(60):
            losses = network.losses(image, None, generator(step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        network.gammas = [0.0, 1.0]
        error = (network(image) - image[:, 1:]).square().mean(dim=(0, 2, 3, 4))
        assert error[1] < 0.5 * error[0]

    def test_refines_what_it_says_of_a_pair(self, make):
        network, image = make(num_frames=3, window=5, smoothness=0.1, squared_error=1.0), pair()
        plain, found = network(image), network.displacement
        network.refinement_steps = 20
        refined = network(image)
        before, after = ((frames - image[:, 1:]).square().mean(dim=(0, 2, 3, 4)) for frames in (plain, refined))
        assert after[2] < 0.3 * before[2]
        assert after[2] < after[1] < 0.9 * before[1]  # half of the way, the ball is on its way too
        assert torch.equal(refined[:, 0], image[:, 0])
        assert all(parameter.grad is None for parameter in network.parameters())
        network.refinement_steps = 0
        assert torch.equal(network(image), plain) and torch.equal(network.displacement, found)

    def test_gives_the_same_in_inference_mode_and_still_learns_after_it(self, make):
        network, image = make(num_frames=3, window=5, squared_error=1.0, refinement_steps=3), pair()
        with torch.inference_mode():
            frames, found = network(image.clone()), network.displacement
        assert torch.equal(network(image), frames) and torch.equal(network.displacement, found)
        with torch.inference_mode():
            network.displace(torch.rand(1, 2, 24, 16, 8))  # of another size, whose grid is kept
        sum(network.losses(torch.rand(1, 2, 24, 16, 8), None, generator()).values()).backward()

    def test_goes_along_the_refined_way_as_far_as_along_its_own(self, make):
        network, image = make(num_frames=2), pair()
        motion = network.motion(image[:, :1], image[:, 1:])
        whole = network.velocities(motion, [1.0])
        own = network.fields(motion, [0.5, 1.0], (whole, whole))
        assert torch.allclose(own[:, 1], network.fields(motion, [1.0])[:, 0], atol=1e-6)
        turned = network.fields(motion, [0.5, 1.0], (whole, -whole))
        if isinstance(network, VoxelMorphNet):  # goes along a straight way
            assert torch.allclose(own[:, 0], network.fields(motion, [0.5])[:, 0], atol=1e-6)
        assert torch.allclose(turned[:, 1], network._integrate(-whole)[:, 0], atol=1e-6)

    def test_sees_all_of_both_images_on_its_coarser_grid(self, make):
        network, image = make(num_frames=2, reduction=2), torch.rand(1, 2, *SIZE)
        network(image)
        before = network.displacement
        for voxel in [(8, 8, 4), (9, 8, 4), (8, 9, 4), (8, 8, 5)]:
            changed = image.clone()
            changed[(0, slice(None), *voxel)] += 1
            network(changed)
            assert not torch.equal(network.displacement, before)

    def test_pays_for_a_field_that_folds_over(self, make):
        network = make(folding=2.0, similarity_weight=1.0)
        there = torch.arange(SIZE[0], dtype=torch.float32)
        field = torch.zeros(1, 3, *SIZE)
        field[:, 0] = (-1.5 * there)[:, None, None]  # x - 1.5 x: a determinant of -0.5 everywhere
        assert network._mismatch(pair()[:, :1], field, pair()[:, 1:])["folding"].item() == pytest.approx(1.0)
        assert network._mismatch(pair()[:, :1], 0.5 * field, pair()[:, 1:])["folding"] == 0
        assert network.losses(pair(), None, generator()).keys() - {"noise"} == {"similarity", "smoothness", "folding"}

    def test_pays_for_the_share_of_the_squared_error_that_the_motion_leaves(self, make):
        network, still = make(squared_error=2.0, similarity_weight=1.0), torch.zeros(1, 3, *SIZE)
        for target in (pair()[:, 1:], pair()[:, :1] + 0.1 * torch.rand(1, 1, *SIZE)):  # much motion, and hardly any
            assert network._mismatch(pair()[:, :1], still, target)["squared_error"].item() == pytest.approx(2.0)
        assert network._mismatch(pair()[:, :1], still, pair()[:, :1])["squared_error"] < 1e-6

    def test_looks_at_the_frames_between_only_if_told_to(self, make):
        network, cine = make(window=5), torch.cat([pair()[:, :1], torch.rand(1, 1, *SIZE), pair()[:, 1:]], dim=1)
        changed = torch.cat([cine[:, :1], torch.rand(1, 1, *SIZE), cine[:, 2:]], dim=1)

        def similarity(image):
            # the first seed draws the source as the frame between, the second the one that differs
            return [network.losses(image, None, generator(seed))["similarity"].item() for seed in range(6)]

        assert similarity(cine) == similarity(changed)
        network.frames_weight = 1.0
        assert similarity(cine) != similarity(changed)


class TestDeformableDiffusion:
    def test_scales_the_code_along_the_way(self):
        network = moved(DeformableDiffusionNet(**SMALL, reduction=1), [0.0, 0.5, 1.0], shift=2.0)
        image = torch.rand(1, 2, *SIZE)
        frames = network(image)
        assert torch.allclose(frames[:, 1, :-1], image[:, 0, 1:], atol=1e-6)  # a whole voxel
        assert torch.allclose(frames[:, 2, :-2], image[:, 0, 2:], atol=1e-6)

    def test_leaves_the_field_of_the_target_as_the_deformation_module_gives_it(self):
        network, image = DeformableDiffusionNet(**SMALL, gammas=[1.0]), pair()
        network(image)
        with torch.no_grad():
            code = network.noise(image[:, :1], image[:, 1:], image[:, 1:], torch.zeros(1))
            expected = network.deformation(torch.cat([image[:, :1], code], dim=1))
        assert torch.allclose(network.displacement, network._integrate(expected[:, None]), atol=1e-5)

    def test_estimates_the_noise_of_the_noised_target(self):
        network, image = DeformableDiffusionNet(**SMALL), pair()
        drawn = []
        network.noise = lambda source, target, noised, t: drawn.append((noised, t)) or torch.zeros_like(target)
        losses = network.losses(image, None, generator())
        noised, t = drawn[0]
        a = network.alphas_cumprod[t].float()
        noise = (noised - a.sqrt() * image[:, 1:]) / (1 - a).sqrt()
        assert losses["noise"].item() == pytest.approx(noise.square().mean().item(), rel=1e-3)
        assert 1 <= t.item() <= 2000

    def test_makes_the_code_as_at_inference_in_the_clean_share_of_the_training(self):
        network, image = DeformableDiffusionNet(**SMALL, clean_share=1.0), pair()
        drawn = []
        network.noise = lambda source, target, noised, t: drawn.append((noised, t)) or torch.zeros_like(target)
        assert network.losses(image, None, generator())["noise"] == 0
        assert torch.equal(drawn[0][0], image[:, 1:]) and drawn[0][1] == 0

    def test_has_the_noise_levels_of_the_paper(self):
        table = DeformableDiffusionNet(**SMALL).alphas_cumprod
        assert len(table) == 2001
        assert 1 - table[1] == pytest.approx(1e-6)
        assert 1 - table[-1] / table[-2] == pytest.approx(1e-2)

    def test_draws_the_same_from_the_same_seed(self):
        network, image = DeformableDiffusionNet(**SMALL, frames_weight=1.0), torch.rand(1, 5, *SIZE)
        first, second = (network.losses(image, None, generator(3)) for _ in range(2))
        assert first == second


class TestVoxelMorph:
    def test_scales_its_field(self):
        network = VoxelMorphNet(**SMALL_VOXELMORPH, gammas=[0.5, 1.0])
        network(pair())
        half, whole = network.displacement.unbind(1)
        assert torch.allclose(2 * half, whole)

    def test_integrates_a_velocity_that_is_everywhere_alike_to_its_product_with_the_time(self):
        network = VoxelMorphNet(diffeomorphic=True, reduction=1, **SMALL_VOXELMORPH)
        velocity = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, *SIZE)
        fields = network.fields(velocity, [0.25, 1.0])
        assert torch.allclose(fields[:, 0], 0.25 * velocity, atol=1e-5)
        assert torch.allclose(fields[:, 1], velocity, atol=1e-5)

    @pytest.mark.parametrize("reduction", [1, 2])
    def test_integrates_a_linear_velocity_to_its_exponential(self, reduction):
        network = VoxelMorphNet(diffeomorphic=True, reduction=reduction, **SMALL_VOXELMORPH)
        x = torch.arange(32.0) - 15.5
        on_grid = torch.arange(32.0 / reduction) - (32 / reduction - 1) / 2
        velocity = torch.zeros(1, 3, len(on_grid), 16 // reduction, 8 // reduction)
        velocity[:, 0] = (-0.5 * on_grid)[:, None, None]  # dx/dt = -x/2, towards the middle
        field = network.fields(velocity, [1.0])[0, 0, 0, :, 8, 4]
        inside = slice(reduction, -reduction)  # beyond its outermost points a grid knows nothing
        assert torch.allclose((x + field)[inside], (x * torch.exp(torch.tensor(-0.5)))[inside], atol=0.05)


class TestLeanUNet:
    @pytest.mark.parametrize("levels", [2, 3, 4])
    def test_gives_what_the_network_of_monai_gives(self, levels):
        settings = {
            "spatial_dims": 3,
            "unet_out_channels": 6,
            "channels": (4, 5) * levels,
            "final_conv_channels": (3,),
        }
        lean, plain = LeanVoxelMorphUNet(**settings), VoxelMorphUNet(in_channels=2, **settings)
        plain.load_state_dict(lean.state_dict())
        x = torch.randn(2, 2, 16, 32, 16)
        assert torch.allclose(lean(x), plain(x), atol=1e-6)
        lean.lean = False
        assert torch.equal(lean(x), plain(x))

    def test_gives_the_same_for_pairs_that_share_their_first_convolution(self):
        network = DeformableDiffusionNet(**SMALL).deformation
        still, scaled = torch.randn(2, 2, 1, *SIZE)
        pairs = [network(torch.cat([still, factor * scaled], dim=1)) for factor in (0.0, 0.3, 1.0)]
        for network.lean in (True, False):
            fields = network.along(network.prepare(still, scaled), [0.0, 0.3, 1.0])
            assert torch.allclose(fields, torch.stack(pairs, dim=1), atol=1e-6)

    def test_gives_the_same_gradient(self):
        settings = {
            "spatial_dims": 3,
            "unet_out_channels": 4,
            "channels": (4,) * 6,
            "final_conv_channels": (4,),
        }
        lean, plain = LeanVoxelMorphUNet(**settings), VoxelMorphUNet(in_channels=2, **settings)
        plain.load_state_dict(lean.state_dict())
        x = torch.randn(1, 2, *SIZE)
        for network in (lean, plain):
            network(x).square().mean().backward()
        for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-8)
