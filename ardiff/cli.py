"""The `ardiff` command: one verb per job, `--help` on each.

torch and everything built on it are imported by the verb that runs, so that `ardiff --help` answers at once.
"""

import argparse
import dataclasses
import functools
import json
import os
import secrets
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
DTYPES = ("float32", "bfloat16", "float16")
DATA_HELP = (
    "a folder of videos, or KIND:FOLDER or KIND/SPLIT:FOLDER with the kinds faceforensics, sky-timelapse, taichi-hd, ucf-101, "
    "videos, images and shards (tar files), and the splits train, val, test, all (ucf-101: train01 to test03)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """One job of the command: a line of help, its options, and the function that does it."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or 2 after one line on stderr when the input was wrong.

    A verb that checks something returns 1 when it found something wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv).parse_args(argv)
    try:
        return VERBS[args.verb].run(args) or 0
    except (ValueError, OSError) as error:
        print(f"ardiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`; only the verb in its first place gets its options, some of which import torch to be listed."""
    parser = argparse.ArgumentParser(prog="ardiff", description="Asynchronous auto-regressive video diffusion.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb_parser = verbs.add_parser(name, help=verb.help, description=verb.help)
        if list(argv[:1]) == [name]:
            verb.add_options(verb_parser)
    return parser


# --- values given on the command line ---------------------------------------------------------------------------


def hide_loading_bar() -> None:
    """Loading a model takes less than a second; diffusers' bar for it would stand above every error line."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()


def parse_gaps(text: str) -> int | list[int]:
    """`5` is one gap for all frames, `5,5,50` one gap per new frame after the first."""
    gaps = parse_gap_list(text)
    return gaps[0] if len(gaps) == 1 else gaps


def parse_gap_list(text: str) -> list[int]:
    """`0,5,50`: integers between commas."""
    try:
        return [int(gap) for gap in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an integer or integers between commas but is {text!r}") from error


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model folder, a Hub id or a bundled model's name; default: scenes-64")
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, mps or cpu, the first that is there) or a torch device"
    )


# --- generate ---------------------------------------------------------------------------------------------------


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


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a path that cannot be written, before the work and not after it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"`--out` must end in {', '.join(suffixes)} but is {path}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"`--out` must be in a folder that exists but is {path}.")


# --- train ------------------------------------------------------------------------------------------------------


def add_autoencoder_options(parser: argparse.ArgumentParser) -> None:
    from ardiff.training.autoencoder import PRESETS, AutoencoderTrainingConfig

    add_config_options(parser, AutoencoderTrainingConfig, sorted(PRESETS))


def run_train_autoencoder(args: argparse.Namespace) -> int:
    from ardiff.training.autoencoder import AutoencoderTrainingConfig, preset, train_autoencoder

    config = preset(args.preset, **given_options(args, AutoencoderTrainingConfig))
    return run_training(train_autoencoder, config)


def add_diffusion_options(parser: argparse.ArgumentParser) -> None:
    from ardiff.training.diffusion import PRESETS, DiffusionTrainingConfig

    add_config_options(parser, DiffusionTrainingConfig, sorted(PRESETS))


def run_train(args: argparse.Namespace) -> int:
    from ardiff.training.diffusion import DiffusionTrainingConfig, preset, train_diffusion

    return run_training(train_diffusion, preset(args.preset, **given_options(args, DiffusionTrainingConfig)))


def run_training(train: Callable, config: object) -> int:
    """0, or 1 after one line on stderr where the run ended before its last step."""
    from ardiff.training.loop import TrainingError

    try:
        train(config)
    except TrainingError as error:
        print(f"ardiff: {error}", file=sys.stderr)
        return 1
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def add_config_options(parser: argparse.ArgumentParser, config_class: type, presets: Sequence[str]) -> None:
    """One option per field of a training config; one that is not given stays as the preset has it."""
    parser.add_argument("--preset", choices=presets, default="scenes-64-cpu", help="default: scenes-64-cpu")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=field.metadata["help"].replace("%", "%%"),
            **option_type(hints[field.name]),
        )


def option_type(hint: typing.Any) -> dict[str, typing.Any]:
    """What argparse needs to read a value of this type; for `X | None` the word none is None."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": parts, "type": type(parts[0])}
    if origin in (list, tuple):
        return {"nargs": "+", "type": parts[0]}
    if origin in (types.UnionType, typing.Union):
        (inner,) = [part for part in parts if part is not types.NoneType]
        option = option_type(inner)
        if "type" in option and "choices" not in option:
            option["type"] = optional(option["type"])
        return option
    return {"type": hint}


def optional(parse: Callable[[str], typing.Any]) -> Callable[[str], typing.Any]:
    def parse_optional(text: str) -> typing.Any:
        return None if text.lower() == "none" else parse(text)

    parse_optional.__name__ = parse.__name__  # argparse names it in "invalid ... value"
    return parse_optional


def given_options(args: argparse.Namespace, config_class: type) -> dict[str, typing.Any]:
    """The fields of a training config that the command line names."""
    names = [field.name for field in dataclasses.fields(config_class) if hasattr(args, field.name)]
    values = {name: getattr(args, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# --- convert ----------------------------------------------------------------------------------------------------


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a Hub id, a folder, or the transformer's file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="model folder to write")
    parser.add_argument(
        "--dataset", choices=("sky", "taichi", "ucf", "face"), help="which of several models; default: the only one"
    )
    parser.add_argument(
        "--vae", type=Path, metavar="FILE", help="the autoencoder; default: within or beside the transformer"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="what differs from the published configuration, by component: "
        '{"transformer": {"merge_mode": "separate_norm"}}; default: nothing',
    )


def run_convert(args: argparse.Namespace) -> None:
    from ardiff.convert import convert

    config = None if args.config is None else json.loads(args.config.read_text(encoding="utf-8"))
    print(convert(args.source, args.out, args.dataset, args.vae, config=config, progress=True))


# --- data -------------------------------------------------------------------------------------------------------


def add_data_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--num-frames", type=int, default=16, help="frames of a clip; default: 16")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame; default: 1")
    parser.add_argument(
        "--decode", action="store_true", help="decode every frame, which finds damage inside files; default: headers"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with every name; default: none")


def run_data_check(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_output(args.out, (".json",))

    from ardiff.data.benchmarks import check_set, format_check

    report = check_set(args.data, num_frames=args.num_frames, stride=args.stride, decode=args.decode)
    print(format_check(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(bool(report["missing"] or report["damaged"]))


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="?", help=DATA_HELP)
    parser.add_argument(
        "--vae", default="runs/autoencoder/vae", help="autoencoder folder; default: runs/autoencoder/vae"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the cache is, or goes")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the tokens on disk; default: float16"
    )
    parser.add_argument("--shard-mb", type=int, default=64, help="size of a file in MB; default: 64")
    parser.add_argument("--batch-size", type=int, default=64, help="frames encoded at once; default: 64")
    parser.add_argument("--device", default="auto", help="auto or a torch device; default: auto")
    parser.add_argument(
        "--verify", action="store_true", help="compare the files of --out with their checksums, and write nothing"
    )


def run_cache(args: argparse.Namespace) -> int:
    if (args.data is None) != args.verify:
        raise ValueError("`ardiff cache-latents` needs either DATA, to make a cache, or `--verify`, to check one.")
    if args.verify:
        from ardiff.data.latents import read_index, verify_cache

        wrong, index = verify_cache(args.out), read_index(args.out)
        print(
            "\n".join(wrong)
            or f"{args.out}: {len(index['videos'])} videos in {len(index['shards'])} files, all intact"
        )
        return int(bool(wrong))

    import torch

    from ardiff import AutoencoderARVAE
    from ardiff.data.latents import cache_latents
    from ardiff.pipelines.loading import choose_device

    hide_loading_bar()
    vae = AutoencoderARVAE.from_pretrained(args.vae, dtype=torch.float32).eval().to(choose_device(args.device))
    index = cache_latents(
        args.data, vae, args.out, dtype=args.dtype, shard_mb=args.shard_mb, batch_size=args.batch_size
    )
    num_frames = sum(video["num_frames"] for video in index["videos"])
    num_bytes = sum(shard["num_bytes"] for shard in index["shards"])
    print(f"{args.out}: {len(index['videos'])} videos, {num_frames} frames, {num_bytes / 1e6:.1f} MB")
    for reason in index["left_out"].values():
        print(f"left out: {reason}")
    return 0


# --- evaluate, scenes, demo -------------------------------------------------------------------------------------


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--scenes", nargs="+", metavar="SCENE", help="default: all that the model knows")
    parser.add_argument("--num-clips", type=int, default=64, help="held-out clips of each scene; default: 64")
    parser.add_argument(
        "--gaps", type=parse_gap_list, default=[0, 5, 50], help="timestep gaps of the samples; default: 0,5,50"
    )
    parser.add_argument(
        "--prediction-gaps",
        type=parse_gap_list,
        help="timestep gaps of the continuations; default: 5 for scenes, none with --data",
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of every frame; default: 50")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; default: 1.0, which is off")
    parser.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="of the generation; default: float32")
    parser.add_argument("--batch-size", type=int, default=64, help="clips at once; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and of the noise; default: 0")
    parser.add_argument("--out", type=Path, default=Path("report.json"), help="default: report.json")
    parser.add_argument(
        "--samples", type=Path, metavar="FOLDER", help="for one picture of clips per scene; default: none"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=100, help="draws for the intervals, 0 = no intervals; default: 100"
    )
    group = parser.add_argument_group("against a data set", "with --data: Frechet distances to its real clips")
    group.add_argument("--data", help=f"'scenes', or {DATA_HELP}")
    group.add_argument("--videos", default="", metavar="DATA", help="measure these videos, not samples of the model")
    group.add_argument("--num-samples", type=int, default=2048, help="clips in each set; default: 2048")
    group.add_argument("--num-frames", type=int, default=16, help="16 is FVD-16, 128 is FVD-128; default: 16")
    group.add_argument("--stride", type=int, default=1, help="of the real frames; default: 1")
    group.add_argument("--size", type=int, default=0, help="pixels that are compared; default: the model's")
    group.add_argument("--clips", choices=("random", "first"), default="random", help="of a video; default: random")
    group.add_argument(
        "--i3d", type=Path, metavar="FILE", help="weights of I3D (.safetensors, or .pt state dict), for FVD"
    )
    group.add_argument("--videomae", metavar="MODEL", help="a VideoMAE folder or Hub id, for its Frechet distance")
    group.add_argument("--inception", type=Path, metavar="FILE", help="inception-2015-12-05.pt, for FID of all frames")
    group.add_argument(
        "--trust-torchscript",
        action="store_true",
        help="run --i3d and --inception files that are TorchScript: programs, as dangerous as whoever made them",
    )
    group.add_argument("--processes", type=int, default=1, help="that generate; default: 1")


def run_evaluate(args: argparse.Namespace) -> None:
    check_output(args.out, (".json",))
    hide_loading_bar()
    if args.data is not None:
        run_evaluate_set(args)
        return
    if args.i3d or args.videomae or args.inception or args.videos:
        raise ValueError("`--data` must name the real clips for `--i3d`, `--videomae`, `--inception` and `--videos`.")

    from ardiff.evaluation.report import evaluate, format_report
    from ardiff.pipelines.loading import choose_device, find_model

    report = evaluate(
        find_model(args.model),
        scenes=args.scenes,
        num_clips=args.num_clips,
        seed=args.seed,
        gaps=args.gaps,
        prediction_gaps=args.prediction_gaps or [5],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        dtype=args.dtype,
        batch_size=args.batch_size,
        bootstrap=args.bootstrap,
        device=choose_device(args.device),
        out=args.out,
        samples=args.samples,
    )
    print(format_report(report))


def run_evaluate_set(args: argparse.Namespace) -> None:
    from ardiff.evaluation.distribution import Protocol, evaluate_set, format_set_report
    from ardiff.pipelines.loading import choose_device, find_model

    protocol = Protocol(
        data=args.data,
        videos=args.videos,
        num_clips=args.num_samples,
        num_frames=args.num_frames,
        stride=args.stride,
        size=args.size,
        clips=args.clips,
        seed=args.seed,
        gaps=args.gaps,
        prediction_gaps=args.prediction_gaps or [],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        dtype=args.dtype,
        bootstrap=args.bootstrap,
    )
    report = evaluate_set(
        find_model(args.model),
        protocol,
        i3d=args.i3d,
        videomae=args.videomae,
        inception=args.inception,
        trust_torchscript=args.trust_torchscript,
        batch_size=args.batch_size,
        processes=args.processes,
        device=choose_device(args.device),
        out=args.out,
    )
    print(format_set_report(report))


def add_scenes_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=64, help="pixels of a frame's side; default: 64")
    parser.add_argument("--num-frames", type=int, default=16, help="frames of each clip; default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip of each scene; default: 0")
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), help="default: scenes.png")


def run_scenes(args: argparse.Namespace) -> None:
    check_output(args.out, IMAGE_SUFFIXES)

    from PIL import Image

    from ardiff.data.scenes import contact_sheet

    Image.fromarray(contact_sheet(size=args.size, num_frames=args.num_frames, seed=args.seed)).save(args.out)
    print(args.out)


def add_page_options(parser: argparse.ArgumentParser, host: str = "127.0.0.1", port: int = 7860) -> None:
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        help="a model of the menu: folder, Hub id or bundled model's name; repeatable; default: all bundled models",
    )
    add_device_option(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="number format of the models; default: float32"
    )
    parser.add_argument(
        "--auth",
        metavar="FILE",
        help="lines of user:password, for who may sign in; default: ARDIFF_ACCOUNTS, else all",
    )
    parser.add_argument("--host", default=host, help=f"address to serve on; default: {host}")
    parser.add_argument("--port", type=int, default=port, help=f"port to serve on; default: {port}")


