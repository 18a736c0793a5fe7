"""Losses as pure functions of tensors; every one returns a scalar."""

import torch
import torch.nn.functional as F


PIXEL_LOSSES = ("mixed", "l1")
TIMESTEP_RANGES = 10


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


@torch.no_grad()
def errors_by_timestep(
    model_output: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, num_train_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the frames' mean squared errors and numbers of frames in equal ranges of the timestep, both (10,) float32.

    Args:
        model_output, target (torch.Tensor of shape (B, F, L, C)).
        timesteps (torch.Tensor of shape (B, F)): int64 in [0, `num_train_timesteps`).
    """
    error = (model_output.float() - target.float()).square().flatten(2).mean(2)
    which = timesteps * TIMESTEP_RANGES // num_train_timesteps
    inside = which[..., None] == torch.arange(TIMESTEP_RANGES, device=which.device)
    return (error[..., None] * inside).sum((0, 1)), inside.sum((0, 1)).float()
