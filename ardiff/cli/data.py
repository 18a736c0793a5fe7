"""Verbs for what others made, weights and data sets: convert, data-check, cache-latents."""

import argparse
import json
from pathlib import Path

from ardiff.cli.options import DATA_HELP, Verb, check_output, hide_loading_bar


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


# --- data-check -------------------------------------------------------------------------------------------------


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


# --- cache-latents ----------------------------------------------------------------------------------------------


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


# --- the verbs --------------------------------------------------------------------------------------------------


VERBS = {
    "convert": Verb("turn the authors' published weights into a model folder", add_convert_options, run_convert),
    "data-check": Verb(
        "say what a data set holds, what is missing and what is damaged", add_data_check_options, run_data_check
    ),
    "cache-latents": Verb(
        "encode a data set to tokens once, for `ardiff train --data latents:FOLDER`", add_cache_options, run_cache
    ),
}