def add_demo_options(parser: argparse.ArgumentParser, host: str = "127.0.0.1", port: int = 7860) -> None:
    add_page_options(parser, host, port)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="models come to the device when they are needed: less of its memory, slower",
    )
    parser.add_argument("--json-log", action="store_true", help="log as JSON lines, without personal data")


def read_accounts_file(path: str | None) -> str | None:
    return os.environ.get("ARDIFF_ACCOUNTS") if path is None else Path(path).read_text(encoding="utf-8")


def run_demo(args: argparse.Namespace) -> None:
    from ardiff.demo.ui import launch

    launch(
        models=args.models,
        device=args.device,
        dtype=args.dtype,
        offload=args.offload,
        host=args.host,
        port=args.port,
        accounts=read_accounts_file(args.auth),
        json_log=args.json_log,
    )


# --- ablate, plot -----------------------------------------------------------------------------------------------


def add_ablate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("ablation"),
        metavar="FOLDER",
        help="resumed where it exists; default: ablation",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the size for two CPU cores and half an hour; default: that for a GPU"
    )
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="autoencoder; default: that of scenes-64")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the table between this file's marks <!-- ablation -->"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each configuration, 2 to 10; default: 3")
    parser.add_argument(
        "--processes", type=int, help="runs at once, one CPU thread each; default: 2 with --quick, else 1"
    )
    add_device_option(parser)


