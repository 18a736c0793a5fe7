"""What a verb is, and what several verbs share: options, values given on the command line, and checks of them."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path


IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
DTYPES = ("float32", "bfloat16", "float16")
DATA_HELP = (
    "a folder of videos, or KIND:FOLDER or KIND/SPLIT:FOLDER with the kinds faceforensics, sky-timelapse, taichi-hd, ucf-101, "
    "videos, images and shards (tar files), and the splits train, val, test, all (ucf-101: train01 to test03)"
)


@dataclasses.dataclass(frozen=True)
class Verb:
    """One job of the command: a line of help, its options, and the function that does it."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]  # the exit code, None for 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model folder, a Hub id or a bundled model's name; default: scenes-64")
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (cuda, mps or cpu, the first that is there) or a torch device"
    )


def parse_gap_list(text: str) -> list[int]:
    """`0,5,50`: integers between commas."""
    try:
        return [int(gap) for gap in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an integer or integers between commas but is {text!r}") from error


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a path that cannot be written, before the work and not after it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"`--out` must end in {', '.join(suffixes)} but is {path}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"`--out` must be in a folder that exists but is {path}.")


def hide_loading_bar() -> None:
    """Loading a model takes less than a second; diffusers' bar for it would stand above every error line."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
