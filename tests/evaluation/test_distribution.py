"""Samples against a set: which clips are taken, what is measured on them, and that processes change nothing."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from tiny_original import build
from torch import nn

from ardiff import ARDiffPipeline, cli
from ardiff.data.benchmarks import open_set
from ardiff.data.scenes import SCENES, render
from ardiff.data.video import write_video
from ardiff.evaluation.distribution import Protocol, RealClips, evaluate_set, format_set_report
from ardiff.evaluation.features import clip_features
from ardiff.evaluation.frechet import frechet_distance
from ardiff.evaluation.prediction import psnr
from ardiff.evaluation.sampling import open_pipeline


CLASSES = ("balls", "clouds", "sunset")


@pytest.fixture
def folder(tmp_path):
    """Three videos of 12 frames of each class of the tiny pipeline, and one that is too short."""
    for scene in CLASSES:
        (tmp_path / "set" / scene).mkdir(parents=True)
        for seed in range(3):
            write_video(render(scene, 12, 32, seed), tmp_path / "set" / scene / f"{seed}.gif")
    write_video(render("balls", 3, 32, 9), tmp_path / "set" / "balls" / "short.gif")
    return tmp_path / "set"


@pytest.fixture
def protocol(folder):
    return Protocol(
        data=str(folder),
        num_clips=4,
        num_frames=6,
        gaps=(0, 1),
        num_inference_steps=2,
        guidance_scale=8.0,
        bootstrap=0,
        seed=3,
    )


def measure(model, protocol, **arguments):
    return evaluate_set(model, protocol, batch_size=3, progress=False, **arguments)


# --- real clips ---------------------------------------------------------------------------------------------------


def test_random_clips_take_every_video_before_one_comes_again(protocol):
    clips = RealClips(protocol, protocol.data, 32)
    taken = list(itertools.islice(clips, 18))
    for half in (taken[:9], taken[9:]):
        assert len({clip.name for clip in half}) == 9
    assert [clip.name for clip in taken[:9]] != [clip.name for clip in taken[9:]]
    assert "short.gif must have at least 6 frames" in clips.left_out["balls/short.gif"]
    videos = {video.name: video.read(32) for video in open_set(protocol.data).videos}
    starts = set()
    for clip in taken:
        windows = {start: videos[clip.name][start : start + 6] for start in range(7)}
        starts.add(next(start for start, window in windows.items() if np.array_equal(window, clip.frames)))
        assert clip.class_name == clip.name.split("/")[0]
    assert len(starts) >= 4
    again = RealClips(protocol, protocol.data, 32)
    assert [clip.name for clip in itertools.islice(again, 18)] == [clip.name for clip in taken]
    other = RealClips(dataclasses.replace(protocol, seed=4), protocol.data, 32)
    assert [clip.name for clip in itertools.islice(other, 18)] != [clip.name for clip in taken]


def test_first_clips_are_the_beginnings_each_once_and_strided(protocol):
    first = dataclasses.replace(protocol, clips="first", stride=2)
    taken = list(RealClips(first, protocol.data, 16))
    assert len(taken) == len({clip.name for clip in taken}) == 9
    videos = {video.name: video.read(16) for video in open_set(protocol.data).videos}
    for clip in taken:
        assert np.array_equal(clip.frames, videos[clip.name][:11:2])


def test_clips_of_scenes_are_as_in_training():
    protocol = Protocol(data="scenes", num_clips=2, num_frames=4, seed=1)
    taken = list(itertools.islice(RealClips(protocol, "scenes", 16), 2 * len(SCENES)))
    assert [clip.class_name for clip in taken] == 2 * list(SCENES)
    assert len({clip.frames.tobytes() for clip in taken}) == len(taken)
    assert taken[0].frames.shape == (4, 16, 16, 3)


# --- the report ---------------------------------------------------------------------------------------------------


def test_figures_are_the_distances_of_the_clips_that_are_named(tiny_pipeline, protocol, tmp_path):
    report = measure(tiny_pipeline, protocol, out=tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    taken = list(itertools.islice(RealClips(protocol, protocol.data, 32), 8))
    frames = np.stack([clip.frames for clip in taken])
    real, others = clip_features(tiny_pipeline.vae, frames[:4]), clip_features(tiny_pipeline.vae, frames[4:])
    floor = report["samples"]["floor"]
    assert floor["frechet_distance"] == pytest.approx(frechet_distance(others, real), rel=1e-3)
    for gap in (0, 1):
        videos = tiny_pipeline(
            class_labels=[clip.class_name for clip in taken[:4]], num_frames=6, ar_step=gap, num_inference_steps=2,
            guidance_scale=8.0, generator=[torch.Generator().manual_seed(600_000 + i) for i in range(4)], output_type="np",
        ).frames  # fmt: skip
        sampled = clip_features(tiny_pipeline.vae, (videos * 255).round().astype(np.uint8))
        figures = report["samples"]["gaps"][str(gap)]
        assert figures["frechet_distance"] == pytest.approx(frechet_distance(sampled, real), rel=0.02)
        assert figures["ratio_to_floor"] == figures["frechet_distance"] / floor["frechet_distance"]
    assert report["counts"] == {"0": {"frame_evaluations": 12}, "1": {"frame_evaluations": 17}}
    assert report["real"]["num_floor_clips_of_the_same_videos"] == 0
    assert list(report["real"]["left_out"]) == ["balls/short.gif"]
    assert report["settings"]["size_px"] == 32
    text = format_set_report(report)
    assert "4 random clips of 6 frames, stride 1, 32 px" in text
    assert f"{floor['frechet_distance']:.2f}" in text
    assert "left out, damaged or too short: 1 of 10 videos" in text


def test_a_floor_needs_as_many_clips_again(tiny_pipeline, protocol):
    few = dataclasses.replace(protocol, clips="first", num_clips=6, gaps=(1,), bootstrap=5)
    report = measure(tiny_pipeline, few)
    assert report["samples"]["floor"] is None
    figures = report["samples"]["gaps"]["1"]
    low, high = figures["frechet_distance_interval"]
    assert low <= figures["frechet_distance"] <= high
    assert "ratio_to_floor" not in figures
    assert "the set gives 3 more clips, not as many again" in format_set_report(report)
    with pytest.raises(ValueError, match=r"`num_clips` must be at most the 9 clips that .* gives but is 10; 1 videos"):
        measure(tiny_pipeline, dataclasses.replace(few, num_clips=10))
    again = measure(tiny_pipeline, dataclasses.replace(protocol, num_clips=9, gaps=(1,)))
    assert again["real"]["num_floor_clips_of_the_same_videos"] == 9
    assert "9 of its clips are from videos that the real set has too" in format_set_report(again)


def test_prediction_of_real_clips(tiny_pipeline, protocol):
    report = measure(tiny_pipeline, dataclasses.replace(protocol, prediction_gaps=(1,), gaps=(1,)))
    figures = report["prediction"]["1"]
    taken = list(itertools.islice(RealClips(protocol, protocol.data, 32), 4))
    real = np.stack([clip.frames for clip in taken])
    repeated = np.repeat(real[:, 3:4], 2, axis=1)
    assert figures["repeat_psnr_db"] == pytest.approx(psnr(repeated, real[:, 4:]).mean())
    videos = tiny_pipeline(
        prompt_frames=real[:, :4], class_labels=[clip.class_name for clip in taken], num_frames=6, ar_step=1,
        num_inference_steps=2, guidance_scale=8.0,
        generator=[torch.Generator().manual_seed(700_000 + i) for i in range(4)], output_type="np",
    ).frames  # fmt: skip
    expected = psnr((videos[:, 4:] * 255).round().astype(np.uint8), real[:, 4:]).mean()
    assert figures["prediction_psnr_db"] == pytest.approx(expected, abs=0.02)
    assert figures["below_ceiling_db"] == figures["ceiling_psnr_db"] - figures["prediction_psnr_db"]
    assert "4 frames continued to 6, gap 1" in format_set_report(report)


class Detector(nn.Module):
    """The call of the usual I3D file: the mean of every colour, and of its changes."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        return torch.cat([x.mean((2, 3, 4)), x.diff(dim=2).abs().mean((2, 3, 4))], 1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_videos_against_a_set_from_the_command_line(tiny_pipeline, folder, tmp_path, capsys):
    """FVD of videos that somebody made, through a TorchScript file as the usual one is."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    torch.jit.save(torch.jit.script(Detector()), tmp_path / "i3d.pt")
    common = ["evaluate", "--model", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path / "r.json")]
    real = ["--data", str(folder), "--num-samples", "4", "--num-frames", "9", "--bootstrap", "0"]
    i3d = ["--i3d", str(tmp_path / "i3d.pt")]
    assert cli.main([*common, *real, "--videos", str(folder), *i3d]) == 2
    assert "is TorchScript: a program of whoever made it" in capsys.readouterr().err
    assert cli.main([*common, *real, "--videos", str(folder), *i3d, "--trust-torchscript"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    # The same clips in both sets: no distance, on any features.
    assert report["samples"]["videos"]["fvd"] == pytest.approx(0.0, abs=1e-6)
    protocol = Protocol(data=str(folder), num_frames=9)
    taken = np.stack([clip.frames for clip in itertools.islice(RealClips(protocol, str(folder), 32), 8)]).astype(float)
    changes = np.abs(np.diff(taken, axis=1)).mean((1, 2, 3))
    vectors = torch.from_numpy(np.concatenate([taken.mean((1, 2, 3)), changes], 1))
    floor = report["samples"]["floor"]["fvd"]
    assert floor == pytest.approx(frechet_distance(vectors[:4], vectors[4:]), rel=1e-3)
    printed = capsys.readouterr().out
    assert ["FVD-9", f"{floor:.2f}", "0.00"] in [line.split() for line in printed.splitlines()]
    assert f"TorchScript i3d.pt, SHA-256 {report['networks']['fvd']['sha256']}" in printed
    assert cli.main([*common, *i3d]) == 2
    assert "`--data` must name the real clips" in capsys.readouterr().err


def test_processes_change_nothing(tiny_pipeline, protocol, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    # With a commit timestep that is not the model's own: the processes load the model and must hear of it.
    settings = dataclasses.replace(protocol, gaps=(1,), num_clips=5, commit_timestep=500)
    assert measure(tmp_path / "model", settings, processes=2) == measure(tmp_path / "model", settings)
    with pytest.raises(ValueError, match="`model` must be a folder or a Hub id for more than one process"):
        measure(ARDiffPipeline.from_pretrained(tmp_path / "model"), protocol, processes=2)


def test_another_commit_timestep(tiny_pipeline, protocol):
    own = dataclasses.replace(protocol, gaps=(2,))
    noisy = dataclasses.replace(own, commit_timestep=500)
    before = measure(tiny_pipeline, own)
    one = measure(tiny_pipeline, noisy)
    assert [report["settings"]["commit_timestep"] for report in (before, one)] == [0, 500]
    assert one["samples"]["gaps"] != before["samples"]["gaps"]
    assert one["real"] == before["real"]
    assert tiny_pipeline.scheduler.config.commit_timestep == 0
    with pytest.raises(ValueError, match=r"`commit_timestep` must be in \[0, 999\] but is 1000"):
        measure(tiny_pipeline, dataclasses.replace(own, commit_timestep=1000))


def test_another_commit_timestep_leaves_a_pipeline_of_its_kind(tmp_path):
    build(compat=True).save_pretrained(tmp_path)
    given = ARDiffPipeline.from_pretrained(tmp_path)
    opened = open_pipeline(given, "cpu", 80)
    assert (type(opened), opened.config.compat, opened.name_or_path) == (type(given), True, str(tmp_path))
    assert (opened.scheduler.config.commit_timestep, given.scheduler.config.commit_timestep) == (80, 0)
    assert opened.transformer is given.transformer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clips": 1}, r"`num_clips` must be in \[2, 100000\] but is 1"),
        ({"clips": "last"}, "`clips` must be one of first, random but is 'last'"),
        ({"num_frames": 1}, "`num_frames` must be at least 2 for features of motion but is 1"),
        ({"stride": 0}, r"`stride` must be in \[1, 10000\] but is 0"),
        ({"bootstrap": 1}, "`bootstrap` must be 0 or at least 2 but is 1"),
        ({"dtype": "float16"}, "`dtype` must be one of float32, bfloat16"),
        ({"gaps": (3,)}, "`ar_step` must"),
        ({"gaps": ()}, "`gaps` must hold at least one entry"),
        ({"prediction_gaps": (1,), "num_frames": 4}, "`num_frames` must be more than the 4 prompt frames but is 4"),
        ({"data": "scenes", "clips": "first"}, "`stride` must be 1 and `clips` random for rendered scenes"),
        ({"data": "nowhere"}, "`data` must name a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_pipeline, protocol, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        measure(tiny_pipeline, dataclasses.replace(protocol, **changes), out=tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()
