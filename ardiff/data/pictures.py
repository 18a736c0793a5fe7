"""Generic stills drawn from a seed, so that an autoencoder trained on scenes also keeps a user's photo recognisable.

Four kinds in turn: dead leaves (overlapping shapes with power-law sizes), smooth gradients, a few big shapes, and soft
blobs. A picture depends on its index, the number of pictures, the size and the seed alone.
Shapes: B pictures, S shapes in each, K colour stops, (H, W) pixels; x to the right, y down, [0, 1] x [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


KINDS = ("leaves", "gradient", "shapes", "blobs")

_BLOCK = 16  # pictures drawn at once: constant, so that no result depends on the number of pictures
_LEAVES, _BIG, _BLOBS, _STOPS = 36, 4, 8, 4
_PARAMETERS = 18  # random numbers per shape
_SLOTS = _LEAVES + 1  # the background's numbers come first


@torch.no_grad()
def render_pictures(num_pictures: int, size: int, seed: int) -> np.ndarray:
    """Draws stills: (num_pictures, size, size, 3) uint8; picture i is of kind KINDS[i % 4].

    `num_pictures` is at least 1, `size` in [16, 512] px, `seed` in [0, 2**63 - 1]; raises ValueError for anything else.
    The first pictures do not depend on `num_pictures`.
    """
    for name, value, low, high in (
        ("num_pictures", num_pictures, 1, None),
        ("size", size, 16, 512),
        ("seed", seed, 0, 2**63 - 1),
    ):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"in [{low}, {'2**63 - 1' if high > 512 else high}]"
            raise ValueError(f"`{name}` must be an integer {allowed}, got {value!r}.")
    upper, lower = divmod(int(seed), 2**32)
    # torch's CPU generator looks at the lower 32 bits of a seed only
    generators = [torch.Generator().manual_seed(part) for part in ((lower, upper) if upper else (lower,))]
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x, y = axis.view(1, 1, size), axis.view(1, size, 1)
    pictures = np.empty((num_pictures, size, size, 3), dtype=np.uint8)
    for start in range(0, num_pictures, _BLOCK * len(KINDS)):
        for offset, kind in enumerate(KINDS):
            shape = (_BLOCK, _SLOTS, _PARAMETERS)
            draws = sum(torch.rand(shape, generator=generator) for generator in generators) % 1.0
            rows = range(start + offset, min(start + _BLOCK * len(KINDS), num_pictures), len(KINDS))
            if len(rows) == 0:
                continue
            canvas = _DRAW[kind](draws, x, y, size).mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
            pictures[rows.start : rows.stop : rows.step] = canvas.permute(0, 2, 3, 1)[: len(rows)].numpy()
    return pictures


def _colour(draws: Tensor) -> Tensor:
    """Colours from three numbers each: (B, 3) hue, saturation and brightness in [0, 1) -> (B, 3) in [0, 1]."""
    hue, saturation, value = draws[:, :1], draws[:, 1:2], 0.08 + 0.90 * draws[:, 2:3]
    phase = torch.tensor([[0.0, 1 / 3, 2 / 3]])
    wheel = 0.5 + 0.5 * torch.cos(2 * math.pi * (hue - phase))
    # to a power: photos hold more greyish colours than vivid ones
    return value * (1 - saturation**1.5 * (1 - wheel))


def _number(draws: Tensor, column: int) -> Tensor:
    return draws[:, column].view(-1, 1, 1)


def _gradient(draws: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """A smooth gradient with _STOPS colours along a line or around a point: (B, 3, H, W)."""
    own = draws[:, 0]
    angle = 2 * math.pi * _number(own, 0)
    centre_x, centre_y = 1.4 * _number(own, 1) - 0.2, 1.4 * _number(own, 2) - 0.2
    along = 0.5 + (x - 0.5) * torch.cos(angle) + (y - 0.5) * torch.sin(angle)
    around = ((x - centre_x) ** 2 + (y - centre_y) ** 2).sqrt_()
    bend = 0.12 * torch.sin(4 * (x * torch.sin(angle) - y * torch.cos(angle)) + 6 * _number(own, 3))
    position = (torch.where(_number(own, 4) < 0.6, along, around) + bend) * (_STOPS - 1)
    canvas = _colour(draws[:, 1, :3]).view(-1, 3, 1, 1).expand(-1, 3, size, size)
    for stop in range(1, _STOPS):
        share = (position - (stop - 1)).clamp_(0, 1)
        share = (share * share * (3 - 2 * share)).unsqueeze(1)
        canvas = torch.lerp(canvas, _colour(draws[:, 1 + stop, :3]).view(-1, 3, 1, 1), share)
    return canvas


def _background(draws: Tensor, y: Tensor, size: int) -> Tensor:
    high, low = _colour(draws[:, 0, :3]).view(-1, 3, 1, 1), _colour(draws[:, 0, 3:6]).view(-1, 3, 1, 1)
    return torch.lerp(high, low, y.unsqueeze(1)).expand(-1, 3, size, size)


def _shape(canvas: Tensor, draws: Tensor, radius: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Lays one disc, rectangle or polygon per picture over the canvas; draws (B, _PARAMETERS), radius (B, 1, 1)."""
    angle = 2 * math.pi * _number(draws, 0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    dx, dy = x - (1.2 * _number(draws, 1) - 0.1), y - (1.2 * _number(draws, 2) - 0.1)
    across, down = dx * cos + dy * sin, dy * cos - dx * sin
    form = _number(draws, 3)
    stretch = 0.45 + 0.55 * _number(draws, 4)
    # one formula for all: the largest of up to four half planes, or the disc
    triangle = torch.maximum(0.87 * across.abs() + 0.5 * down, -down) - 0.6 * radius
    box = torch.maximum(across.abs() - radius, down.abs() - stretch * radius)
    disc = (across * across + (down / stretch) ** 2).sqrt_() - radius
    distance = torch.where(form < 0.4, disc, torch.where(form < 0.8, box, triangle))
    # some edges are out of focus
    blur = size / (1 + 0.06 * size * (_number(draws, 5) - 0.6).clamp(min=0))
    cover = (0.5 - distance * blur).clamp_(0, 1).unsqueeze(1)
    first, second = _colour(draws[:, 6:9]).view(-1, 3, 1, 1), draws[:, 9:12].view(-1, 3, 1, 1) - 0.5
    shade = (across / radius * 0.6).clamp_(-1, 1).unsqueeze(1)
    return torch.lerp(canvas, first + 0.45 * second * shade, cover)


def _leaves(draws: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    canvas = _background(draws, y, size)
    # density of sizes ~ radius ** -3 between the two ends, the law of natural pictures
    radii = (0.09**-2 + (0.55**-2 - 0.09**-2) * draws[:, 1 : 1 + _LEAVES, 12]) ** -0.5
    for leaf in range(_LEAVES):
        canvas = _shape(canvas, draws[:, 1 + leaf], radii[:, leaf].view(-1, 1, 1), x, y, size)
    return canvas


def _shapes(draws: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    canvas = _background(draws, y, size)
    for number in range(_BIG):
        own = draws[:, 1 + number]
        canvas = _shape(canvas, own, 0.14 + 0.30 * _number(own, 12), x, y, size)
    return canvas


def _blobs(draws: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Gaussian blobs which blend into each other, each with its own colour."""
    own = draws[:, 1 : 1 + _BLOBS]
    width = 0.09 + 0.25 * own[..., 0] ** 2
    rows = torch.exp(-(((y - own[..., 1].unsqueeze(-1).transpose(1, 2)) / width.unsqueeze(1)) ** 2)).transpose(1, 2)
    columns = torch.exp(-(((x - own[..., 2].unsqueeze(-1)) / width.unsqueeze(-1)) ** 2))
    weights = rows.unsqueeze(-1) * columns.unsqueeze(-2)  # (B, S, H, W)
    colours = _colour(own[..., 3:6].reshape(-1, 3)).view(-1, _BLOBS, 3)
    total = weights.sum(1, keepdim=True)
    mixed = torch.einsum("bshw,bsc->bchw", weights, colours)
    return (mixed + 0.3 * _background(draws, y, size)) / (total + 0.3)


_DRAW = {"leaves": _leaves, "gradient": _gradient, "shapes": _shapes, "blobs": _blobs}
