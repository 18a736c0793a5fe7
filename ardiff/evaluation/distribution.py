"""Samples of a model, or any videos, against the real clips of a data set: FVD and other Frechet distances.

Every choice that the distances depend on is an option and in the report: the set and its split, the number of clips (the
same in both sets), frames, stride, resolution, whether real clips are the first of their videos or random ones, and the
networks with their checksums. Beside every distance: that of as many other real clips (the floor), and an interval.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ardiff.data.benchmarks import open_set
from ardiff.data.clips import LATEST_START, VideoClips
from ardiff.data.scenes import SCENES, render_batch
from ardiff.evaluation.features import reconstruct
from ardiff.evaluation.frechet import bootstrap_interval, frechet_distance
from ardiff.evaluation.networks import (
    AutoencoderClips,
    AutoencoderFrames,
    FeatureNetwork,
    I3DFeatures,
    InceptionFeatures,
    VideoMAEFeatures,
    resize,
)
from ardiff.evaluation.prediction import (
    DTYPES,
    MAX_SEED,
    NUM_PROMPT_FRAMES,
    PREDICTION_FIGURES,
    HeldOutClip,
    check_fields,
    new_frames_psnr,
    new_frames_ssim,
)
from ardiff.evaluation.report import format_table, write_json
from ardiff.evaluation.sampling import Request, Sampler, model_name, open_pipeline
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline


MAX_CLIPS = 100_000
PLACES = ("first", "random")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is compared, and how.

    Attributes:
        data: the real set, "scenes" or as `open_set` takes; the split is part of it ("ucf-101/train03:FOLDER").
        videos: a set of videos to measure instead of samples of the model, as `data`; "" = samples.
        num_clips: in each set, in [2, 100_000].
        num_frames, stride: of a clip. FVD-16 and FVD-128 are 16 and 128 frames at stride 1.
        size: px at which both sets are given to the networks; 0 = the model's frame size.
        clips: "random", or "first": the first frames of every video, each video once.
        seed: of the clips and the noise, in [0, 2_000].
        gaps, prediction_gaps: `ar_step` of the samples, and of continuations of the first 4 frames of real clips.
        num_inference_steps, guidance_scale: as in `ARDiffPipeline.stream`.
        commit_timestep: as in `ADScheduler`; None = the model's own, which the report names.
        dtype: "float32", or "bfloat16": the pipeline runs under autocast.
        bootstrap: drawn pairs of sets for an interval, >= 2; 0 = no intervals.
    """

    data: str
    videos: str = ""
    num_clips: int = 2048
    num_frames: int = 16
    stride: int = 1
    size: int = 0
    clips: str = "random"
    seed: int = 0
    gaps: Sequence[int] = (5,)
    prediction_gaps: Sequence[int] = ()
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    commit_timestep: int | None = None
    dtype: str = "float32"
    bootstrap: int = 100

    def check(self, pipe: ARDiffPipeline) -> None:
        """Refuse what cannot be done, before any work.

        Raises:
            ValueError: one sentence naming the argument, what is allowed and what came.
        """
        ranges = {
            "num_clips": (2, MAX_CLIPS),
            "num_frames": (1, 100_000),
            "stride": (1, 10_000),
            "size": (0, 4096),
            "seed": (0, MAX_SEED),
            "bootstrap": (0, 100_000),
        }
        check_fields(self, ranges, {"clips": PLACES, "dtype": DTYPES})
        if self.data == "scenes" and (self.stride > 1 or self.clips != "random"):
            raise ValueError("`stride` must be 1 and `clips` random for rendered scenes.")
        if self.prediction_gaps and self.num_frames <= NUM_PROMPT_FRAMES:
            raise ValueError(
                f"`num_frames` must be more than the {NUM_PROMPT_FRAMES} prompt frames but is {self.num_frames}."
            )
        if not (self.gaps or self.videos):
            raise ValueError("`gaps` must hold at least one entry but is empty.")
        for gap in () if self.videos else (*self.gaps, *self.prediction_gaps):
            pipe.check_inputs(None, None, self.num_frames, gap, self.num_inference_steps, self.guidance_scale, None)


