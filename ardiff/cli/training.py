"""Verbs that train: train-autoencoder, train. Their options are the fields of the training configs."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence

from ardiff.cli.options import Verb


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


VERBS = {
    "train-autoencoder": Verb(
        "train the autoencoder (frames to tokens and back)", add_autoencoder_options, run_train_autoencoder
    ),
    "train": Verb("train the transformer on an autoencoder's tokens", add_diffusion_options, run_train),
}
