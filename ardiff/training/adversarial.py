"""The adversarial part of the autoencoder's loss: a discriminator of patches, and how it is weighed and trained.

As in the latent diffusion autoencoders that the paper builds on (arXiv 2012.09841, section 3.1; PatchGAN: arXiv
1611.07004), with two differences: the weight compares gradients at the drawn pixels, not at the weights of the last layer,
and normalisation is by groups of channels, not over the batch, so that neither depends on how a step is spread.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn


MAX_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """One score for every patch of pictures (N, 3, S, S): three halvings, 70 x 70 pixels of view; S >= 32."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor in (1, 2, 4):
            width, stride = 2 * factor * channels, 2 if factor < 4 else 1
            layers += [
                nn.Conv2d(factor * channels, width, 4, stride, padding=1),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, 4, padding=1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures)


class Adversary:
    """A discriminator that learns beside the autoencoder; the `companion` of a training run.

    Every process has all of it. Its gradients are averaged over processes here, without a wrapper.
    """

    def __init__(self, weight: float, start: int, learning_rate: float, seed: int, channels: int = 64) -> None:
        self.weight, self.start = weight, start
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            self.discriminator = PatchDiscriminator(channels)
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9), weight_decay=0.01
        )

    def to(self, device: torch.device) -> None:
        self.discriminator.to(device)

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])

    def losses(
        self, other_loss: torch.Tensor, reconstruction: torch.Tensor, frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the autoencoder adds to its loss, and the discriminator's own hinge loss, after its backward pass.

        The first is -mean(score of the reconstruction), weighed so that its gradient at the drawn pixels is `weight` times
        as long as that of `other_loss`.
        """
        drawn, real = reconstruction.float().flatten(0, 1), frames.float().flatten(0, 1)
        self.discriminator.requires_grad_(False)
        generator_loss = -self.discriminator(drawn).mean()
        (other,) = torch.autograd.grad(other_loss, reconstruction, retain_graph=True)
        (own,) = torch.autograd.grad(generator_loss, reconstruction, retain_graph=True)
        balance = (other.float().norm() / (own.float().norm() + 1e-8)).clamp(max=MAX_WEIGHT)
        self.discriminator.requires_grad_(True)
        hinge = 0.5 * (
            F.relu(1.0 - self.discriminator(real)).mean() + F.relu(1.0 + self.discriminator(drawn.detach())).mean()
        )
        hinge.backward()
        return self.weight * balance * generator_loss, hinge.detach()

    def step(self, accelerator: Accelerator, learning_rate: float) -> None:
        """One step on the gradients gathered since the last one; nothing where there are none (before `start`)."""
        parameters = [parameter for parameter in self.discriminator.parameters() if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad = accelerator.reduce(parameter.grad, "mean") / accelerator.gradient_accumulation_steps
        if parameters:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
