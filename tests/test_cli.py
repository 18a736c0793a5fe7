"""The `ardiff` command on the tiny pipeline: options, errors in one line, and frames equal to those of `stream()`."""

import argparse
import dataclasses
import json
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from ardiff import ARDiffPipeline, cli
from ardiff.cli.generation import parse_gaps, read_prompt
from ardiff.cli.options import parse_gap_list
from ardiff.cli.training import add_config_options, given_options
from ardiff.data.scenes import contact_sheet
from ardiff.data.video import read_image, read_video


SHORT = ["--steps", "3", "--num-frames", "4", "--ar-step", "1"]


@pytest.fixture
def model(tiny_pipeline, tmp_path):
    folder = tmp_path / "model"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


def frames_of_strip(path, num_frames):
    return np.stack(np.split(read_image(path), num_frames, axis=1))


def run(*argv):
    """Run the command in this process; it must succeed."""
    assert cli.main([str(arg) for arg in argv]) == 0


def error_of(capsys, *argv):
    """Run the command, which must refuse its input; the line it says."""
    assert cli.main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("ardiff: ")
    assert captured.count("\n") == 1
    return captured


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["0", "1", "3", "0,3,1"])
def test_generate_gives_the_frames_of_stream(model, tmp_path, gap, capsys):
    out = tmp_path / "strip.png"
    pipe = ARDiffPipeline.from_pretrained(model)
    scene = pipe.class_names[1]
    run(
        "generate",
        "--model",
        model,
        "--device",
        "cpu",
        *SHORT,
        "--scene",
        scene,
        "--ar-step",
        gap,
        "--seed",
        7,
        "--out",
        out,
    )
    steps = pipe.stream(
        class_labels=[scene],
        num_frames=4,
        num_inference_steps=3,
        ar_step=parse_gaps(gap),
        guidance_scale=2.0,
        generator=torch.Generator("cpu").manual_seed(7),
    )
    expected = np.stack([frame for step in steps for _, frame in step.finished])
    np.testing.assert_array_equal(frames_of_strip(out, 4), expected)
    assert "seed 7" in capsys.readouterr().out


