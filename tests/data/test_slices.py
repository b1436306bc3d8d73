from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_inputs import read
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, RandFlipd, RandScaleIntensityd

from scripts.data.slices import BalancedBatchSampler, ExtractSlicesd, ShuffledBatchSampler, SliceDataset
from scripts.transforms import (
    ScaleIntensityByForegroundd,
)

# --- ExtractSlicesd


def volume(num_slices=6):
    """Slices 1 and up show a body; 2 has a large lesion, 3 a small one."""
    image = torch.zeros(2, 16, 16, num_slices)
    image[1, 2:14, 2:14, 1:] = 0.5
    mask = torch.zeros(1, 16, 16, num_slices)
    mask[:, 4:9, 4:9, 2] = 1
    mask[:, 4:6, 4:6, 3] = 1
    return {"image": MetaTensor(image, meta={"filename_or_obj": "case7.nii.gz"}), "label": mask, "case": "case7"}


def test_slices_get_their_class_from_the_mask_and_ambiguous_ones_are_left_out():
    slices = ExtractSlicesd()(volume())
    assert [(s["slice"], s["class_label"]) for s in slices] == [(1, 0), (2, 1), (4, 0), (5, 0)]
    assert [s["position"] for s in slices] == [0.2, 0.4, 0.8, 1.0]
    assert all(s["case"] == "case7" and "label" not in s for s in slices)


def test_a_slice_is_a_plain_tensor_of_its_own():
    data = volume()
    item = ExtractSlicesd()(data)[0]
    assert type(item["image"]) is torch.Tensor and item["image"].dtype == torch.float32
    assert torch.equal(item["image"], data["image"].as_tensor()[..., 1])
    assert item["image"].untyped_storage().nbytes() == 2 * 16 * 16 * 4


@pytest.mark.parametrize("spatial_dim", [0, 1, 2])
def test_cutting_along_any_axis_gives_the_same_slices(spatial_dim):
    data = volume()
    turned = {**data, **{k: data[k].as_subclass(torch.Tensor).movedim(3, spatial_dim + 1) for k in ("image", "label")}}
    expected, slices = ExtractSlicesd()(data), ExtractSlicesd(spatial_dim=spatial_dim)(turned)
    assert [s["slice"] for s in slices] == [s["slice"] for s in expected]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(slices, expected, strict=True))


def test_slices_get_their_class_from_a_list():
    data = {**volume(), "slice_labels": [0, 1, 1, 0, 0, 1]}
    del data["label"]
    slices = ExtractSlicesd()(data)
    assert [s["class_label"] for s in slices] == [1, 1, 0, 0, 1] and "slice_labels" not in slices[0]


def test_a_list_of_the_wrong_length_is_refused_with_the_cases_name():
    data = {"image": volume()["image"], "slice_labels": [0, 1]}
    with pytest.raises(ValueError, match="case7.*2 slice labels for 6 slices"):
        ExtractSlicesd()(data)


def test_a_picture_gives_one_slice_with_its_own_class():
    (item,) = ExtractSlicesd()({"image": torch.zeros(1, 8, 8), "class_label": 1, "case": "a"})
    assert (item["class_label"], item["slice"], item["position"], item["case"]) == (1, 0, 0.0, "a")


def test_a_volume_of_one_slice_lies_at_position_0():
    (item,) = ExtractSlicesd()({"image": torch.ones(1, 8, 8, 1), "slice_labels": [1]})
    assert item["position"] == 0.0


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 2)])
def test_images_without_labels_are_refused_with_the_cases_name(shape):
    with pytest.raises(ValueError, match="case9.*add"):
        ExtractSlicesd()({"image": torch.ones(shape), "case": "case9"})


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 8, 8, 1), (1, 8, 8, 3)])
def test_without_labels_every_slice_is_healthy(shape):
    slices = ExtractSlicesd(labelled=False)({"image": torch.ones(shape), "case": "a"})
    assert [(s["class_label"], s["slice"], s["image"].shape) for s in slices] == [
        (0, i, (1, 8, 8)) for i in range(shape[3] if len(shape) > 3 else 1)
    ]


