"""How scans come to a network's grid, and back."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.data.reading import LoadSequencesd
from scripts.grids import Spacingd

# --- Spacingd


def test_spacing_leaves_alone_what_is_called_like_the_image_and_can_be_undone(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 6, 2)), np.diag([2.0, 2, 5, 1])), tmp_path / "a.nii.gz")
    path = str(tmp_path / "a.nii.gz")
    preprocessing = Compose([LoadSequencesd("image", ["flair"]), Spacingd("image", pixdim=(1.0, 1.0, -1.0))])
    data = preprocessing({"image": path, "image_path": path})
    assert data["image"].shape == (1, 7, 11, 2) and data["image_path"] == path
    assert preprocessing.inverse(data)["image"].shape == (1, 4, 6, 2)


def test_a_finer_grid_is_smoothed_before_it_is_sampled_and_labels_are_not():
    rng = np.random.default_rng(0)
    image = MetaTensor(torch.from_numpy(rng.normal(0, 1, (1, 64, 64, 3)).astype(np.float32)), affine=torch.eye(4))
    label = MetaTensor((image > 0).float(), affine=torch.eye(4))
    coarse = {"pixdim": (2.0, 2.0, -1.0), "mode": ["bilinear", "nearest"]}
    plain = Spacingd(["image", "label"], **coarse)({"image": image, "label": label})
    smooth = Spacingd(["image", "label"], anti_aliasing=True, **coarse)({"image": image, "label": label})
    means = image.reshape(1, 32, 2, 32, 2, 3).mean(dim=(2, 4)).std()
    assert smooth["image"].std() == pytest.approx(float(means), rel=0.3) and plain["image"].std() > 0.9
    assert torch.equal(smooth["label"], plain["label"])


def test_a_grid_that_is_coarse_enough_is_not_smoothed():
    image = MetaTensor(torch.rand(1, 16, 16, 3), affine=torch.diag(torch.tensor([2.0, 3, 1, 1])))
    plain, smooth = (
        Spacingd("image", pixdim=(2.0, 2.0, -1.0), anti_aliasing=on)({"image": image})["image"] for on in (False, True)
    )
    assert torch.equal(plain, smooth)