def test_generate_without_scene_and_seed_says_its_seed(model, tmp_path, capsys):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    run("generate", "--model", model, "--device", "cpu", *SHORT, "--out", first)
    seed = capsys.readouterr().out.split()[1]
    run("generate", "--model", model, "--device", "cpu", *SHORT, "--seed", seed, "--out", second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_generate_writes_every_format(model, tmp_path, suffix):
    out = tmp_path / f"video{suffix}"
    run("generate", "--model", model, "--device", "cpu", *SHORT, "--fps", 4, "--out", out)
    if suffix == ".mp4":
        assert len(read_video(out)) == 4
    else:
        with Image.open(out) as image:
            assert image.n_frames == 4


def test_prompt_is_images_and_the_first_frames_of_videos(tmp_path):
    pictures = np.arange(3, dtype=np.uint8).repeat(16 * 16 * 3).reshape(3, 16, 16, 3) * 80
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    np.testing.assert_array_equal(np.stack(read_prompt(paths, None, 16)), pictures)
    np.testing.assert_array_equal(np.stack(read_prompt(paths, 2, 16)), pictures[:2])
    assert read_prompt([], None, 16) == []


def test_prompt_video_gives_four_frames_unless_told(model, tmp_path):
    clip = tmp_path / "clip.mp4"
    run(
        "generate", "--model", model, "--device", "cpu", "--steps", 2, "--num-frames", 6, "--ar-step", 2, "--out", clip
    )
    assert len(read_prompt([clip], None, 32)) == 4
    assert len(read_prompt([clip], 5, 32)) == 5
    out = tmp_path / "longer.png"
    short = ["--steps", 2, "--num-frames", 8, "--ar-step", 2]
    run("generate", "--model", model, "--device", "cpu", *short, "--prompt", clip, "--out", out)
    assert len(frames_of_strip(out, 8)) == 8


@pytest.mark.parametrize(
    ("profile", "gaps"), [(["chunks", "--chunk", "2"], "0,4,0,4"), (["ramp", "--ar-step", "4"], "0,1,3,4")]
)
def test_a_profile_is_a_list_of_gaps(model, tmp_path, profile, gaps):
    same = ["generate", "--model", model, "--device", "cpu", "--steps", 4, "--num-frames", 5, "--seed", 1]
    run(*same, "--profile", *profile, "--out", tmp_path / "profile.png")
    run(*same, "--ar-step", gaps, "--out", tmp_path / "gaps.png")
    run(*same, "--ar-step", 2, "--out", tmp_path / "even.png")
    assert (tmp_path / "profile.png").read_bytes() == (tmp_path / "gaps.png").read_bytes()
    assert (tmp_path / "profile.png").read_bytes() != (tmp_path / "even.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ar-step", "4"], "4"),
        (["--ar-step", "1,1"], "ar_step"),
        (["--ar-step", "1,1,1", "--profile", "ramp"], "--ar-step"),
        (["--profile", "chunks", "--chunk", "0"], "chunk"),
        (["--scene", "submarines"], "submarines"),
        (["--out", "video.avi"], "video.avi"),
        (["--out", "nowhere/video.mp4"], "nowhere"),
        (["--fps", "61"], "--fps"),
        (["--prompt", "missing.mp4"], "missing.mp4"),
        (["--prompt", "missing.png"], "missing.png"),
        (["--prompt-frames", "0"], "--prompt-frames"),
        (["--num-frames", "0"], "num_frames"),
    ],
)
def test_generate_refuses_in_one_line(model, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    assert named in error_of(capsys, "generate", "--model", model, "--device", "cpu", *SHORT, *options)
    assert not list(tmp_path.glob("video*"))


def test_missing_model_is_refused_in_one_line(tmp_path, capsys):
    assert "nowhere" in error_of(capsys, "generate", "--model", tmp_path / "nowhere", "--device", "cpu")


# --- train ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "options", "named"),
    [
        ("train-autoencoder", ["--stage", "decoder"], "init_from"),
        ("train-autoencoder", ["--stage", "all"], "stage"),
        ("train", ["--timesteps", "sorted"], "timesteps"),
        ("train", ["--draws-per-clip", "0"], "draws_per_clip"),
    ],
)
def test_training_refuses_in_one_line(tmp_path, monkeypatch, capsys, verb, options, named):
    monkeypatch.chdir(tmp_path)
    assert named in error_of(capsys, verb, *options)
    assert list(tmp_path.iterdir()) == []


# --- evaluate ---------------------------------------------------------------------------------------------------


def test_evaluate_prints_and_saves_its_report(model, tmp_path, capsys):
    out, samples = tmp_path / "report.json", tmp_path / "samples"
    short = ["--scenes", "balls", "clouds", "--num-clips", 2, "--gaps", "0,1", "--prediction-gaps", 1, "--steps", 1]
    run("evaluate", "--model", model, "--device", "cpu", *short, "--out", out, "--samples", samples)
    printed = capsys.readouterr().out
    assert {"autoencoder", "prediction", "samples"} <= set(json.loads(out.read_text()))
    assert "balls" in printed
    assert "clouds" in printed
    assert len(list(samples.glob("*.png"))) == 2


def test_evaluate_refuses_a_scene_that_the_model_does_not_know(model, tmp_path, capsys):
    out = tmp_path / "report.json"
    refused = error_of(capsys, "evaluate", "--model", model, "--device", "cpu", "--scenes", "pendulum", "--out", out)
    assert "pendulum" in refused


