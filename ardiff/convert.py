"""From the published checkpoints to a normal pipeline folder, tensor by tensor.

A transformer file holds `diffusion_model.model.*`, tables that a formula gives, and `context_emb` or `class_emb`; it may hold its
autoencoder under `vae.`, else that has a file of its own. Any name may begin with `module.`. Every name and shape is held
against the configuration, and the tables against their formulas: a file that was made with other ones is refused.
"""

import glob
import inspect
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import HfApi, snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ardiff.models.original import AutoencoderOriginal, OriginalTransformerModel
from ardiff.models.original.transformer_original import fixed_tables
from ardiff.pipelines.pipeline_original import OriginalARDiffPipeline
from ardiff.schedulers.scheduling_ad import ADScheduler


DATASETS = {"sky": ("sky",), "taichi": ("taichi", "tai-chi"), "ucf": ("ucf",), "face": ("face",)}
"""The published models, and what a file's path says when it is one's."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
TRAINING_LEFTOVERS = ("optimizer", "scheduler", "random_states", "scaler")
SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar",
)  # fmt: skip
NETWORK = "diffusion_model.model."
CONTEXTS = ("context_emb", "class_emb")
TEMPORAL_CLIP = 16
SHARD_BYTES = 2**30
COMPONENTS = {"transformer": OriginalTransformerModel, "vae": AutoencoderOriginal, "scheduler": ADScheduler}

UCF101_CLASSES = tuple(
    """
    ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk
    BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag
    BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming Fencing
    FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow HandstandPushups
    HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow JugglingBalls JumpingJack
    JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing
    PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar PlayingTabla PlayingViolin
    PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin ShavingBeard Shotput
    SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing
    TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog
    WallPushups WritingOnBoard YoYo
    """.split()
)
"""In the order of the data set's class list, which is that of the class contexts."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Checkpoint:
    """One file, or the shards of one: `label` is its path below the source, `tensors` are by name without `module.`."""

    label: str
    tensors: dict[str, _Stored]

    @property
    def holds_transformer(self) -> bool:
        return any(name.startswith("diffusion_model.") for name in self.tensors)

    @property
    def holds_autoencoder(self) -> bool:
        return "latent_tokens" in self.tensors or any(name.startswith("pixel_decoder.") for name in self.tensors)

    def below(self, prefix: str) -> "_Checkpoint":
        """The tensors whose names begin with `prefix`, without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return _Checkpoint(self.label, {name.removeprefix(prefix): self.tensors[name] for name in names})

    def without(self, prefix: str) -> "_Checkpoint":
        names = [name for name in self.tensors if not name.startswith(prefix)]
        return _Checkpoint(self.label, {name: self.tensors[name] for name in names})


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    dataset: str | None = None,
    vae: str | os.PathLike | None = None,
    *,
    config: Mapping[str, Mapping] | None = None,
    progress: bool = False,
) -> Path:
    """Write a published checkpoint as a pipeline folder that `ARDiffPipeline.from_pretrained` loads.

    Nothing is at `out` until everything is. Tensors keep their dtype and are never all in memory.

    Args:
        source: a Hub id, a folder, or the transformer's file: .safetensors, or .bin, .ckpt, .pt, .pth of tensors alone.
        out: folder to write; must not exist, or be empty.
        dataset: "sky", "taichi", "ucf" or "face": picks files by their path where there are several. None = the only one.
        vae: the autoencoder's file, or a folder with it. None = within the transformer's file, else beside it.
        config: what differs from the published configuration, of "transformer" (`OriginalTransformerModel`), "vae"
            (`AutoencoderOriginal`) and "scheduler" (`ADScheduler`); files do not tell it.
        progress: show a bar.

    Returns:
        `out`.

    Raises:
        ValueError: an argument is wrong, a file is damaged or holds more than tensors, files are missing or ambiguous; or
            tensors are missing, unexpected or of another shape, which lists them.
        OSError: the source cannot be fetched, or the folder cannot be written.
    """
    out = Path(out)
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)} but is {dataset!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"`out` must be a folder that does not exist or is empty but is {out}.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"`out` must be in a folder that exists but is {out}.")
    options = _options(config)

    network, autoencoder = _find(source, dataset, vae)
    if "class_emb" in network.tensors and dataset in (None, "ucf"):
        options["transformer"].setdefault("class_names", list(UCF101_CLASSES))
    if any(name.startswith("decoder.fine_temporal_blocks.") for name in autoencoder.tensors):
        options["vae"].setdefault("clip_frames", TEMPORAL_CLIP)
    with torch.device("meta"):
        models = {name: COMPONENTS[name](**options[name]) for name in ("transformer", "vae")}
    pipeline = OriginalARDiffPipeline(**models, scheduler=ADScheduler(**options["scheduler"]))
    weights = _checked(pipeline, network, autoencoder)
    # Beside `out`, so that the last step is a rename.
    workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        _write(workshop / out.name, pipeline, weights, progress)
        if out.exists():
            out.rmdir()
        (workshop / out.name).rename(out)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return out


def _options(config: Mapping[str, Mapping] | None) -> dict[str, dict]:
    """A copy of `config` with all three components in it."""
    config = {} if config is None else config
    for name, part in config.items():
        known = list(inspect.signature(COMPONENTS[name].__init__).parameters)[1:] if name in COMPONENTS else []
        if not known or not isinstance(part, Mapping) or not part.keys() <= set(known):
            raise ValueError(
                f"`config` must map {', '.join(COMPONENTS)} to options of theirs but has {name!r}: {part!r}"
                + (f", which knows {', '.join(known)}." if known else ".")
            )
    return {name: dict(config.get(name, {})) for name in COMPONENTS}


# --- files ------------------------------------------------------------------------------------------------------


def _find(
    source: str | os.PathLike, dataset: str | None, vae: str | os.PathLike | None
) -> tuple[_Checkpoint, _Checkpoint]:
    """The transformer's tensors and the autoencoder's."""
    root = _fetch(source, dataset)
    network = _choose(root, dataset, "transformer", lambda checkpoint: checkpoint.holds_transformer)
    if vae is not None:
        root = Path(vae)
        if not root.exists():
            raise ValueError(f"`vae` must be a file or a folder that exists but is {root}.")
    elif any(name.startswith("vae.") for name in network.tensors):
        return network.without("vae."), network.below("vae.")
    elif root.is_file():
        raise ValueError(f"{root.name} has no autoencoder in it (`vae.`): `vae` must give its file.")
    autoencoder = _choose(
        root,
        dataset,
        "autoencoder",
        lambda checkpoint: checkpoint.holds_autoencoder or checkpoint.below("vae.").holds_autoencoder,
    )
    return network.without("vae."), autoencoder if autoencoder.holds_autoencoder else autoencoder.below("vae.")


def _fetch(source: str | os.PathLike, dataset: str | None) -> Path:
    """The source itself, or the folder into which its files were fetched from the Hub."""
    path = Path(source)
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.suffix in (".safetensors", *PICKLES):
        raise ValueError(f"`source` must be a Hub id, a folder or a file but is {path}, which does not exist.")
    try:
        names = [name for name in HfApi().list_repo_files(str(source)) if _may_hold_weights(Path(name))]
    except OSError:
        raise
    except Exception as error:  # that of whichever HTTP client the Hub's library uses
        raise OSError(f"{source} cannot be fetched from the Hub: {error}") from error
    others = {other for name in names for other in _named(name)} - {dataset}
    if dataset is None and len(others) > 1:
        raise ValueError(f"`dataset` must be one of {', '.join(sorted(others))}: {source} has all of these.")
    wanted = [name for name in names if dataset is None or not _named(name) or dataset in _named(name)]
    if not wanted:
        raise ValueError(f"{source} has no weights{'' if dataset is None else f' of {dataset}'} among its files.")
    return Path(snapshot_download(str(source), allow_patterns=[glob.escape(name) for name in wanted]))


def _choose(root: Path, dataset: str | None, what: str, holds: Callable[[_Checkpoint], bool]) -> _Checkpoint:
    """The one checkpoint of its kind below `root`; pickles are looked at only where no safetensors file is one."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if _may_hold_weights(path))
    for suffixes in ((".safetensors",), PICKLES):
        groups: dict[str, list[Path]] = {}
        for path in files:
            if path.suffix in suffixes:
                label = path.name if root.is_file() else path.relative_to(root).as_posix()
                groups.setdefault(re.sub(r"-\d{5}-of-\d{5}(?=\.\w+$)", "", label), []).append(path)
        found = [_open(label, paths) for label, paths in groups.items()]
        found = [checkpoint for checkpoint in found if holds(checkpoint)]
        if found:
            break
    if dataset is not None and root.is_dir():
        named = [checkpoint for checkpoint in found if dataset in _named(checkpoint.label)]
        found = named or [checkpoint for checkpoint in found if not _named(checkpoint.label)]
    if len(found) != 1:
        seen = ", ".join(checkpoint.label for checkpoint in found) or "none"
        wanted = f"{what} of {dataset}" if dataset is not None else what
        raise ValueError(
            f"{root} must hold one {wanted} but has {len(found)} ({seen}): give its file"
            + (", or `dataset`." if dataset is None else ".")
        )
    return found[0]