def run_ablate(args: argparse.Namespace) -> None:
    from ardiff.evaluation.ablation import SIZES, ablate, format_table, write_into
    from ardiff.evaluation.plots import import_figure, plot_ablation
    from ardiff.pipelines.loading import bundled_model, choose_device

    import_figure()  # refused before the work and not after it
    hide_loading_bar()
    report = ablate(
        args.out,
        SIZES["quick" if args.quick else "full"],
        vae=bundled_model() / "vae" if args.vae is None else args.vae,
        num_seeds=args.seeds,
        processes=(2 if args.quick else 1) if args.processes is None else args.processes,
        device="cpu" if args.quick and args.device == "auto" else choose_device(args.device),
        command=" ".join(["ardiff", *sys.argv[1:]]),
    )
    print(format_table(report))
    for path in plot_ablation(args.out):
        print(path)
    if args.readme is not None:
        write_into(args.readme, format_table(report))


def add_plot_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        help="laws of the training timesteps, plans, loss by timestep, gaps (quality against gap), samples; default: all",
    )
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="FOLDER", help="default: plots")
    parser.add_argument(
        "--ablation", type=Path, metavar="FOLDER", help="draw the plots of this `ardiff ablate` folder again, into it"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="of `evaluate`, for gaps; default: the model's own"
    )
    add_model_options(parser)