def test_evaluate_with_another_commit_timestep(model, tmp_path, capsys):
    short = "--scenes balls --num-clips 2 --gaps 1 --prediction-gaps 1 --steps 2 --device cpu".split()
    reports = {}
    for commit in (0, 500):
        given = [] if commit == 0 else ["--commit-timestep", commit]
        run("evaluate", "--model", model, *short, *given, "--out", tmp_path / "report.json")
        reports[commit] = json.loads((tmp_path / "report.json").read_text())
    assert [report["settings"]["commit_timestep"] for report in reports.values()] == [0, 500]
    assert reports[500]["autoencoder"] == reports[0]["autoencoder"]
    for part in ("prediction", "samples"):
        assert reports[500][part] != reports[0][part]
    capsys.readouterr()
    refused = error_of(capsys, "evaluate", "--model", model, *short, "--commit-timestep", 1000)
    assert "`commit_timestep` must be in [0, 999] but is 1000" in refused


# --- scenes -----------------------------------------------------------------------------------------------------


def test_scenes_writes_the_contact_sheet(tmp_path):
    out = tmp_path / "scenes.png"
    run("scenes", "--size", 16, "--num-frames", 3, "--seed", 5, "--out", out)
    np.testing.assert_array_equal(read_image(out), contact_sheet(size=16, num_frames=3, seed=5))


# --- options ----------------------------------------------------------------------------------------------------


def test_gaps():
    assert parse_gaps("5") == 5
    assert parse_gaps("5,0,50") == [5, 0, 50]
    assert parse_gap_list("0,5,50") == [0, 5, 50]


def test_a_gap_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--ar-step", "five"])
    assert stop.value.code == 2
    assert "'five'" in capsys.readouterr().err


def option(default, text="50 % of it"):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = option(10, "how long")
    rate: float = option(0.5)
    folder: str | None = option(None)
    limit: int | None = option(3)
    flip: bool = option(True)
    mode: Literal["fast", "fine"] = option("fine")
    widths: tuple[int, ...] = option((1, 2))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Config(steps=20)),
        (["--preset", "other"], Config(rate=2.0)),
        (["--steps", "7", "--rate", "1e-3"], Config(steps=7, rate=1e-3)),
        (["--folder", "clips", "--limit", "none"], Config(steps=20, folder="clips", limit=None)),
        (["--no-flip", "--mode", "fast"], Config(steps=20, flip=False, mode="fast")),
        (["--widths", "3", "4", "5"], Config(steps=20, widths=(3, 4, 5))),
    ],
)
def test_config_options_replace_fields_of_the_preset(argv, expected):
    presets = {"scenes-64-cpu": Config(steps=20), "other": Config(rate=2.0)}
    parser = argparse.ArgumentParser()
    add_config_options(parser, Config, sorted(presets))
    args = parser.parse_args(argv)
    assert dataclasses.replace(presets[args.preset], **given_options(args, Config)) == expected
    assert "how long" in parser.format_help()
    assert "50 % of it" in parser.format_help()


# --- the whole command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"ardiff {verb}" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import json, sys\nfrom ardiff.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print(json.dumps(sorted({'torch', 'diffusers', 'gradio', 'numpy'} & set(sys.modules))))"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert all(any(line.split()[:1] == [verb] for line in lines) for verb in cli.VERBS)
    assert json.loads(lines[-1]) == []


# --- ablate, plot -----------------------------------------------------------------------------------------------


def test_plot_draws_what_is_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run("plot", "plans", "gaps", "--out", tmp_path / "plots")
    written = [tmp_path / "plots" / name for name in ("plans.png", "plans.csv", "gaps.png", "gaps.csv")]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(path.exists() for path in written)


def test_plot_and_ablate_refuse_in_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "has law" in error_of(capsys, "plot", "law", "--out", tmp_path)
    assert "holds no results.json" in error_of(capsys, "plot", "--ablation", tmp_path)
    assert "`num_seeds` must be in [2, 10]" in error_of(
        capsys, "ablate", "--quick", "--seeds", "1", "--out", tmp_path / "a"
    )
    assert "`processes` must be at least 1" in error_of(
        capsys, "ablate", "--quick", "--processes", "0", "--out", tmp_path
    )
