"""Training clips depend on the step alone, and never on clips that a figure is measured on."""

import numpy as np
import pytest
import torch

from ardiff.data.benchmarks import open_set
from ardiff.data.clips import FIRST_TRAINING_SEED, SceneClips, ShuffledFrames, VideoClips, step_generator
from ardiff.data.pixels import to_pixels, to_uint8
from ardiff.data.video import write_video


def test_a_step_can_be_replayed_alone():
    clips = SceneClips(("balls", "clouds"), batch_size=3, num_frames=4, size=16, seed=7)
    frames, labels = clips[5]
    assert frames.shape == (3, 4, 16, 16, 3)
    assert frames.dtype == torch.uint8
    assert labels.shape == (3,)
    again, _ = SceneClips(("balls", "clouds"), batch_size=3, num_frames=4, size=16, seed=7)[5]
    assert torch.equal(frames, again)
    for other in (
        clips[6],
        SceneClips(("balls", "clouds"), 3, 4, 16, seed=8)[5],
        SceneClips(("balls", "clouds"), 3, 4, 16, 7, rank=1)[5],
    ):
        assert not torch.equal(frames, other[0])


def test_training_never_draws_a_held_out_seed(monkeypatch):
    seen = []

    def render_batch(scenes, num_frames, size, seeds):
        seen.extend(seeds)
        return np.zeros((len(seeds), num_frames, size, size, 3), np.uint8)

    monkeypatch.setattr("ardiff.data.clips.render_batch", render_batch)
    clips = SceneClips(("balls",), batch_size=50, num_frames=2, size=16, seed=0)
    for step in range(20):
        _ = clips[step]
    assert len(set(seen)) == 1000
    assert min(seen) >= FIRST_TRAINING_SEED > 2**32


def test_half_of_the_clips_start_late():
    """Frame 0 of a sunset clip from the start equals that of the same seed rendered alone; later starts differ."""
    clips = SceneClips(("sunset",), batch_size=200, num_frames=1, size=16, seed=0)
    from ardiff.data.scenes import render_batch

    generator = step_generator(0, 0)
    torch.randint(1, (200,), generator=generator)
    seeds = torch.randint(FIRST_TRAINING_SEED, 1 << 62, (200,), generator=generator).tolist()
    first = torch.from_numpy(render_batch(["sunset"] * 200, 1, 16, seeds))
    early = (clips[0][0] == first).flatten(1).all(1).float().mean()
    assert 0.4 < early < 0.62


def test_shuffled_frames_hold_clips_and_pictures():
    clips = SceneClips(("balls",), batch_size=4, num_frames=6, size=16, seed=1)
    frames = ShuffledFrames(clips, batch_size=8, picture_share=0.25)
    batches = frames[2]
    assert batches.shape == (4, 8, 1, 16, 16, 3)
    assert torch.equal(frames[2], batches)
    rendered = {frame.numpy().tobytes() for frame in clips[2][0].flatten(0, 1)}
    drawn = [frame.numpy().tobytes() for frame in batches.flatten(0, 2)]
    assert sum(frame in rendered for frame in drawn) == 24
    assert len(set(drawn) - rendered) == 8


def test_a_folder_of_videos(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a/one.mp4", "b/two.mp4"):
        (tmp_path / name).parent.mkdir()
        write_video(
            list(torch.randint(256, (6, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()), tmp_path / name
        )
    found = open_set(str(tmp_path))
    clips = VideoClips(found.videos, found.class_names, batch_size=4, num_frames=3, size=16, seed=0)
    frames, labels = clips[0]
    assert clips.class_names == ("a", "b")
    assert frames.shape == (4, 3, 16, 16, 3)
    for clip, label in zip(frames, labels.tolist(), strict=True):
        whole = torch.from_numpy(found.videos[label].read(16))
        assert any(torch.equal(clip, whole[start : start + 3]) for start in range(4))
    longer = VideoClips(found.videos, found.class_names, batch_size=1, num_frames=7, size=16, seed=0)
    with pytest.raises(ValueError, match=r"at least 7 frames \(stride 1\).*none can be used; .* has 6"):
        _ = longer[0]


def test_pixels_round_trip():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(to_uint8(pixels), frames)
    assert to_uint8(torch.tensor([[[[2.0]], [[-3.0]], [[0.0]]]])).flatten().tolist() == [255, 0, 128]