@dataclass(frozen=True)
class Clip:
    """A real clip: frames (F, S, S, 3), the name of its video, and of its class or None."""

    frames: np.ndarray
    name: str
    class_name: str | None


class RealClips:
    """The clips of a set in the order in which an evaluation takes them; `left_out` names videos that gave none.

    Videos come in a drawn order; with random places they come again, in another order, when all were taken.
    """

    def __init__(self, protocol: Protocol, data: str, size: int) -> None:
        self.protocol, self.size = protocol, size
        self.left_out: dict[str, str] = {}
        self.source, self.class_names = None, SCENES
        if data != "scenes":
            found = open_set(data)
            self.class_names = found.class_names
            self.source = VideoClips(
                found.videos, found.class_names, 1, protocol.num_frames, size, protocol.seed, stride=protocol.stride
            )

    @property
    def num_videos(self) -> int | None:
        """Videos in the set, those left out included; None = without end."""
        return None if self.source is None else self.source.num_videos

    def __iter__(self) -> Iterator[Clip]:
        return self._of_scenes() if self.source is None else self._of_videos()

    def _of_videos(self) -> Iterator[Clip]:
        source, first = self.source, self.protocol.clips == "first"
        generator = torch.Generator().manual_seed(self.protocol.seed)
        num_given = 1
        while num_given:
            num_given = 0
            for index in torch.randperm(source.num_videos, generator=generator).tolist():
                place = float(torch.rand((), generator=generator, dtype=torch.float64))
                try:
                    frames = source.clip(index, 0.0 if first else place)
                except ValueError as error:
                    self.left_out[source.name_of(index)] = str(error)
                    continue
                num_given += 1
                label = source.label_of(index)
                yield Clip(frames.numpy(), source.name_of(index), None if label < 0 else source.class_names[label])
            if first:
                return

    def _of_scenes(self) -> Iterator[Clip]:
        """Excerpts that start as in training: half at frame 0."""
        num_frames, seed = self.protocol.num_frames, self.protocol.seed
        for first in itertools.count(step=8):
            clips = [
                HeldOutClip(scene=scene, index=index, seed=seed)
                for index in range(first, first + 8)
                for scene in SCENES
            ]
            seeds = [clip.part_seed("real") for clip in clips]
            videos = render_batch([clip.scene for clip in clips], LATEST_START + num_frames, self.size, seeds)
            for clip, frames in zip(clips, videos, strict=True):
                generator = clip.generator("real_start")
                late = bool(torch.rand((), generator=generator) < 0.5)
                start = int(torch.randint(LATEST_START + 1, (), generator=generator)) * late
                yield Clip(frames[start : start + num_frames], f"{clip.scene} {clip.index}", clip.scene)


