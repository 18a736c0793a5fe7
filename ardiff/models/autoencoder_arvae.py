"""AR-VAE: a time-agnostic encoder from frames to tokens and a decoder that is causal in time (AR-Diffusion, section 3.2).

Shapes: B batch, F frames, N = B * F, L tokens per frame (= grid * grid), C latent channels, D token width, S image size.
The encoder sees one frame at a time. The decoder draws a frame from its own tokens and the tokens of the
`temporal_window` - 1 frames before it, so decoding frame by frame with a `DecoderCache` equals decoding the whole clip.
Tokens start from the cells of a small convolutional grid (plus learned queries): free 1-D queries learn far more slowly.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


@dataclass
class TokenDistribution:
    """Diagonal Gaussian over a frame's tokens: `mean` and `logvar`, both of shape (..., L, C)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> torch.Tensor:
        """KL divergence from the standard normal, mean over all entries (a scalar, in nats per entry)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


class DecoderCache:
    """Tokens of the last `temporal_window` - 1 frames, shape (B, <= window - 1, L, C): all that a later frame needs."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    def append(self, latents: torch.Tensor, keep: int) -> None:
        tokens = latents if self.tokens is None else torch.cat([self.tokens, latents], dim=1)
        # A copy: a view of a longer clip would keep all of it alive.
        self.tokens = tokens[:, max(tokens.shape[1] - keep, 0) :].clone()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, on (N, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.conv2(F.silu(self.conv1(F.silu(self.norm(hidden_states)))))


class TokenBlock(nn.Module):
    """Pre-norm transformer block over the L tokens of each frame, on (N, L, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        tokens = tokens + self.proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class TemporalAttention(nn.Module):
    """A frame's tokens look at its own latent tokens and those of the frames before it; zero at initialisation."""

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        # Tells a key and a value how many frames back it comes from, oldest first.
        self.lag_embedding = nn.Parameter(torch.randn(window, 1, 2 * width) * 0.02)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """tokens (B, F, L, D); context (B, window - 1 + F, L, D); visible (F, window), True = that frame exists."""
        query = self.to_q(self.norm_query(tokens)).flatten(0, 1).unflatten(-1, (self.num_heads, -1))
        # (B, F, L, 2D, window): every frame's own window of the context.
        key_value = self.to_kv(self.norm_context(context)).unfold(1, self.window, 1)
        key_value = key_value.movedim(-1, 2) + self.lag_embedding
        key, value = key_value.flatten(2, 3).flatten(0, 1).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        mask = visible[:, :, None].expand(-1, -1, tokens.shape[2]).flatten(1).repeat(tokens.shape[0], 1)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask[:, None, None, :]
        )
        return tokens + self.proj(attended.transpose(1, 2).flatten(2)).unflatten(0, tokens.shape[:2])


