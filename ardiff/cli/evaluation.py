"""Verbs that measure and draw: evaluate, ablate, plot, bench, scenes."""

import argparse
import json
import sys
from pathlib import Path

from ardiff.cli.options import (
    DATA_HELP,
    DTYPES,
    IMAGE_SUFFIXES,
    Verb,
    add_device_option,
    add_model_options,
    check_output,
    hide_loading_bar,
    parse_gap_list,
)


# --- evaluate ---------------------------------------------------------------------------------------------------


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
    parser.add_argument(
        "--commit-timestep",
        type=int,
        help="how noisy the model is told that finished frames are, 0 = clean; default: the model's own",
    )
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
        commit_timestep=args.commit_timestep,
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
        commit_timestep=args.commit_timestep,
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


# --- ablate -----------------------------------------------------------------------------------------------------


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
    parser.add_argument(
        "--recipe",
        action="store_true",
        help="also with zero terminal SNR, with finished frames shown as noisy, and with all of the bundled model's recipe",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each configuration, 2 to 10; default: 3")
    parser.add_argument(
        "--processes", type=int, help="runs at once, one CPU thread each; default: 2 with --quick, else 1"
    )
    add_device_option(parser)


def run_ablate(args: argparse.Namespace) -> None:
    from ardiff.evaluation.ablation.reporting import format_table, write_into
    from ardiff.evaluation.ablation.run import ablate
    from ardiff.evaluation.ablation.settings import CONFIGURATIONS, RECIPE_CONFIGURATIONS, SIZES
    from ardiff.evaluation.plots import import_figure, plot_ablation
    from ardiff.pipelines.loading import bundled_model, choose_device

    import_figure()  # refused before the work and not after it
    hide_loading_bar()
    report = ablate(
        args.out,
        SIZES["quick" if args.quick else "full"],
        vae=bundled_model() / "vae" if args.vae is None else args.vae,
        num_seeds=args.seeds,
        configurations=CONFIGURATIONS + (RECIPE_CONFIGURATIONS if args.recipe else ()),
        processes=(2 if args.quick else 1) if args.processes is None else args.processes,
        device="cpu" if args.quick and args.device == "auto" else choose_device(args.device),
        command=" ".join(["ardiff", *sys.argv[1:]]),
    )
    print(format_table(report))
    for path in plot_ablation(args.out):
        print(path)
    if args.readme is not None:
        write_into(args.readme, format_table(report))


# --- plot -------------------------------------------------------------------------------------------------------


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


# --- scenes -----------------------------------------------------------------------------------------------------


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


# --- the verbs --------------------------------------------------------------------------------------------------


VERBS = {
    "evaluate": Verb(
        "measure a model on held-out scenes, or its samples against a data set", add_evaluate_options, run_evaluate
    ),
    "ablate": Verb(
        "train one small model in every way that the paper compares, and measure them alike",
        add_ablate_options,
        run_ablate,
    ),
    "plot": Verb(
        "draw the laws of training timesteps, plans, losses, quality against gap, and samples",
        add_plot_options,
        run_plot,
    ),
    "bench": Verb("measure what the engine costs beside the sampler of the paper", add_bench_options, run_bench),
    "scenes": Verb("write a contact sheet of the scenes", add_scenes_options, run_scenes),
}
