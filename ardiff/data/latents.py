"""Tokens of a whole set of videos on disk: encoded once, so that training neither decodes nor encodes.

The encoder sees each frame alone, so whole videos are kept and every clip of them can be drawn. A cache is a folder of

    latents-00000.safetensors   tensors (F, L, C), one per video under the video's name, a shard about 64 MB
    probe.safetensors           tokens of a few drawn pictures: tells whether an autoencoder is the one that was used
    index.json                  what is in which shard, with checksums; written last, so it never promises too much

Files appear whole or not at all. A cache that was interrupted is continued where its last shard ended.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from ardiff.data.benchmarks import VideoSet, open_set
from ardiff.data.clips import RandomClips, Video
from ardiff.data.pictures import render_pictures
from ardiff.data.pixels import to_pixels
from ardiff.models.autoencoder_arvae import AutoencoderARVAE


MB = 10**6
FORMAT = "ardiff-latents-1"
INDEX, PROBE = "index.json", "probe.safetensors"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Tokens have about unit variance. Half-precision weights change them by some 1e-3, further training by far more.
MAX_PROBE_DIFFERENCE = 0.02


def cache_latents(
    data: str,
    vae: AutoencoderARVAE,
    out: str | os.PathLike,
    *,
    dtype: str = "float16",
    shard_mb: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> dict:
    """Encode every frame of a set of videos, or go on where a cache in `out` ends; returns its index.

    Videos that cannot be decoded to their end are left out and listed in the index under "left_out", name to reason.

    Args:
        data: a set of videos, as `open_set` takes.
        vae: the autoencoder, on the device where it is to run; the mean of its token distribution is kept.
        dtype: of the tokens on disk, "float16" or "float32".
        shard_mb: size of a shard in MB, >= 1: what an interruption can cost.
        batch_size: frames encoded at once, >= 1.

    Raises:
        ValueError: an argument is out of range, or `out` holds another set, autoencoder or data type.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)} but is {dtype!r}.")
    for name, value in (("shard_mb", shard_mb), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 but is {value}.")
    found, folder = open_set(data), Path(out)
    index = _begin(found, vae, folder, dtype)
    done = {video["name"] for video in index["videos"]} | set(index["left_out"])
    todo = [video for video in found.videos if video.name not in done]
    tensors, records = {}, []

    def close_shard(complete: bool) -> None:
        if tensors:
            file = f"latents-{len(index['shards']):05d}.safetensors"
            _save(tensors, folder / file)
            num_bytes = (folder / file).stat().st_size
            index["shards"].append({"file": file, "num_bytes": num_bytes, "sha256": _sha256(folder / file)})
            index["videos"] += records
            tensors.clear(), records.clear()
        index["complete"] = complete
        _write_json(index, folder / INDEX)

    with tqdm(total=len(found.videos), initial=len(done), unit="video", disable=not progress) as bar:
        for video in todo:
            try:
                latents = torch.cat(list(_encode(video, vae, batch_size))).to(DTYPES[dtype])
            except ValueError as error:
                index["left_out"][video.name] = str(error)
                bar.update()
                continue
            if not latents.isfinite().all():
                raise ValueError(
                    f"`dtype` must be float32 for this autoencoder: tokens of {video.name} overflow float16."
                )
            tensors[video.name] = latents
            records.append(
                {
                    "name": video.name,
                    "label": video.label,
                    "num_frames": len(latents),
                    "shard": len(index["shards"]),
                    "crc32": _crc32(latents),
                }
            )
            bar.update()
            if sum(tensor.nbytes for tensor in tensors.values()) >= shard_mb * MB:
                close_shard(complete=False)
        close_shard(complete=True)
    if not index["videos"]:
        name, reason = next(iter(index["left_out"].items()))
        raise ValueError(
            f"`data` must hold videos that can be read, but none of {len(found.videos)} can; {name}: {reason}"
        )
    return index


def _begin(found: VideoSet, vae: AutoencoderARVAE, folder: Path, dtype: str) -> dict:
    """The index to go on with, after checking that it is of the same work; a new one where there is none."""
    index = {
        "format": FORMAT,
        "data": found.name,
        "names_sha256": hashlib.sha256("\n".join(video.name for video in found.videos).encode()).hexdigest(),
        "class_names": list(found.class_names),
        "image_size": vae.config.image_size,
        "num_tokens": vae.num_tokens,
        "latent_channels": vae.config.latent_channels,
        "dtype": dtype,
        "complete": False,
        "shards": [],
        "videos": [],
        "left_out": dict(found.damaged),
    }
    if (folder / INDEX).is_file():
        old = read_index(folder)
        for key in ("data", "names_sha256", "class_names", "image_size", "num_tokens", "latent_channels", "dtype"):
            if old[key] != index[key]:
                raise ValueError(
                    f"`out` must be a new folder or a cache of the same work, but {folder} has another `{key}`: "
                    f"{str(old[key])[:80]}, not {str(index[key])[:80]}."
                )
        check_autoencoder(folder, vae)
        return old
    folder.mkdir(parents=True, exist_ok=True)
    _save({"latents": _probe(vae)}, folder / PROBE)
    return index


@torch.no_grad()
def _encode(video: Video, vae: AutoencoderARVAE, batch_size: int) -> Iterator[torch.Tensor]:
    """Tokens of the video's frames in order, (n, L, C) float32 on the CPU, n <= `batch_size`."""
    batch = []
    for frame in video.frames(vae.config.image_size):
        batch.append(frame)
        if len(batch) == batch_size:
            yield _tokens(vae, np.stack(batch))
            batch.clear()
    if batch:
        yield _tokens(vae, np.stack(batch))


@torch.no_grad()
def _tokens(vae: AutoencoderARVAE, frames: np.ndarray) -> torch.Tensor:
    pixels = to_pixels(torch.from_numpy(frames).to(vae.device)).to(vae.dtype)
    return vae.encode(pixels[:, None]).mode()[:, 0].float().cpu()


def _probe(vae: AutoencoderARVAE) -> torch.Tensor:
    return _tokens(vae, render_pictures(8, vae.config.image_size, seed=0))


def read_index(folder: str | os.PathLike) -> dict:
    """The index of a cache.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} must be a folder that `ardiff cache-latents` wrote but has no {INDEX}.")
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} must have the format {FORMAT} but has {index.get('format')!r}.")
    return index


def check_autoencoder(folder: str | os.PathLike, vae: AutoencoderARVAE) -> None:
    """Refuse a cache whose tokens this autoencoder would not give.

    Raises:
        ValueError: it gives other tokens for the cache's probe pictures.
    """
    saved, own = load_file(Path(folder) / PROBE)["latents"], _probe(vae)
    difference = (saved - own).square().mean().sqrt().item() if saved.shape == own.shape else float("inf")
    if not difference <= MAX_PROBE_DIFFERENCE:
        raise ValueError(
            f"`vae` must be the autoencoder that {folder} was made with, but its tokens of the probe pictures differ by "
            f"{difference:.3g} (root mean square; at most {MAX_PROBE_DIFFERENCE})."
        )


def verify_cache(folder: str | os.PathLike) -> list[str]:
    """Compare every shard with its checksum; sentences about what is wrong, none when all is well."""
    index, folder = read_index(folder), Path(folder)
    wrong = [] if index["complete"] else [f"{folder} is not complete: run the same `ardiff cache-latents` again."]
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            wrong.append(f"{shard['file']} is missing.")
        elif _sha256(path) != shard["sha256"]:
            wrong.append(f"{shard['file']} does not have the checksum that was noted when it was written.")
    return wrong


class LatentClips(RandomClips):
    """Random clips of a cache's tokens, float32 (B, F, L, C), and labels (B,); as `VideoClips` draws them.

    A video's checksum is compared when it is first read.

    Raises:
        ValueError: the folder holds no complete cache.
    """

    def __init__(
        self, folder: str | os.PathLike, batch_size: int, num_frames: int, seed: int, rank: int = 0, stride: int = 1
    ) -> None:
        self.folder, self.index = Path(folder), read_index(folder)
        if not self.index["complete"]:
            raise ValueError(f"{folder} must be a complete cache: run the same `ardiff cache-latents` again.")
        super().__init__(
            self.index["class_names"], batch_size, num_frames, self.index["image_size"], seed, rank, stride
        )
        self._verified: set[int] = set()
        self._shards: dict[int, object] = {}

    @property
    def num_videos(self) -> int:
        return len(self.index["videos"])

    def name_of(self, index: int) -> str:
        return self.index["videos"][index]["name"]

    def label_of(self, index: int) -> int:
        return self.index["videos"][index]["label"]

    def count_frames(self, index: int, exact: bool = False) -> int:
        return self.index["videos"][index]["num_frames"]

    def read(self, index: int, start: int) -> torch.Tensor:
        video = self.index["videos"][index]
        file = self.index["shards"][video["shard"]]["file"]
        if video["shard"] not in self._shards:
            if not (self.folder / file).is_file():
                raise RuntimeError(f"{self.folder / file} is missing; make the cache again.")
            self._shards[video["shard"]] = safe_open(self.folder / file, framework="pt")
        shard = self._shards[video["shard"]]
        if index not in self._verified:
            if _crc32(shard.get_tensor(video["name"])) != video["crc32"]:
                raise RuntimeError(f"{self.folder / file} is damaged at {video['name']}; make the cache again.")
            self._verified.add(index)
        stop = start + (self.num_frames - 1) * self.stride + 1
        return shard.get_slice(video["name"])[start:stop][:: self.stride].float()


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save(tensors))  # safetensors' own `save_file` makes files that nobody else may read
    _publish(partial, path)


def _write_json(index: dict, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Rename a file that is complete, once it is on the disk and not only in memory."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
