"""Between pictures and the numbers that the networks take: uint8 (..., S, S, 3) <-> float (..., 3, S, S) in [-1, 1]."""

import torch


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (..., S, S, 3) to float32 (..., 3, S, S) in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1.0


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (..., 3, S, S), clamped to [-1, 1], to uint8 (..., S, S, 3)."""
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).movedim(-3, -1)
