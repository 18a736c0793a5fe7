"""The whole evaluation of a model on held-out scenes: `evaluate` measures and saves, `format_report` makes the table.

Parts, saved one by one: autoencoder (PSNR), prediction (continuation of prompt frames, PSNR), samples from nothing (Frechet
distance to real clips) with the frame evaluations that they took, and the targets that the figures are held against.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ardiff.data.scenes import SCENES
from ardiff.evaluation.features import clip_features, reconstruct
from ardiff.evaluation.frechet import bootstrap_interval, frechet_distance
from ardiff.evaluation.prediction import (
    NUM_FRAMES,
    NUM_PROMPT_FRAMES,
    HeldOutClip,
    Settings,
    clip_batches,
    generate,
    measure_autoencoder,
    measure_prediction,
    render_excerpts,
)
from ardiff.evaluation.sampling import model_name, open_pipeline
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline


NUM_SHOWN = 2  # clips of every scene in its sample strip
LABEL_WIDTH = 120  # px
PROMPT_MARK = (255, 140, 0)


def evaluate(
    model: str | os.PathLike | ARDiffPipeline,
    *,
    scenes: Sequence[str] | None = None,
    num_clips: int = 64,
    seed: int = 0,
    gaps: Sequence[int] = (0, 5, 50),
    prediction_gaps: Sequence[int] = (5,),
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    commit_timestep: int | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    bootstrap: int = 100,
    device: str | torch.device = "cpu",
    out: str | os.PathLike | None = None,
    samples: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict:
    """Measure a model on held-out clips of 16 frames; returns the report, a dict that JSON holds as it is.

    The figures depend on `seed`, not on `batch_size` (to rounding). Clips, and real and generated sets, are the same size.

    Args:
        model: a folder, a Hub id, or a pipeline (which is moved to `device`).
        scenes: names of SCENES; None or ["all"] = all that the model has as classes.
        num_clips: of each scene, in [2, 10_000]. seed: in [0, 2_000].
        gaps: timestep gaps of the samples from nothing, in [0, `num_inference_steps`].
        prediction_gaps: timestep gaps of the continuations.
        guidance_scale: in [1, 20].
        commit_timestep: as in `ADScheduler`; None = the model's own.
        dtype: "float32", or "bfloat16": generation (not the autoencoder's figures) runs under autocast.
        batch_size: clips at once, >= 1.
        bootstrap: drawn pairs of sets for the intervals of distances over all scenes, >= 2; 0 = no intervals.
        out: JSON file, written anew after every part, so that an interrupted evaluation keeps what it has.
        samples: folder for one picture per scene, a few clips in rows: real, reconstruction, prediction, samples.
        progress: show a bar on stderr.

    Raises:
        ValueError: an argument is out of its range, or the model does not know a scene.
    """
    pipe = open_pipeline(model, device, commit_timestep)
    if scenes is None or list(scenes) == ["all"]:
        scenes = [scene for scene in SCENES if scene in pipe.class_names]
    settings = Settings(
        scenes=list(scenes),
        num_clips=num_clips,
        seed=seed,
        gaps=list(gaps),
        prediction_gaps=list(prediction_gaps),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        dtype=dtype,
        batch_size=batch_size,
        bootstrap=bootstrap,
    )
    settings.check(pipe)
    strips = SampleStrips()
    report = {
        "model": model_name(model),
        "settings": {key: value for key, value in asdict(settings).items() if key != "batch_size"}
        | {"num_frames": NUM_FRAMES, "num_prompt_frames": NUM_PROMPT_FRAMES, "image_size_px": pipe.image_size}
        | {"commit_timestep": pipe.scheduler.config.commit_timestep},
    }

    def save() -> None:
        report["targets"] = targets(report)
        if out is not None:
            write_json(report, Path(out))
        if samples is not None:
            strips.write(Path(samples))

    with tqdm(total=settings.frame_evaluations(), unit="frame", unit_scale=True, disable=not progress) as bar:
        bar.set_description("autoencoder")
        report["autoencoder"] = measure_autoencoder(pipe, settings, strips.add)
        save()
        report["prediction"] = {}
        for gap in settings.prediction_gaps:
            bar.set_description(f"prediction, gap {gap}")
            report["prediction"][str(gap)] = measure_prediction(pipe, settings, gap, bar, strips.add)
            save()
        bar.set_description("real clips")
        real, report["samples"] = measure_real(pipe, settings)
        report["samples"]["gaps"] = {}
        report["counts"] = {}
        save()
        for gap in settings.gaps:
            bar.set_description(f"samples, gap {gap}")
            measure_samples(pipe, settings, gap, bar, strips, real, report)
            save()
    return report


def measure_real(pipe: ARDiffPipeline, settings: Settings) -> tuple[torch.Tensor, dict]:
    """Features (clips, features) of the real clips, and the Frechet distances of two other sets to them.

    `floor` is the distance of as many other real clips, `reconstruction` that of these others after the autoencoder: what
    blur alone costs. The samples' distances are from rendered clips too, so they contain the autoencoder's error.
    """
    sets = {"real": [], "floor": [], "reconstruction": []}
    for clips in clip_batches(settings):
        other = render_excerpts(clips, "other_real", pipe.image_size)
        sets["real"].append(clip_features(pipe.vae, render_excerpts(clips, "real", pipe.image_size)))
        sets["floor"].append(clip_features(pipe.vae, other))
        sets["reconstruction"].append(clip_features(pipe.vae, reconstruct(pipe.vae, other)))
    real, floor, reconstruction = (torch.cat(features) for features in sets.values())
    return real, {
        "floor": distances(floor, real, settings),
        "reconstruction": distances(reconstruction, real, settings),
    }


def measure_samples(
    pipe: ARDiffPipeline,
    settings: Settings,
    gap: int,
    bar: tqdm,
    strips: "SampleStrips",
    real: torch.Tensor,
    report: dict,
) -> None:
    """Generate clips from nothing, their class given, and add their Frechet distances and counts to the report."""
    features = []
    for clips in clip_batches(settings):
        frames, num_evaluations = generate(pipe, clips, settings, gap, bar)
        strips.add(f"sample, gap {gap}", clips, frames)
        features.append(clip_features(pipe.vae, frames))
    figures = distances(torch.cat(features), real, settings)
    floor = report["samples"]["floor"]
    figures["ratio_to_floor"] = figures["frechet_distance"] / floor["frechet_distance"]
    for scene, values in figures["scenes"].items():
        values["ratio_to_floor"] = values["frechet_distance"] / floor["scenes"][scene]["frechet_distance"]
    report["samples"]["gaps"][str(gap)] = figures
    # Every step of every frame once, and one more evaluation of every frame that a later one still waits for.
    expected = NUM_FRAMES * settings.num_inference_steps + (NUM_FRAMES - 1 if gap else 0)
    report["counts"][str(gap)] = {"frame_evaluations": num_evaluations, "expected_frame_evaluations": expected}


def distances(features: torch.Tensor, real: torch.Tensor, settings: Settings) -> dict:
    """Frechet distance of all scenes pooled, and scene by scene; the rows of both are in the order of `clip_batches`."""
    size = settings.num_clips
    each = zip(settings.scenes, features.split(size), real.split(size), strict=True)
    interval = {}
    if settings.bootstrap:
        low, high = bootstrap_interval(features, real, num_draws=settings.bootstrap, seed=settings.seed)
        interval["frechet_distance_interval"] = [low, high]
    return {
        "frechet_distance": frechet_distance(features, real),
        **interval,
        "scenes": {scene: {"frechet_distance": frechet_distance(rows, others)} for scene, rows, others in each},
    }


def targets(report: dict) -> list[dict]:
    """What a good model reaches, for the parts that the report has: value, limit and whether it is met."""
    found = []

    def hold(
        target: str, value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        limit = {"at_most": at_most} if at_least is None else {"at_least": at_least}
        met = value <= at_most if at_least is None else value >= at_least
        found.append({"target": target, "value": value, "unit": unit, **limit, "met": bool(met)})

    if autoencoder := report.get("autoencoder"):
        hold("autoencoder PSNR, mean of the scenes", autoencoder["mean_psnr_db"], "dB", at_least=31.0)
        hold("autoencoder PSNR, lowest scene", autoencoder["lowest_psnr_db"], "dB", at_least=27.0)
    for gap, prediction in report.get("prediction", {}).items():
        if mean := prediction["mean_of_deterministic_scenes"]:
            hold(f"prediction below the ceiling, gap {gap}", mean["below_ceiling_db"], "dB", at_most=5.0)
            hold(f"prediction above repeating, gap {gap}", mean["above_repeat_db"], "dB", at_least=4.0)
    for gap, sampled in report.get("samples", {}).get("gaps", {}).items():
        hold(f"samples' Frechet distance over the floor, gap {gap}", sampled["ratio_to_floor"], "times", at_most=3.0)
    return found


def format_report(report: dict) -> str:
    """The report, or as much of it as there is, as tables of plain text."""
    settings = report["settings"]
    blocks = [
        f"{report['model']}: {settings['num_clips']} clips a scene, seed {settings['seed']}, "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}, {settings['dtype']}"
    ]
    if autoencoder := report.get("autoencoder"):
        rows = [[scene, values["psnr_db"]] for scene, values in autoencoder["scenes"].items()]
        rows += [["mean", autoencoder["mean_psnr_db"]]]
        rows += [[f"lowest: {autoencoder['lowest_scene']}", autoencoder["lowest_psnr_db"]]]
        blocks.append(format_table("Autoencoder", ["PSNR dB"], rows))
    for gap, prediction in report.get("prediction", {}).items():
        columns = ["prediction_psnr_db", "ceiling_psnr_db", "repeat_psnr_db", "below_ceiling_db", "above_repeat_db"]
        rows = list(prediction["scenes"].items())
        if mean := prediction["mean_of_deterministic_scenes"]:
            rows.append(("mean, deterministic", mean))
        title = f"{settings['num_prompt_frames']} frames continued to {settings['num_frames']}, gap {gap}"
        names = ["PSNR dB", "ceiling", "repeating", "below ceiling", "above repeating"]
        blocks.append(
            format_table(title, names, [[name, *(values[column] for column in columns)] for name, values in rows])
        )
    if samples := report.get("samples"):
        columns = {name: _column(samples[name], "frechet_distance") for name in ("floor", "reconstruction")}
        for gap, sampled in samples["gaps"].items():
            columns[f"gap {gap}"] = _column(sampled, "frechet_distance")
            columns[f"ratio {gap}"] = _column(sampled, "ratio_to_floor")
        rows = list(zip(["all scenes", *settings["scenes"]], *columns.values(), strict=True))
        spread = {name: samples[name] for name in ("floor", "reconstruction")}
        spread |= {f"gap {gap}": sampled for gap, sampled in samples["gaps"].items()}
        intervals = {name: figures.get("frechet_distance_interval") for name, figures in spread.items()}
        if all(intervals.values()):
            ends = {name: f"{low:.2f}..{high:.2f}" for name, (low, high) in intervals.items()}
            rows.append(["all, 95 % interval", *(ends.get(column, "") for column in columns)])
        blocks.append(format_table("Samples from nothing, Frechet distance", list(columns), rows))
    if counts := report.get("counts"):
        rows = [
            [f"gap {gap}", row["frame_evaluations"], row["expected_frame_evaluations"]] for gap, row in counts.items()
        ]
        blocks.append(format_table("Frame evaluations of a clip", ["measured", "expected"], rows))
    if report.get("targets"):
        rows = []
        for target in report["targets"]:
            limit = f">= {target['at_least']:g}" if "at_least" in target else f"<= {target['at_most']:g}"
            rows.append(
                [target["target"], target["value"], f"{limit} {target['unit']}", "met" if target["met"] else "MISSED"]
            )
        blocks.append(format_table("Targets", ["value", "limit", ""], rows))
    return "\n\n".join(blocks)


def _column(figures: dict, name: str) -> list[float]:
    """A figure of all scenes pooled, then of every scene."""
    return [figures[name], *(values[name] for values in figures["scenes"].values())]


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Lines of plain text: the title and the columns' names, then the rows; numbers with two decimals."""
    lines = [[title, *columns], *rows]
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in texts
    )


