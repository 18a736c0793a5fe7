"""The published AR-VAE: a TiTok-like encoder from frames to 1-D tokens, and an image or a temporal decoder.

Shapes: B batch, F frames, N = B * F, L latent tokens of a frame, P = grid * grid patches, C latent channels, D token width, S
image size. Tokens are points on the unit sphere in R^C: the decoder normalises them, so their length means nothing.
The architecture is TiTok's first version (Yu et al. 2024, arXiv 2406.07550) with a continuous bottleneck; its pixel decoder
that of MaskGIT's VQGAN. The temporal decoder draws a frame from its own and earlier tokens of its clip of `clip_frames`.
Parameter names are those of the published files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ardiff.models.autoencoder_arvae import DecoderCache, TokenDistribution


SCALE_FACTOR = 0.5  # The released code stores twice the tokens. Normalisation makes it meaningless.


def tokens_from_stored(latents: torch.Tensor) -> torch.Tensor:
    """Latents as the released code stores them, (B, F, C, 1, L), to what the transformer sees: (B, F, L, C), unit length."""
    return F.normalize(latents.squeeze(-2).transpose(-1, -2), dim=-1, eps=1e-12)


def stored_from_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, F, L, C) to the latents that the released code returns, (B, F, C, 1, L)."""
    return (tokens / SCALE_FACTOR).transpose(-1, -2).unsqueeze(-2)


@dataclass
class SphericalTokenDistribution(TokenDistribution):
    """Gaussian over unnormalised tokens; what the transformer sees is the direction of the mean."""

    def mode(self) -> torch.Tensor:
        return F.normalize(self.mean, dim=-1, eps=1e-12)


