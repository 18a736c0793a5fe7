"""Clip features and reconstructions, of a real autoencoder at a tiny size."""

import numpy as np
import pytest
import torch

from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import render_batch
from ardiff.evaluation.features import clip_features, reconstruct


@pytest.fixture
def clips() -> np.ndarray:
    return render_batch(["balls", "sunset"], 5, 32, [1, 2])


def test_appearance_is_the_mean_and_motion_the_root_mean_square_difference(tiny_vae, clips):
    with torch.no_grad():
        tokens = tiny_vae.features(to_pixels(torch.from_numpy(clips))).double()
    num_clips, num_frames, num_tokens, width = tokens.shape
    found = clip_features(tiny_vae, clips)
    assert (found.shape, found.dtype) == ((num_clips, 2 * width), torch.float64)
    for clip in range(num_clips):
        for feature in (0, width - 1):
            values = tokens[clip, :, :, feature]
            steps = [float(values[f + 1, t] - values[f, t]) for f in range(num_frames - 1) for t in range(num_tokens)]
            assert found[clip, feature] == pytest.approx(float(values.mean()), abs=1e-12)
            assert found[clip, width + feature] == pytest.approx(float(np.sqrt(np.mean(np.square(steps)))), abs=1e-12)


def test_a_still_clip_has_no_motion_and_order_matters_to_motion_alone(tiny_vae, clips):
    width = tiny_vae.config.width
    still = clip_features(tiny_vae, np.repeat(clips[:, :1], 5, axis=1))
    assert float(still[:, width:].max()) <= 1e-6
    moving, shuffled = clip_features(tiny_vae, clips), clip_features(tiny_vae, clips[:, [0, 3, 1, 4, 2]])
    torch.testing.assert_close(moving[:, :width], shuffled[:, :width], atol=1e-6, rtol=0)
    assert bool((shuffled[:, width:].mean(1) > 1.05 * moving[:, width:].mean(1)).all())


def test_a_clip_has_the_same_features_in_any_batch(tiny_vae, clips):
    together = clip_features(tiny_vae, clips)
    torch.testing.assert_close(clip_features(tiny_vae, clips[1:]), together[1:], atol=1e-6, rtol=0)
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_reconstruction_is_decoded_as_a_clip(tiny_vae, clips):
    found = reconstruct(tiny_vae, clips)
    assert (found.shape, found.dtype) == (clips.shape, np.uint8)
    alone = reconstruct(tiny_vae, clips[:, 2:3])[:, 0]
    assert np.array_equal(reconstruct(tiny_vae, clips[:, :3]), found[:, :3])  # earlier frames do not see later ones
    assert not np.array_equal(alone, found[:, 2])  # a later frame does see earlier ones


@pytest.mark.parametrize("shape", [(2, 1, 32, 32, 3), (5, 32, 32, 3)])
def test_refuses_clips_without_neighbouring_frames(tiny_vae, shape):
    with pytest.raises(ValueError, match="`frames` must have shape .* at least 2 frames but has"):
        clip_features(tiny_vae, np.zeros(shape, dtype=np.uint8))


def test_refuses_frames_of_another_size(tiny_vae):
    with pytest.raises(ValueError, match="`frames` must have shape"):
        clip_features(tiny_vae, np.zeros((2, 3, 64, 64, 3), dtype=np.uint8))