def run_plot(args: argparse.Namespace) -> None:
    from ardiff.evaluation.plots import KINDS, plot, plot_ablation

    if args.ablation is not None:
        paths = plot_ablation(args.ablation)
    else:
        kinds, pipe, report = args.kinds or KINDS, None, None
        if {"loss", "samples"} & set(kinds):
            from ardiff.pipelines.loading import load_pipeline

            hide_loading_bar()
            pipe = load_pipeline(args.model, device=args.device)
        if "gaps" in kinds:
            from ardiff.pipelines.loading import find_model

            path = args.report or Path(find_model(args.model)) / "evaluation.json"
            report = json.loads(path.read_text(encoding="utf-8"))
        paths = plot(kinds, args.out, pipe=pipe, report=report)
    for path in paths:
        print(path)


# --- serve ------------------------------------------------------------------------------------------------------


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_page_options(parser)
    parser.add_argument(
        "--replicas", type=int, default=0, metavar="N", help="models at once, at most; default: one per GPU, or one"
    )
    parser.add_argument(
        "--min-replicas", type=int, default=1, metavar="N", help="models kept while nobody asks; default: 1"
    )
    parser.add_argument(
        "--cpus",
        type=int,
        default=0,
        metavar="N",
        help="CPU cores, and threads, of a replica; default: 1 with a GPU, else an equal share of all cores",
    )
    parser.add_argument(
        "--address", metavar="RAY", help="a Ray cluster to join, auto for this machine's; default: start one here"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="that runs may still take after SIGTERM; default: 120",
    )


