import math

import numpy as np
import pytest

from ardiff.data import scenes
from ardiff.data.scenes import DETERMINISTIC, SCENES, contact_sheet, render, render_batch, scene_state


def psnr(first, second):
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-12))


def shrink(frames):
    """Averages 2 x 2 pixels."""
    count, size, _, channels = frames.shape
    return frames.reshape(count, size // 2, 2, size // 2, 2, channels).mean(axis=(2, 4))


@pytest.mark.parametrize("scene", SCENES)
def test_a_clip_is_uint8_and_the_same_every_time(scene):
    clip = render(scene, 5, 48, 7)
    assert clip.dtype == np.uint8
    assert clip.shape == (5, 48, 48, 3)
    assert np.array_equal(clip, render(scene, 5, 48, 7))


@pytest.mark.parametrize("scene", SCENES)
def test_the_first_frames_do_not_depend_on_the_length(scene):
    clip = render(scene, 16, 32, 3)
    assert np.array_equal(clip[:8], render(scene, 8, 32, 3))
    assert np.array_equal(clip[:1], render(scene, 1, 32, 3))


def test_every_row_of_a_mixed_batch_equals_its_single_clip():
    names = [*SCENES, *reversed(SCENES), "balls"]
    seeds = [11 + 5 * row for row in range(len(names))]
    batch = render_batch(names, 5, 32, seeds)
    for row, (name, seed) in enumerate(zip(names, seeds, strict=True)):
        assert np.array_equal(batch[row], render(name, 5, 32, seed)), (row, name)


@pytest.mark.parametrize("scene", SCENES)
def test_no_two_seeds_are_alike(scene):
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1]
    clips = render_batch([scene] * len(seeds), 1, 32, seeds)
    assert len({clip.tobytes() for clip in clips}) == len(seeds)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("seed", [0, 5])
def test_another_size_shows_the_same_clip(scene, seed):
    assert psnr(shrink(render(scene, 4, 128, seed)), render(scene, 4, 64, seed)) > 28


@pytest.mark.parametrize("scene", ["balls", "planets", "pendulum", "balloons"])
def test_edges_are_about_one_pixel_wide_at_every_size(scene):
    steepest = {}
    for size in (64, 256):
        clips = render_batch([scene] * 8, 1, size, range(8)).astype(np.float64)
        steepest[size] = np.abs(np.diff(clips, axis=3)).sum(axis=-1).max(axis=(1, 2, 3)).mean()
    assert steepest[256] > 0.75 * steepest[64]
    # anti-aliased: an edge that crosses pixels leaves many in-between values
    assert len(np.unique(render(scene, 1, 64, 0).reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize("scene", SCENES)
def test_every_clip_moves_but_moderately(scene):
    clips = render_batch([scene] * 8, 16, 32, range(8)).astype(np.float64)
    for clip in clips:
        assert np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3)).max() < 20
        changed = np.abs(clip[8:] - clip[:-8]).max(axis=-1) > 16
        assert changed.mean() > 0.01  # a single planet covers about this share of the picture


def test_every_scene_counts_as_deterministic_only_if_it_exists():
    assert set(DETERMINISTIC) <= set(SCENES)


def test_balls_never_gain_energy_and_stay_in_the_room():
    state = scene_state("balls", 200, range(32))
    for ball in (0, 1):
        x, y, radius = (state[f"{name}{ball}"] for name in ("x", "y", "radius"))
        vx, vy = state[f"vx{ball}"], state[f"vy{ball}"]
        falling = vy * vy / 2 - scenes.BALL_GRAVITY * y
        assert (falling.diff(dim=1) <= 1e-12).all()
        assert (falling[:, 0] - falling[:, -1] > 1e-4).all()  # the floor does take energy
        assert ((vx * vx).diff(dim=1) <= 1e-12).all()
        for position, end in ((x, 1.0), (y, scenes.BALL_FLOOR)):
            assert (position >= radius - 1e-9).all()
            assert (position <= end - radius + 1e-9).all()


