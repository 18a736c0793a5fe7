"""Keys and values of finished frames: what lets a causal model evaluate every finished frame only once more.

Layout: one tensor of shape (layers, 2, B, H, slots, L, head size); frame f lies in slot f mod slots, so memory does not
grow with the video. Keys are stored rotated by their frame index; rotary attention sees only differences.
"""

import torch


class FrameKVCache:
    """Ring of the last `window` - 1 committed frames.

    Args:
        num_layers, batch_size, num_heads, head_dim, num_tokens: of the model and the run (both guidance halves counted).
        window (int): how many frames back a frame can see, itself included; >= 1.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        num_tokens: int,
        head_dim: int,
        window: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_slots = window - 1
        self.num_committed = 0
        shape = (num_layers, 2, batch_size, num_heads, self.num_slots, num_tokens, head_dim)
        self.storage = torch.empty(shape, device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def frames(self) -> tuple[int, ...]:
        """Indices of the frames held, in the order of their slots."""
        if self.num_committed <= self.num_slots:
            return tuple(range(self.num_committed))
        first = self.num_committed - self.num_slots
        return tuple(first + (slot - first) % self.num_slots for slot in range(self.num_slots))

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the frames held, each (B, H, frames * L, head size)."""
        held = self.storage[layer, :, :, :, : min(self.num_committed, self.num_slots)].flatten(3, 4)
        return held[0], held[1]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the next frames of one layer, each (B, H, frames, L, head size); `advance` makes them visible."""
        num_frames = keys.shape[2]
        for index in range(max(num_frames - self.num_slots, 0), num_frames):
            slot = (self.num_committed + index) % self.num_slots
            self.storage[layer, 0, :, :, slot] = keys[:, :, index]
            self.storage[layer, 1, :, :, slot] = values[:, :, index]

    def advance(self, num_frames: int) -> None:
        """Count the frames that every layer has stored."""
        self.num_committed += num_frames
