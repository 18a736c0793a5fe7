"""What the runs say: results, comparisons with their intervals, and tables as JSON, Markdown and CSV."""

import csv
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ardiff.evaluation.ablation.settings import BASE, CHUNK, LABELS, NUM_BLOCKS, Configuration, Job, Size
from ardiff.evaluation.frechet import frechet_distance
from ardiff.evaluation.prediction import NUM_FRAMES, NUM_PROMPT_FRAMES
from ardiff.evaluation.report import write_json


VERDICTS = ("better", "worse", "undecided")
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees of freedom


def gather(
    job: Job, runs: Sequence[tuple[Configuration, int]], *, command: str, processes: int, seconds: float
) -> dict:
    """All results that there are, what they are compared with, and what they say."""
    size, data = job.size, job.out / "data"
    found = [job.run_folder(*run) / "result.json" for run in runs]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    real, other = (load_file(data / f"{part}.safetensors")["features"] for part in ("real", "other_real"))
    openings = load_file(data / "openings.safetensors")
    long_floor = [
        frechet_distance(first_of_every_scene(others, len(size.scenes), size.num_long_clips), block)
        for others, block in zip(other, real, strict=True)
    ]
    report = {
        "command": command,
        "hardware": hardware(job.device, processes),
        "seconds": seconds,
        "size": asdict(size),
        "parameters": parameters(job, runs[0][0]),
        "seeds": sorted({seed for _, seed in runs}),
        "floor": frechet_distance(other[0], real[0]),
        "long_floor": long_floor,
        "ceiling_psnr_db": float(openings["ceiling"].mean()),
        "repeat_psnr_db": float(openings["repeat"].mean()),
        "runs": results,
    }
    report["table"] = {
        configuration.name: {
            column: interval(
                [column_value(result, column) for result in results if result["name"] == configuration.name]
            )
            for column in columns(size)
        }
        for configuration in dict.fromkeys(configuration for configuration, _ in runs)
        if any(result["name"] == configuration.name for result in results)
    }
    report["comparisons"] = compare(report)
    return report


def first_of_every_scene(features: torch.Tensor, num_scenes: int, num_clips: int) -> torch.Tensor:
    """The first clips of every scene, of vectors (clips of all scenes, D)."""
    return features.unflatten(0, (num_scenes, -1))[:, :num_clips].flatten(0, 1)


def hardware(device: str, processes: int) -> str:
    """What the runs ran on, in words."""
    if torch.device(device).type == "cuda":
        return f"{processes} processes on {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{processes} processes of one thread each on {name}"


def parameters(job: Job, configuration: Configuration) -> int | None:
    """Of the transformer; None before the first run is done."""
    files = sorted(job.out.glob(f"runs/{configuration.name}-seed*/transformer/*.safetensors"))
    return sum(tensor.numel() for tensor in load_file(files[0]).values()) if files else None


def columns(size: Size) -> tuple[str, ...]:
    short, long = (
        (f"16 frames, gap {gap}" for gap in size.gaps),
        (f"64 frames, gap {name}" for name in size.long_plans()),
    )
    return (*short, *long, "continuation")