def test_a_ball_in_the_air_has_one_gravity_in_every_clip():
    state = scene_state("balls", 12, range(64))
    bend = state["y0"].diff(n=2, dim=1)
    free = (state["y0"][:, 2:] < scenes.BALL_FLOOR - state["radius0"][:, 2:]) & (state["vy0"][:, :-2] >= 0)
    free &= state["vy0"][:, 2:] >= 0  # still on the way down, so it has not bounced in between
    assert free.sum() > 100
    np.testing.assert_allclose(bend[free].numpy(), scenes.BALL_GRAVITY, atol=1e-12)


def test_planets_keep_kepler_s_third_law_counterclockwise():
    state = scene_state("planets", 9, range(16))
    for planet in range(3):
        orbit, x, y = (state[f"{name}{planet}"] for name in ("orbit", "x", "y"))
        dx, dy = (x - state["sun_x"]).numpy(), (y - state["sun_y"]).numpy()
        np.testing.assert_allclose(np.hypot(dx, dy), orbit.numpy(), rtol=1e-9)
        turned = np.diff(np.unwrap(np.arctan2(-dy, dx), axis=1), axis=1)
        assert (turned > 0).all()
        np.testing.assert_allclose(turned**2 * orbit[:, :-1].numpy() ** 3, scenes.KEPLER**2, rtol=1e-9)


def test_a_drawn_planet_is_where_the_law_says():
    """The planets' pixels, found by what changes when the clip goes on."""
    state = scene_state("planets", 1, range(40))
    alone = (state["seen0"] + state["seen1"] + state["seen2"])[:, 0] == 1
    seed = int(alone.nonzero()[0])
    planet = next(number for number in range(3) if state[f"seen{number}"][seed, 0] == 1)
    state = scene_state("planets", 16, [seed])
    clip = render("planets", 16, 64, seed).astype(np.float64)
    changed = np.abs(clip - np.median(clip, axis=0)).sum(axis=-1)
    grid = (np.arange(64) + 0.5) / 64
    for frame in range(16):
        weight = np.where(changed[frame] > 40, 1.0, 0.0)
        x, y = (weight * grid[None]).sum() / weight.sum(), (weight * grid[:, None]).sum() / weight.sum()
        assert math.hypot(x - state[f"x{planet}"][0, frame], y - state[f"y{planet}"][0, frame]) < 0.02


def test_a_drawn_pendulum_keeps_its_period():
    """The bob's path across the picture, measured from pixels, against the period of a pendulum of its length."""
    seeds = range(4)
    state = scene_state("pendulum", 1, seeds)
    periods = 2 * math.pi * np.sqrt(state["length"][:, 0].numpy() / scenes.PENDULUM_GRAVITY)
    clips = render_batch(["pendulum"] * 4, 80, 32, seeds).astype(np.float64)
    for clip, period in zip(clips, periods, strict=True):
        still = np.median(clip, axis=0)
        changed = np.abs(clip - still).sum(axis=-1)[:, 14:27]
        x = (changed.sum(axis=1) * np.arange(32)).sum(axis=1) / changed.sum(axis=(1, 2))
        x -= x.mean()
        ups = [i + x[i] / (x[i] - x[i + 1]) for i in range(79) if x[i] < 0 <= x[i + 1]]
        assert len(ups) >= 2
        assert np.diff(ups).mean() == pytest.approx(period, rel=0.05)


def test_a_longer_pendulum_is_slower():
    state = scene_state("pendulum", 400, range(24))
    angle, length = state["angle"], state["length"][:, 0]
    # the angle solves angle'' = -omega^2 angle: its second difference is -4 sin^2(omega / 2) angle
    ratio = -(angle.diff(n=2, dim=1) * angle[:, 1:-1]).sum(1) / (angle[:, 1:-1] ** 2).sum(1)
    omega = 2 * (ratio.sqrt() / 2).asin()
    np.testing.assert_allclose((omega**2 * length).numpy(), scenes.PENDULUM_GRAVITY, rtol=1e-9)


