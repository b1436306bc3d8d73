from __future__ import annotations

import json
import logging
import math

from stand_in import StandInNet

from scripts.tasks.generation.benchmark import benchmark_sampling


def test_the_benchmark_times_both_samplings_from_the_same_noise(tmp_path, monkeypatch, caplog):
    configs = tmp_path / "configs"
    configs.mkdir()
    images = {"_target_": "stand_in.squares", "number": 20, "section": "validation"}
    evaluate = {"validation": images, "features": {"_target_": "stand_in.FewFeatures"}, "batch_size": 4}
    (configs / "inference.json").write_text("{}")
    (configs / "evaluate.json").write_text(json.dumps(evaluate))
    networks = {"default": StandInNet(), "published": StandInNet(**StandInNet.published)}
    with caplog.at_level(logging.INFO):
        rows = benchmark_sampling(tmp_path, networks, "nowhere", 6, "test")
    assert [row["method"] for row in rows] == ["published", "default", "default, batches of 4"]
    assert len({row["mmd"] for row in rows}) == 1 and math.isfinite(rows[0]["frechet"])
    assert "6 image(s)" in caplog.text and "Fréchet distance" in caplog.text
