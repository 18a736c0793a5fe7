"""Training clips as a function of the step, so that a run resumes on exactly the batch it would have seen.

A dataset item is the batch of one step: uint8 frames (B, F, S, S, 3) and int64 labels (B,), -1 = no class.
Scenes are rendered on the fly, without end; videos are read at random places, and nothing of them is read before.
"""

import itertools
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ardiff.data.pictures import render_pictures
from ardiff.data.scenes import render_batch
from ardiff.data.video import count_frames, fit_frame, iter_video, read_image


LOGGER = logging.getLogger(__name__)


# Half of the scene clips start this many frames into their scene at most, so that long videos are no news to the model:
# a ball comes to rest, the sun is gone, a balloon comes in again. The other half starts at frame 0.
LATEST_START = 48
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
RESAMPLE = Image.Resampling.BICUBIC  # the paper's; what a person uploads is shrunk with a sharper filter
# Training uses seeds from here up; everything below is never trained on (evaluation, examples, tests).
FIRST_TRAINING_SEED = 1 << 40


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The random generator of one training step on one process; any step can be replayed alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class SceneClips(Dataset):
    """Batches of rendered scenes; item `step` is the batch of that step, every scene equally often."""

    def __init__(self, scenes: Sequence[str], batch_size: int, num_frames: int, size: int, seed: int, rank: int = 0):
        self.class_names = tuple(scenes)
        self.batch_size, self.num_frames, self.size, self.seed, self.rank = batch_size, num_frames, size, seed, rank

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = step_generator(self.seed, step, self.rank)
        labels = torch.randint(len(self.class_names), (self.batch_size,), generator=generator)
        seeds = torch.randint(FIRST_TRAINING_SEED, 1 << 62, (self.batch_size,), generator=generator)
        late = torch.rand(self.batch_size, generator=generator) < 0.5
        starts = torch.randint(LATEST_START + 1, (self.batch_size,), generator=generator) * late
        names = [self.class_names[label] for label in labels.tolist()]
        frames = torch.from_numpy(render_batch(names, LATEST_START + self.num_frames, self.size, seeds.tolist()))
        clips = [clip[start : start + self.num_frames] for clip, start in zip(frames, starts.tolist(), strict=True)]
        return torch.stack(clips), labels


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of a set: a video file, a folder of frames (in the order of the numbers in their names), or a picture.

    Attributes:
        name: unique in its set; the path below the set's folder.
        path: the file or folder.
        label: number of its class, -1 = none.
    """

    name: str
    path: Path
    label: int = -1

    def open(self) -> Path | BinaryIO:
        """What the readers of files take."""
        return self.path

    def frame_files(self) -> list[Path]:
        """The pictures of a folder of frames."""
        files = [path for path in self.path.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
        return sorted(files, key=lambda path: natural_order(path.name))

    def count_frames(self) -> int:
        """How many frames it says it has; nothing is decoded.

        Raises:
            ValueError: it is not there, empty, or not a video.
        """
        if self.path.is_dir():
            return len(self.frame_files())
        return 1 if Path(self.name).suffix.lower() in PICTURE_SUFFIXES else count_frames(self.open())

    def frames(self, size: int, start: int = 0, stride: int = 1) -> Iterator[np.ndarray]:
        """Frames start, start + stride, ... one by one, uint8 (size, size, 3).

        Frames become squares as in the paper: short side resized to `size`, bicubic, then the middle.

        Raises:
            ValueError: the next frame is damaged, or there is none at `start`.
        """
        files = None
        if self.path.is_dir():
            files = self.frame_files()
        elif Path(self.name).suffix.lower() in PICTURE_SUFFIXES:
            files = [self.open()]
        if files is not None and start >= len(files):
            raise ValueError(f"`start` must be less than the {len(files)} frames of {self.name} but is {start}.")
        if files is not None:
            return (fit_frame(read_image(file), size, RESAMPLE) for file in files[start::stride])
        return iter_video(self.open(), size=size, stride=stride, start=start, resample=RESAMPLE)

    def read(self, size: int, start: int = 0, num_frames: int | None = None, stride: int = 1) -> np.ndarray:
        """At most `num_frames` of `frames`, as one array (F, size, size, 3)."""
        frames = self.frames(size, start, stride)
        return np.stack(list(itertools.islice(frames, num_frames)))


def natural_order(name: str) -> list[int | str]:
    """A key that sorts frame9 before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def find_videos(folder: Path) -> list[Video]:
    """All videos below a folder, by name: video files, and folders that hold pictures but no video file.

    A folder of frames may be called like a video file (`clip.mp4/0001.png`).
    """
    videos = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        suffixes = {file: Path(file).suffix.lower() for file in files}
        found = [Path(root, file) for file, suffix in suffixes.items() if suffix in VIDEO_SUFFIXES]
        if not found and any(suffix in PICTURE_SUFFIXES for suffix in suffixes.values()):
            found = [Path(root)]
        videos += [Video(name=path.relative_to(folder).as_posix(), path=path) for path in found]
    return sorted(videos, key=lambda video: natural_order(video.name))