def test_labels_that_are_not_asked_for_are_ignored_and_empty_slices_still_left_out():
    assert [(s["slice"], s["class_label"]) for s in ExtractSlicesd(labelled=False)(volume())] == [
        (i, 0) for i in range(1, 6)
    ]
    (item,) = ExtractSlicesd(labelled=False)({"image": torch.ones(1, 8, 8), "class_label": 1})
    assert item["class_label"] == 0


def test_a_least_foreground_of_zero_keeps_every_slice():
    slices = ExtractSlicesd(labelled=False, min_foreground=0)(volume())
    assert [s["slice"] for s in slices] == list(range(6))


def test_transforms_after_the_cut_see_every_slice():
    slices = Compose([ExtractSlicesd(), ScaleIntensityByForegroundd("image")])(volume())
    assert len(slices) == 4 and all(s["image"].shape == (2, 16, 16) for s in slices)


# --- SliceDataset


def cut(data):
    """Stands for the preprocessing: a case's "label" lists the classes of its slices."""
    data = read(data)
    return [
        {"case": data["case"], "image": torch.full((1, 4, 4), 0.1 * i), "class_label": label, "slice": i, "position": i}
        for i, label in enumerate(data["label"])
    ]


def augmentation():
    return Compose([RandFlipd("image", 0.5, 0), RandScaleIntensityd("image", 0.5, 0.8)])


def test_slices_of_all_cases_are_kept_in_half_precision_and_given_in_single():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 1]}, {"case": "b", "image": "x", "label": [1]}], cut)
    assert len(dataset) == 3 and dataset.class_labels.tolist() == [0, 1, 1] and dataset.positions.tolist() == [0, 1, 0]
    assert all(item["image"].dtype == torch.float16 for item in dataset.slices)
    item = dataset[1]
    assert item["image"].dtype == torch.float32 and item["class_label"] == 1
    torch.testing.assert_close(item["image"], torch.full((1, 4, 4), 0.1), rtol=1e-3, atol=0)
    assert [slices.shape for slices in dataset.slices_by_case()] == [(2, 1, 4, 4), (1, 1, 4, 4)]
    torch.testing.assert_close(dataset.slices_by_case()[0][1], item["image"])


def test_all_bad_cases_are_named_before_any_training():
    cases = [{"case": f"case{i}", "image": "bad" if i % 2 else "good", "label": [0, 1]} for i in range(5)]
    with pytest.raises(ValueError, match="2 of 5 cases can't be used for training") as error:
        SliceDataset(cases, Compose([cut]))
    assert str(error.value).splitlines()[1:] == ["case1: case1: not a scan", "case3: case3: not a scan"]


@pytest.mark.parametrize(("labels", "found"), [([0, 0], r"\[0\]"), ([1], r"\[1\]"), ([], r"\[\]")])
def test_training_without_slices_of_a_class_is_refused(labels, found):
    with pytest.raises(ValueError, match=f"healthy.*diseased.*found the classes {found} in 1 cases"):
        SliceDataset([{"case": "a", "image": "x", "label": labels}], cut)


def test_a_training_begins_by_saying_how_many_slices_there_are(caplog):
    with caplog.at_level("INFO"):
        SliceDataset([{"case": "a", "image": "x", "label": [0, 0, 1]}, {"case": "b", "image": "x", "label": [0]}], cut)
    assert "2 cases with 4 slices: 3 of class 0, 1 of class 1" in caplog.text


def test_a_case_that_was_found_to_be_bad_is_told_with_those_that_cannot_be_read():
    cases = [
        {"case": "a", "image": "x", "label": [0, 1]},
        {"case": "b", "image": "x", "failure": "b: two files of one name"},
    ]
    with pytest.raises(ValueError, match="1 of 2 cases can't be used for training:\nb: b: two files"):
        SliceDataset(cases, cut)


def test_a_case_whose_preprocessing_gives_no_slices_is_trained_on_as_a_whole():
    volume = torch.rand(3, 4, 5, 6).half()
    dataset = SliceDataset([{"case": "a", "image": "x"}], lambda case: {"image": volume.float()}, classes=(0,))
    assert len(dataset) == 1
    assert torch.equal(dataset[0]["image"], volume.float())
    assert dataset[0]["class_label"] == 0


def test_healthy_slices_alone_are_enough_where_they_are_all_that_is_wanted():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 0]}], cut, classes=(0,))
    assert len(dataset) == 2 and dataset.class_labels.tolist() == [0, 0]


