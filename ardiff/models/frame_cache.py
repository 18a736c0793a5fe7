"""Keys and values of earlier frames: what lets a causal model evaluate every finished frame only once more.

Layout: one tensor of shape (layers, 2, B, H, slots, L, head size). The last `window` - 1 finished frames lie in front, in
order, and the frames of the running call behind them, so that what a call reads is one slice of it. When a frame is
committed the frames move up by one place, and the oldest one is gone: memory does not grow with the video, and in a long
one nothing about a slot changes but what is in it. Keys are stored rotated by their frame index; rotary attention sees only
differences.
"""

import torch


class FrameKVCache:
    """The last `window` - 1 committed frames, and room for those of a call.

    Args:
        num_layers, batch_size, num_heads, head_dim, num_tokens: of the model and the run (both guidance halves counted).
        window (int): how many frames back a frame can see, itself included; >= 2.
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
        self.window = window
        self.num_committed = 0
        shape = (num_layers, 2, batch_size, num_heads, window, num_tokens, head_dim)
        self.storage = torch.empty(shape, device=device, dtype=dtype)
        self._forget_call()

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def num_held(self) -> int:
        """How many committed frames a call sees."""
        return min(self.num_committed, self.window - 1)

    def frames(self) -> range:
        """Indices of the committed frames that are held, in the order of their slots."""
        return range(self.num_committed - self.num_held, self.num_committed)

    def reserve(self, num_frames: int) -> None:
        """Make room for the frames of a call: to be done before `extend`."""
        call = (self.num_held, num_frames)
        if call == self._call:
            return
        self._forget_call()
        num_slots = self.window - 1 + num_frames
        if num_slots > self.storage.shape[4]:
            # Only what is held lives twice for a moment, and before the first call that is nothing.
            held = self.storage = self.storage[..., : self.num_held, :, :].clone()
            self.storage = held.new_empty((*held.shape[:4], num_slots, *held.shape[5:]))
            self.storage[..., : self.num_held, :, :] = held
        # Every layer's keys, then its values: what calls like this one write, and what they see.
        self._call, stop = call, self.num_held + num_frames
        self._new = self.storage[..., self.num_held : stop, :, :].flatten(0, 1).unbind(0)
        self._seen = self.storage[..., :stop, :, :].flatten(4, 5).flatten(0, 1).unbind(0)

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the frames of a call, (B, H, frames, L, head size), behind the committed ones of one layer.

        Returns:
            Keys and values of both, views of shape (B, H, frames * L, head size). They count for no later call unless
            `commit` says so.
        """
        self._new[2 * layer].copy_(keys)
        self._new[2 * layer + 1].copy_(values)
        return self._seen[2 * layer], self._seen[2 * layer + 1]

    def commit(self, num_frames: int) -> None:
        """The first so many frames of the call are finished: once every layer has them, later calls see them."""
        surplus = max(self.num_held + num_frames - (self.window - 1), 0)
        self.num_committed += num_frames
        if not surplus:
            return
        for layer in self.storage:
            layer[..., : self.num_held, :, :] = layer[..., surplus : surplus + self.num_held, :, :].clone()
        if num_frames > self.window:  # A long prompt: its room is needed only once.
            self._forget_call()
            self.storage = self.storage[..., : self.window, :, :].clone()

    def _forget_call(self) -> None:
        """Let go of the views of the last call, which would keep a storage that is replaced."""
        self._call, self._new, self._seen = None, (), ()