def write_json(report: dict, path: Path) -> None:
    """Write under another name, then rename: the file is never half a report."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


class SampleStrips:
    """Rows of frames of the first clips of every scene, collected while they are made, for a person to look at."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[tuple[str, np.ndarray]]]] = {}

    def add(self, label: str, clips: Sequence[HeldOutClip], frames: np.ndarray, num_prompt_frames: int = 0) -> None:
        """Keep one row for each of the first clips of a scene; frames (B, F, S, S, 3), prompt frames get a coloured edge."""
        for clip, clip_frames in zip(clips, frames, strict=True):
            if clip.index < NUM_SHOWN:
                row = clip_frames.copy()
                edge = np.ones(row.shape[1:3], dtype=bool)
                edge[2:-2, 2:-2] = False
                row[:num_prompt_frames, edge] = PROMPT_MARK
                self.rows.setdefault(clip.scene, [[] for _ in range(NUM_SHOWN)])[clip.index].append((label, row))

    def write(self, folder: Path) -> None:
        """One PNG per scene, `<scene>.png`: a line per row, its label in front of its frames."""
        folder.mkdir(parents=True, exist_ok=True)
        for scene, clips in self.rows.items():
            rows = [row for clip in clips for row in clip]
            num_frames, size = rows[0][1].shape[:2]
            picture = Image.new("RGB", (LABEL_WIDTH + num_frames * (size + 2), len(rows) * (size + 2)), "white")
            draw = ImageDraw.Draw(picture)
            for line, (label, frames) in enumerate(rows):
                top = line * (size + 2)
                draw.text((4, top + size // 2 - 6), label, fill="black")
                for column, frame in enumerate(frames):
                    picture.paste(Image.fromarray(frame), (LABEL_WIDTH + column * (size + 2), top))
            picture.save(folder / f"{scene}.png")
