"""Plots as PNG, each with its numbers as CSV: laws of training timesteps, plans, losses, quality against gap, samples.

Colours are those of Okabe and Ito with two of Tol's, and maps cividis: all can be told apart by colour-blind readers.
matplotlib is an optional extra, imported when something is drawn.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import SCENES
from ardiff.data.video import read_image
from ardiff.evaluation.ablation.measuring import LOSS_TIMESTEPS, loss_by_timestep
from ardiff.evaluation.ablation.reporting import column_value, interval, write_csv
from ardiff.evaluation.ablation.settings import BASE, CHUNK, CONFIGURATIONS, LABELS
from ardiff.evaluation.prediction import NUM_FRAMES, HeldOutClip, render_openings, run_pipeline
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.ad_schedule import ad_schedule, profile_gaps
from ardiff.training.diffusion import SAMPLERS


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#882255",
    "#999933",
    "#332288",
    "#aa4499",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "h")
GREY = "#666666"
MAP = "cividis"
WIDTH = 8.0  # inches: 800 px on the page, drawn at twice that
DPI = 200
LAW_NAMES = {
    "fopp": "FoPP",
    "independent": "independent (Diffusion Forcing)",
    "synchronous": "synchronous",
    "incremental": "plain incremental",
    "lagged": "rows of sampling plans",
}
NUM_TIMESTEPS = 1000
NUM_LAW_DRAWS = 100_000
SAMPLE_GAPS, SAMPLE_STEPS = (0, 5, 50), 50
KINDS = ("laws", "plans", "loss", "gaps", "samples")


def import_figure() -> type["Figure"]:
    """The class that everything is drawn with.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'matplotlib must be installed to draw plots: python -m pip install "ardiff[plots]"'
        ) from error
    return Figure


