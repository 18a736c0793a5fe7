"""Scenes: short clips drawn from a seed, so that training and evaluation need no download.

A clip is a function of (scene, num_frames, size, seed) alone; its first frames do not depend on num_frames, and at
another size it is the same clip. Meant for 8 frames a second.
Shapes: B clips, F frames, M = B * F pictures, (H, W) pixels; x to the right, y down, the picture spans [0, 1] x [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ardiff.data.drawing import between, colour_wheel, coverage, hex_colours, paint, palette, smoothstep, sphere


SCENES = ("balls", "planets", "clouds", "sunset", "pendulum", "balloons")
# Every scene: balls, planets and the pendulum obey one law with the same constants in all clips; clouds are all in
# sight from the start (the sky wraps around) and drift rigidly while the hour advances at one speed; the sun and the
# balloons are in sight at the start and move at constant speed. Nothing is drawn at random after frame 0.
DETERMINISTIC = SCENES

BALL_GRAVITY = 0.0032  # picture heights per frame^2
BALL_BOUNCE = 0.85  # speed kept at the floor
BALL_WALL_BOUNCE = 0.9  # horizontal speed kept at a wall
BALL_FLOOR = 0.90  # y where the balls touch the ground
KEPLER = 0.024  # angular speed = KEPLER * orbit radius ** -1.5, radians per frame
PENDULUM_GRAVITY = 0.018  # angular frequency = sqrt(PENDULUM_GRAVITY / length), radians per frame
HOURS_PER_FRAME = 1 / 96  # share of a day that passes in one frame of "clouds"
BALLOON_MARGIN = 0.30  # how far outside the picture a balloon turns up again
SUNSET_HORIZON = 0.62

_NUM_DRAWS = 64
_BLOCK = 16  # pictures drawn at once: constant, so that no result depends on the shape of the batch
_STARS = ((0.07, 0.12), (0.21, 0.05), (0.36, 0.13), (0.63, 0.07), (0.80, 0.15), (0.94, 0.06))
_STARS += ((0.05, 0.55), (0.95, 0.46), (0.10, 0.90), (0.33, 0.95), (0.70, 0.93), (0.92, 0.84))

State = dict[str, Tensor]


def render(scene: str, num_frames: int, size: int, seed: int) -> np.ndarray:
    """Draws one clip: (num_frames, size, size, 3) uint8.

    `scene` is one of SCENES, `num_frames` at least 1, `size` in [16, 512] px, `seed` in [0, 2**63 - 1].
    Raises ValueError for anything else.
    """
    return render_batch([scene], num_frames, size, [seed])[0]


@torch.no_grad()
def render_batch(scenes: Sequence[str], num_frames: int, size: int, seeds: Sequence[int]) -> np.ndarray:
    """Draws B clips at once: (B, num_frames, size, size, 3) uint8; row i equals `render` of scenes[i] and seeds[i].

    Raises ValueError as `render` does, and where `scenes` and `seeds` differ in length.
    """
    if isinstance(scenes, str):
        raise ValueError(f"`scenes` must be a sequence of scene names, got the string {scenes!r}.")
    if len(scenes) != len(seeds):
        raise ValueError(f"`scenes` and `seeds` must have the same length, got {len(scenes)} and {len(seeds)}.")
    if not _is_int(size) or not 16 <= size <= 512:
        raise ValueError(f"`size` must be an integer in [16, 512], got {size!r}.")
    for scene in scenes:
        _check_scene(scene)
    _check_num_frames(num_frames)
    frames = np.empty((len(scenes), num_frames, size, size, 3), dtype=np.uint8)
    for scene in dict.fromkeys(scenes):
        rows = [row for row, name in enumerate(scenes) if name == scene]
        state = scene_state(scene, num_frames, [seeds[row] for row in rows])
        frames[rows] = _draw_pictures(scene, state, size).reshape(len(rows), num_frames, size, size, 3)
    return frames


@torch.no_grad()
def scene_state(scene: str, num_frames: int, seeds: Sequence[int]) -> State:
    """What is where: name -> (B, F) or (B, F, 3) float64, for B seeds and F = num_frames frames.

    Positions, radii and lengths are in picture heights, colours in [0, 1], angles in radians. Raises ValueError as
    `render` does.
    """
    _check_scene(scene)
    _check_num_frames(num_frames)
    draws = torch.stack([_draws(seed) for seed in seeds]) if len(seeds) else torch.empty(0, _NUM_DRAWS).double()
    time = torch.arange(num_frames, dtype=torch.float64)
    state = _STATE[scene](draws, time)
    shape = (len(seeds), num_frames)
    # what does not move comes as (B, 1) or (B, 1, 3)
    return {name: value.expand(*shape, *value.shape[2:]) for name, value in state.items()}


def contact_sheet(size: int = 64, num_frames: int = 16, seed: int = 0) -> np.ndarray:
    """One row per clip, two clips per scene (seeds `seed` and `seed` + 1): (12 * size, num_frames * size, 3) uint8."""
    names = [scene for scene in SCENES for _ in range(2)]
    clips = render_batch(names, num_frames, size, [seed, seed + 1] * len(SCENES))
    return clips.transpose(0, 2, 1, 3, 4).reshape(len(names) * size, num_frames * size, 3)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_scene(scene: str) -> None:
    if scene not in SCENES:
        raise ValueError(f"`scene` must be one of {', '.join(SCENES)}, got {scene!r}.")


def _check_num_frames(num_frames: int) -> None:
    if not _is_int(num_frames) or num_frames < 1:
        raise ValueError(f"`num_frames` must be an integer of at least 1, got {num_frames!r}.")


def _draws(seed: int) -> Tensor:
    """All random numbers of one clip: (_NUM_DRAWS,) float64, uniform in [0, 1)."""
    if not _is_int(seed) or not 0 <= seed <= 2**63 - 1:
        raise ValueError(f"`seed` must be an integer in [0, 2**63 - 1], got {seed!r}.")
    high, low = divmod(int(seed), 2**32)
    draws = torch.rand(_NUM_DRAWS, generator=torch.Generator().manual_seed(low), dtype=torch.float64)
    if high:  # torch's CPU generator looks at the lower 32 bits of a seed only
        draws += torch.rand(_NUM_DRAWS, generator=torch.Generator().manual_seed(high), dtype=torch.float64)
    return draws % 1.0


def _draw_pictures(scene: str, state: State, size: int) -> np.ndarray:
    """Draws (B, F) states in blocks of _BLOCK pictures: (B * F, size, size, 3) uint8."""
    flat = {name: value.flatten(0, 1).float() for name, value in state.items()}
    count = next(iter(flat.values())).shape[0]
    pictures = np.empty((count, size, size, 3), dtype=np.uint8)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x, y = axis.view(1, 1, 1, size), axis.view(1, 1, size, 1)
    for start in range(0, count, _BLOCK):
        index = torch.arange(start, start + _BLOCK).clamp_(max=count - 1)
        # numbers become (M, 1, 1, 1) and colours (M, 3, 1, 1)
        block = {name: value[index].reshape(_BLOCK, -1, 1, 1) for name, value in flat.items()}
        canvas = _DRAW[scene](block, x, y, size)
        stop = min(start + _BLOCK, count)
        canvas = canvas.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
        pictures[start:stop] = canvas.permute(0, 2, 3, 1)[: stop - start].numpy()
    return pictures


def _full(canvas: Tensor, size: int) -> Tensor:
    """A canvas of its own for every picture, from one that rows, columns or pictures share."""
    return canvas.expand(_BLOCK, 3, size, size)


# --- balls ------------------------------------------------------------------------------------------------------


def _balls_state(draws: Tensor, time: Tensor) -> State:
    def pick(*columns: int) -> Tensor:
        return draws[:, list(columns)]

    radius = between(pick(0, 1), 0.095, 0.14)
    floor = BALL_FLOOR - radius
    vx = between(pick(2, 3), 0.008, 0.035) * torch.where(pick(4, 5) < 0.5, -1.0, 1.0)
    x = between(pick(6, 7), 0.0, 1.0) * (1 - 2 * radius) + radius
    vy = between(pick(8, 9), -0.035, 0.035)
    # high enough for its speed not to take it over the top
    highest = radius + vy * vy / (2 * BALL_GRAVITY)
    y = highest + (floor - highest).clamp(min=0) * between(pick(10, 11), 0.0, 0.85)
    xs, ys, vxs, vys = [], [], [], []
    for _ in range(len(time)):
        xs.append(x)
        ys.append(y)
        vxs.append(vx)
        vys.append(vy)
        x, vx = x + vx, vx.clone()
        over = torch.where(x < radius, x - radius, (x - (1 - radius)).clamp(min=0))
        x = x - (1 + BALL_WALL_BOUNCE) * over
        vx = torch.where(over != 0, -BALL_WALL_BOUNCE * vx, vx)
        y, vy = y + vy + BALL_GRAVITY / 2, vy + BALL_GRAVITY
        hit = y > floor
        # exact: the speed at contact from the energy, then the rest of the frame upwards; no energy is ever added
        contact = (vy * vy - 2 * BALL_GRAVITY * (y - floor)).clamp(min=0).sqrt()
        rest = ((vy - contact) / BALL_GRAVITY).clamp(min=0)
        vy = torch.where(hit, -BALL_BOUNCE * contact + BALL_GRAVITY * rest, vy)
        y = torch.where(hit, floor - BALL_BOUNCE * contact * rest + BALL_GRAVITY / 2 * rest * rest, y)
        vy = torch.where(y > floor, torch.zeros_like(vy), vy)
        y = torch.minimum(y, floor)
    hue = draws[:, 12:13]
    sky = draws[:, 13:14]
    state = {
        "seen1": (draws[:, 15:16] < 0.6).double(),
        "high": colour_wheel(0.50 + 0.27 * sky, 0.60, 0.17),
        "low": colour_wheel(0.02 + 0.22 * sky, 0.88, 0.09),
        "ground": colour_wheel(0.55 + 0.5 * sky, 0.46, 0.10),
    }
    for ball, ball_hue in enumerate((hue, hue + between(draws[:, 14:15], 0.33, 0.67))):
        state[f"radius{ball}"] = radius[:, ball : ball + 1]
        state[f"colour{ball}"] = colour_wheel(ball_hue, 0.55, 0.37)
        for name, values in (("x", xs), ("y", ys), ("vx", vxs), ("vy", vys)):
            state[f"{name}{ball}"] = torch.stack(values, dim=1)[..., ball]
    return state


def _balls_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    sky = torch.lerp(s["high"], s["low"], smoothstep(y / 0.8))
    ground = s["ground"] * (0.86 + 1.2 * (y - 0.76))
    canvas = _full(paint(sky, ground, coverage(0.78 - y, size)), size)
    shown = ((0, torch.ones_like(s["seen1"])), (1, s["seen1"]))
    for ball, seen in shown:
        radius = s[f"radius{ball}"]
        height = BALL_FLOOR - radius - s[f"y{ball}"]
        across = (x - s[f"x{ball}"]) / (radius * (1.05 + 0.8 * height))
        down = (y - BALL_FLOOR) / (radius * 0.30)
        shadow = torch.exp(-across * across) * torch.exp(-down * down) * (seen * (0.62 - 0.5 * height))
        canvas = canvas * (1 - shadow)
    for ball, seen in shown:
        dx, dy = x - s[f"x{ball}"], y - s[f"y{ball}"]
        canvas = sphere(canvas, size, dx, dy, s[f"radius{ball}"], s[f"colour{ball}"], seen)
    return canvas


# --- planets ----------------------------------------------------------------------------------------------------


def _planets_state(draws: Tensor, time: Tensor) -> State:
    sun_x, sun_y = between(draws[:, 0:1], 0.48, 0.52), between(draws[:, 1:2], 0.48, 0.52)
    state = {
        "sun_x": sun_x,
        "sun_y": sun_y,
        "sun_radius": between(draws[:, 2:3], 0.085, 0.105),
        "sun_colour": palette(2 * draws[:, 3:4], hex_colours("ff8a4c", "ffb84a", "ffe36e")),
        "space": palette(2 * draws[:, 4:5], hex_colours("10183a", "1b1440", "0f2338")),
    }
    hue = draws[:, 5:6]
    # which of the three orbits are taken: always at least one
    first = (draws[:, 6:7] * 3).floor()
    for planet, slot in enumerate((0.20, 0.31, 0.41)):
        orbit = slot + between(draws[:, 7 + planet : 8 + planet], -0.015, 0.015)
        omega = KEPLER * orbit**-1.5
        angle = 2 * math.pi * draws[:, 10 + planet : 11 + planet] + omega * time
        taken = (first == planet) | (draws[:, 13 + planet : 14 + planet] < 0.5)
        state |= {
            f"seen{planet}": taken.double(),
            f"orbit{planet}": orbit,
            f"angle{planet}": angle,
            f"x{planet}": sun_x + orbit * torch.cos(angle),
            f"y{planet}": sun_y - orbit * torch.sin(angle),
            f"toward_x{planet}": -torch.cos(angle),
            f"toward_y{planet}": torch.sin(angle),
            f"radius{planet}": between(draws[:, 16 + planet : 17 + planet], 0.052, 0.062) + 0.004 * planet,
            f"colour{planet}": colour_wheel(
                hue + 0.31 * planet + 0.1 * draws[:, 19 + planet : 20 + planet], 0.58, 0.36
            ),
        }
    return state


def _planets_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    stars = torch.zeros(1, 1, size, size)
    for star, (star_x, star_y) in enumerate(_STARS):
        from_star = (x - star_x) ** 2 + (y - star_y) ** 2
        stars += (0.5 + 0.1 * (star % 4)) * torch.exp(-from_star / 0.011**2)
    dx, dy = x - s["sun_x"], y - s["sun_y"]
    distance = (dx * dx + dy * dy).sqrt_()
    glow = torch.exp((s["sun_radius"] - distance) / 0.085).clamp_(max=1).mul_(0.62)
    glow += torch.exp(-distance / 0.30).mul_(0.16)
    canvas = (s["space"] * (1.25 - 0.5 * y) + 0.6 * stars) + s["sun_colour"] * glow
    core = s["sun_colour"] + (1 - s["sun_colour"]) * torch.exp(-((distance / s["sun_radius"]) ** 2) * 1.6).mul_(0.85)
    canvas = paint(canvas, core, coverage(distance - s["sun_radius"], size))
    for planet in range(3):
        radius = s[f"radius{planet}"]
        dx, dy = x - s[f"x{planet}"], y - s[f"y{planet}"]
        cover = coverage((dx * dx + dy * dy).sqrt_().sub_(radius), size).mul_(s[f"seen{planet}"])
        toward = dx * (s[f"toward_x{planet}"] / radius) + dy * (s[f"toward_y{planet}"] / radius)
        light = smoothstep(0.55 + 0.55 * toward).mul_(0.82).add_(0.36)
        canvas = paint(canvas, s[f"colour{planet}"] * light, cover)
    return canvas


# --- clouds -----------------------------------------------------------------------------------------------------

_PUFFS = 4
_CLOUDS = ((0.00, 0), (0.62, 2), (0.30, 4), (0.45, 1), (0.82, 3))  # where across, which of five heights
# dawn, morning, noon, afternoon, dusk, night, and dawn again
_SKY_HIGH = hex_colours("5a6fb5", "4d94d6", "2f7fd0", "4b86c8", "4a3f86", "131b45", "5a6fb5")
_SKY_LOW = hex_colours("ffc6a0", "d6ecf5", "b5e0f7", "ffe0b0", "ff8a6b", "3b4480", "ffc6a0")
_CLOUD_TOP = hex_colours("ffeade", "ffffff", "ffffff", "fff6e6", "ffc9a8", "8089bd", "ffeade")
_CLOUD_BASE = hex_colours("c58fa6", "b9c9dd", "b4c8e0", "d3b6a6", "8a5585", "3c4378", "c58fa6")


def _clouds_state(draws: Tensor, time: Tensor) -> State:
    wind = between(draws[:, 0:1], 0.010, 0.032) * torch.where(draws[:, 1:2] < 0.5, -1.0, 1.0)
    hour = draws[:, 2:3] + HOURS_PER_FRAME * time
    position = (hour % 1.0) * 6
    state = {
        "wind": wind,
        "hour": hour,
        "drift": wind * time,
        "sky_high": palette(position, _SKY_HIGH),
        "sky_low": palette(position, _SKY_LOW),
        "cloud_top": palette(position, _CLOUD_TOP),
        "cloud_base": palette(position, _CLOUD_BASE),
    }
    puffs = {"puff_x": [], "base": [], "wide": [], "tall": [], "weight": []}
    for cloud, (across, band) in enumerate(_CLOUDS):
        own = draws[:, 4 + 10 * cloud : 14 + 10 * cloud]
        scale = between(own[:, 0:1], 0.75, 1.15)
        # three clouds always, two more in some clips; heights in separate bands so that they do not all overlap
        here = torch.ones_like(scale) if cloud < 3 else (draws[:, 3:4] * 3 >= cloud - 2).double()
        middle = across + draws[:, 54:55] + 0.24 * own[:, 1:2]
        base = 0.24 + 0.155 * band + 0.07 * own[:, 2:3]
        for puff in range(_PUFFS):
            lean = (puff - (_PUFFS - 1) / 2) * 0.112
            puffs["puff_x"].append(middle + scale * (lean + 0.05 * (own[:, 3 + puff : 4 + puff] - 0.5)))
            puffs["base"].append(base)
            swell = 1.0 if puff in (1, 2) else 0.62
            puffs["wide"].append(scale * 0.082 * (0.74 + 0.26 * swell))
            tall = swell * (0.65 + 0.65 * own[:, 3 + (puff + 2) % 4 : 4 + (puff + 2) % 4])
            puffs["tall"].append(scale * 0.125 * tall)
            puffs["weight"].append(here * (0.8 + 0.3 * swell))
    return state | {name: torch.stack(values, dim=-1) for name, values in puffs.items()}


def _clouds_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    canvas = _full(torch.lerp(s["sky_high"], s["sky_low"], smoothstep(y * 1.05)), size)
    puff = {name: s[name][..., 0] for name in ("puff_x", "base", "wide", "tall", "weight")}  # (M, K, 1)
    dx = x[:, 0] - (puff["puff_x"] + s["drift"][..., 0])
    dx = (dx - dx.round()) / puff["wide"]  # the nearest of the copies one picture width apart
    up = puff["base"] - y[:, 0, :, 0]  # (M, K, H), positive above the base
    tall = torch.where(up > 0, puff["tall"], torch.full_like(puff["tall"], 0.030))
    rows = puff["weight"] * torch.exp(-((up / tall) ** 2))
    columns = torch.exp(-dx * dx)
    density = torch.einsum("mkh,mkw->mhw", rows, columns)
    height = torch.einsum("mkh,mkw->mhw", rows * (up / 0.12), columns) / (density + 0.05)
    cover = smoothstep((density - 0.22) / 0.55).unsqueeze(1)
    light = smoothstep(0.30 + 0.75 * height).unsqueeze(1)
    return paint(canvas, torch.lerp(s["cloud_base"], s["cloud_top"], light), cover.mul_(0.96))


# --- sunset -----------------------------------------------------------------------------------------------------

# by the sun's height: far below the horizon, below, on it, low, high
_DUSK_HIGH = hex_colours("0f1233", "1d1d52", "4a3f8f", "5470b8", "4f94d8")
_DUSK_LOW = hex_colours("20204f", "6d2f6e", "ff7a45", "ffb877", "cfe6f2")
_DUSK_SUN = hex_colours("d8362a", "f0502e", "ff8c3a", "ffc65c", "fff1bf")


def _sunset_state(draws: Tensor, time: Tensor) -> State:
    rises = draws[:, 0:1] < 0.5
    speed = between(draws[:, 1:2], 0.010, 0.021)
    start = torch.where(rises, between(draws[:, 2:3], 0.40, 0.67), between(draws[:, 2:3], 0.16, 0.50))
    sun_y = start + torch.where(rises, -speed, speed) * time
    position = 2 + (SUNSET_HORIZON - sun_y) * torch.where(sun_y < SUNSET_HORIZON, 4.0, 6.0)
    tint = (colour_wheel(draws[:, 3:4], 0.0, 0.05)).expand(-1, len(time), -1)
    return {
        "sun_x": between(draws[:, 4:5], 0.28, 0.72),
        "sun_y": sun_y,
        "sun_radius": between(draws[:, 5:6], 0.085, 0.11),
        "sun_colour": palette(position, _DUSK_SUN),
        "sky_high": palette(position, _DUSK_HIGH) + tint,
        "sky_low": palette(position, _DUSK_LOW) + tint,
        # the sun's light fades away once it is below the horizon
        "shine": smoothstep((SUNSET_HORIZON + 0.20 - sun_y) / 0.30),
        "phase": 2 * math.pi * draws[:, 6:7] - 0.55 * time,
    }


def _sunset_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    sky = torch.lerp(s["sky_high"], s["sky_low"], smoothstep(y / SUNSET_HORIZON))
    dx, dy = x - s["sun_x"], y - s["sun_y"]
    distance = (dx * dx + dy * dy).sqrt_()
    glow = torch.exp((s["sun_radius"] - distance) / 0.16).clamp_(max=1).mul_(s["shine"] * 0.55)
    canvas = paint(_full(sky, size), s["sun_colour"], glow)
    disc = s["sun_colour"] + (1 - s["sun_colour"]) * (0.35 - 0.25 * dy / s["sun_radius"]).clamp_(0, 0.7)
    canvas = paint(canvas, disc, coverage(distance - s["sun_radius"], size))
    # water: the sky upside down and darker, with waves that grow towards the viewer
    depth = ((y - SUNSET_HORIZON) / (1 - SUNSET_HORIZON)).clamp(min=0)
    wave = torch.sin(2 * math.pi * 3.6 * depth.sqrt() + s["phase"])  # (M, 1, H, 1)
    water = torch.lerp(s["sky_low"], s["sky_high"], smoothstep(depth * 0.9)) * (0.60 - 0.22 * depth)
    water = water * (1 + 0.10 * wave * depth)
    across = (dx + 0.035 * wave * depth.sqrt()) / (s["sun_radius"] * (0.62 + 0.85 * depth))
    column = torch.exp(-across * across) * ((0.62 + 0.34 * wave) * s["shine"] * (0.95 - 0.35 * depth))
    water = paint(_full(water, size), s["sun_colour"] * 0.92 + 0.08, column)
    return paint(canvas, water, coverage(SUNSET_HORIZON - y, size).expand(_BLOCK, 1, size, size))


# --- pendulum ---------------------------------------------------------------------------------------------------


def _pendulum_state(draws: Tensor, time: Tensor) -> State:
    length = between(draws[:, 0:1], 0.42, 0.64)
    reach = between(draws[:, 1:2], 0.15, 0.30)
    omega = torch.sqrt(PENDULUM_GRAVITY / length)
    angle = torch.asin(reach / length) * torch.cos(omega * time + 2 * math.pi * draws[:, 2:3])
    pivot_x = between(draws[:, 3:4], 0.46, 0.54)
    room = draws[:, 4:5]
    return {
        "length": length,
        "angle": angle,
        "pivot_x": pivot_x,
        "rod_x": torch.sin(angle),
        "rod_y": torch.cos(angle),
        "x": pivot_x + length * torch.sin(angle),
        "y": 0.07 + length * torch.cos(angle),
        "radius": between(draws[:, 5:6], 0.10, 0.13),
        "colour": colour_wheel(room + between(draws[:, 6:7], 0.3, 0.7), 0.54, 0.40),
        "wall": colour_wheel(room, 0.74, 0.13),
        "floor": colour_wheel(room + 0.08, 0.42, 0.10),
    }


def _pendulum_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    lamp = torch.exp(-((x - 0.32) ** 2)) * torch.exp(-((y - 0.22) ** 2) * 1.4)
    canvas = s["wall"] * (0.46 + 0.68 * lamp)
    canvas = paint(canvas, s["floor"] * (1.5 - 0.6 * y), coverage(0.90 - y, size).expand(_BLOCK, 1, size, size))
    dx, dy = x - s["x"], y - s["y"]
    # on the wall behind, down and to the right, as the lamp is up and to the left
    away = ((dx - 0.055) ** 2 + (dy - 0.060) ** 2) / (s["radius"] * 1.05) ** 2
    pivot_x, pivot_y = x - s["pivot_x"], y - 0.07
    rod_shadow = _rod_distance(s, pivot_x - 0.03, pivot_y - 0.04)
    shadow = torch.exp(-away * away).mul_(0.42) + torch.exp(-((rod_shadow / 0.022) ** 2)).mul_(0.16)
    canvas = canvas * (1 - shadow.clamp_(max=0.45))
    rod = coverage(_rod_distance(s, pivot_x, pivot_y) - 0.013, size)
    canvas = paint(canvas, torch.full((1, 3, 1, 1), 0.20), rod)
    pivot = coverage((pivot_x * pivot_x + pivot_y * pivot_y).sqrt_() - 0.030, size)
    canvas = paint(canvas, torch.full((1, 3, 1, 1), 0.27), pivot)
    return sphere(canvas, size, dx, dy, s["radius"], s["colour"], torch.ones_like(s["x"]))


def _rod_distance(s: State, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance from the line between the pivot and the bob's centre."""
    along = torch.minimum((dx * s["rod_x"] + dy * s["rod_y"]).clamp_(min=0), s["length"])
    return ((dx - along * s["rod_x"]) ** 2 + (dy - along * s["rod_y"]) ** 2).sqrt_()


