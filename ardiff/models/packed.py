"""Layers for a run on a CPU: the same results to rounding, without gradients, with the least work around the products.

`torch.nn.functional.linear` lays its weights out anew in every call. With few rows, as in a call with one frame, that is
a third of its time. Here that is done once, as oneDNN's kernels read them, and the activation is done with the product.
"""

import torch
from torch import nn


def can_pack(linear: nn.Linear) -> bool:
    """Whether there are kernels for this layer: a plain one, on a CPU, in float32 or, where the processor has it, bfloat16.

    Under autocast the layers themselves choose the dtype of each product.
    """
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if linear.weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return linear.weight.dtype == torch.float32


class PackedLinear:
    """What a linear layer gives, and GELU (tanh) of it where `gelu` is set; without gradients.

    The weights are a copy: later changes of the layer are not seen.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        # What torch.compile makes of a linear layer on a CPU. Row numbers of a call may differ from the one named here.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 512)
        self.bias = linear.bias.detach()
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in features) to (..., out features)."""
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, *self.activation)


class LeanRMSNorm:
    """What an RMSNorm without weights gives, in three kernels for its six."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        (self.size,) = norm.normalized_shape
        self.least = torch.tensor((self.size * norm.eps) ** 0.5)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(..., features) to the same, of mean square 1."""
        # sqrt(|x|^2 / n + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n)
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return states / torch.hypot(length, self.least).mul_(self.size**-0.5)
