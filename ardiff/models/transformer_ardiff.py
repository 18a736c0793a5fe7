"""The denoiser: a transformer over the tokens of all frames, strictly causal in time, one timestep per frame.

Shapes: B batch, F frames, L tokens per frame, S = F * L, C latent channels, D width, H heads.
Frame i sees frames (i - window, i] and the condition, nothing else: there is no path from a later frame to an earlier
one. AR-Diffusion (arXiv 2503.07418) section 3.2; adaLN-single as in PixArt-alpha; rotary positions over the frame index.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ardiff.models.frame_cache import FrameKVCache
from ardiff.models.packed import LeanRMSNorm, PackedLinear, can_pack


ROTARY_BASE = 100.0  # Lags of a window of some dozens of frames; 10,000 would leave most pairs nearly unrotated.


@lru_cache(maxsize=64)
def frame_mask(
    num_queries: int,
    num_keys: int,
    window: int,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    causal: bool = True,
) -> torch.Tensor | None:
    """What is added to attention scores, (queries * L, keys * L): 0 = visible, -inf = not; None when everything is visible.

    Counted in frames; the last key is the last query.
    """
    if num_keys <= window and (num_queries == 1 or not causal):
        return None
    query, key = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)
    visible = (key > query - window) & (key < query + (1 if causal else window))
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
    return mask.repeat_interleave(num_tokens, 0).repeat_interleave(num_tokens, 1).to(device)


@lru_cache(maxsize=16)
def frame_rotation(
    first: int, num_frames: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, each (num_frames, 1, 1, 1, head_dim), of the rotary angles of consecutive frames, for `rotate`.

    Half of the features are rotated. Computed in float64 on the CPU: only differences of angles matter, also between
    frames far into a long video.
    """
    num_pairs = head_dim // 4
    frequency = ROTARY_BASE ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    angle = torch.arange(first, first + num_frames)[:, None, None, None, None] * frequency
    cos, sin, rest = angle.cos(), angle.sin(), angle.new_zeros(num_frames, 1, 1, 1, head_dim - 2 * num_pairs)
    return (
        torch.cat([cos, cos, rest + 1], dim=-1).to(device, dtype),
        torch.cat([-sin, sin, rest], dim=-1).to(device, dtype),
    )


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate feature i of (B, F, L, 2, H, head size) with feature i + head size / 4, for the first half of the features."""
    # In the other half `sin` is zero.
    swapped = states.unflatten(-1, (2, -1)).roll(states.shape[-1] // 4, dims=-1).flatten(-2)
    return torch.addcmul(states * cos, swapped, sin)


def attend_windows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of F frames, each to its own `window` frames of the W - 1 + F that the keys are: the band without a mask.

    The windows are views that overlap, so nothing is copied and nothing invisible is computed.

    Args:
        query (B, H, F, L, head size); keys, values (B, H, (W - 1 + F) * L, head size), in order.

    Returns:
        torch.Tensor of shape (B, F, L, H * head size).
    """
    batch_size, _, _, num_tokens, _ = query.shape
    # (B * H, F, head size, W * L) -> (F, B * H, W * L, head size)
    keys, values = (
        states.flatten(0, 1).unfold(1, window * num_tokens, num_tokens).permute(1, 0, 3, 2)
        for states in (keys, values)
    )
    attended = F.scaled_dot_product_attention(query.flatten(0, 1).transpose(0, 1), keys, values)
    return attended.unflatten(1, (batch_size, -1)).permute(1, 0, 3, 2, 4).flatten(3)


class RunLayers(NamedTuple):
    """Layers of a block made for one run, under the names that they have in `FrameBlock`."""

    qkv: Callable[[torch.Tensor], torch.Tensor]
    norm_qk: Callable[[torch.Tensor], torch.Tensor]
    proj: Callable[[torch.Tensor], torch.Tensor]
    expand: Callable[[torch.Tensor], torch.Tensor]
    fc2: Callable[[torch.Tensor], torch.Tensor]


class FrameBlock(nn.Module):
    """Attention over frames and an MLP, both modulated per frame."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        # Queries and keys of unit size keep attention scores within sqrt(head size): training stays stable in bf16.
        self.norm_qk = nn.RMSNorm(width // num_heads, eps=1e-6, elementwise_affine=False) if qk_norm else nn.Identity()
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
        run_layers: RunLayers | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, F, L, D); modulation (B, F, 1, 6, D); mask (S, keys) or None; the new `hidden_states`."""
        layers = run_layers or self
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.modulation_offset).unbind(-2)
        qkv = layers.qkv(torch.addcmul(shift_a, self.norm(hidden_states), 1 + scale_a))
        qk, value = qkv.unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=3)
        qk = rotate(layers.norm_qk(qk), *rotary)
        # (B, F, L, 2 or 1, H, head size) -> (2 or 1, B, H, F, L, head size)
        (query, key), (value,) = (states.permute(3, 0, 4, 1, 2, 5) for states in (qk, value))
        attended = self.attend(query, key, value, mask, cache, layer)
        hidden_states = torch.addcmul(hidden_states, gate_a, layers.proj(attended))
        inner = layers.expand(torch.addcmul(shift_m, self.norm(hidden_states), 1 + scale_m))
        return torch.addcmul(hidden_states, gate_m, layers.fc2(inner))

    def expand(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The wide half of the MLP."""
        return F.gelu(self.fc1(hidden_states), approximate="tanh")

    def pack(self) -> RunLayers | None:
        """Layers for a run on a CPU; None where there is nothing faster than the block's own."""
        if not all(can_pack(linear) for linear in (self.qkv, self.proj, self.fc1, self.fc2)):
            return None
        lean = isinstance(self.norm_qk, nn.RMSNorm)
        return RunLayers(
            qkv=PackedLinear(self.qkv),
            # The lean norm rounds lengths to the dtype.
            norm_qk=LeanRMSNorm(self.norm_qk) if lean and self.qkv.weight.dtype == torch.float32 else self.norm_qk,
            proj=PackedLinear(self.proj),
            expand=PackedLinear(self.fc1, gelu=True),
            fc2=PackedLinear(self.fc2),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        cache: FrameKVCache | None,
        layer: int,
    ) -> torch.Tensor:
        """(B, H, F, L, head size) each, of the frames of this call, to (B, F, L, D)."""
        if cache is None:
            keys, values = key.flatten(2, 3), value.flatten(2, 3)
        else:
            keys, values = cache.extend(layer, key, value)
            if mask is None and query.shape[2] > 1:
                return attend_windows(query, keys, values, cache.window)
        attended = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2).unflatten(1, query.shape[2:4])


