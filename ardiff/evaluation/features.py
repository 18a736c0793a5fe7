"""What the autoencoder makes of clips: feature vectors for the Frechet distance, and reconstructions.

Shapes: B clips, F frames, L tokens per frame, D features per token, (S, S) pixels.
"""

import numpy as np
import torch

from ardiff.data.pixels import to_pixels, to_uint8
from ardiff.models.autoencoder_arvae import AutoencoderARVAE


@torch.no_grad()
def clip_features(vae: AutoencoderARVAE, frames: np.ndarray) -> torch.Tensor:
    """One vector per clip, (B, 2 D) float64 on the CPU: appearance, then motion.

    Appearance is the mean of the token features over frames and tokens; motion is the root mean square, over frames and
    tokens, of the differences between neighbouring frames' features.

    Args:
        vae (AutoencoderARVAE): whose `features` are used.
        frames (uint8 array of shape (B, F, S, S, 3)): at least 2 frames.

    Raises:
        ValueError: there are fewer than 2 frames, or frames that are not of the autoencoder's size.
    """
    if frames.ndim != 5 or frames.shape[1] < 2:
        raise ValueError(
            f"`frames` must have shape (clips, frames, size, size, 3) with at least 2 frames but has {frames.shape}."
        )
    tokens = vae.features(_pixels(vae, frames)).double()
    motion = tokens.diff(dim=1).square().mean((1, 2)).sqrt()
    return torch.cat([tokens.mean((1, 2)), motion], dim=1).cpu()


@torch.no_grad()
def reconstruct(vae: AutoencoderARVAE, frames: np.ndarray) -> np.ndarray:
    """Clips encoded to tokens (the mean of their distribution) and decoded as whole clips; uint8 (B, F, S, S, 3) both."""
    return to_uint8(vae.decode(vae.encode(_pixels(vae, frames)).mode())).cpu().numpy()


def _pixels(vae: AutoencoderARVAE, frames: np.ndarray) -> torch.Tensor:
    return to_pixels(torch.from_numpy(frames).to(vae.device)).to(vae.dtype)