@pytest.mark.parametrize(("labels", "found"), [([0, 1], r"\[0, 1\]"), ([], r"\[\]")])
def test_training_on_healthy_slices_alone_refuses_others_and_none(labels, found):
    with pytest.raises(ValueError, match=rf"needs healthy \(0\) slices alone, found the classes {found} in 1 cases"):
        SliceDataset([{"case": "a", "image": "x", "label": labels}], cut, classes=(0,))


def test_cases_of_monai_label_have_no_name_and_are_accepted():
    dataset = SliceDataset([{"image": "/data/scan7.nii.gz", "label": [0, 1]}], cut)
    assert [item["case"] for item in dataset.slices] == ["scan7.nii.gz"] * 2
    dataset = SliceDataset([{"image": ["/data/scan8_t1.nii.gz", None], "label": [0, 1]}], cut)
    assert dataset.slices[0]["case"] == "scan8_t1.nii.gz"


def random_slices():
    def transform(data):
        image = torch.from_numpy(np.random.RandomState(0).rand(1, 4, 4).astype(np.float32))
        return [{"image": image, "class_label": label, "position": 0.0} for label in (0, 1)]

    return SliceDataset([{"case": "a", "image": "x"}], transform, augmentation())


def test_augmentation_depends_on_the_seed_of_the_item_alone():
    dataset, other = random_slices(), random_slices()
    seeds = list(range(12))
    images = {seed: dataset[0, seed]["image"].clone() for seed in seeds}
    np.random.seed(5)
    torch.manual_seed(5)
    for seed in reversed(seeds):
        assert torch.equal(other[1, seed]["image"], images[seed])
    assert len({image.numpy().tobytes() for image in images.values()}) > 4
    assert torch.equal(dataset[0]["image"], dataset.slices[0]["image"].float())


# --- BalancedBatchSampler


def labelled(num_healthy=50, num_diseased=10):
    """Diseased slices lie between 0.4 and 0.6, healthy ones everywhere."""
    positions = np.concatenate([np.linspace(0, 1, num_healthy), np.linspace(0.41, 0.59, num_diseased)])
    return SimpleNamespace(class_labels=np.repeat([0, 1], [num_healthy, num_diseased]), positions=positions)


def batches(count, start=0, **kwargs):
    sampler = BalancedBatchSampler(labelled(), **{"batch_size": 8, **kwargs})
    sampler.start = start
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("batch_size", [8, 5])
def test_half_of_a_batch_is_diseased(batch_size):
    for batch in batches(20, batch_size=batch_size):
        assert len(batch) == batch_size and sum(labelled().class_labels[i] for i, _ in batch) == batch_size // 2


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    np.random.seed(1)
    straight = batches(10)
    np.random.seed(2)
    assert batches(10) == straight and batches(4, start=6) == straight[6:]
    assert batches(10, seed=1) != straight and len({tuple(batch) for batch in straight}) == 10


def test_every_slice_of_a_sequence_gets_its_own_seed():
    seeds = [seed for batch in batches(10) for _, seed in batch]
    assert len(set(seeds)) == 80 and all(0 <= seed < 2**31 for seed in seeds)


def test_processes_share_one_sequence_of_batches_out():
    ranks = [batches(5, rank=rank, world_size=2) for rank in (0, 1)]
    both = [[item for pair in zip(*group, strict=True) for item in pair] for group in zip(*ranks, strict=True)]
    assert both == batches(5, batch_size=2 * len(ranks[0][0]))


def healthy_positions(matched, dataset=None, count=200):
    dataset = dataset or labelled()
    sampler = BalancedBatchSampler(dataset, 8, matched=matched)
    chosen = [i for batch in itertools.islice(sampler, count) for i, _ in batch]
    return dataset.positions[[i for i in chosen if dataset.class_labels[i] == 0]]


def test_matched_healthy_slices_lie_where_the_diseased_do():
    positions = healthy_positions(matched=1)
    assert 0.4 <= positions.min() and positions.max() < 0.6
    assert positions.mean() == pytest.approx(0.5, abs=0.02)