def run_serve(args: argparse.Namespace) -> None:
    from ardiff.serving.cluster import Cluster, serve_studio

    options = vars(args) | {"models": tuple(args.models or ()), "accounts": read_accounts_file(args.auth)}
    options = {field.name: options[field.name] for field in dataclasses.fields(Cluster)}
    serve_studio(Cluster(**options), say=functools.partial(print, flush=True))


# --- bench ------------------------------------------------------------------------------------------------------


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    from ardiff.benchmark import CONTESTANTS, SIZES

    parser.add_argument(
        "--size",
        choices=SIZES,
        default="mini",
        help="mini: the bundled model; published: the authors' size with random weights; default: mini",
    )
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda; default: cpu")
    parser.add_argument("--frames", type=parse_gap_list, default=[16], metavar="F,F", help="of a video; default: 16")
    parser.add_argument(
        "--gaps",
        type=parse_gap_list,
        metavar="GAP,GAP",
        help="timestep gaps; default: 0, a tenth of the steps, the steps",
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of every frame; default: 50")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant at each gap; default: 3")
    parser.add_argument("--batch-size", type=int, default=1, help="videos at once; default: 1")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: 1")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        help="who runs; ratios are over the first; default: all",
    )
    parser.add_argument("--quick", action="store_true", help="4 steps, without gap 0: under a minute on two cores")


