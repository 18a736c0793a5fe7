"""The perceptual and the adversarial loss: files of the true shapes, closed forms, and a run with both."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_training import autoencoder_config, log_of

from ardiff.training.adversarial import Adversary
from ardiff.training.autoencoder import train_autoencoder
from ardiff.training.perceptual import PLACES, STAGES, PerceptualLoss


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """VGG-16 as torchvision saves it, classifier and all (cut short), and the heads of LPIPS; random weights."""
    folder, generator = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    weights, channels = {"classifier.6.bias": torch.zeros(1000)}, 3
    for widths, places in zip(STAGES, PLACES, strict=True):
        for width, place in zip(widths, places, strict=True):
            kernel = torch.randn(width, channels, 3, 3, generator=generator)
            weights[f"features.{place}.weight"] = kernel * (2 / (9 * channels)) ** 0.5
            weights[f"features.{place}.bias"] = torch.zeros(width)
            channels = width
    heads = {
        f"lin{index}.model.1.weight": torch.rand(1, widths[-1], 1, 1, generator=generator)
        for index, widths in enumerate(STAGES)
    }
    torch.save(weights, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    save_file(heads, folder / "vgg.safetensors")
    return folder, weights, heads


def test_it_is_the_formula_of_lpips(files, generator):
    """Against the whole network as one `Sequential` in torchvision's order, with the heads as convolutions."""
    folder, weights, heads = files
    layers, channels = [], 3
    for index, widths in enumerate(STAGES):
        layers += [torch.nn.MaxPool2d(2)] if index else []
        for width in widths:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
    network = torch.nn.Sequential(*layers)
    network.load_state_dict({key.removeprefix("features."): v for key, v in weights.items() if "features" in key})
    pictures = [torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2)]
    shift = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 2 - 1
    scale = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 2
    states, expected = [(picture - shift) / scale for picture in pictures], 0.0
    last = [3, 8, 15, 22, 29]
    with torch.no_grad():
        for number, layer in enumerate(network):
            states = [layer(state) for state in states]
            if number in last:
                ours, theirs = (torch.nn.functional.normalize(state, dim=1) for state in states)
                head = heads[f"lin{last.index(number)}.model.1.weight"]
                expected += torch.nn.functional.conv2d((ours - theirs) ** 2, head).mean().item()
    loss = PerceptualLoss(folder / "vgg16.pth", folder / "vgg.pth")
    assert loss(*pictures).item() == pytest.approx(expected, rel=1e-3)
    assert PerceptualLoss(folder / "vgg16.pth", folder / "vgg.safetensors")(*pictures) == loss(*pictures)
    assert loss(pictures[0], pictures[0]).item() == 0.0
    clips = [picture.view(1, 2, 3, 32, 32) for picture in pictures]
    assert loss(*clips).item() == pytest.approx(loss(*pictures).item())


def test_files_that_are_something_else(files, tmp_path):
    folder, weights, heads = files
    with pytest.raises(ValueError, match="`perceptual_vgg` must be a file of weights but .* is none"):
        PerceptualLoss(folder / "vgg19.pth")
    with pytest.raises(
        ValueError, match="`perceptual_vgg` must hold features.0.weight of shape .64, 3, 3, 3.* has none"
    ):
        PerceptualLoss(folder / "vgg.pth")
    with pytest.raises(ValueError, match="`perceptual_heads` must hold lin0.model.1.weight .* has none"):
        PerceptualLoss(folder / "vgg16.pth", folder / "vgg16.pth")
    save_file(heads | {"lin2.model.1.weight": torch.ones(1, 255, 1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lin2.model.1.weight of shape \(1, 256, 1, 1\), .* has \(1, 255, 1, 1\)"):
        PerceptualLoss(folder / "vgg16.pth", tmp_path / "other.safetensors")
    (tmp_path / "vgg16.pth").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match="`perceptual_vgg` must be safetensors or a state dict"):
        PerceptualLoss(tmp_path / "vgg16.pth")


def test_the_adversarial_gradient_has_the_asked_length(generator):
    adversary = Adversary(weight=0.3, start=0, learning_rate=1e-3, seed=0, channels=8)
    frames = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    drawn = (torch.rand(frames.shape, generator=generator) * 2 - 1).requires_grad_()
    other = (drawn - frames).square().mean() * 7
    added, hinge = adversary.losses(other, drawn, frames)
    (own,), (given,) = torch.autograd.grad(added, drawn, retain_graph=True), torch.autograd.grad(other, drawn)
    assert own.norm().item() == pytest.approx(0.3 * given.norm().item(), rel=1e-4)
    assert hinge.item() == pytest.approx(1.0, abs=0.5)  # scores near 0 at the start
    assert all(parameter.grad is not None for parameter in adversary.discriminator.parameters())


def test_the_discriminator_learns_to_tell_apart(generator):
    adversary = Adversary(weight=1.0, start=0, learning_rate=2e-3, seed=0, channels=8)
    accelerator = Accelerator(cpu=True)
    frames = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    drawn = (frames * 0.3).requires_grad_()
    hinges = []
    for _ in range(15):
        _, hinge = adversary.losses((drawn - frames).square().mean(), drawn, frames)
        adversary.step(accelerator, 2e-3)
        hinges.append(hinge.item())
    assert hinges[-1] < 0.5 * hinges[0]


def test_a_run_with_both_goes_on_exactly(files, tmp_path):
    options = {
        "image_size": 32, "batch_size": 2, "perceptual_vgg": str(files[0] / "vgg16.pth"), "pixel_loss": "l1",
        "perceptual_weight": 0.5, "adversarial_weight": 0.1, "adversarial_start": 1, "checkpoint_every": 2, "num_steps": 3,
        "picture_share": 0.0,
    }  # fmt: skip
    train_autoencoder(autoencoder_config(tmp_path, **options))
    straight = log_of(tmp_path)
    assert "adversarial" not in straight[0]
    line = straight[1]
    parts = line["pixels"] + 0.5 * line["perceptual"] + 4e-4 * line["kl"] + line["adversarial"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    train_autoencoder(autoencoder_config(tmp_path, **options))
    for name in ("loss", "discriminator"):
        assert log_of(tmp_path)[2][name] == straight[2][name]
