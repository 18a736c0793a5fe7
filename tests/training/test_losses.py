"""Losses against their closed forms."""

import pytest
import torch

from ardiff import ADScheduler
from ardiff.training.losses import diffusion_loss, reconstruction_loss, snr_weight


def test_reconstruction_loss_of_a_constant_shift_has_no_gradient_part():
    frames = torch.zeros(1, 2, 3, 8, 8)
    assert reconstruction_loss(frames + 0.5, frames).item() == pytest.approx(0.5 + 2 * 0.25)
    ramp = torch.arange(8.0).expand(1, 2, 3, 8, 8) / 8
    expected = ramp.mean() + 2 * ramp.square().mean() + 1 / 8
    assert reconstruction_loss(ramp, frames).item() == pytest.approx(expected.item())
    turned = ramp.transpose(-1, -2)
    assert reconstruction_loss(turned, frames).item() == pytest.approx(expected.item())


def test_diffusion_loss_weights_frames():
    target = torch.zeros(1, 2, 3, 4)
    output = torch.cat([torch.full((1, 1, 3, 4), 1.0), torch.full((1, 1, 3, 4), 2.0)], dim=1)
    assert diffusion_loss(output, target).item() == pytest.approx(2.5)
    assert diffusion_loss(output, target, torch.ones(1, 2)).item() == pytest.approx(2.5)
    assert diffusion_loss(output, target, torch.tensor([[3.0, 0.5]])).item() == pytest.approx((3 * 1 + 0.5 * 4) / 2)


def test_snr_weight_turns_the_x0_error_into_the_v_error(generator):
    scheduler = ADScheduler()
    timesteps = torch.tensor([[0, 300, 600, 999]])
    clean, guess, noise = (torch.randn(1, 4, 2, 3, generator=generator) for _ in range(3))
    noisy = scheduler.add_noise(clean, noise, timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps][..., None, None]
    # The noise that the guess implies, and with it the guess's v.
    implied = (noisy - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    v_error = (
        (alpha_bar.sqrt() * (implied - noise) - (1 - alpha_bar).sqrt() * (guess - clean)).square().flatten(2).mean(2)
    )
    x0_error = (guess - clean).square().flatten(2).mean(2)
    weight = snr_weight(scheduler.alphas_cumprod, timesteps, cap=float("inf"))
    assert torch.allclose(weight * x0_error, v_error, rtol=1e-2)
    capped = snr_weight(scheduler.alphas_cumprod, timesteps, cap=5.0)
    assert capped[0, 0] == 5.0
    assert capped[0, 3] == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(snr_weight(scheduler.alphas_cumprod, timesteps, cap=1.0), torch.ones(1, 4))