class ARDiffTransformerModel(ModelMixin, ConfigMixin):
    """Predicts, for every frame at its own timestep, the clean tokens (or what the scheduler's prediction type says).

    Args:
        num_tokens (int): L. in_channels (int): C. width (int): D. depth (int): blocks. num_heads (int): H.
        window (int): how many frames back a frame can see, itself included.
        class_names (list of str): names of the classes; empty = unconditional only. A trained null class is added.
        causal (bool): False lets a frame see later frames of the window too, and there is no cache: for comparison.
        qk_norm (bool): queries and keys of unit size. False is for comparison too.
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
        causal: bool = True,
        qk_norm: bool = True,
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
        self.blocks = nn.ModuleList(FrameBlock(width, num_heads, qk_norm) for _ in range(depth))
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
        if not config.causal:
            raise ValueError("`causal` must be True for a cache: here later frames change the keys of earlier ones.")
        return FrameKVCache(
            config.depth, batch_size, config.num_heads, config.num_tokens, self.head_dim, config.window,
            device=device or self.device, dtype=self.dtype,
        )  # fmt: skip

    @apply_forward_hook
    def modulate(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All that timestep and class do: the modulation of the blocks (B, F, 1, 6, D) and of the output (B, F, 1, 2D + C).

        They depend on nothing else, so a run computes them once for all of its timesteps. Arguments as in `forward`.
        """
        batch_size, num_frames = timestep.shape
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.null_class, device=timestep.device)
        features = self.timestep_features(timestep.flatten()).to(self.dtype)
        condition = self.timestep_embedding(features).unflatten(0, (batch_size, num_frames))
        condition = F.silu(condition + self.class_embedding(class_labels)[:, None])[:, :, None]
        return self.modulation(condition).unflatten(-1, (6, -1)), self.modulation_out(condition)

    def pack(self) -> list[RunLayers | None]:
        """The blocks' layers made for one run of many calls without gradients: on a CPU, copies of the weights laid out for it.

        Later changes of the weights are not seen. Where nothing is gained, on a GPU or in float64, an entry is None.
        """
        return [block.pack() for block in self.blocks]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        *,
        cache: FrameKVCache | None = None,
        num_commit: int = 0,
        modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
        run_layers: Sequence[RunLayers | None] | None = None,
    ) -> torch.Tensor:
        """One evaluation of consecutive frames.

        Args:
            hidden_states (torch.Tensor of shape (B, F, L, C)): noisy tokens. Without a cache these are frames 0 .. F - 1,
                with one they follow the frames committed so far.
            timestep (torch.Tensor of shape (B, F)): int64 in [0, 1000), one per frame.
            class_labels (torch.Tensor of shape (B,) or None): int64 in [0, classes], the last = no class. None = no class.
            cache (FrameKVCache or None): finished frames, from `new_cache`.
            num_commit (int): the first so many frames are finished and are added to the cache.
            modulation: what `modulate` gives, in place of `timestep` and `class_labels`.
            run_layers: what `pack` gives, in place of the blocks' own; without gradients.

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
        if modulation is None and (timestep is None or timestep.shape != (batch_size, num_frames)):
            came = "is None" if timestep is None else f"has {tuple(timestep.shape)}"
            raise ValueError(f"`timestep` must have shape {(batch_size, num_frames)} but {came}.")
        if num_commit and cache is None:
            raise ValueError(f"`num_commit` must be 0 without a `cache` but is {num_commit}.")
        block_modulation, out_modulation = self.modulate(timestep, class_labels) if modulation is None else modulation

        first, num_held = (0, 0) if cache is None else (cache.num_committed, cache.num_held)
        if cache is not None:
            cache.reserve(num_frames)
        mask = None
        if num_held < config.window - 1:  # else each frame has its whole window: `attend_windows`
            mask = frame_mask(
                num_frames, num_held + num_frames, config.window, num_tokens,
                hidden_states.dtype, hidden_states.device, config.causal,
            )  # fmt: skip
        rotary = frame_rotation(first, num_frames, self.head_dim, hidden_states.dtype, hidden_states.device)
        tokens = self.embed(hidden_states) + self.token_positions
        run_layers = run_layers or [None] * len(self.blocks)
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, block_modulation, rotary, mask, cache, layer, run_layers[layer])
        if num_commit:
            cache.commit(num_commit)
        shift, scale, through = out_modulation.split([config.width, config.width, channels], dim=-1)
        return self.proj_out(torch.addcmul(shift, self.norm_out(tokens), 1 + scale)) + through * hidden_states
