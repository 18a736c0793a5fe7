"""How fast a model trains: the operations it needs, and what the device could do.

Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B) counts what the model needs, forward and backward, and not what
is computed twice to save memory.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode


# Dense bfloat16 peaks in FLOP/s from NVIDIA's data sheets; the first name found in the device's counts.
KNOWN_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def count_flops(model: torch.nn.Module, forward: Callable[[torch.nn.Module], torch.Tensor]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one forward and backward pass.

    Args:
        model: on the device "meta", where shapes are computed and nothing else.
        forward: makes the forward pass and returns a scalar.
    """
    with FlopCounterMode(display=False) as counter:
        forward(model).backward()
    return counter.get_total_flops()


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device reaches: its data sheet's where we know it, else the best of three square matrix products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in KNOWN_PEAKS.items():
            if known in name:
                return peak
    size = 512 if device.type == "cpu" else 8192
    factor = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        float((factor @ factor)[0, 0])
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])