def _may_hold_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.suffix in PICKLES and not path.name.startswith(TRAINING_LEFTOVERS))


def _named(label: str) -> set[str]:
    """The data sets that a path speaks of."""
    return {dataset for dataset, words in DATASETS.items() if any(word in label.lower() for word in words)}


def _open(label: str, paths: Iterable[Path]) -> _Checkpoint:
    tensors: dict[str, _Stored] = {}
    for path in paths:
        for name, stored in _open_file(path).items():
            name = name.removeprefix("module.")
            if name in tensors:
                raise ValueError(f"{label} has {name} twice.")
            tensors[name] = stored
    return _Checkpoint(label, tensors)


def _open_file(path: Path) -> dict[str, _Stored]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                # Empty slices tell shape and dtype without a byte being read.
                return {
                    name: _Stored(
                        torch.Size(file.get_slice(name).get_shape()), _dtype(file.get_slice(name)), _reader(path, name)
                    )
                    for name in file.keys()  # noqa: SIM118 - not a mapping
                }
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be read: it is cut off or no safetensors file ({error}).") from error
    if path.suffix not in PICKLES:
        raise ValueError(f"{path.name} must end in .safetensors, {', '.join(PICKLES)}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} is refused: it holds more than tensors, and reading it could run code."
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path.name} cannot be read: it is cut off or no file of torch's.") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path.name} must be a state dict, names to tensors, but holds something else.")
    return {
        name: _Stored(tensor.shape, tensor.dtype, lambda tensor=tensor: tensor.detach().contiguous())
        for name, tensor in state.items()
    }


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        # Opened for every tensor: what was read before can leave memory.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def _dtype(part: object) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(
        part.get_dtype(), torch.int64
    )


