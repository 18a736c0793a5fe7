"""Plots: what their numbers are, that they are 1,600 pixels wide, and what they refuse."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from ardiff import ad_schedule, bundled_model
from ardiff.evaluation import plots


pytest.importorskip("matplotlib")


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_picture(path):
    picture = Image.open(path)
    assert picture.width == 1600
    assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_laws_are_densities_and_those_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "NUM_LAW_DRAWS", 20_000)
    for path in plots.plot(["laws"], tmp_path):
        assert path.exists()
    check_picture(tmp_path / "laws.png")
    share = {}
    for row in read_csv(tmp_path / "laws.csv"):
        share.setdefault((row["law"], int(row["frame"])), []).append(float(row["times as often as uniform"]))
    assert len(share) == 4 * 16
    np.testing.assert_allclose([np.mean(values) for values in share.values()], 1.0)
    for frame in (0, 8, 15):
        assert max(abs(np.array(share["independent", frame]) - 1)) < 0.3
        assert max(abs(np.array(share["synchronous", frame]) - 1)) < 0.3
    # FoPP: the first frame mostly clean, the last mostly noisy, and every timestep seen in both; incremental: not so.
    assert share["fopp", 0][0] > 5 > 1 > share["fopp", 0][-1] > 0
    assert share["fopp", 15][-1] > 5 > 1 > share["fopp", 15][0] > 0
    assert share["incremental", 0][-1] == share["incremental", 15][0] == 0


def test_plans_are_the_plans(tmp_path):
    plots.plot(["plans"], tmp_path)
    check_picture(tmp_path / "plans.png")
    rows = [row for row in read_csv(tmp_path / "plans.csv") if row["plan"] == "gap 5"]
    found = np.array([int(row["denoising steps done"]) for row in rows]).reshape(-1, 16)
    assert np.array_equal(found, ad_schedule(16, 50, 5))


def test_gaps_are_those_of_the_report(tmp_path):
    report = json.loads((bundled_model() / "evaluation.json").read_text())
    plots.plot(["gaps"], tmp_path, report=report)
    check_picture(tmp_path / "gaps.png")
    found = {row["gap"]: float(row["Frechet distance"]) for row in read_csv(tmp_path / "gaps.csv")}
    expected = {gap: figures["frechet_distance"] for gap, figures in report["samples"]["gaps"].items()}
    assert found == expected | {"real clips": report["samples"]["floor"]["frechet_distance"]}


def test_model_without_scenes_is_refused(tmp_path, tiny_pipeline):
    tiny_pipeline.transformer.register_to_config(class_names=["cats"])
    with pytest.raises(ValueError, match=r"`model` must know scenes \(balls, .*\) but has \['cats'\]"):
        plots.plot(["loss"], tmp_path, pipe=tiny_pipeline)


def test_loss_and_samples_of_a_model(tmp_path, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(plots, "SAMPLE_GAPS", (0, 3))
    monkeypatch.setattr(plots, "SAMPLE_STEPS", 3)
    plots.plot(["loss", "samples"], tmp_path, pipe=tiny_pipeline)
    check_picture(tmp_path / "loss.png")
    check_picture(tmp_path / "samples.png")
    rows = read_csv(tmp_path / "loss.csv")
    assert [int(row["timestep"]) for row in rows] == list(plots.LOSS_TIMESTEPS)
    assert all(float(row["all frames noisy"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (["law"], {}, "`kinds` must be of laws, plans, loss, gaps, samples but has law"),
        (["gaps"], {"report": {"samples": {}}}, "`report` must be of `ardiff evaluate` on scenes"),
        (["gaps"], {}, "`report` must be given for gaps"),
        (["samples"], {}, "`pipe` must be given for samples"),
    ],
)
def test_bad_requests_are_refused(tmp_path, kinds, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot(kinds, tmp_path, **options)


def test_missing_matplotlib_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib must be installed .* \"ardiff\[plots\]\""):
        plots.plot(["plans"], tmp_path)


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results.json"):
        plots.plot_ablation(tmp_path)