# --- balloons ---------------------------------------------------------------------------------------------------


def _balloons_state(draws: Tensor, time: Tensor) -> State:
    mood = draws[:, 0:1]
    state = {
        "sky_high": palette(3 * mood, hex_colours("3f86cf", "5a8fd0", "6a6fb8", "4a4f9a")),
        "sky_low": palette(3 * mood, hex_colours("d5eefa", "fde6c4", "ffc8a0", "ff9f8a")),
        "hill_far": palette(3 * draws[:, 1:2], hex_colours("6fa79b", "7fa36f", "8d8fae", "6f8fb8")),
        "hill_near": palette(3 * draws[:, 1:2], hex_colours("3f7d5c", "4f7f45", "56557f", "3d5f85")),
        "phase_far": 2 * math.pi * draws[:, 2:3],
        "phase_near": 2 * math.pi * draws[:, 3:4],
    }
    count = 1 + (draws[:, 4:5] * 3).floor()
    wind = between(draws[:, 5:6], -0.007, 0.007)
    rise = between(draws[:, 6:7], 0.011, 0.024)
    span = 1 + 2 * BALLOON_MARGIN
    lane = (3 * draws[:, 16:17]).floor()
    for balloon, (smallest, largest) in enumerate(((0.100, 0.115), (0.115, 0.130), (0.130, 0.150))):
        own = draws[:, 7 + 3 * balloon : 10 + 3 * balloon]
        radius = between(own[:, 0:1], smallest, largest)
        near = radius / 0.15  # nearer ones are larger and faster
        start_x = 0.20 + 0.30 * ((lane + balloon) % 3) + 0.08 * (own[:, 1:2] - 0.5)
        start_y = between(own[:, 2:3], 0.18, 0.62)
        hue = draws[:, 17 + 2 * balloon : 18 + 2 * balloon]
        stripe_hue = hue + between(draws[:, 18 + 2 * balloon : 19 + 2 * balloon], 0.1, 0.3)
        state |= {
            # the largest ones first: a single balloon is a near one
            f"seen{balloon}": (count >= 3 - balloon).double(),
            f"radius{balloon}": radius,
            f"x{balloon}": (start_x + wind * near * time + BALLOON_MARGIN) % span - BALLOON_MARGIN,
            f"y{balloon}": (start_y - rise * near * time + BALLOON_MARGIN) % span - BALLOON_MARGIN,
            f"colour{balloon}": colour_wheel(hue, 0.54, 0.42),
            f"stripe{balloon}": colour_wheel(stripe_hue, 0.82, 0.16),
        }
    return state