def test_clouds_come_back_on_the_other_side():
    """Clouds drift rigidly: after the wind has carried them once around, the same sky shape is back."""
    state = scene_state("clouds", 1, range(200))
    wind = state["wind"][:, 0].abs()
    seed = int(((1 / wind) % 1).argmin())  # a whole number of frames for one turn, nearly
    turn = round(float(1 / wind[seed]))
    state = scene_state("clouds", turn + 1, [seed])
    for name in ("sky_high", "sky_low", "cloud_top", "cloud_base"):
        state[name] = state[name][:, :1].expand_as(state[name])  # the hour stands still
    pictures = scenes._draw_pictures("clouds", state, 32)
    assert psnr(pictures[0], pictures[turn]) > 40
    assert psnr(pictures[0], pictures[turn // 2]) < 30


def test_the_sun_moves_at_constant_speed_and_the_sky_follows_its_height():
    state = scene_state("sunset", 16, range(32))
    np.testing.assert_allclose(state["sun_y"].diff(n=2, dim=1).numpy(), 0, atol=1e-12)
    assert (state["sun_y"][:, 0] - state["sun_radius"][:, 0] < scenes.SUNSET_HORIZON).all()  # in sight at the start
    rises = state["sun_y"].diff(dim=1)[:, 0] < 0
    assert 0 < rises.sum() < 32
    brightness = render_batch(["sunset"] * 32, 16, 16, range(32)).astype(np.float64).mean(axis=(2, 3, 4))
    brighter = brightness[:, -1] > brightness[:, 0]
    assert np.mean(brighter == rises.numpy()) > 0.85


def test_balloons_are_in_sight_at_first_and_rise_at_constant_speed():
    state = scene_state("balloons", 120, range(32))
    span = 1 + 2 * scenes.BALLOON_MARGIN
    for balloon in range(3):
        x, y = state[f"x{balloon}"], state[f"y{balloon}"]
        assert ((y[:, 0] > 0) & (y[:, 0] < 1)).all()
        assert ((x[:, 0] > 0) & (x[:, 0] < 1)).all()
        rise = (-y.diff(dim=1)) % span
        np.testing.assert_allclose(rise.numpy(), rise[:, :1].expand_as(rise).numpy(), rtol=1e-9)
        assert (y < -0.2).any()
        assert (y > 1.2).any()
        # out of sight, basket and all, where it changes ends
        assert (state[f"radius{balloon}"] * 1.88 < scenes.BALLOON_MARGIN).all()
    seen = state["seen0"] + state["seen1"] + state["seen2"]
    assert set(seen[:, 0].tolist()) == {1.0, 2.0, 3.0}


def test_contact_sheet_holds_two_clips_per_scene():
    sheet = contact_sheet(16, 3, 4)
    assert sheet.shape == (12 * 16, 3 * 16, 3)
    row = SCENES.index("clouds") * 2 + 1
    clip = render("clouds", 3, 16, 5)
    assert np.array_equal(sheet[row * 16 : row * 16 + 16, 32:48], clip[2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fire", 4, 64, 0), r"`scene` must be one of balls, planets, .*, got 'fire'"),
        (("balls", 0, 64, 0), r"`num_frames` must be an integer of at least 1, got 0"),
        (("balls", 2.5, 64, 0), r"`num_frames` must be an integer of at least 1, got 2.5"),
        (("balls", 4, 15, 0), r"`size` must be an integer in \[16, 512\], got 15"),
        (("balls", 4, 513, 0), r"`size` must be an integer in \[16, 512\], got 513"),
        (("balls", 4, 64, -1), r"`seed` must be an integer in \[0, 2\*\*63 - 1\], got -1"),
        (("balls", 4, 64, 2**63), r"`seed` must be an integer in .*, got 9223372036854775808"),
        (("balls", 4, 64, True), r"`seed` must be an integer in .*, got True"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        render(*arguments)


def test_a_batch_needs_one_seed_per_scene():
    with pytest.raises(ValueError, match="same length, got 2 and 1"):
        render_batch(["balls", "clouds"], 4, 32, [1])
    with pytest.raises(ValueError, match="sequence of scene names"):
        render_batch("balls", 4, 32, [1, 2, 3, 4, 5])


def test_the_largest_and_smallest_clips_are_allowed():
    assert render("balls", 1, 16, 2**63 - 1).shape == (1, 16, 16, 3)
    assert render("balls", 1, 512, 0).shape == (1, 512, 512, 3)
    assert render_batch([], 2, 16, []).shape == (0, 2, 16, 16, 3)
