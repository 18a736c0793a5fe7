"""How steadily the training goes: the recipe against one change each, at its learning rate and at 3 and 10 times that.

    python examples/stability.py --work runs/stability --out assets/stability

Caches tokens of rendered clips with the bundled autoencoder and trains one small model per change, learning rate and seed,
all at equal compute. Measures how much the loss jumps from step to step, the gradient norm, the error on held-out clips along
the way (of the weights and of their averages) and by timestep. Prints a table with mean and range over the seeds, differences
from the base seed by seed, and one JSON line last; with `--out` it writes curves too. What is done already is not done again.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from ardiff import ARDiffTransformerModel, AutoencoderARVAE, bundled_model
from ardiff.data.clips import FIRST_TRAINING_SEED, step_generator
from ardiff.data.latents import LatentClips, cache_latents
from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import SCENES, render_batch
from ardiff.evaluation.ablation.reporting import interval, write_csv
from ardiff.evaluation.plots import COLOURS, DPI, GREY, new_figure, set_log, set_title
from ardiff.schedulers.scheduling_ad import ADScheduler
from ardiff.training.diffusion import DiffusionTrainingConfig, Source, denoise, preset
from ardiff.training.loop import TrainingError, TrainingRun
from ardiff.training.losses import TIMESTEP_RANGES, errors_by_timestep
from ardiff.training.timesteps import sample_fopp, sample_lagged, sample_synchronous


NUM_FRAMES, SIZE, BATCH = 16, 64, 32
# What every arm starts from, beside the preset: that one has since taken more synchronous clips and even noise levels.
BASE = {"synchronous_share": 0.1, "timestep_candidates": 1}
ARMS = {
    "base": {},
    "without qk-norm": {"qk_norm": False},
    "plain squared error": {"snr_cap": 1.0},
    "even noise levels": {"timestep_candidates": 8},
    "FoPP alone": {"synchronous_share": 0.0, "lagged_share": 0.0},
    "AdamW alone": {"optimizer": "adamw"},
    "without clipping": {"max_grad_norm": 1e9},
}
LAWS = (sample_fopp, sample_synchronous, sample_lagged)
# Averages over about 10, 20 and 50 steps of 240; the presets' are over 1,000 of 24,000 and 2,000 of 60,000.
# An average starts short: diffusers' decay is (1 + step) / (10 + step) until it reaches its own, 0.964 in 240 steps.
DECAYS = (0.9, 0.95, 0.98)
DECAY = 0.95
WEIGHTS = ("weights", *(f"average {decay}" for decay in DECAYS))
WINDOW = 31  # steps of the running median that the loss is compared with
SPIKE = 5.0  # times the median gradient norm


# --- one run ----------------------------------------------------------------------------------------------------


def write_clips(folder: Path, num_clips: int) -> None:
    """`<scene>/<n>/<frame>.png` of so many clips, every scene equally often."""
    names = [SCENES[index % len(SCENES)] for index in range(num_clips)]
    for first in range(0, num_clips, BATCH):
        part = names[first : first + BATCH]
        seeds = range(FIRST_TRAINING_SEED + first, FIRST_TRAINING_SEED + first + len(part))
        for index, (scene, clip) in enumerate(
            zip(part, render_batch(part, NUM_FRAMES, SIZE, list(seeds)), strict=True)
        ):
            target = folder / scene / f"{first + index:05d}"
            target.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(clip):
                Image.fromarray(frame).save(target / f"{number:03d}.png")


@torch.no_grad()
def held_out_draws(vae: AutoencoderARVAE, class_names: list[str], num_clips: int) -> dict[str, torch.Tensor]:
    """Held-out clips, each noised once by FoPP, synchronously and by a row of a plan: the same for every model.

    `clean` and `noisy` (3 * clips, F, L, C), `timesteps` (3 * clips, F), `labels` (3 * clips,).
    """
    names = [SCENES[index % len(SCENES)] for index in range(num_clips)]
    frames = torch.from_numpy(render_batch(names, NUM_FRAMES, SIZE, list(range(num_clips))))
    tokens = torch.cat([vae.encode(to_pixels(part)).mode() for part in frames.split(BATCH)])
    generator = torch.Generator().manual_seed(1)
    timesteps = [law(num_clips, NUM_FRAMES, 1000, generator=generator) for law in LAWS]
    # Clip by clip, so that every third draw is of one law and the first ones are of all laws and scenes.
    timesteps, clean = torch.stack(timesteps, 1).flatten(0, 1), tokens.repeat_interleave(len(LAWS), 0)
    labels = torch.tensor([class_names.index(name) for name in names]).repeat_interleave(len(LAWS))
    noise = torch.randn(clean.shape, generator=generator)
    return {
        "clean": clean,
        "noisy": ADScheduler().add_noise(clean, noise, timesteps),
        "timesteps": timesteps,
        "labels": labels,
    }


@torch.no_grad()
def held_out_error(
    model: torch.nn.Module, draws: dict[str, torch.Tensor], num_draws: int
) -> tuple[float, list[float | None]]:
    """Squared error of the clean tokens over the first so many draws: the mean, and by tenth of the timesteps."""
    sums, counts = torch.zeros(TIMESTEP_RANGES), torch.zeros(TIMESTEP_RANGES)
    for first in range(0, num_draws, BATCH):
        part = {name: tensor[first : min(first + BATCH, num_draws)] for name, tensor in draws.items()}
        guess = model(part["noisy"], part["timesteps"], part["labels"])
        error, count = errors_by_timestep(guess, part["clean"], part["timesteps"], 1000)
        sums, counts = sums + error, counts + count
    by_timestep = [e / n if n else None for e, n in zip(sums.tolist(), counts.tolist(), strict=True)]
    return float(sums.sum() / counts.sum()), by_timestep


def train(
    config: DiffusionTrainingConfig,
    qk_norm: bool,
    vae: AutoencoderARVAE,
    draws: dict[str, torch.Tensor],
    probe_every: int,
    num_probe_draws: int,
) -> dict:
    """Train one model and measure it along the way. A run that ends in no number is a result: `finite` is False."""
    shutil.rmtree(config.out, ignore_errors=True)
    torch.random.default_generator.manual_seed(config.seed)
    scheduler, clips = ADScheduler(), LatentClips(config.data[8:], config.batch_size, NUM_FRAMES, config.seed)
    source = Source(clips, torch.arange(len(clips.class_names) + 1))
    model = ARDiffTransformerModel(
        num_tokens=vae.num_tokens, in_channels=vae.config.latent_channels, width=config.width, depth=config.depth,
        num_heads=config.num_heads, window=NUM_FRAMES, class_names=list(clips.class_names), qk_norm=qk_norm,
    )  # fmt: skip
    run, curve, finite, started = (
        TrainingRun(config, model.train()),
        {name: [] for name in WEIGHTS},
        True,
        time.monotonic(),
    )
    averages = [EMAModel(run.parameters, decay=decay) for decay in DECAYS]
    try:
        while run.step < config.num_steps:
            generator = step_generator(config.seed, run.step)
            loss = denoise(run, vae, scheduler, clips[run.step], source, generator)
            run.update(loss.weighted, loss.by_timestep, mse=loss.plain)
            for average in averages:
                average.step(run.parameters)
            if run.step % probe_every == 0:
                for name, error, _ in each_error(run, averages, draws, num_probe_draws):
                    curve[name].append(error)
    except TrainingError:
        finite = False
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    result = {"finite": finite, "curve": curve, "seconds": round(time.monotonic() - started, 1)}
    result |= {name: [line[name] for line in lines] for name in ("loss", "mse", "grad_norm", "mse_by_timestep")}
    if finite:
        errors = each_error(run, averages, draws, len(draws["labels"]))
        result |= {"held_out": {name: {"mse": error, "by_timestep": by} for name, error, by in errors}}
    run.close()
    return result


def each_error(
    run: TrainingRun, averages: list[EMAModel], draws: dict[str, torch.Tensor], num_draws: int
) -> list[tuple[str, float, list[float | None]]]:
    """Held-out errors of the weights and of their averages, as (name, mean, by timestep)."""
    found = [(WEIGHTS[0], *held_out_error(run.network, draws, num_draws))]
    for name, average in zip(WEIGHTS[1:], averages, strict=True):
        average.store(run.parameters)
        average.copy_to(run.parameters)
        found.append((name, *held_out_error(run.network, draws, num_draws)))
        average.restore(run.parameters)
    return found


# --- figures ----------------------------------------------------------------------------------------------------


def beside_median(values: list[float]) -> np.ndarray:
    """Values over the running median of the WINDOW around them; half a window is lost at either end."""
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW), axis=1)
    return np.array(values[WINDOW // 2 : len(values) - WINDOW // 2]) / medians


def wobble(curve: list[float]) -> float:
    """How far the held-out error of the second half is from a straight line: standard deviation of the logarithm."""
    logs = np.log(curve[len(curve) // 2 :])
    steps = np.arange(len(logs))
    return float(np.std(logs - np.polyval(np.polyfit(steps, logs, 1), steps)))


def figures_of(result: dict, warmup_steps: int) -> dict[str, float]:
    """The figures of one run, after the warm-up; none of a run that ended in no number."""
    if not result["finite"]:
        return {}
    norms = result["grad_norm"][warmup_steps:]
    found = {
        "loss_spread": float(np.std(np.log(beside_median(result["loss"][warmup_steps:])))),
        "grad_norm": float(np.median(norms)),
        "grad_norm_tail": float(np.quantile(beside_median(norms), 0.99)),
        "spikes": int((beside_median(norms) > SPIKE).sum()),
    }
    for name in WEIGHTS:
        found[f"wobble, {name}"] = wobble(result["curve"][name])
        found[f"error, {name}"] = result["held_out"][name]["mse"]
    return found


TRAINING = {
    "loss_spread": ("spread of the loss", "{:.1%}"),
    "grad_norm": ("gradient norm, median", "{:.3f}"),
    "grad_norm_tail": ("99th percentile of it beside the median", "{:.2f}"),
    "spikes": ("spikes", "{:.1f}"),
    "wobble, weights": ("wobble of the held-out error", "{:.1%}"),
    "error, weights": ("held-out error", "{:.4f}"),
    f"error, average {DECAY}": (f"of average {DECAY}", "{:.4f}"),
}
AVERAGES = [f"{what}, {name}" for what in ("error", "wobble") for name in WEIGHTS]
DIFFERENCES = {name: head for name, (head, _) in TRAINING.items() if name not in ("grad_norm", "spikes")}


def table_rows(results: dict[str, dict[str, list[dict]]], warmup_steps: int) -> list[dict]:
    """A row for every learning rate and arm: the seeds' figures, and their relative differences from the base."""
    rows = []
    for rate, arms in results.items():
        base = [figures_of(result, warmup_steps) for result in arms["base"]]
        for arm, seeds in arms.items():
            found = [figures_of(result, warmup_steps) for result in seeds]
            figures = {name: [one[name] for one in found if one] for name in (*TRAINING, *AVERAGES)}
            pairs = [(one, other) for one, other in zip(found, base, strict=True) if one and other]
            differences = {name: [one[name] / other[name] - 1.0 for one, other in pairs] for name in DIFFERENCES}
            survived = f"{sum(map(bool, found))} of {len(found)}"
            rows.append(
                {"rate": rate, "arm": arm, "survived": survived, "figures": figures, "differences": differences}
            )
    return rows


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Markdown."""
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row).replace("%", " %") + " |")


def with_range(values: list[float], form: str) -> str:
    """Mean (lowest..highest)."""
    if not values:
        return "-"
    mean, low, high = (form.format(value) for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low}..{high})"


def with_interval(values: list[float]) -> str:
    """Mean ± half the 95 % t interval, bold when that leaves out zero."""
    if len(values) < 2:
        return "-"
    found = interval(values)
    text = f"{found['mean']:+.1%} ± {found['half_width']:.1%}"
    return f"**{text}**" if abs(found["mean"]) > found["half_width"] else text


def print_tables(rows: list[dict]) -> None:
    """The training, what differs from the base, and the averages of the base's weights."""
    names = [[row["rate"], row["arm"]] for row in rows]
    cells = [
        [*name, row["survived"], *(with_range(row["figures"][key], form) for key, (_, form) in TRAINING.items())]
        for name, row in zip(names, rows, strict=True)
    ]
    print_table(["learning rate", "recipe", "survived", *(head for head, _ in TRAINING.values())], cells)
    cells = [
        [*name, *(with_interval(row["differences"][key]) for key in DIFFERENCES)]
        for name, row in zip(names, rows, strict=True)
        if row["arm"] != "base"
    ]
    print_table(["learning rate", "recipe beside the base", *DIFFERENCES.values()], cells)
    cells = []
    for row in rows:
        if row["arm"] == "base":
            for weights in WEIGHTS:
                found = [row["figures"][f"{what}, {weights}"] for what in ("error", "wobble")]
                cell = [with_range(values, form) for values, form in zip(found, ("{:.4f}", "{:.1%}"), strict=True)]
                pairs = zip(found[1], row["figures"][f"wobble, {WEIGHTS[0]}"], strict=True)
                beside = "" if weights == WEIGHTS[0] else with_interval([one / other - 1.0 for one, other in pairs])
                cells.append([row["rate"], weights, *cell, beside])
    print_table(["learning rate", "base", "held-out error", "wobble", "wobble beside the weights'"], cells)