def _balloons_draw(s: State, x: Tensor, y: Tensor, size: int) -> Tensor:
    canvas = _full(torch.lerp(s["sky_high"], s["sky_low"], smoothstep(y / 0.85)), size)
    far = 0.78 + 0.045 * torch.sin(5.2 * x + s["phase_far"])
    canvas = paint(canvas, s["hill_far"] * (1.35 - 0.4 * y), coverage(far - y, size))
    for balloon in range(3):
        canvas = _balloon(canvas, s, balloon, x, y, size)
    near = 0.88 + 0.040 * torch.sin(4.1 * x + s["phase_near"])
    return paint(canvas, s["hill_near"] * (1.75 - 0.8 * y), coverage(near - y, size))


def _balloon(canvas: Tensor, s: State, balloon: int, x: Tensor, y: Tensor, size: int) -> Tensor:
    radius, seen = s[f"radius{balloon}"], s[f"seen{balloon}"]
    # in envelope radii from the envelope's centre, the sign of x dropped; lengths are scaled back for coverage
    side, down = (x - s[f"x{balloon}"]) / radius, (y - s[f"y{balloon}"]) / radius
    width = side.abs()
    scaled = radius * size
    basket = torch.maximum(width - 0.21, (down - 1.72).abs() - 0.16)
    ropes = torch.maximum(width - 0.21, (down - 1.48).abs() - 0.12)
    dark = torch.tensor([0.36, 0.23, 0.16]).view(1, 3, 1, 1)
    cover = torch.maximum((0.5 - basket * scaled).clamp_(0, 1), (0.5 - ropes * scaled).clamp_(0, 1).mul_(0.4))
    canvas = paint(canvas, dark, cover * seen)
    # the envelope: a large circle, a small one at `throat` below it, and the cone which touches both
    throat, small = 1.25, 0.25
    lean = (1 - small) / throat
    upright = math.sqrt(1 - lean * lean)
    across = upright * down - lean * width
    cone = upright * width + lean * down - 1
    top = (width * width + down * down).sqrt_() - 1
    bottom = (width * width + (down - throat) ** 2).sqrt_() - small
    distance = torch.where(across < 0, top, torch.where(across > upright * throat, bottom, cone))
    half = torch.where(down < lean, (1 - down * down).clamp_(min=0).sqrt_(), (1 - lean * down) / upright)
    half = half.clamp_(min=0.05)  # half the envelope's width at this height
    stripe = (0.5 - (width - 0.40 * half) * scaled).clamp_(0, 1)
    from_light = (side + 0.35) ** 2 + (down + 0.35) ** 2
    light = (1.12 - 0.17 * from_light).clamp_(min=0.5)
    colour = torch.lerp(s[f"colour{balloon}"], s[f"stripe{balloon}"], stripe) * light
    return paint(canvas, colour, (0.5 - distance * scaled).clamp_(0, 1).mul_(seen))


# --- all of them ------------------------------------------------------------------------------------------------


_STATE = {
    "balls": _balls_state,
    "planets": _planets_state,
    "clouds": _clouds_state,
    "sunset": _sunset_state,
    "pendulum": _pendulum_state,
    "balloons": _balloons_state,
}
_DRAW = {
    "balls": _balls_draw,
    "planets": _planets_draw,
    "clouds": _clouds_draw,
    "sunset": _sunset_draw,
    "pendulum": _pendulum_draw,
    "balloons": _balloons_draw,
}