def evaluate_set(
    model: str | os.PathLike | ARDiffPipeline,
    protocol: Protocol,
    *,
    i3d: str | os.PathLike | None = None,
    videomae: str | os.PathLike | None = None,
    inception: str | os.PathLike | None = None,
    trust_torchscript: bool = False,
    batch_size: int = 16,
    processes: int = 1,
    device: str | torch.device = "cpu",
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict:
    """Measure a model's samples, or other videos, against the clips of a set; returns a dict that JSON holds as it is.

    The distances: `frechet_distance` (clips) and `frame_frechet_distance` (frames) on the features of the model's own
    autoencoder always; `fvd`, `videomae_frechet_distance` and `fid` where their networks are given. Classes: where the
    model knows the classes of the set, sample i is of the class of real clip i.

    Args:
        model: a folder, a Hub id, or a pipeline (which is moved to `device`).
        i3d, inception: files, and videomae: a folder or Hub id; see `networks.py`.
        trust_torchscript: run files that are programs.
        batch_size: clips at once; processes: that generate, each with the model in its memory.
        out: JSON file, written anew after every part, so that an interrupted evaluation keeps what it has.

    Raises:
        ValueError: an argument is out of its range, a file is not what it must be, or the set has too few clips.
    """
    for name, value in (("batch_size", batch_size), ("processes", processes)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 but is {value}.")
    pipe = open_pipeline(model, device, protocol.commit_timestep)
    protocol.check(pipe)
    size = protocol.size or pipe.image_size
    networks: list[FeatureNetwork] = [AutoencoderClips(pipe.vae), AutoencoderFrames(pipe.vae)]
    if i3d is not None:
        networks.append(I3DFeatures(i3d, device, trust_torchscript=trust_torchscript))
    if videomae is not None:
        networks.append(VideoMAEFeatures(videomae, device))
    if inception is not None:
        networks.append(InceptionFeatures(inception, device, trust_torchscript=trust_torchscript))
    for network in networks:
        network.check(protocol.num_frames)
    real = RealClips(protocol, protocol.data, size)
    report = {
        "model": model_name(model),
        "settings": asdict(protocol)
        | {"gaps": list(protocol.gaps), "prediction_gaps": list(protocol.prediction_gaps), "size_px": size}
        | {"commit_timestep": pipe.scheduler.config.commit_timestep},
        "networks": {network.key: network.origin for network in networks},
    }

    def save() -> None:
        if out is not None:
            write_json(report, Path(out))

    num_sets = 2 + (1 if protocol.videos else len(protocol.gaps) + len(protocol.prediction_gaps))
    with (
        Sampler(model, pipe, processes) as sampler,
        tqdm(total=num_sets * protocol.num_clips, unit="clip", disable=not progress) as bar,
    ):
        bar.set_description("real clips")
        clips = iter(real)
        found = _measure(itertools.islice(clips, protocol.num_clips), networks, batch_size, bar)
        if len(found.names) < protocol.num_clips:
            raise ValueError(
                f"`num_clips` must be at most the {len(found.names)} clips that {protocol.data} gives but is "
                f"{protocol.num_clips}" + (f"; {len(real.left_out)} videos cannot be used." if real.left_out else ".")
            )
        # Resumed for real against real: clips of other videos, as far as there are any.
        others = _measure(itertools.islice(clips, protocol.num_clips), networks, batch_size, bar)
        report["real"] = {
            "num_videos": real.num_videos,
            "num_used": len(set(found.names)),
            "left_out": real.left_out,
            "num_floor_clips": len(others.names),
            "num_floor_clips_of_the_same_videos": sum(name in set(found.names) for name in others.names),
        }
        floor = None
        if len(others.names) == protocol.num_clips:
            floor = _figures(found.features, others.features, protocol, None)
        report["samples"] = {"floor": floor}
        save()
        if protocol.videos:
            bar.set_description("videos")
            given = RealClips(protocol, protocol.videos, size)
            measured = _measure(itertools.islice(given, protocol.num_clips), networks, batch_size, bar)
            if len(measured.names) < protocol.num_clips:
                raise ValueError(
                    f"`num_clips` must be at most the {len(measured.names)} clips that {protocol.videos} gives but is "
                    f"{protocol.num_clips}."
                )
            report["samples"]["videos"] = _figures(found.features, measured.features, protocol, floor)
            report["samples"]["videos"]["left_out"] = given.left_out
            save()
            return report
        report["samples"]["gaps"], report["counts"] = {}, {}
        known = bool(real.class_names) and set(real.class_names) <= set(pipe.class_names) and None not in found.classes
        classes = found.classes if known else None
        for gap in protocol.gaps:
            bar.set_description(f"samples, gap {gap}")
            features = {network.key: [] for network in networks}
            for videos, frame_evaluations in sampler(_requests(protocol, gap, batch_size, classes)):
                report["counts"][str(gap)] = {"frame_evaluations": frame_evaluations}
                _add_features(features, networks, resize(videos, size))
                bar.update(len(videos))
            measured = {key: torch.cat(parts) for key, parts in features.items()}
            report["samples"]["gaps"][str(gap)] = _figures(found.features, measured, protocol, floor)
            save()
        for gap in protocol.prediction_gaps:
            bar.set_description(f"prediction, gap {gap}")
            figures = _measure_prediction(pipe, protocol, gap, batch_size, real, sampler, bar, with_class=known)
            report.setdefault("prediction", {})[str(gap)] = figures
            save()
    return report


@dataclass
class _Measured:
    """Features (n, k, D) of n clips by network, and the names of their videos and classes."""

    features: dict[str, torch.Tensor]
    names: list[str]
    classes: list[str | None]


def _batches(clips: Iterator[Clip], batch_size: int) -> Iterator[list[Clip]]:
    while batch := list(itertools.islice(clips, batch_size)):
        yield batch


def _measure(clips: Iterator[Clip], networks: Sequence[FeatureNetwork], batch_size: int, bar: tqdm) -> _Measured:
    features, names, classes = {network.key: [] for network in networks}, [], []
    for batch in _batches(clips, batch_size):
        _add_features(features, networks, np.stack([clip.frames for clip in batch]))
        names += [clip.name for clip in batch]
        classes += [clip.class_name for clip in batch]
        bar.update(len(batch))
    return _Measured({key: torch.cat(parts) for key, parts in features.items() if parts}, names, classes)


def _add_features(features: dict[str, list], networks: Sequence[FeatureNetwork], frames: np.ndarray) -> None:
    for network in networks:
        features[network.key].append(network(frames))


def _figures(real: dict, other: dict, protocol: Protocol, floor: dict | None) -> dict:
    """Every network's distance of two sets of features, its interval, and its ratio to the floor."""
    figures = {}
    for key, vectors in real.items():
        figures[key] = frechet_distance(other[key].flatten(0, 1), vectors.flatten(0, 1))
        if protocol.bootstrap:
            interval = bootstrap_interval(other[key], vectors, num_draws=protocol.bootstrap, seed=protocol.seed)
            figures[f"{key}_interval"] = list(interval)
        if floor is not None:
            name = "ratio_to_floor" if key == AutoencoderClips.key else f"{key}_ratio_to_floor"
            figures[name] = figures[key] / floor[key] if floor[key] else None
    return figures


def _seeds(protocol: Protocol, part: int, first: int, count: int) -> tuple[int, ...]:
    """Below 2**32, what torch's CPU generator looks at, and far from the seeds of training."""
    return tuple((2 * protocol.seed + part) * MAX_CLIPS + first + row for row in range(count))


def _requests(protocol: Protocol, gap: int, batch_size: int, classes: Sequence[str] | None) -> Iterator[Request]:
    for first in range(0, protocol.num_clips, batch_size):
        count = min(batch_size, protocol.num_clips - first)
        yield Request(
            seeds=_seeds(protocol, 0, first, count),
            class_labels=None if classes is None else tuple(classes[first : first + count]),
            num_frames=protocol.num_frames,
            gap=gap,
            num_inference_steps=protocol.num_inference_steps,
            guidance_scale=protocol.guidance_scale,
            dtype=protocol.dtype,
        )


def _measure_prediction(
    pipe: ARDiffPipeline,
    protocol: Protocol,
    gap: int,
    batch_size: int,
    real: RealClips,
    sampler: Sampler,
    bar: tqdm,
    *,
    with_class: bool,
) -> dict:
    """PSNR and SSIM of the frames after the first 4 when real clips are continued from these; means over clips.

    As for scenes: beside the autoencoder's own, and those of repeating the last prompt frame.
    """
    waiting, figures = [], []

    def requests() -> Iterator[Request]:
        first = 0
        for batch in _batches(itertools.islice(real, protocol.num_clips), batch_size):
            waiting.append(resize(np.stack([clip.frames for clip in batch]), pipe.image_size))
            yield Request(
                seeds=_seeds(protocol, 1, first, len(batch)),
                class_labels=tuple(clip.class_name for clip in batch) if with_class else None,
                num_frames=protocol.num_frames,
                gap=gap,
                num_inference_steps=protocol.num_inference_steps,
                guidance_scale=protocol.guidance_scale,
                dtype=protocol.dtype,
                prompt_frames=waiting[-1][:, :NUM_PROMPT_FRAMES],
            )
            first += len(batch)

    for videos, _ in sampler(requests()):
        truth = waiting.pop(0)
        repeated = np.repeat(truth[:, NUM_PROMPT_FRAMES - 1 : NUM_PROMPT_FRAMES], protocol.num_frames, axis=1)
        each = videos, reconstruct(pipe.vae, truth), repeated
        rows = [figure(video, truth) for figure in (new_frames_psnr, new_frames_ssim) for video in each]
        figures += zip(*rows, strict=True)
        bar.update(len(videos))
    means = dict(zip(PREDICTION_FIGURES, np.mean(figures, axis=0).tolist(), strict=True))
    means["below_ceiling_db"] = means["ceiling_psnr_db"] - means["prediction_psnr_db"]
    means["above_repeat_db"] = means["prediction_psnr_db"] - means["repeat_psnr_db"]
    return means


def format_set_report(report: dict) -> str:
    """The report, or as much of it as there is, as plain text."""
    settings = report["settings"]
    titles = {
        "frechet_distance": "autoencoder features",
        "frame_frechet_distance": "its frames",
        "fvd": f"FVD-{settings['num_frames']}",
        "videomae_frechet_distance": "VideoMAE",
        "fid": "FID, all frames",
    }
    lines = [
        f"{report['model']} against {settings['data']}: {settings['num_clips']} {settings['clips']} clips of "
        f"{settings['num_frames']} frames, stride {settings['stride']}, {settings['size_px']} px, seed {settings['seed']}"
    ]
    for key, origin in report["networks"].items():
        if "sha256" in origin:
            kind = "TorchScript" if origin["torchscript"] else "weights"
            lines.append(f"{titles[key]}: {kind} {origin['file']}, SHA-256 {origin['sha256']}")
        elif "source" in origin:
            lines.append(f"{titles[key]}: {origin['source']}")
    real = report.get("real")
    if real and real["left_out"]:
        lines.append(f"left out, damaged or too short: {len(real['left_out'])} of {real['num_videos']} videos")
    blocks = ["\n".join(lines)]
    if samples := report.get("samples"):
        columns = {"real against real": samples["floor"]}
        columns |= {f"gap {gap}": figures for gap, figures in samples.get("gaps", {}).items()}
        columns |= {settings["videos"]: samples["videos"]} if "videos" in samples else {}
        rows = [[titles[key], *(_cell(figures, key) for figures in columns.values())] for key in report["networks"]]
        blocks.append(format_table("Frechet distance", list(columns), rows))
        if samples["floor"] is None:
            blocks.append(
                f"No real-against-real: the set gives {real['num_floor_clips']} more clips, not as many again."
            )
        elif shared := real["num_floor_clips_of_the_same_videos"]:
            blocks.append(f"Real against real: {shared} of its clips are from videos that the real set has too.")
    for gap, figures in report.get("prediction", {}).items():
        rows = [
            [name, *(figures[f"{which}_{unit}"] for which in ("prediction", "ceiling", "repeat"))]
            for name, unit in (("PSNR dB", "psnr_db"), ("SSIM", "ssim"))
        ]
        title = f"{NUM_PROMPT_FRAMES} frames continued to {settings['num_frames']}, gap {gap}"
        blocks.append(format_table(title, ["prediction", "ceiling", "repeating"], rows))
    return "\n\n".join(blocks)


def _cell(figures: dict | None, key: str) -> str:
    if figures is None:
        return "-"
    interval = figures.get(f"{key}_interval")
    return f"{figures[key]:.2f}" + (f" ({interval[0]:.2f}..{interval[1]:.2f})" if interval else "")
