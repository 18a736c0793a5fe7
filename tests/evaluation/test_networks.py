"""Feature networks through the files that a person would give: small ones with random weights, made here."""

import hashlib
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import VideoMAEConfig, VideoMAEModel

from ardiff.evaluation.i3d import I3D, _pad_same
from ardiff.evaluation.networks import (
    AutoencoderClips,
    AutoencoderFrames,
    I3DFeatures,
    InceptionFeatures,
    VideoMAEFeatures,
    is_torchscript,
    resize,
)


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (2, 9, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()


# --- I3D ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2), (2, 2)])
def test_padding_is_tensorflows_same(size, kernel, stride):
    x = torch.ones(1, 1, size, size, size)
    padded = _pad_same(x, (kernel, kernel, 1), (stride, stride, 1))
    num_out = math.ceil(size / stride)
    total = max((num_out - 1) * stride + kernel - size, 0)
    assert padded.shape[2:] == (size + total, size + total, size)
    assert float(padded[0, 0, total // 2, total // 2, 0]) == 1.0
    assert total < 2 or float(padded[0, 0, total // 2 - 1, total // 2, 0]) == 0.0


def test_i3d_has_the_parameters_of_the_published_weights():
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in I3D().state_dict().items()}
    for name, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2c_3x3.bn.running_var": (192,),
        "Mixed_3b.b1b.conv3d.weight": (128, 96, 3, 3, 3),
        "Mixed_4f.b3b.conv3d.weight": (128, 528, 1, 1, 1),
        "Mixed_5c.b2b.bn.weight": (128,),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items():
        assert shapes[name] == shape
    convolutions = 1 + 2 + 9 * 6  # the stem and nine blocks, each with batch norm; then the logits
    assert len(shapes) == convolutions * 6 + 2


def test_i3d_reads_weights_as_numbers_and_takes_whole_clips(tmp_path, clips):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = I3D().eval()
    weights = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    save_file(weights, tmp_path / "i3d.safetensors")
    torch.save(weights, tmp_path / "i3d.pt")
    one = clips[:1]
    found = I3DFeatures(tmp_path / "i3d.safetensors", "cpu")
    features = found(one)
    assert features.shape == (1, 1, 400)
    pictures = [Image.fromarray(frame).resize((224, 224), Image.Resampling.BICUBIC) for frame in one[0]]
    pixels = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(features[:, 0], network(pixels), atol=1e-5, rtol=1e-4)
    pt = I3DFeatures(tmp_path / "i3d.pt", "cpu")
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, pt.network.state_dict()[name])
    assert found.origin["sha256"] == hashlib.sha256((tmp_path / "i3d.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="`num_frames` must be at least 9 for I3D but is 8"):
        found.check(8)


class Program:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_is_a_program_is_not_run(tmp_path):
    torch.save({"logits.conv3d.bias": Program(tmp_path / "written")}, tmp_path / "i3d.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Program(tmp_path / "written"), protocol=2))
    for name in ("i3d.pt", "plain.pt"):
        with pytest.raises(ValueError, match="`i3d` must be a state dict of the network"):
            I3DFeatures(tmp_path / name, "cpu")
    assert not (tmp_path / "written").exists()


def test_other_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"missing \['Conv3d_1a_7x7.conv3d.weight'.*unexpected \['a'\]"):
        I3DFeatures(tmp_path / "other.safetensors", "cpu")
    with pytest.raises(ValueError, match="`i3d` must be a file with the network's weights"):
        I3DFeatures(tmp_path / "none.pt", "cpu")


# --- TorchScript --------------------------------------------------------------------------------------------------


class TinyDetector(nn.Module):
    """The call of the usual I3D file, with numbers that can be computed by hand."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        if not (rescale and resize and return_features):
            return x
        x = x / 255.0
        return torch.stack([x.mean((1, 2, 3, 4)), x[:, 0].mean((1, 2, 3)), x[:, :, 0].mean((1, 2, 3))], 1)


class TinyInception(nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        assert return_features
        return x.float().mean((2, 3)) / 255.0


def save_script(module, path):
    torch.jit.save(torch.jit.script(module), path)
    return path


def test_torchscript_is_run_only_when_that_is_allowed(tmp_path, clips):
    path = save_script(TinyDetector(), tmp_path / "i3d_torchscript.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert is_torchscript(path)
    with pytest.raises(ValueError, match=f"is TorchScript: a program .*--trust-torchscript.*{digest}"):
        I3DFeatures(path, "cpu")
    network = I3DFeatures(path, "cpu", trust_torchscript=True)
    assert network.origin == {"file": "i3d_torchscript.pt", "sha256": digest, "torchscript": True}
    mean = clips.reshape(2, -1).mean(1), clips[..., 0].reshape(2, -1).mean(1), clips[:, 0].reshape(2, -1).mean(1)
    np.testing.assert_allclose(network(clips)[:, 0].numpy(), np.stack(mean, 1) / 255.0, rtol=1e-5)


def test_inception_sees_every_frame_alone(tmp_path, clips):
    path = save_script(TinyInception(), tmp_path / "inception.pt")
    with pytest.raises(ValueError, match="is TorchScript"):
        InceptionFeatures(path, "cpu")
    features = InceptionFeatures(path, "cpu", trust_torchscript=True)(clips)
    np.testing.assert_allclose(features.numpy(), clips.mean((2, 3)) / 255.0, rtol=1e-5)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="`inception` must be the TorchScript file"):
        InceptionFeatures(tmp_path / "weights.pt", "cpu", trust_torchscript=True)


def test_a_torchscript_of_another_kind_is_named(tmp_path, clips):
    network = InceptionFeatures(save_script(TinyDetector(), tmp_path / "i3d.pt"), "cpu", trust_torchscript=True)
    with pytest.raises(ValueError, match=r"`inception` must give one vector for each of 18 inputs but gives \(18, 3"):
        network(clips)


# --- VideoMAE -----------------------------------------------------------------------------------------------------


@pytest.fixture
def videomae(tmp_path):
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path / "videomae")
    return model, tmp_path / "videomae"


def test_videomae_is_the_mean_of_its_tokens_and_of_the_windows(videomae, clips):
    model, folder = videomae
    network = VideoMAEFeatures(folder, "cpu")
    clips = clips[:, :8]
    features = network(clips)
    assert features.shape == (2, 1, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(clips) / 255.0 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        windows = [model(pixels[:, start : start + 4]).last_hidden_state.mean(1) for start in (0, 4)]
    torch.testing.assert_close(features[:, 0], (windows[0] + windows[1]) / 2, atol=1e-5, rtol=1e-4)
    assert float((windows[0] - windows[1]).abs().max()) > 1e-3
    network.check(8)
    with pytest.raises(ValueError, match="`num_frames` must be a multiple of 4, what this VideoMAE takes, but is 6"):
        network.check(6)


def test_videomae_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`videomae` must be a folder or Hub id of a VideoMAE model but"):
        VideoMAEFeatures(tmp_path, "cpu")


# --- the autoencoder ----------------------------------------------------------------------------------------------


def test_autoencoder_features_of_frames_know_no_time(tiny_vae, clips):
    features = AutoencoderFrames(tiny_vae)(clips)
    assert features.shape == (2, 9, 16)
    turned = AutoencoderFrames(tiny_vae)(np.ascontiguousarray(clips[:, ::-1]))
    torch.testing.assert_close(features.flip(1), turned, atol=1e-5, rtol=1e-4)
    assert AutoencoderClips(tiny_vae)(resize(clips, 64)).shape == (2, 1, 32)
    with pytest.raises(ValueError, match="at least 2 for features of motion but is 1"):
        AutoencoderClips(tiny_vae).check(1)


def test_many_frames_are_seen_in_parts_with_the_same_result(tiny_vae, clips, monkeypatch):
    whole = AutoencoderClips(tiny_vae)(clips)
    monkeypatch.setattr("ardiff.evaluation.networks.MAX_FRAMES_AT_ONCE", 1)
    torch.testing.assert_close(AutoencoderClips(tiny_vae)(clips), whole, atol=1e-5, rtol=1e-4)
