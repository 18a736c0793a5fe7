"""How steadily the training goes: the recipe against one change each, at its learning rate and at three times that.

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
from ardiff.evaluation.ablation import interval, write_csv
from ardiff.evaluation.plots import COLOURS, DPI, GREY, new_figure, set_log, set_title
from ardiff.schedulers.scheduling_ad import ADScheduler
from ardiff.training.diffusion import DiffusionTrainingConfig, Source, denoise, preset
from ardiff.training.loop import TrainingError, TrainingRun
from ardiff.training.losses import TIMESTEP_RANGES, errors_by_timestep
from ardiff.training.timesteps import sample_fopp, sample_lagged, sample_synchronous


NUM_FRAMES, SIZE, BATCH = 16, 64, 32
ARMS = {
    "base": {},
    "without qk-norm": {"qk_norm": False},
    "plain squared error": {"snr_cap": 1.0},
    "even noise levels": {"timestep_candidates": 8},
    "FoPP alone": {"synchronous_share": 0.0, "lagged_share": 0.0},
    "AdamW alone": {"optimizer": "adamw"},
    "without clipping": {"max_grad_norm": 1e9},
    "independent timesteps": {"timesteps": "independent", "synchronous_share": 0.0, "lagged_share": 0.0},
}
LAWS = (sample_fopp, sample_synchronous, sample_lagged)
# Averages over about 10, 20 and 50 steps of 240; the presets' are over 1,000 of 18,000 and 2,000 of 60,000.
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


def spread(loss: list[float]) -> float:
    """How far the loss of a step is from the running median of WINDOW steps: standard deviation of the logarithm."""
    logs = np.log(loss)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(logs, WINDOW), axis=1)
    return float(np.std(logs[WINDOW // 2 : len(logs) - WINDOW // 2] - medians))


def wobble(curve: list[float]) -> float:
    """How far the held-out error of the second half is from a straight line: standard deviation of the logarithm."""
    logs = np.log(curve[len(curve) // 2 :])
    steps = np.arange(len(logs))
    return float(np.std(logs - np.polyval(np.polyfit(steps, logs, 1), steps)))


def figures_of(result: dict, warmup_steps: int) -> dict[str, float]:
    """The figures of one run, after the warm-up; of one that ended in no number only how far it came."""
    norms = np.array(result["grad_norm"][warmup_steps:])
    found = {"steps": len(result["loss"])}
    if not result["finite"]:
        return found
    median = float(np.median(norms))
    return found | {
        "loss_spread": spread(result["loss"][warmup_steps:]),
        "grad_norm_median": median,
        "grad_norm_tail": float(np.quantile(norms, 0.99)) / median,
        "spikes": int((norms > SPIKE * median).sum()),
        "wobble": wobble(result["curve"][WEIGHTS[0]]),
        "wobble_averaged": wobble(result["curve"][f"average {DECAY}"]),
        "held_out": result["held_out"][WEIGHTS[0]]["mse"],
        "held_out_averaged": result["held_out"][f"average {DECAY}"]["mse"],
    }


COLUMNS = {
    "loss_spread": ("spread of the loss", "{:.1%}"),
    "grad_norm_median": ("gradient norm, median", "{:.3f}"),
    "grad_norm_tail": ("99th percentile / median", "{:.2f}"),
    "spikes": ("spikes", "{:.1f}"),
    "wobble": ("wobble of the held-out error", "{:.1%}"),
    "wobble_averaged": ("of the averaged weights'", "{:.1%}"),
    "held_out": ("held-out error", "{:.4f}"),
    "held_out_averaged": ("of the averaged weights", "{:.4f}"),
}


def table_rows(results: dict[str, dict[str, list[dict]]], warmup_steps: int) -> list[dict]:
    """A row for every learning rate and arm: how many runs ended in numbers, and of every figure the seeds' values."""
    rows = []
    for rate, arms in results.items():
        base = [figures_of(result, warmup_steps) for result in arms.get("base", [])]
        for arm, seeds in arms.items():
            found = [figures_of(result, warmup_steps) for result in seeds]
            row = {
                "learning_rate": float(rate),
                "arm": arm,
                "finite": sum(result["finite"] for result in seeds),
                "seeds": len(seeds),
            }
            for name in COLUMNS:
                row[name] = [figures[name] for figures in found if name in figures]
            pairs = zip(found, base, strict=False)
            row["difference"] = [
                figures["held_out_averaged"] / other["held_out_averaged"] - 1.0
                for figures, other in pairs
                if "held_out_averaged" in figures and "held_out_averaged" in other
            ]
            rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    """Markdown: mean (lowest..highest) over the seeds; last the difference from the base, ± half the 95 % t interval."""
    heads = ["learning rate", "recipe", "survived", *(head for head, _ in COLUMNS.values()), "beside the base"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        cells = [f"{row['learning_rate']:g}", row["arm"], f"{row['finite']} of {row['seeds']}"]
        for name, (_, form) in COLUMNS.items():
            values = row[name]
            text = [form.format(value) for value in (np.mean(values), min(values), max(values))] if values else []
            cells.append(f"{text[0]} ({text[1]}..{text[2]})" if text else "")
        found = interval(row["difference"]) if len(row["difference"]) > 1 and row["arm"] != "base" else None
        cells.append(f"{found['mean']:+.1%} ± {found['half_width']:.1%}".replace("%", " %") if found else "")
        print("| " + " | ".join(cells).replace("%)", " %)") + " |")


# --- curves -----------------------------------------------------------------------------------------------------


def smooth(values: list[float], every: int) -> np.ndarray:
    """Medians of every so many steps."""
    return np.median(np.reshape(values[: len(values) // every * every], (-1, every)), axis=1)


def draw(results: dict[str, dict[str, list[dict]]], every: int, probe_every: int) -> tuple[object, list[list]]:
    """Loss and gradient norm along the training, error by timestep and of averages; and the same as rows of a CSV."""
    rates = list(results)
    figure, axes = new_figure(9.6, 3, 2)
    rows = []
    for column, rate in enumerate(rates[:2]):
        for index, (arm, seeds) in enumerate(results[rate].items()):
            for axis, name in zip(axes[:2, column], ("mse", "grad_norm"), strict=True):
                curves = [smooth(result[name], every) for result in seeds]
                length = min(len(curve) for curve in curves)
                if not length:
                    continue
                curves = np.array([curve[:length] for curve in curves])
                steps = (np.arange(length) + 1) * every
                axis.plot(steps, curves.mean(0), color=COLOURS[index], linewidth=1.2, label=arm)
                axis.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[index], alpha=0.15, linewidth=0)
                what = {"mse": "training error", "grad_norm": "gradient norm"}[name]
                rows += [
                    [what, arm, rate, step, *(f"{value:.5g}" for value in (values.mean(), values.min(), values.max()))]
                    for step, values in zip(steps.tolist(), curves.T, strict=True)
                ]
        for axis, title in zip(
            axes[:2, column], ("squared error of the clean tokens", "gradient norm before clipping"), strict=True
        ):
            set_log(axis, "y")
            set_title(axis, f"{title}, learning rate {rate}")
            axis.set_xlabel(f"step (medians of {every}; band: range of the seeds)", fontsize=9)
            axis.grid(alpha=0.3)
    left, right = axes[2]
    middle = (np.arange(TIMESTEP_RANGES) + 0.5) * 1000 / TIMESTEP_RANGES
    base = [
        result["held_out"][f"average {DECAY}"]["by_timestep"]
        for result in results[rates[0]]["base"]
        if result["finite"]
    ]
    for index, (arm, seeds) in enumerate(results[rates[0]].items()):
        found = [result["held_out"][f"average {DECAY}"]["by_timestep"] for result in seeds if result["finite"]]
        if not found or len(found) != len(base):
            continue
        ratio = np.array(found) / np.array(base)
        left.plot(middle, ratio.mean(0), color=COLOURS[index], marker=".", linewidth=1.2)
        left.fill_between(middle, ratio.min(0), ratio.max(0), color=COLOURS[index], alpha=0.15, linewidth=0)
        rows += [
            ["held-out error by timestep", arm, rates[0], int(timestep), *(f"{value:.5g}" for value in (values.mean(), values.min(), values.max()))]
            for timestep, values in zip(middle.tolist(), np.array(found).T, strict=True)
        ]  # fmt: skip
    set_log(left, "y")
    set_title(left, f"held-out error beside the base, averaged, rate {rates[0]}")
    left.set_xlabel("timestep (large = noisy)", fontsize=9)
    left.grid(alpha=0.3)
    for index, name in enumerate(WEIGHTS):
        curves = np.array([result["curve"][name] for result in results[rates[0]]["base"] if result["finite"]])
        steps = (np.arange(curves.shape[1]) + 1) * probe_every
        colour = GREY if index == 0 else COLOURS[(1, 0, 2)[index - 1]]
        right.plot(steps, curves.mean(0), color=colour, linewidth=1.2, label=name)
        right.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        rows += [
            [f"held-out error, {name}", "base", rates[0], step, *(f"{value:.5g}" for value in (values.mean(), values.min(), values.max()))]
            for step, values in zip(steps.tolist(), curves.T, strict=True)
        ]  # fmt: skip
    set_log(right, "y")
    set_title(right, f"held-out error of the base, rate {rates[0]}")
    right.set_xlabel("step", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    right.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure, rows


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
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-2, 3e-2])
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
                    options = dict(ARMS[arm])
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
    print_table(rows)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        figure, curve_rows = draw(results, max(args.steps // 24, 1), args.probe_every)
        save_small(figure, args.out / "curves.png")
        write_csv(
            args.out / "curves.csv",
            ["curve", "recipe", "learning rate", "step or timestep", "mean", "lowest", "highest"],
            curve_rows,
        )
        names = [*COLUMNS, "difference"]
        seeds = [
            [
                row["learning_rate"],
                row["arm"],
                f"{row['finite']} of {row['seeds']}",
                name,
                *(f"{value:.5g}" for value in row[name]),
            ]
            for row in rows
            for name in names
        ]
        write_csv(
            args.out / "table.csv",
            ["learning rate", "recipe", "survived", "figure", *(f"seed {s}" for s in range(args.seeds))],
            seeds,
        )
    seconds = {
        arm: float(np.mean([r["seconds"] for rate in results.values() for r in rate[arm]])) for arm in args.arms
    }
    print(
        json.dumps(
            {"settings": vars(args) | {"work": str(args.work), "out": str(args.out)}, "rows": rows, "seconds": seconds}
        )
    )


if __name__ == "__main__":
    main()
