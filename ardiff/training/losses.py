"""Losses as pure functions of tensors; every one returns a scalar."""

import torch
import torch.nn.functional as F


def reconstruction_loss(reconstruction: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """L1 + 2 * L2 + L1 of the image gradients, for pixels (..., height, width) in [-1, 1].

    L1 keeps edges, L2 is what PSNR measures, the gradient term is what makes a small moving object worth drawing.
    """
    error = reconstruction.float() - frames.float()
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + 2.0 * error.square().mean() + across.abs().mean() + down.abs().mean()


def diffusion_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all frames, tokens and channels, unweighted (AR-Diffusion section 3.3)."""
    return F.mse_loss(model_output.float(), target.float())