def column_value(result: dict, column: str) -> float:
    """A figure of one run; of a video of 64 frames the mean over its blocks."""
    if column == "continuation":
        return result["continuation_psnr_db"]
    frames, _, gap = column.partition(" frames, gap ")
    return result["samples"][gap] if frames == "16" else float(np.mean(result["long_samples"][gap]))


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and half the width of its 95 % t interval over the seeds (None with one)."""
    mean, num_values = float(np.mean(values)), len(values)
    half = None
    if num_values > 1:
        half = T_QUANTILES[num_values - 2] * float(np.std(values, ddof=1)) / math.sqrt(num_values)
    return {"mean": mean, "half_width": half, "num_seeds": num_values}


def compare(report: dict) -> list[dict]:
    """Pairs of figures that answer the questions; a difference counts when its 95 % t interval leaves out zero.

    "training": the base against every other configuration, figure by figure, and FoPP against independent timesteps once
    more where both show finished frames as noisy. "sampling": long videos at gap 5 and N against
    synchronous blocks, for every model. "both": the base so against the model of synchronous timesteps in blocks.
    Differences are taken seed by seed. The intervals are not widened for the number of comparisons.
    """
    runs = {(result["name"], result["seed"]): result for result in report["runs"]}
    others = [name for name in report["table"] if name != BASE.name]
    every = next(iter(report["table"].values()), {})
    blocks, *gaps = (column for column in every if column.startswith("64"))
    pairs = [("training", (BASE.name, column), (name, column)) for name in others for column in every]
    if {"commit", "independent-commit"} <= set(others):
        pairs += [("training", ("commit", column), ("independent-commit", column)) for column in every]
    pairs += [("sampling", (name, column), (name, blocks)) for column in gaps for name in report["table"]]
    pairs += [("both", (BASE.name, column), ("synchronous", blocks)) for column in gaps]
    found = []
    for question, first, second in pairs:
        seeds = [seed for seed in report["seeds"] if (first[0], seed) in runs and (second[0], seed) in runs]
        if len(seeds) < 2:
            continue
        differences = [
            column_value(runs[first[0], seed], first[1]) - column_value(runs[second[0], seed], second[1])
            for seed in seeds
        ]
        row = interval(differences)
        better = row["mean"] > 0 if first[1] == "continuation" else row["mean"] < 0
        verdict = "undecided"
        if abs(row["mean"]) > row["half_width"]:
            verdict = "better" if better else "worse"
        found.append({"question": question, "first": first, "second": second, **row, "first_is": verdict})
    return found


def write_tables(report: dict, out: Path) -> None:
    """`results.json`, `table.md`, and as CSV the table, the comparisons, every block of long videos and the losses."""
    write_json(report, out / "results.json")
    (out / "table.md").write_text(format_table(report), encoding="utf-8")
    every = list(next(iter(report["table"].values()), {}))
    rows = [
        [name, *(cell for column in every for cell in (row[column]["mean"], row[column]["half_width"]))]
        for name, row in report["table"].items()
    ]
    header = [cell for column in every for cell in (column, f"{column}, half width")]
    write_csv(out / "table.csv", ["configuration", *header], rows)
    write_csv(
        out / "comparisons.csv",
        ["first", "measure", "second", "its measure", "difference", "half width", "seeds", "first is"],
        [
            [*row["first"], *row["second"], row["mean"], row["half_width"], row["num_seeds"], row["first_is"]]
            for row in report["comparisons"]
        ],
    )
    write_csv(
        out / "drift.csv",
        ["configuration", "seed", "gap", *(f"frames {16 * k} to {16 * k + 15}" for k in range(NUM_BLOCKS))],
        [
            [result["name"], result["seed"], gap, *distances]
            for result in report["runs"]
            for gap, distances in result["long_samples"].items()
        ],
    )
    write_csv(
        out / "loss.csv",
        ["configuration", "seed", "timestep", "all frames noisy", "last frame noisy"],
        [
            [result["name"], result["seed"], *row]
            for result in report["runs"]
            for row in zip(*(result["loss"][name] for name in ("timesteps", "all_noisy", "last_noisy")), strict=True)
        ],
    )


def write_into(path: Path, text: str) -> None:
    """Put the results between the lines `<!-- ablation -->` and `<!-- /ablation -->` of a Markdown file.

    Raises:
        ValueError: the file does not have these lines, once each and in this order.
    """
    first, last = "<!-- ablation -->\n", "<!-- /ablation -->"
    before, *inner = path.read_text(encoding="utf-8").split(first)
    parts = inner[0].split(last) if len(inner) == 1 else []
    if len(parts) != 2:
        raise ValueError(
            f"`--readme` must have one line {first.strip()} and one line {last} after it, but {path} has not."
        )
    path.write_text(f"{before}{first}\n{text}\n{last}{parts[1]}", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def format_table(report: dict) -> str:
    """The results as Markdown: the table, what the base is compared with, and how it was made."""
    size, floor = report["size"], report["floor"]
    steps = size["num_inference_steps"]
    every = list(next(iter(report["table"].values()), {}))
    title = {
        "16 frames, gap 0": "16 frames: gap 0",
        "64 frames, gap 0": f"64 frames: blocks of {CHUNK}",
        "continuation": "continuation, dB",
    }
    names = [title.get(column, column.partition(", ")[2]) for column in every]
    lines = [f"| Training | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, row in report["table"].items():
        cells = [format_interval(row[column], 1 if column == "continuation" else 2) for column in every]
        lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
    long_floor = f"{np.mean(report['long_floor']):.2f}"
    cells = [f"{floor:.2f}" if column.startswith("16") else long_floor for column in every[:-1]]
    lines.append(f"| real clips | {' | '.join([*cells, format(report['ceiling_psnr_db'], '.1f')])} |")
    minutes = report["seconds"] / 60
    made = (
        f"`{report['command']}`: {report['hardware']}, {minutes:.0f} minutes" if report["command"] else "made by hand"
    )
    text = (
        f"Frechet distance on autoencoder features (lower is better), for 64 frames the mean of blocks of 16; PSNR of "
        f"{NUM_PROMPT_FRAMES} frames continued to {NUM_FRAMES} at gap 5 (higher is better; repeating the last frame gives "
        f"{report['repeat_psnr_db']:.1f}). {len(report['seeds'])} seeds: mean ± half the 95 % t interval. Every run: "
        f"{size['num_steps']} steps of {size['batch_size']} clips of {', '.join(size['scenes'])}, width {size['width']}, depth "
        f"{size['depth']}, {steps} denoising steps, {size['num_clips'] * len(size['scenes'])} samples of 16 frames and "
        f"{size['num_long_clips'] * len(size['scenes'])} of 64. {made}. The comparisons below take differences seed by seed; "
        f"*undecided* means that the 95 % interval holds zero; they are not corrected for their number."
    )
    return "\n".join([*lines, "", text, "", *format_verdicts(report)]) + "\n"


def format_interval(row: dict, digits: int) -> str:
    if row["half_width"] is None:
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} ± {row['half_width']:.{digits}f}"


def format_verdicts(report: dict) -> list[str]:
    """The comparisons, a line for each pair, as a Markdown list."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in report["comparisons"]:
        (first, column), (second, _) = row["first"], row["second"]
        if row["question"] == "training":
            head, item = f"{LABELS[first]}, against: {LABELS[second]}", column
        elif row["question"] == "sampling":
            head, item = f"{column}, against blocks of {CHUNK}, same model", LABELS[first]
        else:
            head, item = f"{LABELS[first]} at {column}, against: {LABELS[second]} in blocks of {CHUNK}", "64 frames"
        text = f"{item} ({row['mean']:+.2f} ± {row['half_width']:.2f})"
        lines.setdefault(head, {}).setdefault(row["first_is"], []).append(text)
    return [
        f"- {head}. "
        + " ".join(f"**{verdict}**: {'; '.join(found[verdict])}." for verdict in VERDICTS if verdict in found)
        for head, found in lines.items()
    ]