class AutoencoderARVAE(ModelMixin, ConfigMixin):
    """Frames (B, F, 3, S, S) in [-1, 1] <-> latents (B, F, L, C), roughly zero mean and unit variance per channel.

    Args:
        image_size (int): S in pixels, a multiple of 16 times a power of two; 64 gives a 4 x 4 grid of tokens.
        latent_channels (int): C.
        stem_channels (list of int): channels at 1/2, 1/4 and 1/8 of the image size.
        width (int): D, also the channels of the token grid at 1/16.
        num_encoder_layers, num_decoder_layers (int): transformer blocks over the tokens of a frame.
        num_heads (int): attention heads.
        temporal_window (int): how many frames, its own included, a decoded frame may look at; 1 = images only.
        latents_mean, latents_std (list of float, length C, or None): statistics of the raw tokens. None = 0 and 1.
    """

    _no_split_modules = ["TokenBlock", "TemporalAttention"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        latent_channels: int = 16,
        stem_channels: list[int] = (32, 64, 128),
        width: int = 192,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        num_heads: int = 3,
        temporal_window: int = 4,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"`image_size` must be a positive multiple of 16 but is {image_size}.")
        if temporal_window < 1:
            raise ValueError(f"`temporal_window` must be at least 1 but is {temporal_window}.")
        grid = image_size // 16
        self.grid = grid
        self.num_tokens = grid * grid
        half, quarter, eighth = stem_channels

        self.encoder_stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, half, 3, padding=1),
            ResidualBlock(half),
            nn.Conv2d(half, quarter, 3, stride=2, padding=1),
            ResidualBlock(quarter),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            ResidualBlock(eighth),
            nn.Conv2d(eighth, width, 3, stride=2, padding=1),
            ResidualBlock(width),
        )
        self.encoder_queries = nn.Parameter(torch.randn(self.num_tokens, width) * 0.02)
        self.encoder_blocks = nn.ModuleList(TokenBlock(width, num_heads) for _ in range(num_encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.to_moments = nn.Linear(width, 2 * latent_channels)

        self.from_latents = nn.Linear(latent_channels, width)
        self.decoder_positions = nn.Parameter(torch.randn(self.num_tokens, width) * 0.02)
        self.temporal_blocks = nn.ModuleList(
            TemporalAttention(width, num_heads, temporal_window) for _ in range(num_decoder_layers)
        )
        self.decoder_blocks = nn.ModuleList(TokenBlock(width, num_heads) for _ in range(num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 4 * eighth, 1),
            nn.PixelShuffle(2),
            ResidualBlock(eighth),
            ResidualBlock(eighth),
            nn.Conv2d(eighth, 4 * quarter, 1),
            nn.PixelShuffle(2),
            ResidualBlock(quarter),
            nn.Conv2d(quarter, 4 * half, 1),
            nn.PixelShuffle(2),
            ResidualBlock(half),
            nn.GroupNorm(8, half),
            nn.SiLU(),
            nn.Conv2d(half, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        if self.config.latents_mean is None:
            return 0.0, 1.0
        return like.new_tensor(self.config.latents_mean), like.new_tensor(self.config.latents_std)

    def features(self, frames: torch.Tensor) -> torch.Tensor:
        """Token features (B, F, L, D) that the token statistics are read off, each frame alone.

        Args:
            frames (torch.Tensor of shape (B, F, 3, S, S)): pixels in [-1, 1].
        """
        size = self.config.image_size
        if frames.ndim != 5 or frames.shape[2:] != (3, size, size):
            raise ValueError(
                f"`frames` must have shape (batch, frames, 3, {size}, {size}) but has {tuple(frames.shape)}."
            )
        pixels = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        tokens = self.encoder_stem(pixels).flatten(2).transpose(1, 2) + self.encoder_queries
        for block in self.encoder_blocks:
            tokens = block(tokens)
        return self.encoder_norm(tokens).unflatten(0, frames.shape[:2])

    @apply_forward_hook
    def encode(self, frames: torch.Tensor) -> TokenDistribution:
        """Distribution of the tokens of every frame (B, F, L, C), each frame alone; `frames` as in `features`."""
        mean, logvar = self.to_moments(self.features(frames)).float().to(frames.dtype).chunk(2, dim=-1)
        shift, scale = self._statistics(mean)
        logvar = logvar.clamp(-12.0, 4.0) - 2.0 * torch.as_tensor(scale).log()
        return TokenDistribution((mean - shift) / scale, logvar)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, cache: DecoderCache | None = None) -> torch.Tensor:
        """Frames (B, F, 3, S, S), pixels about [-1, 1] (not clamped), each from its own and earlier tokens.

        Args:
            latents (torch.Tensor of shape (B, F, L, C)): the next F frames' tokens.
            cache (DecoderCache or None): what came before these frames; extended by them. None = they are the first.
        """
        expected = (self.num_tokens, self.config.latent_channels)
        if latents.ndim != 4 or latents.shape[2:] != expected:
            raise ValueError(
                f"`latents` must have shape (batch, frames, {expected[0]}, {expected[1]}) but has {tuple(latents.shape)}."
            )
        window, num_frames = self.config.temporal_window, latents.shape[1]
        context = latents
        if cache is not None:
            if cache.tokens is not None:
                context = torch.cat([cache.tokens.to(latents), latents], dim=1)
            cache.append(latents, keep=window - 1)
        # Frames before the first one do not exist: padded with zeros, and invisible.
        num_missing = window - 1 + num_frames - context.shape[1]
        slot = torch.arange(num_frames, device=latents.device)[:, None] + torch.arange(window, device=latents.device)
        shift, scale = self._statistics(latents)
        embedded = self.from_latents(context * scale + shift) + self.decoder_positions
        context = F.pad(embedded, (0, 0, 0, 0, num_missing, 0))
        tokens = embedded[:, -num_frames:]
        for temporal_block, block in zip(self.temporal_blocks, self.decoder_blocks, strict=True):
            tokens = temporal_block(tokens, context, visible=slot >= num_missing)
            tokens = block(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        grid_states = self.decoder_norm(tokens).flatten(0, 1).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        frames = self.decoder_head(grid_states.contiguous(memory_format=torch.channels_last))
        return frames.to(latents.dtype).unflatten(0, latents.shape[:2])

    def forward(
        self, frames: torch.Tensor, generator: torch.Generator | None = None, train_encoder: bool = True
    ) -> tuple[torch.Tensor, TokenDistribution]:
        """One training pass: frames -> posterior sample -> frames, batch decode.

        Args:
            frames (torch.Tensor of shape (B, F, 3, S, S)): pixels in [-1, 1].
            generator (torch.Generator or None): draws the posterior sample.
            train_encoder (bool): False stops the gradient at the tokens (second stage: the decoder learns time).

        Returns:
            The reconstruction (B, F, 3, S, S) and the token distribution.
        """
        with torch.set_grad_enabled(train_encoder and torch.is_grad_enabled()):
            posterior = self.encode(frames)
            latents = posterior.sample(generator)
        return self.decode(latents), posterior
