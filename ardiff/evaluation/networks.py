"""Networks that turn clips into feature vectors for the Frechet distance: files that a person has, or the autoencoder.

Each takes uint8 frames (B, F, S, S, 3) and gives float32 vectors (B, n, D) on the CPU, n of them for a clip.

Weights are data, and are read as nothing else: safetensors, or a state dict through `torch.load(weights_only=True)`. The
usual `i3d_torchscript.pt` and `inception-2015-12-05.pt` are TorchScript, that is, programs: running one is running code of
whoever made the file. That is done only where the caller says so (`trust_torchscript`), and the report keeps its SHA-256.
"""

import hashlib
import os
import pickle
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import VideoMAEModel

from ardiff.data.pixels import to_pixels
from ardiff.data.video import fit_frame
from ardiff.evaluation.features import clip_features
from ardiff.evaluation.i3d import I3D, MIN_FRAMES
from ardiff.models.autoencoder_arvae import AutoencoderARVAE


MAX_FRAMES_AT_ONCE = 256  # in the large networks
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetwork(ABC):
    """A source of feature vectors.

    Attributes:
        key: name of its distance in a report.
        origin: what a report keeps of where the network comes from.
    """

    key: str
    origin: dict

    def check(self, num_frames: int) -> None:  # noqa: B027 - some take any clip
        """Refuse clips that it cannot take, before any work.

        Raises:
            ValueError: clips of so many frames have no features.
        """

    @abstractmethod
    def features(self, frames: np.ndarray) -> torch.Tensor:
        """Of a few clips: (B, n, D)."""

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        at_once = max(MAX_FRAMES_AT_ONCE // frames.shape[1], 1)
        parts = [self.features(frames[first : first + at_once]) for first in range(0, len(frames), at_once)]
        return torch.cat(parts).float().cpu()


class AutoencoderClips(FeatureNetwork):
    """Appearance and motion in the features of a model's own autoencoder: needs no download, and is not FVD."""

    key = "frechet_distance"

    def __init__(self, vae: AutoencoderARVAE) -> None:
        self.vae, self.origin = vae, {"network": "autoencoder of the model"}

    def check(self, num_frames: int) -> None:
        if num_frames < 2:
            raise ValueError(f"`num_frames` must be at least 2 for features of motion but is {num_frames}.")

    def features(self, frames: np.ndarray) -> torch.Tensor:
        return clip_features(self.vae, resize(frames, self.vae.config.image_size))[:, None]


class AutoencoderFrames(FeatureNetwork):
    """The mean over a frame's tokens of the autoencoder's features: single frames, without time. Not FID."""

    key = "frame_frechet_distance"

    def __init__(self, vae: AutoencoderARVAE) -> None:
        self.vae, self.origin = vae, {"network": "autoencoder of the model"}

    def features(self, frames: np.ndarray) -> torch.Tensor:
        pixels = to_pixels(torch.from_numpy(resize(frames, self.vae.config.image_size)).to(self.vae.device))
        return self.vae.features(pixels.to(self.vae.dtype)).mean(2)


class I3DFeatures(FeatureNetwork):
    """FVD's: 400 logits of I3D on Kinetics, averaged over time, for a whole clip at 224 x 224.

    From a state dict, frames are resized as in the paper (Pillow, bicubic); a TorchScript file resizes them itself.
    """

    key = "fvd"

    def __init__(
        self, path: str | os.PathLike, device: str | torch.device, *, trust_torchscript: bool = False
    ) -> None:
        path = _existing(path, "i3d")
        self.device, self.torchscript = torch.device(device), is_torchscript(path)
        if self.torchscript:
            self.network = _load_torchscript(path, device, "i3d", trust=trust_torchscript)
        else:
            self.network = I3D().eval().to(device)
            _load_weights(self.network, path, "i3d")
        self.origin = {"file": path.name, "sha256": sha256(path), "torchscript": self.torchscript}

    def check(self, num_frames: int) -> None:
        if num_frames < MIN_FRAMES:
            raise ValueError(f"`num_frames` must be at least {MIN_FRAMES} for I3D but is {num_frames}.")

    def features(self, frames: np.ndarray) -> torch.Tensor:
        if self.torchscript:
            clips = torch.from_numpy(frames).to(self.device).permute(0, 4, 1, 2, 3).float()
            found = self.network(clips, rescale=True, resize=True, return_features=True)
        else:
            found = self.network(to_pixels(torch.from_numpy(resize(frames, 224)).to(self.device)).transpose(1, 2))
        return _vectors(found, len(frames), "i3d")[:, None]


class VideoMAEFeatures(FeatureNetwork):
    """The mean over the tokens that VideoMAE (arXiv 2203.12602) ends with; windows of a longer clip are averaged.

    `source` is a folder or Hub id that `transformers.VideoMAEModel` loads, in safetensors.
    """

    key = "videomae_frechet_distance"

    def __init__(self, source: str | os.PathLike, device: str | torch.device) -> None:
        try:
            network = VideoMAEModel.from_pretrained(str(source), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`videomae` must be a folder or Hub id of a VideoMAE model but {source}: {error}"
            ) from error
        self.network = network.eval().to(device)
        self.window, self.size = network.config.num_frames, network.config.image_size
        revision = getattr(network.config, "_commit_hash", None)
        self.origin = {"source": str(source), "revision": revision}

    def check(self, num_frames: int) -> None:
        if num_frames % self.window:
            raise ValueError(
                f"`num_frames` must be a multiple of {self.window}, what this VideoMAE takes, but is {num_frames}."
            )

    def features(self, frames: np.ndarray) -> torch.Tensor:
        device = self.network.device
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (to_pixels(torch.from_numpy(resize(frames, self.size)).to(device)) + 1.0) / 2.0
        windows = ((pixels - mean) / std).unflatten(1, (-1, self.window)).flatten(0, 1)
        tokens = self.network(windows.to(self.network.dtype)).last_hidden_state.float()
        return tokens.mean(1).unflatten(0, (len(frames), -1)).mean(1)[:, None]


class InceptionFeatures(FeatureNetwork):
    """FID's: the 2,048 features of Inception for every frame, from the usual TorchScript file."""

    key = "fid"

    def __init__(
        self, path: str | os.PathLike, device: str | torch.device, *, trust_torchscript: bool = False
    ) -> None:
        path = _existing(path, "inception")
        if not is_torchscript(path):
            raise ValueError(f"`inception` must be the TorchScript file inception-2015-12-05.pt but {path} is none.")
        self.device = torch.device(device)
        self.network = _load_torchscript(path, device, "inception", trust=trust_torchscript)
        self.origin = {"file": path.name, "sha256": sha256(path), "torchscript": True}

    def features(self, frames: np.ndarray) -> torch.Tensor:
        pictures = torch.from_numpy(frames).to(self.device).flatten(0, 1).permute(0, 3, 1, 2)
        found = _vectors(self.network(pictures, return_features=True), len(pictures), "inception")
        return found.unflatten(0, frames.shape[:2])


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """Clips (B, F, S, S, 3) at another size, bicubic; unchanged where they have it."""
    if frames.shape[2:4] == (size, size):
        return frames
    fitted = [fit_frame(frame, size, Image.Resampling.BICUBIC) for frame in frames.reshape(-1, *frames.shape[2:])]
    return np.stack(fitted).reshape(*frames.shape[:2], size, size, 3)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; nothing in it is run."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: str | os.PathLike, name: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{name}` must be a file with the network's weights but {path} is none.")
    return path


def _load_torchscript(path: Path, device: str | torch.device, name: str, *, trust: bool) -> torch.jit.ScriptModule:
    if not trust:
        raise ValueError(
            f"`{name}` must be weights, but {path} is TorchScript: a program of whoever made it, which would be run. "
            "Allow that with `trust_torchscript` (`--trust-torchscript`) if you trust where you have it from; "
            f"its SHA-256 is {sha256(path)}."
        )
    return torch.jit.load(path, map_location=device).eval()


def _load_weights(network: torch.nn.Module, path: Path, name: str) -> None:
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        # Files from before batch norm counted its batches lack that number, which is of no use here.
        missing, unexpected = network.load_state_dict(weights, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"`{name}` must be a state dict of the network, but {path} is not: {error}") from error


def _vectors(found: torch.Tensor, count: int, name: str) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != count:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"`{name}` must give one vector for each of {count} inputs but gives {shape}.")
    return found
