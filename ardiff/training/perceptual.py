"""Perceptual distance in the features of VGG-16 (LPIPS, arXiv 1801.03924), from weights that a person has.

    vgg     a state dict of torchvision's `vgg16`, 13 convolutions `features.N.weight` and `.bias`; its classifier is not used
    heads   the linear layers of LPIPS for VGG, `linK.model.1.weight` of shape (1, C, 1, 1), K = 0..4; without them every
            channel counts the same

Files are safetensors, or state dicts through `torch.load(weights_only=True)`.
"""

import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


# Output channels of the convolutions of each stage; their places in torchvision's `features`, where ReLU and pooling count.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# ImageNet's mean and deviation, for pixels in [-1, 1].
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualLoss(nn.Module):
    """Mean over pictures of the LPIPS distance; the network is fixed, gradients go to the pictures.

    Raises:
        ValueError: a file is missing or does not hold what the module's description says.
    """

    def __init__(self, vgg: str | os.PathLike, heads: str | os.PathLike | None = None) -> None:
        super().__init__()
        weights, channels = read_weights(vgg, "perceptual_vgg"), 3
        self.stages = nn.ModuleList()
        for widths, places in zip(STAGES, PLACES, strict=True):
            stage = nn.ModuleList()
            for width, place in zip(widths, places, strict=True):
                convolution = nn.Conv2d(channels, width, 3, padding=1)
                for name, parameter in convolution.named_parameters():
                    key = f"features.{place}.{name}"
                    parameter.data = _take(weights, key, parameter.shape, "perceptual_vgg", vgg)
                stage.append(convolution)
                channels = width
            self.stages.append(stage)
        read = read_weights(heads, "perceptual_heads") if heads else {}
        for index, widths in enumerate(STAGES):
            shape = (1, widths[-1], 1, 1)
            head = torch.full(shape, 1.0 / widths[-1])
            if heads:
                head = _take(read, f"lin{index}.model.1.weight", shape, "perceptual_heads", heads)
            self.register_buffer(f"head{index}", head)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """The last feature map of every stage; pictures (N, 3, S, S) in [-1, 1], S a multiple of 16."""
        found, states = [], (pictures - self.mean) / self.std
        for index, stage in enumerate(self.stages):
            if index:
                states = F.max_pool2d(states, 2)
            for convolution in stage:
                states = F.relu(convolution(states))
            found.append(states)
        return found

    def forward(self, reconstruction: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Scalar >= 0, for pixels (..., 3, S, S) in [-1, 1], S a multiple of 16; 0 for equal pictures."""
        drawn, real = (pixels.float().flatten(0, -4) for pixels in (reconstruction, frames))
        with torch.no_grad():
            real = self.features(real)
        total = 0.0
        for index, (ours, theirs) in enumerate(zip(self.features(drawn), real, strict=True)):
            difference = (_unit(ours) - _unit(theirs)).square()
            total = total + (difference * getattr(self, f"head{index}")).sum(1).mean()
        return total


def _unit(states: torch.Tensor) -> torch.Tensor:
    return states / (states.square().sum(1, keepdim=True) + 1e-10).sqrt()


def read_weights(path: str | os.PathLike, option: str) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; nothing else of it is read.

    Raises:
        ValueError: it is not there, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{option}` must be a file of weights but {path} is none.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`{option}` must be safetensors or a state dict, but {path} is not: {str(error).splitlines()[0]}"
        ) from error


def _take(
    weights: dict[str, torch.Tensor], key: str, shape: tuple[int, ...], option: str, path: str | os.PathLike
) -> torch.Tensor:
    found = weights.get(key)
    if not isinstance(found, torch.Tensor) or found.shape != shape:
        what = "has none" if found is None else f"has {tuple(getattr(found, 'shape', ()))}"
        raise ValueError(f"`{option}` must hold {key} of shape {tuple(shape)}, but {path} {what}.")
    return found.float().clone()
