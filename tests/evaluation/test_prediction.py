"""PSNR, held-out clips, and what a continuation is measured on."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from tqdm import tqdm

from ardiff.data.clips import FIRST_TRAINING_SEED, LATEST_START
from ardiff.data.scenes import SCENES, render
from ardiff.evaluation.features import reconstruct
from ardiff.evaluation.prediction import (
    MAX_CLIPS,
    MAX_SEED,
    NUM_FRAMES,
    NUM_PROMPT_FRAMES,
    PARTS,
    HeldOutClip,
    Settings,
    clip_batches,
    generate,
    measure_autoencoder,
    measure_prediction,
    new_frames_psnr,
    psnr,
    render_excerpts,
    render_openings,
    ssim,
)


SETTINGS = Settings(
    scenes=["balls", "sunset"],
    num_clips=2,
    seed=0,
    gaps=[0, 2],
    prediction_gaps=[1],
    num_inference_steps=2,
    guidance_scale=1.0,
    dtype="float32",
    batch_size=3,
)


class Shown(dict):
    """What a measurement shows: (row, scene, index) -> (frames, number of prompt frames)."""

    def add(self, label, clips, frames, num_prompt_frames):
        for clip, clip_frames in zip(clips, frames, strict=True):
            self[label, clip.scene, clip.index] = (clip_frames, num_prompt_frames)


@pytest.fixture
def bar() -> tqdm:
    return tqdm(disable=True)


@pytest.fixture
def clips() -> list[HeldOutClip]:
    return [HeldOutClip(scene=scene, index=index, seed=0) for scene in ("balls", "clouds") for index in range(2)]


def test_psnr_closed_form_clip_by_clip():
    reference = np.full((3, 2, 4, 4, 3), 100, dtype=np.uint8)
    frames = reference.copy()
    frames[1] += 10  # everywhere 10 grey levels
    frames[2, 0] -= 40  # 40 in half of the frames: the error is averaged over the clip, not the decibels over frames
    expected = [100.0, 20 * math.log10(255 / 10), 10 * math.log10(255**2 / (40**2 / 2))]
    assert psnr(frames, reference).tolist() == pytest.approx(expected, abs=1e-5)
    assert psnr(reference, frames).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("frames", "reference", "message"),
    [
        (np.zeros((1, 2, 4, 4, 3), np.uint8), np.zeros((1, 3, 4, 4, 3), np.uint8), "must have the shape of `frames`"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), np.zeros((1, 2, 4, 4, 3)), "must be uint8 but are uint8 and float64"),
    ],
)
def test_psnr_refuses_what_it_cannot_compare(frames, reference, message):
    with pytest.raises(ValueError, match=message):
        psnr(frames, reference)


def test_seeds_are_held_out_and_nobody_shares_one():
    seeds = [
        HeldOutClip(scene=scene, index=index, seed=seed).part_seed(part)
        for seed in (0, 1, MAX_SEED)
        for scene in SCENES
        for part in PARTS
        for index in (0, 1, MAX_CLIPS - 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds)
    assert max(seeds) < min(2**32, FIRST_TRAINING_SEED)


def test_batches_hold_every_clip_once_scene_after_scene():
    batches = list(clip_batches(SETTINGS))
    assert [len(batch) for batch in batches] == [3, 1]
    found = [(clip.scene, clip.index) for batch in batches for clip in batch]
    assert found == [("balls", 0), ("balls", 1), ("sunset", 0), ("sunset", 1)]


def test_openings_start_at_the_first_frame(clips):
    frames = render_openings(clips, 16)
    for clip, clip_frames in zip(clips, frames, strict=True):
        assert np.array_equal(clip_frames, render(clip.scene, NUM_FRAMES, 16, clip.part_seed("clips")))


def test_excerpts_start_as_in_training_and_do_not_depend_on_the_batch():
    clips = [HeldOutClip(scene="sunset", index=index, seed=0) for index in range(24)]
    frames = render_excerpts(clips, "real", 16)
    assert np.array_equal(frames[5:7], render_excerpts(clips[5:7], "real", 16))
    assert not np.array_equal(frames, render_excerpts(clips, "other_real", 16))
    starts = []
    for clip, clip_frames in zip(clips, frames, strict=True):
        scene = render("sunset", LATEST_START + NUM_FRAMES, 16, clip.part_seed("real"))
        excerpts = np.lib.stride_tricks.sliding_window_view(scene, NUM_FRAMES, axis=0)
        matches = [
            start for start, excerpt in enumerate(excerpts) if np.array_equal(np.moveaxis(excerpt, -1, 0), clip_frames)
        ]
        assert len(matches) == 1
        starts += matches
    assert 6 <= starts.count(0) <= 18
    assert max(starts) > LATEST_START // 2


def test_generated_videos_are_the_pipelines_for_the_clips_own_noise(tiny_pipeline, clips, bar):
    frames, evaluations = generate(tiny_pipeline, clips, SETTINGS, 2, bar)
    assert evaluations == NUM_FRAMES * 2 + NUM_FRAMES - 1
    alone = tiny_pipeline(
        class_labels=["clouds"],
        num_frames=NUM_FRAMES,
        ar_step=2,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(clips[2].part_seed("sample_noise")),
        output_type="np",
    ).frames[0]
    assert np.abs(frames[2] / 255.0 - alone).max() <= 1.5 / 255
    assert not np.array_equal(frames[2], frames[3])
    assert np.abs(frames[2:3].astype(int) - generate(tiny_pipeline, clips[2:3], SETTINGS, 2, bar)[0]).max() <= 1


def test_bfloat16_runs_under_autocast_and_stays_close(tiny_pipeline, clips, bar):
    dtypes = []
    tiny_pipeline.transformer.embed.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    full, _ = generate(tiny_pipeline, clips[:1], SETTINGS, 2, bar)
    half, _ = generate(tiny_pipeline, clips[:1], dataclasses.replace(SETTINGS, dtype="bfloat16"), 2, bar)
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    assert 25.0 < psnr(half, full)[0] < 100.0
    assert tiny_pipeline.transformer.dtype == torch.float32


def test_prompt_frames_are_not_counted_in_the_new_ones():
    reference = np.zeros((1, NUM_FRAMES, 4, 4, 3), dtype=np.uint8)
    frames = reference.copy()
    frames[:, :NUM_PROMPT_FRAMES] = 255
    assert new_frames_psnr(frames, reference) == [100.0]
    frames[:, NUM_PROMPT_FRAMES] = 255
    assert new_frames_psnr(frames, reference) == pytest.approx([10 * math.log10(12)])


def test_autoencoder_figures_follow_from_what_is_shown(tiny_pipeline):
    shown = Shown()
    report = measure_autoencoder(tiny_pipeline, SETTINGS, shown.add)
    means = {}
    for scene in ("balls", "sunset"):
        values = []
        for index in range(2):
            real, _ = shown["real", scene, index]
            clip = HeldOutClip(scene=scene, index=index, seed=0)
            assert np.array_equal(real, render(scene, NUM_FRAMES, 32, clip.part_seed("clips")))
            values.append(psnr(shown["reconstruction", scene, index][0][None], real[None])[0])
        means[scene] = np.mean(values)
        assert report["scenes"][scene]["psnr_db"] == pytest.approx(means[scene])
    assert report["mean_psnr_db"] == pytest.approx(sum(means.values()) / 2)
    assert report["lowest_scene"] == min(means, key=means.get)
    assert report["lowest_psnr_db"] == pytest.approx(min(means.values()))


def test_prediction_figures_follow_from_what_is_shown(tiny_pipeline, bar):
    shown = Shown()
    report = measure_prediction(tiny_pipeline, SETTINGS, 1, bar, shown.add)
    for scene in ("balls", "sunset"):
        values = {"prediction_psnr_db": [], "ceiling_psnr_db": [], "repeat_psnr_db": []}
        for index in range(2):
            clip = HeldOutClip(scene=scene, index=index, seed=0)
            real = render_openings([clip], 32)
            prediction, num_marked = shown["prediction, gap 1", scene, index]
            reconstruction = reconstruct(tiny_pipeline.vae, real)
            # Prompt frames come back as the autoencoder decodes them, so the real first four were given.
            assert num_marked == 4
            assert np.abs(prediction[:4].astype(int) - reconstruction[0, :4]).max() <= 1
            repeated = np.stack([real[:, 3]] * 12, axis=1)
            values["prediction_psnr_db"] += [psnr(prediction[None, 4:], real[:, 4:])[0]]
            values["ceiling_psnr_db"] += [psnr(reconstruction[:, 4:], real[:, 4:])[0]]
            values["repeat_psnr_db"] += [psnr(repeated, real[:, 4:])[0]]
        found = report["scenes"][scene]
        for name, each in values.items():
            assert found[name] == pytest.approx(np.mean(each), abs=1e-3)
        assert found["below_ceiling_db"] == found["ceiling_psnr_db"] - found["prediction_psnr_db"]
        assert found["above_repeat_db"] == found["prediction_psnr_db"] - found["repeat_psnr_db"]
    for name, mean in report["mean_of_deterministic_scenes"].items():
        assert mean == pytest.approx(np.mean([scene[name] for scene in report["scenes"].values()]))


def test_only_deterministic_scenes_are_averaged(tiny_pipeline, bar, monkeypatch):
    monkeypatch.setattr("ardiff.evaluation.prediction.DETERMINISTIC", ("sunset",))
    report = measure_prediction(tiny_pipeline, SETTINGS, 1, bar, Shown().add)
    assert report["mean_of_deterministic_scenes"] == report["scenes"]["sunset"]
    monkeypatch.setattr("ardiff.evaluation.prediction.DETERMINISTIC", ())
    assert measure_prediction(tiny_pipeline, SETTINGS, 1, bar, Shown().add)["mean_of_deterministic_scenes"] == {}


# --- SSIM ---------------------------------------------------------------------------------------------------------


def test_ssim_of_flat_frames_has_a_closed_form():
    flat = np.full((3, 2, 16, 20, 3), 100, dtype=np.uint8)
    other = np.stack([np.full_like(flat[0], value) for value in (100, 150, 0)])
    x, y = 100 / 255, np.array([100, 150, 0]) / 255
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    np.testing.assert_allclose(ssim(flat, other), expected, atol=1e-4)


def test_ssim_equals_the_formula_with_scipys_filter(generator):
    frames = torch.randint(256, (2, 2, 24, 20, 3), generator=generator, dtype=torch.uint8).numpy()
    reference = torch.randint(256, frames.shape, generator=generator, dtype=torch.uint8).numpy()
    reference[0] = frames[0] // 2 + 30
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets**2) / 4.5)
    window /= window.sum()

    def blur(picture):
        for axis in (0, 1):
            picture = scipy.ndimage.correlate1d(picture, window, axis=axis)
        return picture[5:-5, 5:-5]

    for clip in range(2):
        values = []
        for frame, channel in np.ndindex(2, 3):
            x, y = (each[clip, frame, :, :, channel] / 255.0 for each in (frames, reference))
            mx, my, vx, vy, cov = blur(x), blur(y), blur(x * x), blur(y * y), blur(x * y)
            vx, vy, cov = vx - mx**2, vy - my**2, cov - mx * my
            values.append(
                ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()
            )
        assert ssim(frames, reference)[clip] == pytest.approx(np.mean(values), abs=1e-5)


def test_ssim_refuses_what_it_cannot_compare():
    frames = np.zeros((1, 1, 10, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="`frames` must have at least 11 x 11 pixels"):
        ssim(frames, frames)
    with pytest.raises(ValueError, match="`reference` must have the shape"):
        ssim(frames, frames[:, :, :5])
    with pytest.raises(ValueError, match="must be uint8 but are float64"):
        ssim(frames.astype(float), frames)


def test_prediction_reports_ssim_beside_psnr(tiny_pipeline, bar):
    shown = Shown()
    report = measure_prediction(tiny_pipeline, SETTINGS, 1, bar, shown.add)
    for scene in ("balls", "sunset"):
        values = []
        for index in range(2):
            real = render_openings([HeldOutClip(scene=scene, index=index, seed=0)], 32)
            values.append(ssim(shown["prediction, gap 1", scene, index][0][None, 4:], real[:, 4:])[0])
        assert report["scenes"][scene]["prediction_ssim"] == pytest.approx(np.mean(values), abs=1e-3)
        assert -1 <= report["scenes"][scene]["repeat_ssim"] <= 1
