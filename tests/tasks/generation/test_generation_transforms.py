from __future__ import annotations

import torch

from scripts.tasks.generation.transforms import SeededNoised, seeded_noise


def test_noise_is_standard_normal_and_depends_on_the_seed_alone():
    noise = seeded_noise(3, (1, 64, 64))
    assert noise.shape == (1, 64, 64) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    torch.manual_seed(9)  # the state of the process does not count
    drawn = SeededNoised(keys="image", shape=[1, 64, 64])({"case": "a", "seed": 3})
    assert torch.equal(drawn["image"], noise) and drawn["case"] == "a"
    assert not torch.equal(seeded_noise(4, (1, 64, 64)), noise)
