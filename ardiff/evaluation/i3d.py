"""The I3D network (Carreira and Zisserman, CVPR 2017, arXiv 1705.07750) that FVD is measured with, RGB stream, 400 classes.

Parameters are named as in the PyTorch port whose Kinetics weights are in use everywhere (`rgb_imagenet.pt`,
`i3d_pretrained_400.pt`), so that these can be loaded as plain numbers. Shapes: B clips, T frames, (S, S) pixels.
"""

import torch
import torch.nn.functional as F
from torch import nn


# Channels of every block: the 1x1 branch, the two 3x3x3 branches (before and after), the pooled branch.
_MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
MIN_FRAMES = 9  # fewer leave the last pooling nothing to pool


def _pad_same(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Zeros around (B, C, T, H, W) so that the output is input / stride, rounded up; the odd one goes behind."""
    padding = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def _max_pool(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Inception block: four branches side by side."""

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = Unit(in_channels, channels[0])
        self.b1a = Unit(in_channels, channels[1])
        self.b1b = Unit(channels[1], channels[2], kernel=3)
        self.b2a = Unit(in_channels, channels[3])
        self.b2b = Unit(channels[3], channels[4], kernel=3)
        self.b3b = Unit(in_channels, channels[5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Logits(nn.Module):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """Clips (B, 3, T, 224, 224) in [-1, 1], T >= 9, to logits (B, 400) averaged over time."""

    def __init__(self, num_classes: int = 400) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, kernel=7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, kernel=3)
        for name, (in_channels, channels) in _MIXED.items():
            self.add_module(name, Mixed(in_channels, channels))
        self.logits = Logits(1024, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = _max_pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = _max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = _max_pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        x = self.Mixed_4f(self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))))
        x = self.Mixed_5c(self.Mixed_5b(_max_pool(x, (2, 2, 2), (2, 2, 2))))
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean((2, 3, 4))