def run_bench(args: argparse.Namespace) -> None:
    from ardiff.benchmark import benchmark, format_benchmark

    hide_loading_bar()
    steps = 4 if args.quick else args.steps
    gaps = args.gaps or ([1, steps] if args.quick else [0, max(steps // 10, 1), steps])
    report = benchmark(
        size=args.size,
        device=args.device,
        frames=args.frames,
        gaps=gaps,
        num_steps=steps,
        rounds=args.rounds,
        batch_size=args.batch_size,
        threads=args.threads,
        contestants=args.contestants,
    )
    print(format_benchmark(report))


# --- deploy -----------------------------------------------------------------------------------------------------


def add_deploy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo-id", metavar="ID", help="the Space, an account and a name: me/ardiff")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end; needs no network and no token")
    parser.add_argument("--folder", type=Path, default=Path(), help="with spaces.yaml; default: where you are")
    parser.add_argument(
        "--prune", action="store_true", help="delete variables, secrets and volumes that spaces.yaml does not name"
    )
    parser.add_argument("--update-secrets", action="store_true", help="send secrets again that the Space has already")
    parser.add_argument(
        "--write-header", action="store_true", help="write the header of README.md from spaces.yaml and end"
    )


def run_deploy(args: argparse.Namespace) -> None:
    from ardiff.serving.space import deploy, write_header

    if args.write_header:
        print(f"README.md: {'header written' if write_header(args.folder) else 'nothing to change'}")
        return
    deploy(
        args.folder,
        args.repo_id,
        say=functools.partial(print, flush=True),
        dry_run=args.dry_run,
        prune=args.prune,
        update_secrets=args.update_secrets,
    )


VERBS = {
    "generate": Verb(help="make a video", add_options=add_generate_options, run=run_generate),
    "train-autoencoder": Verb(
        help="train the autoencoder (frames to tokens and back)",
        add_options=add_autoencoder_options,
        run=run_train_autoencoder,
    ),
    "train": Verb(
        help="train the transformer on an autoencoder's tokens", add_options=add_diffusion_options, run=run_train
    ),
    "convert": Verb(
        help="turn the authors' published weights into a model folder",
        add_options=add_convert_options,
        run=run_convert,
    ),
    "data-check": Verb(
        help="say what a data set holds, what is missing and what is damaged",
        add_options=add_data_check_options,
        run=run_data_check,
    ),
    "cache-latents": Verb(
        help="encode a data set to tokens once, for `ardiff train --data latents:FOLDER`",
        add_options=add_cache_options,
        run=run_cache,
    ),
    "evaluate": Verb(
        help="measure a model on held-out scenes, or its samples against a data set",
        add_options=add_evaluate_options,
        run=run_evaluate,
    ),
    "ablate": Verb(
        help="train one small model in every way that the paper compares, and measure them alike",
        add_options=add_ablate_options,
        run=run_ablate,
    ),
    "plot": Verb(
        help="draw the laws of training timesteps, plans, losses, quality against gap, and samples",
        add_options=add_plot_options,
        run=run_plot,
    ),
    "bench": Verb(
        help="measure what the engine costs beside the sampler of the paper",
        add_options=add_bench_options,
        run=run_bench,
    ),
    "scenes": Verb(help="write a contact sheet of the scenes", add_options=add_scenes_options, run=run_scenes),
    "demo": Verb(help="serve the studio", add_options=add_demo_options, run=run_demo),
    "serve": Verb(
        help="serve the studio with a model on every GPU, of one machine or a Ray cluster",
        add_options=add_serve_options,
        run=run_serve,
    ),
    "deploy": Verb(help="create or update a Space", add_options=add_deploy_options, run=run_deploy),
}


if __name__ == "__main__":
    sys.exit(main())
