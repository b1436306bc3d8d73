from __future__ import annotations

import csv
import json
import logging
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from sklearn.metrics import average_precision_score, roc_auc_score

from scripts.metrics import bootstrap_interval
from scripts.tasks.anomaly.metrics import AnomalyMetrics, BinnedScores, ImageMetrics, cohort_figures, lesions_found

AFFINE = torch.diag(torch.tensor([-1.0, 2.0, 5.0, 1.0], dtype=torch.float64))  # voxels of 10 mm³, mirrored


def raw_dice(pred, label):
    return 2 * np.sum(pred & label) / (np.sum(pred) + np.sum(label))


def make_scores(seed, number=5000):
    """Scores in [0, 1], many of them 0, higher for positives; a tenth is positive."""
    generator = np.random.default_rng(seed)
    labels = generator.random(number) < 0.1
    scores = generator.beta(2, 5, number) * (generator.random(number) < 0.6) + 0.25 * labels
    return scores.clip(0, 1), labels


def make_case(name, seed, lesion=True, shape=(24, 20, 8)):
    """Slices 0 and 7 are skipped; with a lesion, slices 3 to 5 are diseased and slice 2 has 4 lesion pixels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(1, *shape)
    if lesion:
        label[:, 5:12, 6:11, 3:6] = 4  # classes of any number
        label[:, 5:7, 6:8, 2] = 1
    anomaly = torch.rand(1, *shape, generator=generator) + 0.8 * (label > 0)
    probability = torch.zeros(1, *shape)
    probability[..., 1:-1] = 0.1 + 0.1 * torch.rand(6, generator=generator)
    if lesion:
        probability[..., 3:6] = 0.9
    volumes = {"label": label, "pred": (anomaly > 0.9).to(torch.uint8), "map": anomaly, "probability": probability}
    return {"case": name} | {key: MetaTensor(value, affine=AFFINE) for key, value in volumes.items()}


def evaluate(cases, output_dir, **settings):
    """Run the handler in a MONAI evaluator whose postprocessing yields the cases; returns table, summary, metrics."""
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.tensor([[float(index)]])} for index in range(len(cases))],
        network=torch.nn.Identity(),
        postprocessing=lambda item: cases[int(item["image"])],
    )
    AnomalyMetrics(output_dir, **settings).attach(evaluator)
    evaluator.run()
    with open(output_dir / "metrics.csv", encoding="utf-8") as file:
        rows = {row.pop("case"): {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)}
    return rows, json.loads((output_dir / "metrics_summary.json").read_text(encoding="utf-8")), evaluator.state.metrics


@pytest.mark.parametrize("seed", range(3))
def test_binned_auroc_and_auprc_agree_with_scikit_learn_on_raw_scores(seed):
    scores, labels = make_scores(seed)
    binned = BinnedScores()
    binned.add(scores, labels)
    assert binned.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=5e-4)
    assert binned.auprc() == pytest.approx(average_precision_score(labels, scores), abs=2e-3)


def test_binned_measures_are_exact_where_scores_lie_on_edges():
    scores, labels = make_scores(0)
    scores = np.round(scores * 64) / 64
    binned = BinnedScores(bins=64)
    binned.add(scores, labels)
    assert binned.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert binned.auprc() == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    raw = {threshold: raw_dice(scores > threshold, labels) for threshold in binned.edges}
    value, threshold = binned.best_dice()
    assert value == pytest.approx(max(raw.values()), abs=1e-12)
    assert raw[threshold] == pytest.approx(value, abs=1e-12)
    for threshold, expected in raw.items():
        assert binned.dice_at(threshold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_dice_is_the_largest_dice_over_all_raw_thresholds(seed):
    scores, labels = make_scores(seed, 500)
    binned = BinnedScores()
    binned.add(scores, labels)
    value, threshold = binned.best_dice()
    assert value == pytest.approx(max(raw_dice(scores > level, labels) for level in np.unique(scores)), abs=5e-3)
    assert value == pytest.approx(raw_dice(scores > threshold, labels), abs=1e-9)
    assert all(binned.dice_at(level) <= value for level in np.linspace(0, 1, 50))


def test_scores_added_in_parts_count_as_scores_added_at_once():
    scores, labels = make_scores(1)
    whole, parts = BinnedScores(), BinnedScores()
    whole.add(scores.reshape(50, 100), torch.from_numpy(labels).reshape(50, 100))
    for start in range(0, 5000, 700):
        parts.add(torch.from_numpy(scores[start : start + 700]), labels[start : start + 700])
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() == 5000


def test_swapped_labels_mirror_the_auroc():
    scores, labels = make_scores(2)
    right, swapped = BinnedScores(), BinnedScores()
    right.add(scores, labels)
    swapped.add(scores, ~labels)
    assert right.auroc() + swapped.auroc() == pytest.approx(1)


def test_a_shifted_range_does_not_change_the_measures():
    scores, labels = make_scores(0)
    unit, wide = BinnedScores(), BinnedScores(value_range=(-5.0, 3.0))
    unit.add(scores, labels)
    wide.add(8 * scores - 5, labels)
    assert wide.auroc() == pytest.approx(unit.auroc(), abs=1e-6)
    assert wide.best_dice()[1] == pytest.approx(8 * unit.best_dice()[1] - 5, abs=0.01)


def test_scores_beyond_the_range_fall_into_the_end_bins():
    binned = BinnedScores(bins=4)
    binned.add([-math.inf, -1.0, 0.0, 1.0, 7.0, math.inf], [0, 0, 0, 1, 1, 1])
    assert binned.counts[:, [0, -1]].tolist() == [[3, 0], [0, 3]]
    assert binned.auroc() == 1 and binned.best_dice() == (1, 0)


def test_measures_are_nan_where_a_class_is_absent():
    nothing, healthy, diseased = BinnedScores(), BinnedScores(), BinnedScores()
    healthy.add([0.2, 0.4], [0, 0])
    diseased.add([0.2, 0.4], [1, 1])
    for binned in (nothing, healthy, diseased):
        assert math.isnan(binned.auroc()) and math.isnan(binned.auprc())
    assert all(math.isnan(value) for value in healthy.best_dice())
    assert diseased.best_dice() == (1, 0)
    assert healthy.dice_at(0.5) == 1 and healthy.dice_at(0.3) == 0


def test_scores_that_are_not_a_number_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        BinnedScores().add([0.1, math.nan], [0, 1])


def test_scores_and_labels_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        BinnedScores().add([0.1, 0.2], [1])


@pytest.mark.parametrize("settings", [{"bins": 0}, {"value_range": (1.0, 1.0)}])
def test_a_histogram_without_bins_or_range_is_refused(settings):
    with pytest.raises(ValueError, match="rising range"):
        BinnedScores(**settings)


def test_the_table_holds_the_figures_of_each_case(tmp_path):
    cases = [make_case("first", 0), make_case("second", 1)]
    rows, _, _ = evaluate(cases, tmp_path)
    assert list(rows) == ["first", "second", "mean", "std"]
    for case in cases:
        anomaly, row = case["map"][0].numpy(), rows[case["case"]]
        label, pred = case["label"][0].numpy() > 0, case["pred"][0].numpy() > 0
        assert row["dice"] == pytest.approx(raw_dice(pred, label), abs=1e-6)
        assert row["best_dice"] == pytest.approx(
            max(raw_dice(anomaly > threshold, label) for threshold in np.unique(anomaly)), abs=5e-3
        )
        assert row["slice_dice"] == pytest.approx(
            np.mean([raw_dice(pred[..., index], label[..., index]) for index in (3, 4, 5)]), abs=1e-6
        )
        assert row["auroc"] == pytest.approx(roc_auc_score(label.ravel(), anomaly.ravel()), abs=1e-3)
        assert row["auprc"] == pytest.approx(average_precision_score(label.ravel(), anomaly.ravel()), abs=5e-3)
        assert row["lesion_mean"] == pytest.approx(anomaly[label].mean(), abs=1e-6)
        assert row["healthy_slice_mean"] == pytest.approx(anomaly[..., [1, 6]].mean(), abs=1e-6)
        assert row["predicted_ml"] == pytest.approx(pred.sum() * 10 / 1000)
        assert row["true_ml"] == pytest.approx((3 * 35 + 4) * 10 / 1000)
        assert row["num_slices"] == 6
    for key in rows["mean"]:
        values = [rows[name][key] for name in ("first", "second")]
        assert rows["mean"][key] == pytest.approx(np.mean(values))
        assert rows["std"][key] == pytest.approx(np.std(values))


def test_pooled_figures_are_those_of_all_voxels_together(tmp_path):
    cases = [make_case("first", 0), make_case("second", 1), make_case("healthy", 2, lesion=False)]
    rows, summary, metrics = evaluate(cases, tmp_path)
    anomaly = np.concatenate([case["map"][0].numpy() for case in cases], axis=2)
    label = np.concatenate([case["label"][0].numpy() for case in cases], axis=2) > 0
    probability = np.concatenate([case["probability"][0, 0, 0].numpy() for case in cases])
    area = label.sum(axis=(0, 1))
    some, healthy = area > 0, (area == 0) & (probability > 0)
    clear = healthy | (area >= 20)

    assert summary == pytest.approx({key: metrics[key] for key in summary})
    assert summary["num_cases"] == 3
    assert summary["dice_mean"] == pytest.approx(rows["mean"]["dice"])
    assert summary["dice_std"] == pytest.approx(rows["std"]["dice"])
    assert summary["auroc"] == pytest.approx(roc_auc_score(label.ravel(), anomaly.ravel()), abs=1e-3)
    assert summary["auprc"] == pytest.approx(average_precision_score(label.ravel(), anomaly.ravel()), abs=5e-3)
    lesion_slices = label[..., some].ravel(), anomaly[..., some].ravel()
    assert summary["auroc_lesion_slices"] == pytest.approx(roc_auc_score(*lesion_slices), abs=1e-3)
    assert summary["auprc_lesion_slices"] == pytest.approx(average_precision_score(*lesion_slices), abs=5e-3)
    assert summary["best_dice_lesion_slices"] == pytest.approx(
        max(raw_dice(lesion_slices[1] > threshold, lesion_slices[0]) for threshold in np.linspace(0, 2, 400)), abs=5e-3
    )
    assert summary["best_dice"] == pytest.approx(raw_dice(anomaly > summary["best_threshold"], label), abs=1e-6)
    assert summary["best_dice"] == pytest.approx(
        max(raw_dice(anomaly > threshold, label) for threshold in np.linspace(0, 2, 400)), abs=5e-3
    )
    slices = area[clear] >= 20, probability[clear]
    assert summary["slice_auroc"] == pytest.approx(roc_auc_score(*slices), abs=1e-3)
    assert summary["slice_auprc"] == pytest.approx(average_precision_score(*slices), abs=1e-3)
    assert summary["healthy_ratio"] == pytest.approx(anomaly[..., healthy].mean() / anomaly[label].mean(), abs=1e-6)


def test_ambiguous_and_skipped_slices_do_not_change_the_slice_auroc(tmp_path):
    case = make_case("case", 0)
    case["probability"][..., 2] = 0.99  # 4 lesion pixels: neither healthy nor diseased
    _, summary, _ = evaluate([case], tmp_path)
    assert summary["slice_auroc"] == 1
    _, summary, _ = evaluate([case], tmp_path, min_lesion_area=1)
    assert summary["slice_auroc"] == 1
    case["probability"][..., 2] = 0.01
    _, summary, _ = evaluate([case], tmp_path, min_lesion_area=1)
    assert summary["slice_auroc"] < 1


def test_the_best_dice_of_lesion_slices_does_not_fall_with_what_is_marked_in_healthy_ones(tmp_path):
    case = make_case("case", 0)
    _, before, _ = evaluate([case], tmp_path)
    case["map"][..., 6] = 1.5
    _, after, _ = evaluate([case], tmp_path)
    assert after["best_dice_lesion_slices"] == before["best_dice_lesion_slices"]
    assert after["best_dice"] < before["best_dice"] - 0.1


def test_probabilities_close_to_one_stay_apart(tmp_path):
    case = make_case("case", 0)
    case["probability"][..., 1:-1] = 0.9999
    case["probability"][..., 3:6] = 0.99999
    assert evaluate([case], tmp_path)[1]["slice_auroc"] == 1


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_slices_may_run_along_any_axis(tmp_path, slice_dim):
    case = make_case("case", 0)
    moved = {key: value if key == "case" else value.movedim(3, slice_dim + 1) for key, value in case.items()}
    rows, summary, _ = evaluate([case], tmp_path)
    moved_rows, moved_summary, _ = evaluate([moved], tmp_path, slice_dim=slice_dim)
    assert moved_rows["case"] == pytest.approx(rows["case"])
    assert moved_summary == pytest.approx(summary)


def test_a_cohort_without_lesions_has_empty_figures_and_valid_json(tmp_path):
    rows, summary, metrics = evaluate([make_case("healthy", 0, lesion=False)], tmp_path)
    assert rows["healthy"]["dice"] == 0 and rows["healthy"]["true_ml"] == 0
    assert math.isnan(rows["healthy"]["auroc"]) and math.isnan(rows["mean"]["slice_dice"])
    assert summary["auroc"] is None and summary["healthy_ratio"] is None and math.isnan(metrics["auroc"])


def test_a_second_run_starts_from_nothing(tmp_path):
    case = make_case("case", 0)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": torch.zeros(1, 1)}],
        network=torch.nn.Identity(),
        postprocessing=lambda item: case,
    )
    AnomalyMetrics(tmp_path).attach(evaluator)
    evaluator.run()
    first = (tmp_path / "metrics.csv").read_bytes()
    evaluator.run()
    assert (tmp_path / "metrics.csv").read_bytes() == first
    assert evaluator.state.metrics["num_cases"] == 1


def test_a_case_without_label_is_named_with_the_mend(tmp_path):
    case = make_case("patient_7", 0)
    del case["label"]
    with pytest.raises(ValueError, match="patient_7 has no label.*leave the case out"):
        evaluate([case], tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_network_has_in_place_of_the_probability_is_measured_as_one(tmp_path):
    case = make_case("a", 0)
    expected = evaluate([case], tmp_path / "probability")[1]
    case["abnormality"] = case.pop("probability")
    assert evaluate([case], tmp_path / "abnormality", slice_score="abnormality")[1] == expected


@pytest.mark.parametrize("key", ["label", "pred", "probability"])
def test_a_volume_of_another_shape_than_the_map_is_named(tmp_path, key):
    case = make_case("patient_7", 0)
    case[key] = case[key][..., :-1]
    with pytest.raises(ValueError, match=rf"patient_7: {key} has shape \(1, 24, 20, 7\).*\(1, 24, 20, 8\)"):
        evaluate([case], tmp_path)


def test_a_map_with_nan_is_named(tmp_path):
    case = make_case("patient_7", 0)
    case["map"][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="patient_7.*NaN"):
        evaluate([case], tmp_path)


def test_the_files_are_whole_under_their_names_and_nothing_else_is_left(tmp_path, caplog):
    folder = tmp_path / "made" / "here"
    folder.parent.mkdir()
    with caplog.at_level(logging.INFO, logger="scripts.metrics"):
        evaluate([make_case("case", 0)], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["here_files.csv", "metrics.csv", "metrics_summary.json"]
    assert "healthy_ratio" in caplog.text


def image_case(name, class_label, probability, level, found=0.0):
    volumes = {"map": torch.full((1, 4, 4, 1), level), "probability": torch.full((1, 4, 4, 1), probability)}
    pred = torch.zeros(1, 4, 4, 1)
    pred.view(-1)[: int(16 * found)] = 1
    return {"case": name, "class_label": class_label, "pred": pred, **volumes}


def test_images_with_a_class_and_no_mask_are_told_apart_by_probability_and_map(tmp_path):
    cases = [image_case("a", 0, 0.1, 0.01), image_case("b", 0, 0.6, 0.03, 0.25), image_case("c", 1, 0.5, 0.2, 0.5)]
    metrics = ImageMetrics(tmp_path)
    metrics.rows = [metrics._evaluate(case) for case in cases]
    figures = metrics._summarise({}, {})
    assert (figures["num_healthy"], figures["num_diseased"]) == (2, 1)
    assert figures["auroc"] == 0.5 and figures["map_auroc"] == 1
    assert figures["healthy_ratio"] == pytest.approx(0.1)
    assert figures["found_in_healthy"] == 0.5 and figures["found_in_diseased"] == 1 and metrics.rows[1]["found"] == 0.25
    metrics.rows = metrics.rows[:2]
    assert all(math.isnan(metrics._summarise({}, {})[key]) for key in ("auroc", "map_auprc", "healthy_ratio"))


def test_an_image_without_a_class_is_named_with_the_mend(tmp_path):
    with pytest.raises(ValueError, match="Case a has no class.*healthy/ and diseased/"):
        ImageMetrics(tmp_path)._evaluate({"case": "a"})


def test_the_control_and_what_is_found_in_slices_without_a_lesion_are_measured_as_the_mask_is(tmp_path):
    case = make_case("a", 0)
    case["control"] = MetaTensor((case["label"] > 0).float(), affine=AFFINE)
    case["control"][0, 0, 0, 1] = 1
    rows, figures, _ = evaluate([case], tmp_path)
    label, pred = case["label"][0].numpy() > 0, case["pred"][0].numpy() > 0
    healthy = ~label.any(axis=(0, 1))
    assert rows["a"]["healthy_ml"] == pytest.approx(pred[..., healthy].sum() * 0.01)
    assert rows["a"]["control_healthy_ml"] == pytest.approx(0.01)
    assert rows["a"]["control_dice"] == pytest.approx(raw_dice(case["control"][0].numpy() > 0, label))
    slices = [raw_dice(pred[..., i], label[..., i]) for i in range(1, 7)]
    assert rows["a"]["all_slices_dice"] == pytest.approx(np.mean(slices), abs=1e-6)
    assert figures["control_dice_mean"] == rows["a"]["control_dice"]


def test_a_healthy_slice_where_nothing_is_found_has_a_dice_of_one_among_all_slices(tmp_path):
    case = make_case("a", 0, lesion=False)
    case["pred"] = torch.zeros_like(case["pred"])
    case["pred"][0, 0, 0, 1] = 1
    rows, _, _ = evaluate([case], tmp_path)
    assert rows["a"]["all_slices_dice"] == pytest.approx(5 / 6) and math.isnan(rows["a"]["slice_dice"])


def test_figures_of_the_cohort_have_intervals_over_the_cases(tmp_path):
    cases = [make_case(str(seed), seed) for seed in range(4)]
    rows, figures, _ = evaluate(cases, tmp_path)
    dices = [rows[case["case"]]["dice"] for case in cases]
    assert (figures["dice_low"], figures["dice_high"]) == pytest.approx(bootstrap_interval(dices))
    assert min(dices) <= figures["dice_low"] < figures["dice_mean"] < figures["dice_high"] <= max(dices)
    assert "control_dice_mean" not in figures


def test_a_lesion_is_found_by_a_tenth_of_it_and_lesions_that_touch_at_a_corner_are_one():
    label, pred = np.zeros((12, 12, 4), bool), np.zeros((12, 12, 4), bool)
    label[0:2, 0:2, 0] = label[2, 2, 1] = True  # one lesion of 5 voxels
    label[5:10, 5:9, 2] = True  # of 20
    pred[0, 0, 0] = pred[5, 5, 2] = pred[11, 11, 3] = True
    assert lesions_found(pred, label, 0.02) == [(pytest.approx(0.1), True), (pytest.approx(0.4), False)]
    assert lesions_found(~label, np.zeros_like(label), 1.0) == []


def test_figures_of_a_cohort_count_every_slice_and_lesion():
    label = np.zeros((10, 10, 3), bool)
    label[2:6, 2:7, 1] = True  # 20 voxels of 0.1 ml
    anomaly = label * 0.8
    anomaly[0, 0, 0] = 0.5
    figures = cohort_figures([anomaly] * 2, [anomaly > 0.4] * 2, [anomaly > 0.6, anomaly > 0.9], [(label, 0.1)] * 2)
    assert figures["dice"] == figures["dice_low"] == figures["dice_high"] == pytest.approx(40 / 41)
    assert figures["own_dice"] == 0.5 and figures["own_dice_low"] == 0 and figures["own_dice_high"] == 1
    assert figures["recall 1 to 10 ml"] == 1 and np.isnan(figures["recall above 10 ml"])
    assert figures["best_dice"] == figures["auprc"] == figures["slice_auroc"] == 1
    assert figures["false_ml"] == pytest.approx(0.1) and figures["own_false_ml"] == 0
    assert [row["found_ml"] for row in figures["cases"]] == pytest.approx([2.1, 2.1])
