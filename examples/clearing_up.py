"""One clip clearing up at several timestep gaps, from the same noise and with the same work, as a moving picture.

    python examples/clearing_up.py --scene sunset --seed 3 --out clearing_up.webp

Every row is a run. On its left the frames that have finished so far play; the tiles are all frames of the clip: the model's
guess, under as much grain as the frame has noise left, over a bar with that much noise. At every moment of the picture all
rows have had the same number of frame evaluations.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ardiff import ARDiffPipeline, ad_schedule, bundled_model
from ardiff.schedulers.ad_schedule import plan_counts


PAPER, INK, SOFT, GROOVE, ACCENT = "#f6f4ef", "#1e1c19", "#655f56", "#e4dfd5", "#b83f16"
MARGIN, PLAYER, TILE, SPACE, TITLE = 16, 78, 44, 4, 24
CELL = 2  # pixels of a grain: finer ones make the file twice as large


@dataclass(frozen=True)
class Moment:
    """A run after some of its calls: `guesses` uint8 (F, S, S, 3), `noise_level` (F,) in [0, 1], its first finished frames."""

    calls: int
    guesses: np.ndarray
    noise_level: np.ndarray
    num_finished: int


def moments(pipe: ARDiffPipeline, count: int, arguments: dict) -> Iterator[Moment]:
    """What a run has come to when `count` even parts of its frame evaluations are done, one after the other."""
    plan = ad_schedule(arguments["num_frames"], arguments["num_inference_steps"], arguments["ar_step"])
    total = plan_counts(plan).frame_evaluations
    done, part, frames = 0, 1, {}
    for step in pipe.stream(**arguments):
        done += step.frame_evaluations
        frames.update(step.finished)
        if done * count < part * total:
            continue
        open_frames = [index for index in range(arguments["num_frames"]) if index not in frames]
        shown = frames | dict(zip(open_frames, step.preview(open_frames), strict=True))
        moment = Moment(
            calls=step.iteration,
            guesses=np.stack([shown[index] for index in range(arguments["num_frames"])]),
            noise_level=step.noise_level.numpy(),
            num_finished=len(frames),
        )
        while done * count >= part * total:
            yield moment
            part += 1


def tile(frame: np.ndarray, noise_level: float, grain: np.ndarray, side: int) -> Image.Image:
    """A frame as the picture shows it: uint8 (S, S, 3) under its share of grain."""
    enlarged = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
    return Image.fromarray(((1 - noise_level) * enlarged + noise_level * grain).round().astype(np.uint8))


def draw(rows: dict[int, Moment], clock: int) -> Image.Image:
    """One picture: a row for every gap."""
    num_frames = len(next(iter(rows.values())).guesses)
    row_height = TITLE + PLAYER + MARGIN
    left = 2 * MARGIN + PLAYER
    picture = Image.new(
        "RGB", (left + num_frames * (TILE + SPACE) - SPACE + MARGIN, MARGIN + len(rows) * row_height), PAPER
    )
    pen = ImageDraw.Draw(picture)
    cells = torch.randn(num_frames, PLAYER // CELL, PLAYER // CELL, 3, generator=torch.Generator().manual_seed(0))
    grain = (128 + 60 * cells).clamp(0, 255).numpy().repeat(CELL, axis=1).repeat(CELL, axis=2)
    for row, (gap, moment) in enumerate(rows.items()):
        top = MARGIN + row * row_height
        pen.text((left, top), f"timestep gap {gap}", INK, ImageFont.load_default(15))
        words = f"{moment.calls} calls, {moment.num_finished} of {num_frames} frames finished"
        pen.text((picture.width - MARGIN, top + 2), words, SOFT, ImageFont.load_default(13), anchor="ra")
        playing = clock % moment.num_finished if moment.num_finished else 0
        level = 0.0 if moment.num_finished else float(moment.noise_level[0])
        picture.paste(tile(moment.guesses[playing], level, grain[0], PLAYER), (MARGIN, top + TITLE // 2))
        for index in range(num_frames):
            x, y, level = left + index * (TILE + SPACE), top + TITLE + 4, float(moment.noise_level[index])
            picture.paste(tile(moment.guesses[index], level, grain[index, :TILE, :TILE], TILE), (x, y))
            pen.rectangle((x, y + TILE + 4, x + TILE - 1, y + TILE + 7), GROOVE)
            if level > 0:
                pen.rectangle((x, y + TILE + 4, x + round(level * (TILE - 1)), y + TILE + 7), ACCENT)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder (default: the bundled model)")
    parser.add_argument("--scene", default="sunset", help="a class of the model")
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 5, 50], help="timestep gaps, a row each")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--pictures", type=int, default=48, help="while the frames clear up; then as many as there are frames"
    )
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--out", default="clearing_up.webp", help=".webp")
    args = parser.parse_args()
    if not args.out.endswith(".webp"):
        parser.error(f"--out must end in .webp but is {args.out}.")

    pipe = ARDiffPipeline.from_pretrained(args.model or bundled_model(), dtype=torch.float32)
    runs = {}
    for gap in args.gaps:
        arguments = {
            "class_labels": [args.scene], "num_frames": args.num_frames, "ar_step": gap, "num_inference_steps": args.steps,
            "guidance_scale": args.guidance, "generator": torch.Generator().manual_seed(args.seed),
        }  # fmt: skip
        runs[gap] = list(moments(pipe, args.pictures, arguments))
        runs[gap] += runs[gap][-1:] * args.num_frames
    pictures = [
        draw(dict(zip(runs, row, strict=True)), clock) for clock, row in enumerate(zip(*runs.values(), strict=True))
    ]
    # Not `write_video`: grain at its quality takes more than twice the bytes.
    options = {"duration": 1000 // args.fps, "loop": 0, "quality": 50, "method": 6}
    pictures[0].save(args.out, "WEBP", save_all=True, append_images=pictures[1:], **options)


if __name__ == "__main__":
    main()
