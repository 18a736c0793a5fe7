import math

import numpy as np
import pytest

from ardiff.data.pictures import KINDS, render_pictures


def test_pictures_are_uint8_and_the_same_every_time():
    pictures = render_pictures(9, 32, 4)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (9, 32, 32, 3)
    assert np.array_equal(pictures, render_pictures(9, 32, 4))


def test_the_first_pictures_do_not_depend_on_their_number():
    many = render_pictures(150, 16, 2)
    for count in (1, 5, 64, 70):
        assert np.array_equal(many[:count], render_pictures(count, 16, 2))


def test_no_two_pictures_are_alike():
    seeds = (0, 1, 2**32, 2**32 + 1, 2**63 - 1)
    pictures = np.concatenate([render_pictures(70, 16, seed) for seed in seeds])
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_another_size_shows_the_same_pictures():
    large = render_pictures(32, 128, 1).astype(np.float64)
    small = render_pictures(32, 64, 1).astype(np.float64)
    error = (large.reshape(32, 64, 2, 64, 2, 3).mean(axis=(2, 4)) - small) ** 2
    assert 10 * math.log10(255**2 / error.mean()) > 28


def test_edges_are_about_one_pixel_wide_at_every_size():
    steepest = {}
    for size in (64, 256):
        leaves = render_pictures(32, size, 5)[::4].astype(np.float64)
        steepest[size] = np.abs(np.diff(leaves, axis=2)).sum(axis=-1).max(axis=(1, 2)).mean()
    assert steepest[256] > 0.75 * steepest[64]


def test_pictures_have_contrast_and_cover_the_colours():
    pictures = render_pictures(200, 32, 6).astype(np.float64)
    contrast = pictures.std(axis=(1, 2)).mean(axis=1)
    assert np.mean(contrast > 8) > 0.9
    assert pictures.min() < 12
    assert pictures.max() > 243
    means = pictures.mean(axis=(1, 2))
    assert (means.std(axis=0) > 20).all()  # dark and bright, reddish and bluish ones


def test_leaves_and_shapes_have_edges_and_the_other_kinds_are_smooth():
    pictures = render_pictures(64, 64, 3).astype(np.float64)
    steepest = np.abs(np.diff(pictures, axis=2)).max(axis=(1, 2, 3))
    by_kind = {kind: np.median(steepest[number :: len(KINDS)]) for number, kind in enumerate(KINDS)}
    assert min(by_kind["leaves"], by_kind["shapes"]) > 3 * max(by_kind["gradient"], by_kind["blobs"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 64, 0), r"`num_pictures` must be an integer at least 1, got 0"),
        ((4, 15, 0), r"`size` must be an integer in \[16, 512\], got 15"),
        ((4, 513, 0), r"`size` must be an integer in \[16, 512\], got 513"),
        ((4, 64, -1), r"`seed` must be an integer in \[0, 2\*\*63 - 1\], got -1"),
        ((4, 64, 2**63), r"`seed` must be an integer in .*, got 9223372036854775808"),
        ((4.0, 64, 0), r"`num_pictures` must be an integer at least 1, got 4.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        render_pictures(*arguments)