def new_figure(
    height: float, num_rows: int = 1, num_columns: int = 1, **options: object
) -> tuple["Figure", np.ndarray]:
    """An empty figure, 8 inches wide, and its axes (rows, columns)."""
    figure = import_figure()(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def set_title(axis: "Axes", text: str, loc: str = "center") -> None:
    axis.set_title(text, loc=loc, fontsize=10)


def set_log(axis: "Axes", direction: str) -> None:
    """A logarithmic "x" or "y" whose ticks are plain numbers: 0.5, 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis, f"set_{direction}scale")("log")
    scale = getattr(axis, f"{direction}axis")
    scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())


def save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


# --- the method -------------------------------------------------------------------------------------------------


def plot_laws(out: Path, *, num_frames: int = NUM_FRAMES, seed: int = 0) -> list[Path]:
    """How often a frame is trained at a timestep, law by law: `laws.png`, `laws.csv`. From 100,000 draws of each."""
    num_bins = 50
    laws = ("fopp", "independent", "synchronous", "incremental")
    shares = {}
    for law in laws:
        generator = torch.Generator().manual_seed(seed)
        drawn = SAMPLERS[law](NUM_LAW_DRAWS, num_frames, NUM_TIMESTEPS, generator=generator)
        bins = drawn * num_bins // NUM_TIMESTEPS
        counts = torch.stack([torch.bincount(column, minlength=num_bins) for column in bins.T], dim=1)
        # Relative to a uniform law: 1 = every timestep of this frame as often as every other.
        shares[law] = (drawn[:5], counts.double().numpy() * num_bins / NUM_LAW_DRAWS)
    figure, axes = new_figure(5.2, 2, len(laws), sharey=True, sharex=True, height_ratios=(1.0, 0.8))
    for column, law in enumerate(laws):
        examples, share = shares[law]
        top, bottom = axes[:, column]
        extent = (-0.5, num_frames - 0.5, 0, NUM_TIMESTEPS)
        image = top.imshow(share, origin="lower", aspect="auto", extent=extent, cmap=MAP, norm=_log_norm(0.05, 20.0))
        set_title(top, LAW_NAMES[law].replace(" (", "\n("))
        frames = np.arange(num_frames)
        for index, row in enumerate(examples.tolist()):
            bottom.plot(frames, row, color=COLOURS[index], marker=".", markersize=4, linewidth=1)
        bottom.set_xlabel("frame", fontsize=9)
    axes[0, 0].set_ylabel("timestep (large = noisy)", fontsize=9)
    axes[1, 0].set_ylabel("timestep of 5 drawn clips", fontsize=9)
    bar = figure.colorbar(image, ax=axes[0], extend="both", pad=0.01)
    bar.set_label("times as often as uniform", fontsize=9)
    middle = (np.arange(num_bins) + 0.5) * NUM_TIMESTEPS / num_bins
    rows = [
        [law, frame, middle[row], float(share[row, frame])]
        for law, (_, share) in shares.items()
        for frame in range(num_frames)
        for row in range(num_bins)
    ]
    write_csv(out / "laws.csv", ["law", "frame", "timestep", "times as often as uniform"], rows)
    return [save(figure, out / "laws.png"), out / "laws.csv"]


def _log_norm(low: float, high: float) -> object:
    from matplotlib.colors import LogNorm

    return LogNorm(low, high, clip=True)


def plot_plans(out: Path, *, num_frames: int = NUM_FRAMES, num_inference_steps: int = 50) -> list[Path]:
    """Noise maps of the plans that people choose from, on one scale of calls: `plans.png`, `plans.csv`."""
    steps, count = num_inference_steps, num_frames
    profiles = {
        "gap 0: synchronous": 0,
        f"gap {max(steps // 10, 1)}": max(steps // 10, 1),
        "chunks of 4": profile_gaps("chunks", gap=0, chunk=4, num_new_frames=count, num_inference_steps=steps),
        f"ramp to {steps}": profile_gaps("ramp", gap=steps, chunk=1, num_new_frames=count, num_inference_steps=steps),
        f"gap {steps}: auto-regressive": steps,
    }
    plans = {name: ad_schedule(num_frames, steps, gaps) for name, gaps in profiles.items()}
    longest = max(len(plan) for plan in plans.values())
    figure, axes = new_figure(6.4, len(plans), 1, sharex=True)
    for axis, (name, plan) in zip(axes[:, 0], plans.items(), strict=True):
        noise = 1.0 - plan.T.double().numpy() / steps
        extent = (0, len(plan), num_frames - 0.5, -0.5)
        image = axis.imshow(noise, aspect="auto", extent=extent, cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        set_title(axis, f"{name}: {len(plan)} calls", loc="left")
        axis.set_ylabel("frame", fontsize=9)
    axes[-1, 0].set(xlim=(0, longest))
    axes[-1, 0].set_xlabel(f"calls of the network ({steps} denoising steps for every frame)", fontsize=9)
    figure.colorbar(image, ax=axes[:, 0], pad=0.01, aspect=40).set_label("noise left", fontsize=9)
    rows = [
        [name, call, frame, index]
        for name, plan in plans.items()
        for call, row in enumerate(plan.tolist(), start=1)
        for frame, index in enumerate(row)
    ]
    write_csv(out / "plans.csv", ["plan", "call", "frame", "denoising steps done"], rows)
    return [save(figure, out / "plans.png"), out / "plans.csv"]


# --- one model --------------------------------------------------------------------------------------------------


def plot_model_loss(out: Path, pipe: ARDiffPipeline, *, num_clips: int = 4) -> list[Path]:
    """Error of a model's guess at every timestep, on held-out scenes that it has as classes: `loss.png`, `loss.csv`.

    Raises:
        ValueError: the model knows no scene.
    """
    clips = held_out_clips(pipe, num_clips)
    labels = torch.tensor([pipe.class_names.index(clip.scene) for clip in clips], device=pipe.device)
    with torch.no_grad():
        frames = to_pixels(torch.from_numpy(render_openings(clips, pipe.image_size))).to(pipe.device, pipe.vae.dtype)
        tokens = torch.cat([pipe.vae.encode(clip).mode() for clip in frames.split(16)]).float()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    found = loss_by_timestep(pipe.transformer, scheduler, tokens, labels, LOSS_TIMESTEPS)
    figure = draw_loss({"": [found]})
    rows = zip(found["timesteps"], found["all_noisy"], found["last_noisy"], strict=True)
    write_csv(out / "loss.csv", ["timestep", "all frames noisy", "last frame noisy"], list(rows))
    return [save(figure, out / "loss.png"), out / "loss.csv"]


def held_out_clips(pipe: ARDiffPipeline, num_clips: int) -> list[HeldOutClip]:
    """So many clips of every scene that the model has as a class."""
    scenes = [scene for scene in SCENES if scene in pipe.class_names]
    if not scenes:
        raise ValueError(f"`model` must know scenes ({', '.join(SCENES)}) but has {list(pipe.class_names)}.")
    return [HeldOutClip(scene=scene, index=index, seed=0) for scene in scenes for index in range(num_clips)]


def draw_loss(curves: dict[str, list[dict]]) -> "Figure":
    """Two panels of error against timestep: all frames at one timestep, and one noisy frame behind clean ones.

    Args:
        curves: what `loss_by_timestep` found, once or for several seeds, by label; the seeds' mean and range are drawn.
    """
    figure, axes = new_figure(4.0 if len(curves) > 1 else 3.2, 1, 2, sharey=True)
    titles = {
        "all_noisy": "all frames at this timestep (gap 0)",
        "last_noisy": "last frame, behind 15 clean ones (gap N)",
    }
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for index, (label, seeds) in enumerate(curves.items()):
            timesteps = seeds[0]["timesteps"]
            values = np.array([found[name] for found in seeds])
            axis.fill_between(timesteps, values.min(0), values.max(0), color=COLOURS[index], alpha=0.2, linewidth=0)
            axis.plot(
                timesteps,
                values.mean(0),
                color=COLOURS[index],
                marker=MARKERS[index],
                markersize=4,
                label=label.split(" (")[0],
            )
        set_log(axis, "y")
        set_title(axis, title)
        axis.set_xlabel("timestep (large = noisy)", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("squared error of the clean tokens\n(their variance is about 1)", fontsize=9)
    if len(curves) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def plot_report_gaps(out: Path, report: dict) -> list[Path]:
    """Quality of samples against the gap, from a report of `ardiff evaluate`: `gaps.png`, `gaps.csv`.

    Raises:
        ValueError: the report has no samples of scenes.
    """
    samples = report.get("samples", {})
    if not samples.get("gaps"):
        raise ValueError("`report` must be of `ardiff evaluate` on scenes, with samples, but has none.")
    gaps = [int(gap) for gap in samples["gaps"]]
    values = [figures["frechet_distance"] for figures in samples["gaps"].values()]
    figure, axes = new_figure(3.6)
    axis = axes[0, 0]
    spread = [figures.get("frechet_distance_interval") for figures in samples["gaps"].values()]
    if all(spread):
        below, above = (
            [v - low for v, (low, _) in zip(values, spread, strict=True)],
            [high - v for v, (_, high) in zip(values, spread, strict=True)],
        )
        axis.errorbar(range(len(gaps)), values, yerr=[below, above], color=COLOURS[0], marker="o", capsize=4)
    else:
        axis.plot(range(len(gaps)), values, color=COLOURS[0], marker="o")
    floor = samples["floor"]["frechet_distance"]
    _draw_floor(axis, floor)
    axis.set(xticks=range(len(gaps)), xticklabels=gaps, ylim=(0, None))
    steps = report["settings"]["num_inference_steps"]
    axis.set_xlabel(f"timestep gap, in denoising steps ({steps} per frame)", fontsize=9)
    axis.set_ylabel("Frechet distance (lower is better)", fontsize=9)
    write_csv(out / "gaps.csv", ["gap", "Frechet distance"], [*zip(gaps, values, strict=True), ("real clips", floor)])
    return [save(figure, out / "gaps.png"), out / "gaps.csv"]


def _draw_floor(axis: "Axes", value: float, text: str = "real clips") -> None:
    axis.axhline(value, color=GREY, linestyle="--", linewidth=1)
    axis.annotate(
        text, (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=9, color=GREY,
    )  # fmt: skip


def plot_model_samples(out: Path, pipe: ARDiffPipeline) -> list[Path]:
    """Strips of samples from the same noise at every gap, a row for each scene: `samples.png`.

    Raises:
        ValueError: the model knows no scene.
    """
    clips = held_out_clips(pipe, 1)
    rows = {}
    for gap in SAMPLE_GAPS:
        frames, _ = run_pipeline(
            pipe,
            generators=[clip.generator("sample_noise") for clip in clips],
            class_labels=[clip.scene for clip in clips],
            num_frames=NUM_FRAMES,
            gap=gap,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=1.0,
            dtype="float32",
        )
        rows[f"gap {gap}"] = np.concatenate([np.concatenate(list(clip[::2]), axis=1) for clip in frames])
    return [save(draw_strips(rows, 2), out / "samples.png")]


def draw_strips(pictures: dict[str, np.ndarray], num_columns: int) -> "Figure":
    """Pictures (H, W, 3) of rows of frames with their labels above, side by side in columns."""
    num_rows = -(-len(pictures) // num_columns)
    height = sum(
        max(picture.shape[0] / picture.shape[1] for picture in list(pictures.values())[row::num_rows])
        for row in range(num_rows)
    )
    figure, axes = new_figure(WIDTH / num_columns * height + 0.28 * num_rows, num_rows, num_columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (label, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture, interpolation="nearest")
        set_title(axis, label, loc="left")
    return figure


# --- an ablation ------------------------------------------------------------------------------------------------


def plot_ablation(folder: str | os.PathLike) -> list[Path]:
    """All plots of an ablation, from the files in its folder; returns what was written.

    Raises:
        ValueError: there are no results.
    """
    folder = Path(folder)
    if not (folder / "results.json").exists():
        raise ValueError(f"`folder` must be of `ardiff ablate` but {folder} holds no results.json.")
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if not report["runs"]:
        raise ValueError(f"`folder` must hold at least one finished run but {folder} has none.")
    figures = {
        "quality.png": draw_quality(report),
        "gaps.png": draw_gaps(report),
        "drift.png": draw_drift(report),
        "loss.png": draw_loss(
            {
                LABELS[name]: [result["loss"] for result in report["runs"] if result["name"] == name]
                for name in report["table"]
            }
        ),
    }
    written = [save(figure, folder / name) for name, figure in figures.items()]
    for name, frames in (("samples", "16 frames, every frame"), ("long_samples", "64 frames, every fourth")):
        strips = {
            f"{LABELS[result['name']]}: {frames}": _read_picture(
                folder / "runs" / f"{result['name']}-seed{result['seed']}" / f"{name}.png"
            )
            for result in report["runs"]
            if result["seed"] == report["seeds"][0]
        }
        if strips:
            written.append(save(draw_strips(strips, 1), folder / f"{name}.png"))
    return written


def _read_picture(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


def draw_quality(report: dict) -> "Figure":
    """Every configuration's figures with their intervals, one panel for each measure; seeds as small points."""
    names = list(report["table"])
    every = list(report["table"][names[0]])
    figure, axes = new_figure(2.4 + 0.65 * len(names), 2, 4, sharey=True)
    for axis, column in zip(axes.flat, every, strict=False):
        for row, name in enumerate(names):
            figures, colour = report["table"][name][column], COLOURS[row % len(COLOURS)]
            values = [column_value(result, column) for result in report["runs"] if result["name"] == name]
            axis.plot(values, [row] * len(values), ".", color=colour, alpha=0.5, markersize=5)
            axis.errorbar(
                figures["mean"],
                row,
                xerr=figures["half_width"],
                fmt=MARKERS[row % len(MARKERS)],
                color=colour,
                capsize=3,
                markersize=5,
            )
        title = column.replace(", gap", "\ngap")
        set_title(axis, "64 frames\nblocks of " + str(CHUNK) if column == "64 frames, gap 0" else title)
        axis.grid(axis="x", alpha=0.3)
        if column == "continuation":
            set_title(axis, "continuation")
            axis.axvline(report["ceiling_psnr_db"], color=GREY, linestyle="--", linewidth=1)
            axis.set_xlabel("PSNR, dB (higher is better)", fontsize=9)
        else:
            floor = report["floor"] if column.startswith("16") else float(np.mean(report["long_floor"]))
            axis.axvline(floor, color=GREY, linestyle="--", linewidth=1)
            set_log(axis, "x")
            axis.set_xlabel("Frechet distance", fontsize=9)
    axes.flat[-1].set_axis_off()
    axes.flat[-1].text(
        0.0,
        0.5,
        f"points: seeds\nbars: 95 % t interval\nof {len(report['seeds'])} seeds\ndashed: real clips",
        fontsize=9,
        va="center",
        transform=axes.flat[-1].transAxes,
    )
    for axis in axes[:, 0]:
        axis.set(yticks=range(len(names)), yticklabels=[LABELS[name].split(" (")[0].split(",")[0] for name in names])
    axes[0, 0].invert_yaxis()  # all panels share it
    return figure


def draw_gaps(report: dict) -> "Figure":
    """Distance against the gap for every law of the timesteps, 16 and 64 frames."""
    laws = [c.name for c in CONFIGURATIONS if replace(c, name=BASE.name, law=BASE.law) == BASE]
    names = [name for name in report["table"] if name in laws]
    steps = report["size"]["num_inference_steps"]
    gaps = ("0", "5", str(steps))
    figure, axes = new_figure(3.8, 1, 2, sharey=True)
    for axis, frames, floor in zip(
        axes[0], ("16", "64"), (report["floor"], float(np.mean(report["long_floor"]))), strict=True
    ):
        for index, name in enumerate(names):
            rows = [report["table"][name][f"{frames} frames, gap {gap}"] for gap in gaps]
            means, halves = [row["mean"] for row in rows], [row["half_width"] or 0.0 for row in rows]
            places = np.arange(len(gaps)) + 0.06 * (index - (len(names) - 1) / 2)
            axis.errorbar(
                places,
                means,
                yerr=halves,
                color=COLOURS[index],
                marker=MARKERS[index],
                markersize=5,
                capsize=3,
                label=LAW_NAMES[name],
            )
        _draw_floor(axis, floor)
        set_title(axis, f"{frames} frames")
        ticks = [f"0\n(blocks of {CHUNK})" if frames == "64" else "0", "5", f"{steps} = N"]
        set_log(axis, "y")
        axis.set(xticks=range(len(gaps)), xticklabels=ticks)
        axis.set_xlabel("timestep gap of the sampling, denoising steps", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("Frechet distance (lower is better)", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, title="trained with timesteps"
    )
    return figure


def draw_drift(report: dict) -> "Figure":
    """Distance of every 16 frames of a video of 64, a panel for each way of sampling."""
    names = list(report["table"])
    plans = list(report["runs"][0]["long_samples"])
    figure, axes = new_figure(4.2, 1, len(plans), sharey=True)
    for axis, plan in zip(axes[0], plans, strict=True):
        for index, name in enumerate(names):
            blocks = np.array([result["long_samples"][plan] for result in report["runs"] if result["name"] == name])
            rows = [interval(column.tolist()) for column in blocks.T]
            means = [row["mean"] for row in rows]
            places = np.arange(len(means)) + 0.04 * (index - (len(names) - 1) / 2)
            axis.errorbar(
                places, means, yerr=[row["half_width"] or 0.0 for row in rows], color=COLOURS[index], marker=MARKERS[index],
                markersize=4, capsize=2, linewidth=1, label=LABELS[name].split(" (")[0],
            )  # fmt: skip
        axis.plot(
            range(len(report["long_floor"])), report["long_floor"], color=GREY, linestyle="--", label="real clips"
        )
        set_title(axis, f"blocks of {CHUNK}, one after another" if plan == "0" else f"gap {plan}")
        set_log(axis, "y")
        axis.set(xticks=range(len(report["long_floor"])))
        axis.set_xticklabels([f"{16 * k}-{16 * k + 15}" for k in range(len(report["long_floor"]))], fontsize=8)
        axis.set_xlabel("frames of the video", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("Frechet distance (lower is better)", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def plot(
    kinds: Sequence[str], out: str | os.PathLike, *, pipe: ARDiffPipeline | None = None, report: dict | None = None
) -> list[Path]:
    """Draw some of KINDS into a folder; returns what was written.

    Args:
        kinds: "laws" and "plans" need nothing, "loss" and "samples" a model, "gaps" a report of `ardiff evaluate`.

    Raises:
        ValueError: another kind, or one without what it needs.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"`kinds` must be of {', '.join(KINDS)} but has {', '.join(unknown)}.")
    for kind in kinds:
        need, given = ("report", report) if kind == "gaps" else ("pipe", pipe)
        if kind in ("loss", "gaps", "samples") and given is None:
            raise ValueError(f"`{need}` must be given for {kind} but is None.")
    import_figure()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in kinds:
        if kind == "laws":
            written += plot_laws(out)
        elif kind == "plans":
            written += plot_plans(out)
        elif kind == "loss":
            written += plot_model_loss(out, pipe)
        elif kind == "samples":
            written += plot_model_samples(out, pipe)
        else:
            written += plot_report_gaps(out, report)
    return written