# --- checks -----------------------------------------------------------------------------------------------------


def _checked(
    pipeline: OriginalARDiffPipeline, network: _Checkpoint, autoencoder: _Checkpoint
) -> dict[str, dict[str, _Stored]]:
    """The stored tensors of every model of `pipeline` by their names in it, when all of them are what they should be."""
    parameters = {name: name if name in CONTEXTS else NETWORK + name for name in pipeline.transformer.state_dict()}
    tables = {NETWORK + name: table for name, table in fixed_tables(pipeline.transformer.config).items()}
    alphas = pipeline.scheduler.alphas_cumprod
    expected = {stored: pipeline.transformer.state_dict()[name] for name, stored in parameters.items()}
    expected |= tables | {f"diffusion_model.{name}": alphas for name in SCHEDULE_BUFFERS}
    # The rotary table is one tensor that every block refers to; a file may list it under all these names.
    repeated = re.compile(re.escape(NETWORK) + r"blocks\.\d+\.attn\.rotary_emb\.freqs")
    found = {name: tensor for name, tensor in network.tensors.items() if not repeated.fullmatch(name)}

    problems = _differences("transformer", network.label, found, expected)
    problems += _differences("autoencoder", autoencoder.label, autoencoder.tensors, pipeline.vae.state_dict())
    if problems:
        raise ValueError(" ".join(problems))
    for name, table in tables.items():
        if not _agree(found[name], table, rtol=0.0, atol=1e-5):
            raise ValueError(f"{network.label} has another {name} than the configuration gives.")
    stored = found["diffusion_model.alphas_cumprod"]
    if not _agree(stored, alphas, rtol=1e-3, atol=0.0):
        raise ValueError(
            f"{network.label} was made with another noise schedule: its alphas_cumprod ends at {stored.read()[-1]:.4g} instead of "
            f"{alphas[-1]:.4g}; `config` must give the scheduler's betas, and what else differs in such a model."
        )
    return {
        "transformer": {name: found[stored] for name, stored in parameters.items()},
        "vae": {name: autoencoder.tensors[name] for name in pipeline.vae.state_dict()},
    }


def _differences(
    what: str, label: str, tensors: Mapping[str, _Stored], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """One sentence for all that is missing, unexpected, or not what it should be; none when all is well."""
    both = [name for name in expected if name in tensors]
    kinds = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name}: {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in both
            if tensors[name].shape != expected[name].shape
        ],
        "not floating-point": [name for name in both if not tensors[name].dtype.is_floating_point],
    }
    found = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]
    return [f"{label} does not hold the {what} of this configuration: {'; '.join(found)}."] if found else []


def _agree(stored: _Stored, table: torch.Tensor, *, rtol: float, atol: float) -> bool:
    """Whether a stored table is `table`, but for rounding to its dtype."""
    rounding = torch.finfo(stored.dtype).eps
    return torch.allclose(stored.read().float(), table, rtol=max(rtol, rounding), atol=atol)


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- writing ----------------------------------------------------------------------------------------------------


def _write(
    folder: Path, pipeline: OriginalARDiffPipeline, weights: Mapping[str, Mapping[str, _Stored]], progress: bool
) -> None:
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    total = sum(stored.num_bytes for tensors in weights.values() for stored in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, tensors in weights.items():
            bar.set_description(name)
            getattr(pipeline, name).save_config(folder / name)
            _write_weights(folder / name, tensors, bar)


def _write_weights(folder: Path, tensors: Mapping[str, _Stored], bar: tqdm) -> None:
    """Weights as diffusers lays them out, one shard in memory at a time."""
    shells = {name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shells, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].read() for name in names}, folder / file, metadata={"format": "pt"})
        bar.update(sum(tensors[name].num_bytes for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
