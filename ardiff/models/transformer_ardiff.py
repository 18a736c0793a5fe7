"""The denoiser: a transformer over the tokens of all frames, strictly causal in time, one timestep per frame.

Shapes: B batch, F frames, L tokens per frame, S = F * L, C latent channels, D width, H heads.
Frame i sees frames (i - window, i] and the condition, nothing else: there is no path from a later frame to an earlier
one. AR-Diffusion (arXiv 2503.07418) section 3.2; adaLN-single as in PixArt-alpha; rotary positions over the frame index.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ardiff.models.frame_cache import FrameKVCache


ROTARY_BASE = 100.0  # Lags of a window of some dozens of frames; 10,000 would leave most pairs nearly unrotated.


@lru_cache(maxsize=512)
def frame_mask(
    query_frames: tuple[int, ...], key_frames: tuple[int, ...], window: int, num_tokens: int, device: torch.device
) -> torch.Tensor | None:
    """Which keys a query sees, (queries * L, keys * L) bool, True = visible; None when everything is visible."""
    query, key = torch.tensor(query_frames)[:, None], torch.tensor(key_frames)[None, :]
    visible = (key <= query) & (key > query - window)
    if bool(visible.all()):
        return None
    return visible.repeat_interleave(num_tokens, 0).repeat_interleave(num_tokens, 1).to(device)


@lru_cache(maxsize=512)
def frame_rotation(
    first: int, num_frames: int, num_pairs: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (num_frames, 1, num_pairs), of the rotary angles of consecutive frames.

    Computed in float64 on the CPU: only differences of angles matter, also between frames far into a long video.
    """
    frequency = ROTARY_BASE ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    angle = torch.arange(first, first + num_frames)[:, None, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2 * R features of (B, H, F, L, head size) by angles whose cos and sin have shape (F, 1, R)."""
    half = cos.shape[-1]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class FrameBlock(nn.Module):
    """Attention over frames and an MLP, both modulated per frame."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        # Queries and keys of unit size keep attention scores within sqrt(head size): training stays stable in bf16.
        self.norm_qk = nn.RMSNorm(width // num_heads, eps=1e-6, elementwise_affine=False)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        # This block's own offset to the modulation that all blocks share.
        self.modulation_offset = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: FrameKVCache | None,
        layer: int,
        num_commit: int,
    ) -> torch.Tensor:
        """hidden_states (B, F, L, D); modulation (B, F, 1, 6, D); mask (S, keys) or None."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.modulation_offset).unbind(-2)
        qkv = self.qkv(self.norm(hidden_states) * (1 + scale_a) + shift_a)
        # (B, F, L, 3, H, head size) -> three of (B, H, F, L, head size)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        cos, sin = (table.to(value.dtype) for table in rotary)
        query, key = rotate(self.norm_qk(query), cos, sin), rotate(self.norm_qk(key), cos, sin)
        keys, values = key.flatten(2, 3), value.flatten(2, 3)
        if cache is not None:
            cached_keys, cached_values = cache.get(layer)
            keys = torch.cat([cached_keys, keys], dim=2)
            values = torch.cat([cached_values, values], dim=2)
            # Stored after reading: the frame that falls out of the ring is still visible to the first one committed.
            cache.store(layer, key[:, :, :num_commit], value[:, :, :num_commit])
        attended = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2).unflatten(1, hidden_states.shape[1:3])
        hidden_states = hidden_states + gate_a * self.proj(attended)
        inner = self.fc1(self.norm(hidden_states) * (1 + scale_m) + shift_m)
        return hidden_states + gate_m * self.fc2(F.gelu(inner, approximate="tanh"))


class ARDiffTransformerModel(ModelMixin, ConfigMixin):
    """Predicts, for every frame at its own timestep, the clean tokens (or what the scheduler's prediction type says).

    Args:
        num_tokens (int): L. in_channels (int): C. width (int): D. depth (int): blocks. num_heads (int): H.
        window (int): how many frames back a frame can see, itself included.
        class_names (list of str): names of the classes; empty = unconditional only. A trained null class is added.
    """

    _no_split_modules = ["FrameBlock"]
    _repeated_blocks = ["FrameBlock"]
    _skip_keys = ["cache"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 16,
        in_channels: int = 16,
        width: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        window: int = 16,
        class_names: list[str] = (),
    ) -> None:
        super().__init__()
        if width % num_heads or (width // num_heads) % 4:
            raise ValueError(f"`width` must be a multiple of 4 * `num_heads` = {4 * num_heads} but is {width}.")
        if window < 2:
            raise ValueError(f"`window` must be at least 2 but is {window}.")
        self.head_dim = width // num_heads
        self.embed = nn.Linear(in_channels, width)
        self.token_positions = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.timestep_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedding = TimestepEmbedding(256, width)
        self.class_embedding = nn.Embedding(len(class_names) + 1, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(FrameBlock(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        # Shift and scale of the output, and per channel how much of the noisy input passes straight through: near timestep
        # 0 the input is the answer, and the network need not copy it.
        self.modulation_out = nn.Linear(width, 2 * width + in_channels)
        self.proj_out = nn.Linear(width, in_channels)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for layer in (self.modulation, self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Gates start small but open, so that the first steps already train every block.
        with torch.no_grad():
            for block in self.blocks:
                block.modulation_offset[2] = block.modulation_offset[5] = 0.1

    @property
    def null_class(self) -> int:
        """The class label of "no class", trained by dropping the label."""
        return len(self.config.class_names)

    def new_cache(self, batch_size: int, device: torch.device | None = None) -> FrameKVCache:
        """An empty cache for `batch_size` sequences (count both guidance halves); `device` None is where the weights are."""
        config = self.config
        return FrameKVCache(
            config.depth, batch_size, config.num_heads, config.num_tokens, self.head_dim, config.window,
            device=device or self.device, dtype=self.dtype,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        *,
        cache: FrameKVCache | None = None,
        num_commit: int = 0,
    ) -> torch.Tensor:
        """One evaluation of consecutive frames.

        Args:
            hidden_states (torch.Tensor of shape (B, F, L, C)): noisy tokens. Without a cache these are frames 0 .. F - 1,
                with one they follow the frames committed so far.
            timestep (torch.Tensor of shape (B, F)): int64 in [0, 1000), one per frame.
            class_labels (torch.Tensor of shape (B,) or None): int64 in [0, classes], the last = no class. None = no class.
            cache (FrameKVCache or None): finished frames, from `new_cache`.
            num_commit (int): the first so many frames are finished (timestep 0) and are added to the cache.

        Returns:
            torch.Tensor of shape (B, F, L, C).
        """
        batch_size, num_frames, num_tokens, channels = hidden_states.shape
        config = self.config
        if (num_tokens, channels) != (config.num_tokens, config.in_channels):
            raise ValueError(
                f"`hidden_states` must have shape (batch, frames, {config.num_tokens}, {config.in_channels}) "
                f"but has {tuple(hidden_states.shape)}."
            )
        if timestep.shape != (batch_size, num_frames):
            raise ValueError(f"`timestep` must have shape {(batch_size, num_frames)} but has {tuple(timestep.shape)}.")
        if num_commit and cache is None:
            raise ValueError(f"`num_commit` must be 0 without a `cache` but is {num_commit}.")
        first = cache.num_committed if cache is not None else 0
        frames = tuple(range(first, first + num_frames))
        key_frames = (cache.frames() if cache is not None else ()) + frames
        mask = frame_mask(frames, key_frames, config.window, num_tokens, hidden_states.device)

        rotary = frame_rotation(first, num_frames, self.head_dim // 4, hidden_states.dtype, hidden_states.device)

        if class_labels is None:
            class_labels = torch.full((batch_size,), self.null_class, device=hidden_states.device)
        features = self.timestep_features(timestep.flatten()).to(hidden_states.dtype)
        condition = self.timestep_embedding(features).unflatten(0, (batch_size, num_frames))
        condition = F.silu(condition + self.class_embedding(class_labels)[:, None])[:, :, None]
        modulation = self.modulation(condition).unflatten(-1, (6, -1))

        tokens = self.embed(hidden_states) + self.token_positions
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, modulation, rotary, mask, cache, layer, num_commit)
        if cache is not None and num_commit:
            cache.advance(num_commit)
        width = config.width
        shift, scale, through = self.modulation_out(condition).split([width, width, channels], dim=-1)
        return self.proj_out(self.norm_out(tokens) * (1 + scale) + shift) + through * hidden_states
