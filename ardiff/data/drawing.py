"""What scenes are drawn with: colours, and shapes laid over a canvas with smooth edges.

Shapes: M pictures, (H, W) pixels; x (1, 1, 1, W) to the right and y (1, 1, H, 1) down in [0, 1], numbers (M, 1, 1, 1),
colours (M, 3, 1, 1); (...) is any shape.
"""

import math

import torch
from torch import Tensor


def between(draw: Tensor, low: float, high: float) -> Tensor:
    """From a draw in [0, 1) to a number in [low, high)."""
    return low + (high - low) * draw


def smoothstep(value: Tensor) -> Tensor:
    """From 0 to 1 with no slope at either end; beyond them it stays."""
    value = value.clamp(0, 1)
    return value * value * (3 - 2 * value)


def colour_wheel(hue: Tensor, mean: float = 0.56, swing: float = 0.36) -> Tensor:
    """A smooth colour wheel: (...) in turns -> (..., 3)."""
    phase = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=hue.dtype)
    return mean + swing * torch.cos(2 * math.pi * (hue.unsqueeze(-1) - phase))


def hex_colours(*colours: str) -> Tensor:
    """Hex colours as (number of colours, 3) float64."""
    values = [[int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in colours]
    return torch.tensor(values, dtype=torch.float64)


def palette(position: Tensor, colours: Tensor) -> Tensor:
    """Colours (K, 3) at positions (...) in [0, K - 1], smoothly interpolated: (..., 3)."""
    position = position.clamp(0, len(colours) - 1)
    index = position.floor().clamp(max=len(colours) - 2)
    share = (position - index).unsqueeze(-1)
    index = index.long()
    return colours[index].lerp(colours[index + 1], smoothstep(share))


def coverage(distance: Tensor, size: int) -> Tensor:
    """Share of a pixel inside a shape, from the signed distance of its centre (negative inside)."""
    return distance.mul(-size).add_(0.5).clamp_(0, 1)


def paint(canvas: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Lays a colour (M, 3, H or 1, W or 1) over the canvas (M, 3, H, W) where cover (M, 1, H, W) says."""
    return torch.lerp(canvas, colour, cover)


def sphere(canvas: Tensor, size: int, dx: Tensor, dy: Tensor, radius: Tensor, colour: Tensor, seen: Tensor) -> Tensor:
    """A shaded ball, lit from the upper left; dx and dy are measured from its centre."""
    cover = coverage((dx * dx + dy * dy).sqrt_().sub_(radius), size).mul_(seen)
    across, down = dx / radius + 0.34, dy / radius + 0.40
    from_light = across * across + down * down
    shine = torch.exp(-6 * from_light).mul_(0.45)
    return paint(canvas, colour * (1.12 - 0.36 * from_light) + shine, cover)
