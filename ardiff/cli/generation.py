"""The verb that makes a video: generate."""

import argparse
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from ardiff.cli.options import (
    DTYPES,
    IMAGE_SUFFIXES,
    Verb,
    add_model_options,
    check_output,
    hide_loading_bar,
    parse_gap_list,
)


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--scene", help="what to show, one of the model's class names; default: unconditional")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="an image or a video to go on from; repeatable",
    )
    parser.add_argument(
        "--prompt-frames", type=int, metavar="N", help="take at most N frames of the prompt; default: 4 of each video"
    )
    parser.add_argument(
        "--prompt-start", type=int, default=0, metavar="N", help="first frame taken of a video, from 0; default: 0"
    )
    parser.add_argument(
        "--prompt-stride", type=int, default=1, metavar="N", help="take every Nth frame of a video; default: 1"
    )
    parser.add_argument(
        "--num-frames", type=int, default=16, help="frames in all, prompt frames included; default: 16"
    )
    parser.add_argument(
        "--ar-step",
        type=parse_gaps,
        default=5,
        metavar="GAP",
        help="timestep gap between neighbouring frames, 0 (together) to the steps (one by one), "
        "or one gap per new frame after the first: 5,5,50; default: 5",
    )
    parser.add_argument(
        "--profile",
        choices=("even", "chunks", "ramp"),
        default="even",
        help="even: the gap as it is; chunks: --chunk frames together, then the next ones; ramp: gaps that grow from 0 to "
        "--ar-step; default: even",
    )
    parser.add_argument("--chunk", type=int, default=4, metavar="N", help="frames of a chunk; default: 4")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of every frame; default: 50")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale towards the scene; default: 2.0")
    parser.add_argument("--seed", type=int, help="default: drawn at random; always printed")
    parser.add_argument("--fps", type=int, default=8, help="frames a second of the file, 1 to 60; default: 8")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="number format of the model; default: float32"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("video.mp4"),
        help=".mp4, .gif, .webp, .png (a strip) or .zip (all frames); default: video.mp4",
    )


def run_generate(args: argparse.Namespace) -> None:
    from ardiff.data.video import WRITE_SUFFIXES, write_video

    check_output(args.out, WRITE_SUFFIXES)
    if not 1 <= args.fps <= 60:
        raise ValueError(f"`--fps` must be in [1, 60] but is {args.fps}.")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed

    import torch
    from tqdm import tqdm

    from ardiff.pipelines.loading import load_pipeline

    hide_loading_bar()
    pipe = load_pipeline(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    prompt = read_prompt(
        args.prompt, args.prompt_frames, pipe.image_size, start=args.prompt_start, stride=args.prompt_stride
    )
    steps = pipe.stream(
        prompt_frames=prompt or None,
        class_labels=None if args.scene is None else [args.scene],
        num_frames=args.num_frames,
        ar_step=choose_gaps(args, args.num_frames - len(prompt)),
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    print(f"seed {seed}")
    frames, seconds = [], []
    started = time.monotonic()
    with tqdm(unit="call", delay=0.1) as bar:  # the delay keeps a refused request to its one line
        for step in steps:
            frames += [frame for _, frame in step.finished]
            seconds += [time.monotonic() - started] * len(step.finished)
            bar.total = step.num_iterations
            bar.set_postfix_str(f"frames {len(frames)}/{args.num_frames}", refresh=False)
            bar.update()
    write_video(frames, args.out, fps=args.fps)
    print(
        f"{len(frames)} frames in {seconds[-1]:.1f} s, the first new one after {seconds[len(prompt)]:.1f} s: {args.out}"
    )


def parse_gaps(text: str) -> int | list[int]:
    """`5` is one gap for all frames, `5,5,50` one gap per new frame after the first."""
    gaps = parse_gap_list(text)
    return gaps[0] if len(gaps) == 1 else gaps


def choose_gaps(args: argparse.Namespace, num_new_frames: int) -> int | Sequence[int]:
    """The gap, or one per new frame after the first, of the profile that was asked for."""
    from ardiff.schedulers.ad_schedule import profile_gaps

    if args.profile == "even":
        return args.ar_step
    if not isinstance(args.ar_step, int):
        raise ValueError(f"`--ar-step` must be one gap with `--profile {args.profile}` but is a list.")
    return profile_gaps(
        args.profile,
        gap=args.ar_step,
        chunk=args.chunk,
        num_new_frames=num_new_frames,
        num_inference_steps=args.steps,
    )


def read_prompt(paths: Sequence[Path], max_frames: int | None, size: int, *, start: int = 0, stride: int = 1) -> list:
    """Prompt frames of `paths` in order, uint8 (size, size, 3) each; of videos every `stride`-th from `start` on."""
    from ardiff.data.video import fit_frame, read_image, read_video

    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`--prompt-frames` must be at least 1 but is {max_frames}.")
    frames = []
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            frames.append(fit_frame(read_image(path), size))
        else:
            count = 4 if max_frames is None else max_frames
            frames += list(read_video(path, size=size, max_frames=count, start=start, stride=stride))
    return frames[:max_frames]


VERBS = {
    "generate": Verb("make a video", add_generate_options, run_generate),
}