# --- curves -----------------------------------------------------------------------------------------------------


def smooth(values: list[float], every: int) -> np.ndarray:
    """Medians of every so many steps."""
    return np.median(np.reshape(values[: len(values) // every * every], (-1, every)), axis=1)


class Curves:
    """Draws lines with the band of the seeds' range, and keeps their numbers as rows of a CSV."""

    def __init__(self) -> None:
        self.rows: list[list] = []

    def add(
        self,
        axis: object,
        name: list[str],
        places: np.ndarray,
        seeds: list,
        colour: str,
        *,
        label: str,
        base: list | None = None,
    ) -> None:
        """One line: `seeds` are values at `places`, drawn beside those of `base` where it is given; None = no such value."""
        if not seeds:
            return
        values = np.array(seeds, dtype=float)
        shown = values if base is None else values / np.array(base, dtype=float)
        axis.plot(places, shown.mean(0), color=colour, linewidth=1.2, label=label)
        axis.fill_between(places, shown.min(0), shown.max(0), color=colour, alpha=0.15, linewidth=0)
        figures = zip(values.mean(0), values.min(0), values.max(0), strict=True)
        self.rows += [
            [*name, f"{place:g}", *(f"{value:.5g}" for value in found)]
            for place, found in zip(places, figures, strict=True)
        ]


def draw(results: dict[str, dict[str, list[dict]]], every: int, probe_every: int) -> tuple[object, list[list]]:
    """The figure and its CSV rows: loss, gradient norm, held-out error by timestep; a column for each of two learning rates."""
    curves, rates = Curves(), list(results)[:2]
    figure, axes = new_figure(12.0, 4, len(rates), sharey="row")
    middle = (np.arange(TIMESTEP_RANGES) + 0.5) * 1000 / TIMESTEP_RANGES
    averaged = f"average {DECAY}"
    for column, rate in zip(axes.T, rates, strict=True):
        arms = {arm: [result for result in seeds if result["finite"]] for arm, seeds in results[rate].items()}
        for index, (arm, seeds) in enumerate(arms.items()):
            for axis, key, name in zip(
                column, ("mse", "grad_norm"), ("training error", "gradient norm"), strict=False
            ):
                values = [smooth(result[key], every) for result in seeds]
                steps = (np.arange(len(values[0]) if values else 0) + 1) * every
                curves.add(axis, [name, arm, rate], steps, values, COLOURS[index], label=arm)
            if len(seeds) == len(arms["base"]):
                found, base = (
                    [result["held_out"][averaged]["by_timestep"] for result in part] for part in (seeds, arms["base"])
                )
                name = [f"held-out error by timestep, {averaged}", arm, rate]
                curves.add(column[2], name, middle, found, COLOURS[index], label=arm, base=base)
        for index, weights in enumerate(WEIGHTS):
            found = [result["curve"][weights] for result in arms["base"]]
            steps = (np.arange(len(found[0]) if found else 0) + 1) * probe_every
            name = [f"held-out error, {weights}", "base", rate]
            curves.add(column[3], name, steps, found, (GREY, *COLOURS)[index], label=weights)
        titles = (
            f"training error at learning rate {rate}", "gradient norm before clipping", "held-out error by timestep, beside the base",
            "held-out error of the base and its averages",
        )  # fmt: skip
        for axis, title, below in zip(
            column, titles, ("step", "step", "timestep (large = noisy)", "step"), strict=True
        ):
            if axis is not column[2]:
                set_log(axis, "y")
            set_title(axis, title)
            axis.set_xlabel(below, fontsize=9)
            axis.grid(alpha=0.3)
        column[3].legend(fontsize=8, frameon=False)
    for axis, text in zip(
        axes[:, 0], ("squared error of tokens", "norm", "times the base's", "squared error of tokens"), strict=True
    ):
        axis.set_ylabel(text, fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    title = f"lines: mean of the seeds, bands: their range; steps: medians of {every}"
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False, title=title)
    return figure, curves.rows


def save_small(figure: object, path: Path) -> None:
    """A PNG of 256 colours: a third of the bytes, and lines look the same."""
    figure.savefig(path, dpi=DPI * 3 // 4, facecolor="white")
    with Image.open(path) as picture:
        picture = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, caches and runs")
    parser.add_argument("--out", type=Path, help="folder for curves.png, curves.csv and table.csv")
    parser.add_argument(
        "--quick", action="store_true", help="minutes instead of the sizes below: to see that it works"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="models per arm and learning rate, at least 2")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1])
    parser.add_argument("--clips", type=int, default=192)
    parser.add_argument("--steps", type=int, default=240, help="training steps")
    parser.add_argument("--batch-size", type=int, default=4, help="clips a step, each noised twice")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=48, help="clips that are measured on")
    parser.add_argument(
        "--probe-every", type=int, default=12, help="steps between measurements on the first 4 of them"
    )
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.clips, args.held_out = 2, 80, 24, 8
    if args.seeds < 2:
        parser.error("--seeds must be at least 2, for a spread")
    if "base" not in args.arms:
        parser.error("--arms must have the base, which the others are compared with")

    vae_folder = bundled_model() / "vae"
    vae = AutoencoderARVAE.from_pretrained(vae_folder, dtype=torch.float32).eval().requires_grad_(False)
    tokens = args.work / "tokens"
    if not (tokens / "index.json").is_file():
        write_clips(args.work / "clips", args.clips)
    class_names = cache_latents(f"videos:{args.work / 'clips'}", vae, tokens)["class_names"]
    draws = held_out_draws(vae, class_names, args.held_out)
    warmup_steps = args.steps // 20
    results = {f"{rate:g}": {arm: [] for arm in args.arms} for rate in args.learning_rates}
    bar = tqdm(total=args.seeds * len(args.arms) * len(args.learning_rates), unit="run")
    for seed in range(args.seeds):  # arms take turns: what is finished is a comparison
        for rate in args.learning_rates:
            for arm in args.arms:
                out = args.work / f"{arm.replace(' ', '-')}-{rate:g}-{seed}"
                figures = args.work / f"{out.name}.json"
                if not figures.is_file():
                    options = BASE | ARMS[arm]
                    qk_norm = options.pop("qk_norm", True)
                    config = preset(
                        "scenes-64-cpu", out=str(out), vae=str(vae_folder), data=f"latents:{tokens}", seed=seed,
                        batch_size=args.batch_size, num_steps=args.steps, learning_rate=rate, warmup_steps=warmup_steps,
                        width=args.width, depth=args.depth, num_heads=args.width // 32 or 1, num_workers=0, log_every=1,
                        checkpoint_every=args.steps, sample_every=args.steps, mixed_precision=args.mixed_precision, **options,
                    )  # fmt: skip
                    result = train(config, qk_norm, vae, draws, args.probe_every, min(12, 3 * args.held_out))
                    shutil.rmtree(out)
                    figures.write_text(json.dumps(result))
                results[f"{rate:g}"][arm].append(json.loads(figures.read_text()))
                bar.update()
    bar.close()
    rows = table_rows(results, warmup_steps)
    print_tables(rows)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        figure, curves = draw(results, max(args.steps // 24, 1), args.probe_every)
        save_small(figure, args.out / "curves.png")
        heads = ["curve", "recipe", "learning rate", "step or timestep", "mean", "lowest", "highest"]
        write_csv(args.out / "curves.csv", heads, curves)
        heads = ["learning rate", "recipe", "survived", "figure", "values of the seeds that survived"]
        write_csv(
            args.out / "table.csv",
            heads,
            [
                [row["rate"], row["arm"], row["survived"], name, *(f"{value:.5g}" for value in values)]
                for row in rows
                for name, values in row["figures"].items()
            ],
        )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    seconds = [result["seconds"] for arms in results.values() for seeds in arms.values() for result in seeds]
    print(json.dumps({"settings": settings, "rows": rows, "seconds_per_run": float(np.mean(seconds))}))


if __name__ == "__main__":
    main()