def find_pictures(folder: Path) -> list[Video]:
    """All pictures below a folder, each a video of one frame."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()]
    return [Video(name=path.relative_to(folder).as_posix(), path=path) for path in sorted(paths)]


def label_by_folder(videos: Sequence[Video]) -> tuple[list[Video], tuple[str, ...]]:
    """The same videos with the first folder of their names as their class, and the names of the classes."""
    parts = [Path(video.name).parts for video in videos]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    labels = [names.index(part[0]) if len(part) > 1 else -1 for part in parts]
    return [replace(video, label=label) for video, label in zip(videos, labels, strict=True)], names


class RandomClips(Dataset, ABC):
    """Batches of clips at random places of random videos; the base of clips of frames and of cached latents.

    The first random number of a clip chooses the video, the second the place in it. A video that is damaged, or too short
    for a clip, is left out: another one is drawn, and it is named in a warning and in `left_out` (name to reason).
    """

    def __init__(
        self,
        class_names: Sequence[str],
        batch_size: int,
        num_frames: int,
        size: int,
        seed: int,
        rank: int = 0,
        stride: int = 1,
    ):
        self.class_names = tuple(class_names)
        self.batch_size, self.num_frames, self.size, self.seed, self.rank = batch_size, num_frames, size, seed, rank
        self.stride = stride
        self.left_out: dict[str, str] = {}
        self._lengths: dict[tuple[int, bool], int] = {}

    @property
    @abstractmethod
    def num_videos(self) -> int: ...

    @abstractmethod
    def name_of(self, index: int) -> str: ...

    @abstractmethod
    def label_of(self, index: int) -> int: ...

    @abstractmethod
    def count_frames(self, index: int, exact: bool = False) -> int:
        """Frames of a video; `exact` when what it says of itself turned out wrong."""

    @abstractmethod
    def read(self, index: int, start: int) -> torch.Tensor:
        """`num_frames` frames of a video from `start` on, or as many as there are."""

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = step_generator(self.seed, step, self.rank)
        clips, labels = zip(*(self._draw(generator) for _ in range(self.batch_size)), strict=True)
        return torch.stack(clips), torch.tensor(labels)

    def _draw(self, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        # What is drawn never depends on what failed before: a run that is resumed would draw something else.
        for _ in range(self.num_videos + 100):
            index = int(torch.randint(self.num_videos, (), generator=generator))
            place = float(torch.rand((), generator=generator, dtype=torch.float64))
            try:
                return self.clip(index, place), self.label_of(index)
            except ValueError as error:
                if self.name_of(index) not in self.left_out:
                    self.left_out[self.name_of(index)] = str(error)
                    LOGGER.warning("left out: %s", error)
        name, reason = next(iter(self.left_out.items()))
        raise ValueError(
            f"`data` must hold videos of at least {self.num_frames} frames (stride {self.stride}), but of its "
            f"{self.num_videos} none can be used; {name}: {reason}"
        )

    def clip(self, index: int, place: float) -> torch.Tensor:
        """The clip of video `index` whose start is at `place`, in [0, 1), of all starts that it has.

        Raises:
            ValueError: the video is too short, or damaged.
        """
        span = (self.num_frames - 1) * self.stride + 1
        for exact in (False, True):
            if (index, exact) not in self._lengths:
                self._lengths[index, exact] = self.count_frames(index, exact)
            length = self._lengths[index, exact]
            if length < span:
                raise ValueError(
                    f"{self.name_of(index)} must have at least {span} frames for a clip but has {length}."
                )
            try:
                frames = self.read(index, int(place * (length - span + 1)))
            except ValueError:
                if exact:
                    raise
                continue  # perhaps only the number was wrong
            if len(frames) == self.num_frames:
                return frames
        raise ValueError(f"{self.name_of(index)} does not give the same number of frames twice.")


class VideoClips(RandomClips):
    """Random clips of videos, uint8 (B, F, S, S, 3); after `videos` the arguments of `RandomClips`."""

    def __init__(self, videos: Sequence[Video], *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self.videos = list(videos)

    @property
    def num_videos(self) -> int:
        return len(self.videos)

    def name_of(self, index: int) -> str:
        return self.videos[index].name

    def label_of(self, index: int) -> int:
        return self.videos[index].label

    def count_frames(self, index: int, exact: bool = False) -> int:
        video = self.videos[index]
        return len(video.read(1)) if exact else video.count_frames()

    def read(self, index: int, start: int) -> torch.Tensor:
        return torch.from_numpy(self.videos[index].read(self.size, start, self.num_frames, self.stride))


class ShuffledFrames(Dataset):
    """Single frames for the first stage of the autoencoder: item `chunk` is (batches, B, 1, S, S, 3) uint8.

    The frames of a set of clips and, for a share of them, generic pictures, shuffled and cut into batches: whole clips are
    used, and still no batch is made of neighbouring frames.
    """

    def __init__(self, clips: SceneClips | VideoClips, batch_size: int, picture_share: float):
        self.clips, self.batch_size, self.picture_share = clips, batch_size, picture_share
        num_clip_frames = clips.batch_size * clips.num_frames
        self.num_pictures = round(num_clip_frames * picture_share / (1.0 - picture_share))
        self.num_batches = (num_clip_frames + self.num_pictures) // batch_size

    @property
    def rank(self) -> int:
        """The part of a step that the clips are drawn for."""
        return self.clips.rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self.clips.rank = rank

    def __getitem__(self, chunk: int) -> torch.Tensor:
        frames = self.clips[chunk][0].flatten(0, 1)
        generator = step_generator(self.clips.seed + 1, chunk, self.clips.rank)
        if self.num_pictures:
            picture_seed = int(torch.randint(FIRST_TRAINING_SEED, 1 << 62, (1,), generator=generator))
            pictures = render_pictures(self.num_pictures, self.clips.size, picture_seed)
            frames = torch.cat([frames, torch.from_numpy(pictures)])
        order = torch.randperm(len(frames), generator=generator)[: self.num_batches * self.batch_size]
        return frames[order].unflatten(0, (self.num_batches, self.batch_size)).unsqueeze(2)
