"""The published transformer: a DiT over context tokens and the tokens of one window of frames, one timestep per frame.

Shapes: B batch, F frames of the window, L tokens per frame, K context tokens, S = K + F * L, C latent channels, D width.
Positions are absolute within the window, so the network takes exactly `window` frames. Under the published mask
"video_temporal_causal" context tokens see every frame and carry what later frames hold to earlier ones in the next block:
keys and values of finished frames change with every call and cannot be cached.
Parameter names are those of the published files.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


MERGE_MODES = ("share_norm", "separate_norm", "reproduce", "sharenorm_shift_first_t")
ATTENTION_MASKS = ("none", "temporal_causal", "video_temporal_causal")
POSITIONS = ("absolute", "rotary")
BASE = 10000.0


@lru_cache(maxsize=16)
def position_table(num_positions: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Sinusoids of positions 0, 1, ..., (num_positions, width): sines in the first half, cosines in the second."""
    frequency = BASE ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(device, dtype)


def rotary_frequencies(head_dim: int) -> torch.Tensor:
    """Angle per position of every pair of features, (head_dim / 2,), float32."""
    return BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


@lru_cache(maxsize=16)
def rotation_table(
    num_positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (num_positions, head_dim / 2), of the rotary angles."""
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None] * rotary_frequencies(head_dim)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


@lru_cache(maxsize=16)
def visibility(
    kind: str, num_context: int, num_frames: int, num_tokens: int, device: torch.device
) -> torch.Tensor | None:
    """Which keys (column) a query (row) sees, (S, S) bool, True = visible; None when everything is."""
    if kind == "none":
        return None
    frame = torch.arange(num_frames).repeat_interleave(num_tokens)
    frame = torch.cat([torch.full((num_context,), -1), frame])  # the context comes before every frame
    visible = frame[None, :] <= frame[:, None]
    if kind == "video_temporal_causal":
        visible[:num_context] = True
    return visible.to(device)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of features of (B, H, S, head size) by angles whose cos and sin have shape (S, pairs)."""
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B, F) to (B, F, D)."""

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.features = Timesteps(num_features, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        features = self.features(timestep.flatten()).to(self.mlp[0].weight.dtype)
        return self.mlp(features).unflatten(0, timestep.shape)


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence (B, S, D)."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class OriginalBlock(nn.Module):
    """Attention and an MLP over context and video together; the merge mode says how the two are normalised and modulated."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, merge_mode: str) -> None:
        super().__init__()
        self.merge_mode = merge_mode
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def token_modulation(self, embedding: torch.Tensor, num_context: int, num_tokens: int) -> torch.Tensor:
        """Shift, scale and gate of attention, then of the MLP, for every token: (B, S, 6, D) from (B, F, D)."""
        video = self.adaLN_modulation(embedding).unflatten(-1, (6, -1))
        first = video[:, :1]
        # Shift 0, scale 0, gate 1: the context is not modulated.
        context = first.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None].expand_as(first)
        if self.merge_mode == "reproduce":  # a plain DiT: one timestep for everything
            video, context = first.expand_as(video), first
        elif self.merge_mode == "sharenorm_shift_first_t":
            # The MLP takes the shift and scale of attention; only its gate is its own.
            video, first = video[:, :, [0, 1, 2, 0, 1, 5]], first[:, :, [0, 1, 2, 0, 1, 5]]
            context = torch.cat([first[:, :, :2], context[:, :, 2:3], first[:, :, 3:5], context[:, :, 5:]], dim=2)
        return torch.cat([context.expand(-1, num_context, -1, -1), video.repeat_interleave(num_tokens, 1)], dim=1)

    def forward(
        self,
        tokens: torch.Tensor,
        embedding: torch.Tensor,
        num_context: int,
        mask: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """tokens (B, S, D), context first; embedding (B, F, D)."""
        num_tokens = (tokens.shape[1] - num_context) // embedding.shape[1]
        modulation = self.token_modulation(embedding, num_context, num_tokens)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(2)
        # The published modes add to the normalised tokens: what was there before is lost.
        replaces_residual = self.merge_mode in ("share_norm", "sharenorm_shift_first_t")

        normed = self.norm(tokens)
        residual = normed if replaces_residual else tokens
        tokens = residual + gate_a * self.attn(normed * (1 + scale_a) + shift_a, mask, rotation)
        normed = self.norm(tokens)
        residual = normed if replaces_residual else tokens
        return residual + gate_m * self.mlp(normed * (1 + scale_m) + shift_m)


class OriginalTransformerModel(ModelMixin, ConfigMixin):
    """Predicts the clean tokens of a window of frames, each at its own timestep (or what the prediction type says).

    The defaults are the configuration of the published checkpoints. A file shows neither `merge_mode` nor
    `attention_mask`: all of them have the same parameters.

    Args:
        num_tokens (int): L. in_channels (int): C. width (int): D. depth (int): blocks. num_heads (int).
        window (int): F, exactly so many frames go in.
        num_context_tokens (int): K. context_width (int): features of a context token.
        class_names (list of str): names of the classes, each with its context; empty = one context for every video.
        mlp_ratio (float): hidden width of the MLP over D.
        merge_mode (str): "share_norm" (published), "separate_norm", "reproduce" or "sharenorm_shift_first_t".
        attention_mask (str): "video_temporal_causal" (published; context sees everything), "temporal_causal" (context
            sees itself alone: strictly causal) or "none".
        positions (str): "absolute" (published) or "rotary". qk_norm (bool): LayerNorm of queries and keys.
    """

    _no_split_modules = ["OriginalBlock"]
    _repeated_blocks = ["OriginalBlock"]

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 32,
        in_channels: int = 4,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        window: int = 16,
        num_context_tokens: int = 77,
        context_width: int = 768,
        class_names: list[str] = (),
        mlp_ratio: float = 4.0,
        merge_mode: str = "share_norm",
        attention_mask: str = "video_temporal_causal",
        positions: str = "absolute",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(f"`width` must be a multiple of 2 * `num_heads` = {2 * num_heads} but is {width}.")
        for name, value, allowed in (
            ("merge_mode", merge_mode, MERGE_MODES),
            ("attention_mask", attention_mask, ATTENTION_MASKS),
            ("positions", positions, POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)} but is {value!r}.")
        # Not trained, yet random: the contexts exist in the files alone. One more than there are classes, never used.
        if class_names:
            self.class_emb = nn.Parameter(torch.randn(len(class_names) + 1, num_context_tokens, context_width) * 0.1)
        else:
            self.context_emb = nn.Parameter(torch.randn(num_context_tokens, context_width) * 0.1)
        self.x_embedder = nn.Linear(in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.c_embedder = nn.Linear(context_width, width)
        self.blocks = nn.ModuleList(
            OriginalBlock(width, num_heads, mlp_ratio, qk_norm, merge_mode) for _ in range(depth)
        )
        self.final_layer = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6), nn.Linear(width, in_channels)
        )

    def conditional_context(self, class_labels: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """Context of a batch, (B, K, context width).

        Args:
            class_labels (torch.Tensor of shape (B,) or None): int64 in [0, classes). None = no class, which in a model
                with classes is the context of class 0: the published models were trained so.
        """
        if not self.config.class_names:
            if class_labels is not None:
                raise ValueError("`class_labels` must be None: this model has no classes.")
            return self.context_emb.expand(batch_size, -1, -1)
        if class_labels is None:
            return self.class_emb[:1].expand(batch_size, -1, -1)
        return self.class_emb[class_labels.to(self.class_emb.device)]

    def unconditional_context(self, batch_size: int) -> torch.Tensor:
        """What guidance leads away from, (B, K, context width): class 0, or zeros in a model without classes."""
        if self.config.class_names:
            return self.class_emb[:1].expand(batch_size, -1, -1)
        return torch.zeros_like(self.context_emb).expand(batch_size, -1, -1)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """One evaluation of a window.

        Args:
            hidden_states (torch.Tensor of shape (B, F, L, C)): noisy tokens; positions are counted from the first frame.
            timestep (torch.Tensor of shape (B, F)): int64 in [0, 1000), one per frame.
            context (torch.Tensor of shape (B, K, context width)): from `conditional_context` or `unconditional_context`.

        Returns:
            torch.Tensor of shape (B, F, L, C).
        """
        config = self.config
        expected = (config.window, config.num_tokens, config.in_channels)
        if hidden_states.ndim != 4 or hidden_states.shape[1:] != expected:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {', '.join(map(str, expected))}) but has "
                f"{tuple(hidden_states.shape)}."
            )
        if timestep.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`timestep` must have shape {tuple(hidden_states.shape[:2])} but has {tuple(timestep.shape)}."
            )
        expected = (len(hidden_states), config.num_context_tokens, config.context_width)
        if context.shape != expected:
            raise ValueError(f"`context` must have shape {expected} but has {tuple(context.shape)}.")
        num_context, num_video, device = context.shape[1], config.window * config.num_tokens, hidden_states.device

        video = self.x_embedder(hidden_states.flatten(1, 2))
        rotation = None
        if config.positions == "absolute":
            video = video + position_table(num_video, config.width, video.dtype, device)
        else:
            rotation = rotation_table(num_context + num_video, config.width // config.num_heads, video.dtype, device)
        tokens = torch.cat([self.c_embedder(context), video], dim=1)
        mask = visibility(config.attention_mask, num_context, config.window, config.num_tokens, device)
        embedding = self.t_embedder(timestep)
        for block in self.blocks:
            tokens = block(tokens, embedding, num_context, mask, rotation)
        return self.final_layer(tokens[:, num_context:]).unflatten(1, hidden_states.shape[1:3])


def fixed_tables(config: dict) -> dict[str, torch.Tensor]:
    """Tables that published files carry besides the parameters although a formula gives them, by their names there.

    Args:
        config: of an `OriginalTransformerModel`.
    """
    if config["positions"] == "rotary":
        return {"rotary_emb.freqs": rotary_frequencies(config["width"] // config["num_heads"])}
    num_video = config["window"] * config["num_tokens"]
    return {"pos_embed": position_table(num_video, config["width"], torch.float32, torch.device("cpu"))[None]}
