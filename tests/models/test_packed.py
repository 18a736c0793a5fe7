"""Layers made for a run on a CPU give what the layers themselves give."""

import pytest
import torch
from torch import nn

from ardiff.models.packed import LeanRMSNorm, PackedLinear, can_pack


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 600])
def test_a_packed_layer_is_the_layer(generator, rows, gelu):
    linear = nn.Linear(24, 40)
    states = torch.randn(2, rows, 24, generator=generator)
    expected = linear(states)
    if gelu:
        expected = nn.functional.gelu(expected, approximate="tanh")
    packed = PackedLinear(linear, gelu=gelu)
    assert (packed(states) - expected).abs().max() <= 1e-5
    linear.weight.zero_()
    assert (packed(states) - expected).abs().max() <= 1e-5


def test_the_lean_norm_is_the_norm(generator):
    """Also where the length is near the root of eps, and zero."""
    norm = nn.RMSNorm(16, eps=1e-6, elementwise_affine=False)
    states = torch.randn(5, 3, 16, generator=generator) * torch.tensor([0.0, 1e-3, 1.0])[:, None]
    assert (LeanRMSNorm(norm)(states) - norm(states)).abs().max() <= 1e-5


def test_what_cannot_be_packed_is_left_alone(tiny_transformer):
    assert can_pack(nn.Linear(4, 4))
    assert not can_pack(nn.Linear(4, 4).double())
    assert not can_pack(nn.Linear(4, 4, device="meta"))
    assert not can_pack(type("Adapted", (nn.Linear,), {})(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(nn.Linear(4, 4))
    tiny_transformer.double()
    assert set(tiny_transformer.pack()) == {None}


@torch.no_grad()
def test_a_packed_model_is_the_model(tiny_transformer, generator):
    hidden_states = torch.randn(2, 3, 4, 4, generator=generator)
    timestep = torch.tensor([[0, 300, 999]]).expand(2, -1)
    run_layers = tiny_transformer.pack()
    assert None not in run_layers
    expected = tiny_transformer(hidden_states, timestep)
    assert (tiny_transformer(hidden_states, timestep, run_layers=run_layers) - expected).abs().max() <= 1e-5
