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


def diffusion_loss(
    model_output: torch.Tensor, target: torch.Tensor, frame_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error over all frames, tokens and channels (AR-Diffusion section 3.3).

    Args:
        model_output, target (torch.Tensor of shape (B, F, L, C)).
        frame_weight (torch.Tensor of shape (B, F) or None): weight of every frame. None = all 1, as in the paper.
    """
    if frame_weight is None:
        return F.mse_loss(model_output.float(), target.float())
    error = (model_output.float() - target.float()).square().flatten(2).mean(2)
    return (error * frame_weight).mean()


def snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, cap: float) -> torch.Tensor:
    """Frame weights min(1 + SNR, cap) for x0 prediction, same shape as `timesteps`.

    1 + SNR turns the x0 error into the v error (Salimans and Ho 2022); the cap is that of min-SNR (Hang et al. 2023): nearly
    clean frames, which are easy, do not take over, and frames that are all noise weigh least.
    """
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps]
    return (1.0 / (1.0 - alpha_bar)).clamp(max=cap)