def test_unmatched_healthy_slices_lie_everywhere():
    counts = np.histogram(healthy_positions(matched=0), bins=10, range=(0, 1))[0]
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_healthy_slices_that_never_lie_near_diseased_ones_are_drawn_evenly():
    dataset = SimpleNamespace(class_labels=np.array([0] * 4 + [1]), positions=np.array([0.0, 0.1, 0.2, 0.3, 0.9]))
    counts = Counter(healthy_positions(matched=1, dataset=dataset).tolist())
    assert len(counts) == 4 and min(counts.values()) > 150


def test_cases_are_drawn_evenly_however_many_slices_they_have():
    dataset = labelled(num_healthy=40, num_diseased=20)
    dataset.cases = np.array(["a"] * 36 + ["b"] * 4 + ["a"] * 2 + ["b"] * 18)
    chosen = [i for batch in itertools.islice(BalancedBatchSampler(dataset, 8, by_case=True), 300) for i, _ in batch]
    for label in (0, 1):
        drawn = dataset.cases[[i for i in chosen if dataset.class_labels[i] == label]]
        assert (drawn == "a").mean() == pytest.approx(0.5, abs=0.06)


def test_a_case_whose_healthy_slices_lie_nowhere_near_diseased_ones_does_not_stop_the_drawing():
    dataset = labelled(num_healthy=40, num_diseased=20)
    dataset.cases = np.array(["bottom"] * 10 + ["a"] * 50)
    chosen = [i for batch in itertools.islice(BalancedBatchSampler(dataset, 8, 1.0, by_case=True), 20) for i, _ in batch]
    assert set(dataset.cases[chosen]) == {"a"}


def test_a_loader_gives_the_batches_of_the_sampler():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0, 1, 0, 1]}], cut, augmentation())
    sampler = BalancedBatchSampler(dataset, batch_size=4)
    batch = next(iter(DataLoader(dataset, batch_sampler=sampler, num_workers=0)))
    expected = [dataset[key]["image"] for key in next(iter(sampler))]
    assert torch.equal(batch["image"], torch.stack(expected)) and batch["class_label"].tolist() == [1, 1, 0, 0]


# --- ShuffledBatchSampler


def shuffled(count, length=24, batch_size=8, start=0, **kwargs):
    sampler = ShuffledBatchSampler(range(length), batch_size, **kwargs)
    sampler.start = start
    return list(itertools.islice(sampler, count))


def indices(batches):
    return [index for batch in batches for index, _ in batch]


@pytest.mark.parametrize(("length", "batch_size"), [(24, 8), (24, 24), (1, 1), (1000, 40), (10, 3), (3, 8), (1, 4)])
def test_each_pass_shows_every_slice_exactly_once(length, batch_size):
    passes = 4
    batches = shuffled(-(-passes * length // batch_size), length, batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    for i in range(passes):
        assert sorted(indices(batches)[i * length : (i + 1) * length]) == list(range(length))


def test_each_pass_has_its_own_order():
    chosen = indices(shuffled(12))
    assert len({tuple(chosen[i : i + 24]) for i in range(0, 96, 24)}) == 4 and chosen[:24] != sorted(chosen[:24])


@pytest.mark.parametrize("length", [24, 10, 3])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_shuffled_batches_resume_where_they_were_cut_off(length, start):
    np.random.seed(start)
    assert shuffled(10 - start, length, start=start) == shuffled(10, length)[start:]


def test_shuffled_batches_depend_on_the_seed():
    assert shuffled(3, seed=1) != shuffled(3) == shuffled(3)
    seeds = [seed for batch in shuffled(10) for _, seed in batch]
    assert len(set(seeds)) == 80 and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("start", [0, 2])
def test_processes_share_the_shuffled_batches_out(start):
    ranks = [shuffled(5, rank=rank, world_size=3, start=start) for rank in range(3)]
    whole = [[item for group in zip(*parts, strict=True) for item in group] for parts in zip(*ranks, strict=True)]
    assert whole == shuffled(5, batch_size=3 * len(ranks[0][0]), start=start)


def test_a_loader_gives_the_shuffled_batches():
    dataset = SliceDataset([{"case": "a", "image": "x", "label": [0] * 6}], cut, augmentation(), classes=(0,))
    sampler = ShuffledBatchSampler(dataset, batch_size=4)
    batch = next(iter(DataLoader(dataset, batch_sampler=sampler, num_workers=0)))
    assert torch.equal(batch["image"], torch.stack([dataset[key]["image"] for key in next(iter(sampler))]))
