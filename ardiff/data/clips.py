"""Training clips as a function of the step, so that a run resumes on exactly the batch it would have seen.

A dataset item is the batch of one step: uint8 frames (B, F, S, S, 3) and int64 labels (B,), -1 = no class.
Scenes are rendered on the fly, without end; a folder of videos is read at random places.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ardiff.data.pictures import render_pictures
from ardiff.data.scenes import render_batch
from ardiff.data.video import read_video


# Half of the scene clips start this many frames into their scene at most, so that long videos are no news to the model:
# a ball comes to rest, the sun is gone, a balloon comes in again. The other half starts at frame 0.
LATEST_START = 48
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
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


class VideoFolderClips(Dataset):
    """Random clips of the videos below a folder; the names of its direct subfolders are the classes."""

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        num_frames: int,
        size: int,
        seed: int,
        rank: int = 0,
        stride: int = 1,
    ):
        self.folder = Path(folder)
        self.files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        if not self.files:
            raise ValueError(
                f"`data` must be a folder with video files ({', '.join(VIDEO_SUFFIXES)}); {folder} has none."
            )
        parts = [path.relative_to(self.folder).parts for path in self.files]
        self.class_names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
        self.labels = [self.class_names.index(part[0]) if len(part) > 1 else -1 for part in parts]
        self.batch_size, self.num_frames, self.size, self.seed, self.rank = batch_size, num_frames, size, seed, rank
        self.stride = stride

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = step_generator(self.seed, step, self.rank)
        clips, labels = [], []
        for index in torch.randint(len(self.files), (self.batch_size,), generator=generator).tolist():
            frames = torch.from_numpy(read_video(self.files[index], size=self.size, stride=self.stride))
            if len(frames) < self.num_frames:
                raise ValueError(
                    f"`data` must hold videos of at least {self.num_frames} frames (stride {self.stride}); "
                    f"{self.files[index]} has {len(frames)}."
                )
            start = int(torch.randint(len(frames) - self.num_frames + 1, (1,), generator=generator))
            clips.append(frames[start : start + self.num_frames])
            labels.append(self.labels[index])
        return torch.stack(clips), torch.tensor(labels)


class ShuffledFrames(Dataset):
    """Single frames for the first stage of the autoencoder: item `chunk` is (batches, B, 1, S, S, 3) uint8.

    The frames of a set of clips and, for a share of them, generic pictures, shuffled and cut into batches: whole clips are
    used, and still no batch is made of neighbouring frames.
    """

    def __init__(self, clips: SceneClips | VideoFolderClips, batch_size: int, picture_share: float):
        self.clips, self.batch_size, self.picture_share = clips, batch_size, picture_share
        num_clip_frames = clips.batch_size * clips.num_frames
        self.num_pictures = round(num_clip_frames * picture_share / (1.0 - picture_share))
        self.num_batches = (num_clip_frames + self.num_pictures) // batch_size

    def __getitem__(self, chunk: int) -> torch.Tensor:
        frames = self.clips[chunk][0].flatten(0, 1)
        generator = step_generator(self.clips.seed + 1, chunk, self.clips.rank)
        if self.num_pictures:
            picture_seed = int(torch.randint(FIRST_TRAINING_SEED, 1 << 62, (1,), generator=generator))
            pictures = render_pictures(self.num_pictures, self.clips.size, picture_seed)
            frames = torch.cat([frames, torch.from_numpy(pictures)])
        order = torch.randperm(len(frames), generator=generator)[: self.num_batches * self.batch_size]
        return frames[order].unflatten(0, (self.num_batches, self.batch_size)).unsqueeze(2)