class TokenBlock(nn.Module):
    """Pre-norm transformer block over (N, tokens, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(tokens))))


class FineTemporalBlock(nn.Module):
    """Every patch looks at the same patch of the frames up to its own; pixels (B, F, P, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        batch_size, num_frames, num_patches = pixels.shape[:3]
        normed = self.ln_1(pixels).transpose(1, 2).flatten(0, 1)
        later = torch.ones(num_frames, num_frames, dtype=torch.bool, device=pixels.device).triu(1)
        attended = self.attn(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        return pixels + attended.unflatten(0, (batch_size, num_patches)).transpose(1, 2)


class CoarseTemporalBlock(nn.Module):
    """Every token of a frame looks at the latent tokens of the frames up to its own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.ln_v = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, pixels: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels (B, F, P, D), latents (B, F, L, D); both come back changed."""
        num_frames, num_latents = latents.shape[1:3]
        tokens = torch.cat([latents, pixels], dim=2)
        frame = torch.arange(num_frames, device=tokens.device)
        query_frame = frame.repeat_interleave(tokens.shape[2])
        key_frame = frame.repeat_interleave(num_latents)
        context = latents.flatten(1, 2)
        attended = self.attn(
            self.ln_q(tokens.flatten(1, 2)),
            self.ln_k(context),
            self.ln_v(context),
            attn_mask=key_frame[None, :] > query_frame[:, None],
            need_weights=False,
        )[0]
        tokens = tokens + attended.unflatten(1, tokens.shape[1:3])
        return tokens[:, :, num_latents:], tokens[:, :, :num_latents]


class Encoder(nn.Module):
    """Frames (N, 3, S, S) in [0, 1] to moments (N, 2C, 1, L)."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, depth: int, num_heads: int, num_tokens: int, channels: int
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + num_patches, width) * width**-0.5)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TokenBlock(width, num_heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, 2 * channels, 1)

    def forward(self, frames: torch.Tensor, latent_tokens: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(frames).flatten(2).transpose(1, 2)
        images = torch.cat([self.class_embedding.expand(len(frames), 1, -1), patches], dim=1)
        images = images + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(len(frames), -1, -1)
        tokens = self.ln_pre(torch.cat([images, latents], dim=1))
        for block in self.transformer:
            tokens = block(tokens)
        latents = self.ln_post(tokens[:, images.shape[1] :])
        # The numbers of (L, D) are read as (D, L), not transposed: the weights were trained on this.
        return self.conv_out(latents.contiguous().view(len(frames), -1, 1, latents.shape[1]))


class Decoder(nn.Module):
    """Tokens (B, F, L, C) to codebook logits (B * F', codebook size, grid, grid) of the last F' frames."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        num_tokens: int,
        channels: int,
        codebook_size: int,
        temporal: bool,
    ) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.decoder_embed = nn.Linear(channels, width)
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + self.grid**2, width) * width**-0.5)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TokenBlock(width, num_heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, codebook_size, 1))
        self.temporal = temporal
        if temporal:
            self.fine_temporal_blocks = nn.ModuleList(FineTemporalBlock(width, num_heads) for _ in range(depth))
            self.coarse_temporal_blocks = nn.ModuleList(CoarseTemporalBlock(width, num_heads) for _ in range(depth))

    def mix_frames(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """The temporal half of a layer; tokens (B, F, 1 + P + L, D): class, pixels, latents."""
        class_token, pixels, latents = tokens.split([1, self.grid**2, tokens.shape[2] - 1 - self.grid**2], dim=2)
        pixels = self.fine_temporal_blocks[layer](pixels)
        pixels, latents = self.coarse_temporal_blocks[layer](pixels, latents)
        return torch.cat([class_token, pixels, latents], dim=2)

    def forward(self, latents: torch.Tensor, num_last: int) -> torch.Tensor:
        shape = latents.shape[:2]
        masked = torch.cat([self.class_embedding[None], self.mask_token.expand(1, self.grid**2, -1)], dim=1)
        masked = (masked + self.positional_embedding).expand(*shape, -1, -1)
        embedded = self.decoder_embed(latents) + self.latent_token_positional_embedding
        tokens = self.ln_pre(torch.cat([masked, embedded], dim=2))
        for layer, block in enumerate(self.transformer):
            if self.temporal:
                tokens = self.mix_frames(tokens, layer)
            tokens = block(tokens.flatten(0, 1)).unflatten(0, shape)
        pixels = self.ln_post(tokens[:, shape[1] - num_last :, 1 : 1 + self.grid**2].flatten(0, 1))
        return self.ffn(pixels.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip; where the channels change, the skip reads their output and the input is lost."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden_states)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(inner) if hasattr(self, "nin_shortcut") else hidden_states)


class UpLevel(nn.Module):
    """Residual blocks and, but for the finest level, twice the height and width."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(out_channels if index else in_channels, out_channels) for index in range(num_blocks)
        )
        if upsample:
            self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            hidden_states = block(hidden_states)
        if hasattr(self, "upsample_conv"):
            hidden_states = self.upsample_conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return hidden_states


class PixelDecoder(nn.Module):
    """MaskGIT-VQGAN's decoder: (N, pixel channels, grid, grid) to (N, 3, S, S). `up` is listed from the finest level on."""

    def __init__(self, in_channels: int, base: int, multipliers: list[int], num_blocks: int) -> None:
        super().__init__()
        channels = [base * multiplier for multiplier in multipliers]
        coarser = [*channels[1:], channels[-1]]
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(channels[-1], channels[-1]) for _ in range(num_blocks))
        self.up = nn.ModuleList(
            UpLevel(come_in, go_out, num_blocks, upsample=level > 0)
            for level, (come_in, go_out) in enumerate(zip(coarser, channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in self.mid:
            hidden_states = block(hidden_states)
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class AutoencoderOriginal(ModelMixin, ConfigMixin):
    """Frames (B, F, 3, S, S) in [-1, 1] <-> tokens (B, F, L, C) on the unit sphere; the contract of `AutoencoderARVAE`.

    The defaults are the published configuration, whose files know pixels in [0, 1]: converted here, at the edge.

    Args:
        image_size (int): S in pixels, `patch_size` times a power of two.
        patch_size (int): pixels of a patch's side; 2 to the number of `channel_multipliers` less one.
        width (int): D. num_layers (int): blocks of the encoder, and of the decoder. num_heads (int).
        num_tokens (int): L. latent_channels (int): C.
        codebook_size (int): entries of the soft codebook between decoder and pixel decoder.
        pixel_channels (int): channels into the pixel decoder.
        base_channels (int), channel_multipliers (list of int, finest level first), num_res_blocks (int): of the pixel
            decoder; its widths are multiples of 32.
        clip_frames (int): frames of the clips that the temporal decoder takes apart; 1 = image decoder.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_tokens: int = 32,
        latent_channels: int = 4,
        codebook_size: int = 1024,
        pixel_channels: int = 256,
        base_channels: int = 128,
        channel_multipliers: list[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        clip_frames: int = 1,
    ) -> None:
        super().__init__()
        if patch_size != 2 ** (len(channel_multipliers) - 1) or image_size % patch_size:
            raise ValueError(
                f"`patch_size` must divide `image_size` {image_size} and be 2 to the number of `channel_multipliers` less "
                f"one, {2 ** (len(channel_multipliers) - 1)}, but is {patch_size}."
            )
        if clip_frames < 1:
            raise ValueError(f"`clip_frames` must be at least 1 but is {clip_frames}.")
        sizes = (image_size, patch_size, width, num_layers, num_heads, num_tokens, latent_channels)
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes, codebook_size, temporal=clip_frames > 1)
        self.pixel_quantize_conv = nn.Conv2d(codebook_size, pixel_channels, 1)
        self.pixel_decoder = PixelDecoder(pixel_channels, base_channels, channel_multipliers, num_res_blocks)

    @apply_forward_hook
    def encode(self, frames: torch.Tensor) -> SphericalTokenDistribution:
        """Distribution of the tokens of every frame (B, F, L, C), each frame alone; its `mode()` has unit length.

        Args:
            frames (torch.Tensor of shape (B, F, 3, S, S)): pixels in [-1, 1].
        """
        size = self.config.image_size
        if frames.ndim != 5 or frames.shape[2:] != (3, size, size):
            raise ValueError(
                f"`frames` must have shape (batch, frames, 3, {size}, {size}) but has {tuple(frames.shape)}."
            )
        moments = self.encoder(frames.flatten(0, 1) * 0.5 + 0.5, self.latent_tokens)
        mean, logvar = moments.squeeze(2).transpose(1, 2).unflatten(0, frames.shape[:2]).chunk(2, dim=-1)
        return SphericalTokenDistribution(mean, logvar.clamp(-30.0, 20.0))

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, cache: DecoderCache | None = None) -> torch.Tensor:
        """Frames (B, F, 3, S, S), pixels about [-1, 1] (not clamped); the length of a token has no effect.

        Args:
            latents (torch.Tensor of shape (B, F, L, C)): the next F frames' tokens. The temporal decoder takes clips of
                `clip_frames` apart, counted from the first frame; a shorter last one is drawn as the start of a clip.
            cache (DecoderCache or None): what came before these frames; extended by them. None = they are the first.
        """
        expected = (self.config.num_tokens, self.config.latent_channels)
        if latents.ndim != 4 or latents.shape[2:] != expected:
            raise ValueError(
                f"`latents` must have shape (batch, frames, {expected[0]}, {expected[1]}) but has {tuple(latents.shape)}."
            )
        tokens, clip_frames = F.normalize(latents, dim=-1, eps=1e-12), self.config.clip_frames
        earlier = 0
        if cache is not None:
            if cache.tokens is not None:
                earlier = cache.tokens.shape[1]
                tokens = torch.cat([cache.tokens.to(tokens), tokens], dim=1)
            # Only the clip that is not complete yet: a later frame looks no further back.
            cache.append(tokens[:, earlier:], keep=tokens.shape[1] % clip_frames)
        step = clip_frames if clip_frames > 1 else tokens.shape[1]
        frames = []
        for start in range(0, tokens.shape[1], step):
            clip = tokens[:, start : start + step]
            num_new = min(clip.shape[1], start + clip.shape[1] - earlier)
            logits = self.decoder(clip, num_new)
            pixels = self.pixel_decoder(self.pixel_quantize_conv(logits.softmax(dim=1)))
            frames.append(pixels.unflatten(0, (len(latents), num_new)))
        return torch.cat(frames, dim=1) * 2.0 - 1.0
