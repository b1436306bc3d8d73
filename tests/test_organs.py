from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from scripts.organs import PickLabelsd, RightPartd, WithinMaskd, likely_organ


def volume(values, affine=None, **meta):
    return MetaTensor(torch.as_tensor(values, dtype=torch.float32), affine, meta=meta)


def test_a_label_map_becomes_the_mask_of_its_wanted_values():
    labels = volume(np.arange(8).reshape(1, 2, 2, 2))
    picked = PickLabelsd("organ")({"organ": labels, "organ_values": [1, 7]})["organ"]
    assert torch.equal(picked.flatten(), torch.tensor([0, 1, 0, 0, 0, 0, 0, 1.0]))
    assert PickLabelsd("organ")({"organ": labels, "organ_values": []})["organ"].sum() == 7, "all above 0"
    assert PickLabelsd("organ")({"organ": labels})["organ"].sum() == 7


def test_a_mask_without_the_organ_is_refused_with_what_it_has():
    data = {"organ": volume(np.full((1, 2, 2, 2), 5), filename_or_obj="a.nii.gz"), "organ_values": [7]}
    with pytest.raises(ValueError, match=r"a\.nii\.gz: no voxel is 7, it has the values 5; give the mask of the organ"):
        PickLabelsd("organ", required="organ")(data)
    assert not PickLabelsd("organ")(data)["organ"].any()


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAL", "ARI"])
def test_the_right_part_is_towards_the_patients_right_whatever_the_axes(axcodes):
    mask = torch.zeros(1, 12, 4, 3)
    mask[:, 1:11] = 1  # from left to right
    turned = Orientation(axcodes=axcodes, labels=None)(volume(mask, torch.eye(4, dtype=torch.float64)))
    part = RightPartd("organ", share=4 / 9)({"organ": turned})["organ"]
    back = Orientation(axcodes="RAS", labels=None)(part)
    assert torch.equal(back.amax(dim=(0, 2, 3)).nonzero().flatten(), torch.arange(6, 11))
    assert torch.equal(RightPartd("organ", share=1.0)({"organ": turned})["organ"], turned)
    assert not RightPartd("organ", share=0.5)({"organ": 0 * turned})["organ"].any()


def test_a_share_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        RightPartd("organ", share=0)


def test_beyond_the_mask_an_image_is_another_or_zero():
    mask, image, scan = torch.zeros(1, 2, 2, 2), torch.rand(1, 2, 2, 2), torch.rand(1, 2, 2, 2)
    mask[0, 0] = 1
    data = {"map": volume(image), "organ": volume(mask), "scan": volume(scan)}
    assert torch.equal(WithinMaskd("map", "organ")(data)["map"].as_tensor(), image * mask)
    pasted = WithinMaskd("map", "organ", "scan")(data)["map"].as_tensor()
    assert torch.equal(pasted[:, 0], image[:, 0]) and torch.equal(pasted[:, 1], scan[:, 1])


def test_the_likely_organ_of_a_box_is_its_commonest_soft_tissue_with_clefts_filled():
    rng = np.random.default_rng(0)
    image, organ = np.zeros((64, 96)), np.zeros((64, 96), bool)
    image[4:60, 4:92] = 0.15  # fat
    organ[24:44, 12:84] = True
    image[organ] = 0.62
    image[4:16, 60:92] = 0.5  # bowel, further from the middle
    image[46:58, 20:34] = 0.9  # a vessel
    image[33:35, 40:48] = 0.2  # a cleft
    image[4:60, 4:92] += rng.normal(0, 0.02, (56, 88))
    found = likely_organ(image)
    assert (found & organ).sum() / (found | organ).sum() > 0.85
    assert found[33:35, 40:48].all() and not found[4:16].any() and not found[50:].any()
    assert not likely_organ(np.zeros((40, 40))).any()  # air
    assert not likely_organ(np.full((40, 40), 0.2)).any()  # fat
