"""What both trainers share: accelerator, EMA, exact resume, logs, throughput and clear ends. No model code.

Everything a step draws comes from generators seeded by (seed, step, part), and a checkpoint holds the complete state, so a
run that was killed goes on with the loss curve it would have had. A step has `accumulation_steps` times processes parts,
numbered through: how they are spread over processes changes nothing but rounding.
"""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from ardiff.training.throughput import count_flops, peak_flops


class TrainingError(RuntimeError):
    """A run ended before its last step; the message says why, and where the last good checkpoint is."""


def option(default: object, help: str) -> object:
    """A dataclass field that carries its own help text for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training run has; the trainers add their own."""

    out: str = option("runs/new", "run folder; an existing one is resumed")
    data: str = option("scenes", "'scenes' (rendered on the fly) or a folder of videos")
    image_size: int = option(64, "frame size in pixels")
    num_frames: int = option(16, "frames per clip")
    stride: int = option(1, "take every n-th frame of a video folder's videos")
    seed: int = option(0, "seed of everything drawn")
    batch_size: int = option(64, "items per step and process")
    num_steps: int = option(10_000, "optimiser steps; the learning rate decays to a tenth over them")
    learning_rate: float = option(1e-3, "peak learning rate")
    optimizer: str = option("adamw", "'adamw', or 'muon' for the matrices of the blocks and AdamW for the rest")
    warmup_steps: int = option(200, "linear warm-up")
    ema_decay: float = option(
        0.999, "decay of the averaged weights (what is saved as the model); they span about 1 / (1 - this) steps"
    )
    max_grad_norm: float = option(1.0, "gradient clipping")
    mixed_precision: str = option("bf16", "'no' or 'bf16'")
    device: str = option("auto", "auto, cuda, mps or cpu")
    num_workers: int = option(1, "data processes; 0 renders in the training process")
    checkpoint_every: int = option(1000, "steps between checkpoints (the last two are kept)")
    log_every: int = option(50, "steps between lines of log.jsonl")
    sample_every: int = option(1000, "steps between sample strips in samples/")
    accumulation_steps: int = option(1, "batches per step and process whose gradients are averaged")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower")
    compile: bool = option(False, "compile the repeated blocks with torch.compile")
    log_with: str = option(
        "", "'tensorboard' also writes the figures of log.jsonl to tensorboard/; '' = log.jsonl only"
    )
    peak_tflops: float = option(
        0.0,
        "peak of a device in 1e12 FLOP/s for the utilisation; 0 = that of a known GPU, else of a measured matrix product",
    )

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "num_frames",
            "stride",
            "batch_size",
            "num_steps",
            "checkpoint_every",
            "log_every",
            "sample_every",
            "accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {getattr(self, name)}.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"`mixed_precision` must be 'no' or 'bf16' but is {self.mixed_precision!r}.")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'muon' but is {self.optimizer!r}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"`ema_decay` must be in [0, 1) but is {self.ema_decay}.")
        if self.peak_tflops < 0.0:
            raise ValueError(f"`peak_tflops` must be >= 0 but is {self.peak_tflops}.")
        if self.log_with not in ("", "tensorboard"):
            raise ValueError(f"`log_with` must be 'tensorboard' or empty but is {self.log_with!r}.")
        if self.log_with and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "`log_with` must be empty without the package tensorboard; `python -m pip install -e '.[train]'` installs it."
            )


class CountFrom(Sampler):
    """Yields first, first + 1, ..., last - 1: the steps still to do."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def build_optimizers(config: TrainingConfig, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of the parameters that require gradients; Muon's step is scaled to what AdamW's would be."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [
        p
        for name, p in named
        if config.optimizer == "muon" and "blocks." in name and name.endswith(".weight") and p.ndim == 2
    ]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


class PartsOfSteps(Dataset):
    """Item `step` is a list: for every one of `parts`, what each of `datasets` has for that part of the step.

    A dataset has a `rank`, the part it draws for.
    """

    def __init__(self, parts: Sequence[int], *datasets: Dataset) -> None:
        self.parts, self.datasets = parts, datasets

    def __getitem__(self, step: int) -> list[list]:
        return [[self._draw(dataset, step, part) for dataset in self.datasets] for part in self.parts]

    @staticmethod
    def _draw(dataset: Dataset, step: int, part: int) -> object:
        dataset.rank = part
        return dataset[step]


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks a model is a stack of: what stands in a list or sequence and has parts of its own."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)]
    return [block for stack in stacks for block in stack if any(block.children())]


def checkpoint_gradients(model: torch.nn.Module) -> None:
    """Keep only the inputs of the repeated blocks for the backward pass, which computes the rest again."""
    for block in repeated_blocks(model):
        block.forward = partial(_forward_again, block.forward)


def _forward_again(forward: Callable, *args: object, **options: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, **options)


def is_death_of_worker(error: BaseException | None) -> bool:
    """Whether an error is PyTorch's of a data process that is gone, or of the pipe to one that went while it sent something."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return isinstance(error, ConnectionError | EOFError)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP spread over the processes, which all must call this; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class AveragedWeights(EMAModel):
    """EMA that is saved whole and loaded to where its tensors are, on one device or spread by FSDP."""

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {"shadow_params": [full_tensor(tensor.detach()) for tensor in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        old, decay = self.shadow_params, self.decay
        super().load_state_dict(state_dict)
        self.decay = decay  # the option's, which may have been changed
        new = [tensor.to(place.device, place.dtype) for tensor, place in zip(self.shadow_params, old, strict=True)]
        self.shadow_params = [
            distribute_tensor(tensor, place.device_mesh, place.placements) if isinstance(place, DTensor) else tensor
            for tensor, place in zip(new, old, strict=True)
        ]


class TrainingRun:
    """One run folder: `training_config.json`, `log.jsonl`, `checkpoints/step-*`, `samples/`.

    `model` is trained on the parameters that require gradients. An existing folder is resumed at its last checkpoint.
    As a context it turns a full disk and a data process that died into a TrainingError.

    Args:
        config: the options.
        model: on the CPU, in training mode.
        companion: something with `state_dict`, `load_state_dict`, `to` and `step` that learns beside the model; its `step` is
            called with every step of the model. None = nothing.
    """

    def __init__(self, config: TrainingConfig, model: torch.nn.Module, companion: object | None = None) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.device == "cpu",
            gradient_accumulation_steps=config.accumulation_steps,
            log_with=config.log_with or None,
            project_dir=self.folder,
        )
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not sharded:
            raise ValueError(
                "FSDP must have a GPU for each of several processes; without that, launch without --use_fsdp."
            )
        if sharded and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("FSDP must be version 2 (`--fsdp_version 2`) but is 1.")
        if sharded and config.optimizer != "adamw":
            raise ValueError(
                f"`optimizer` must be 'adamw' with FSDP, which splits matrices, but is {config.optimizer!r}."
            )
        self._class, self._options = type(model), {k: v for k, v in model.config.items() if not k.startswith("_")}
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if config.gradient_checkpointing:
            checkpoint_gradients(model)
        if config.compile:
            for block in repeated_blocks(model):
                block.compile()  # in place: names of parameters, and so checkpoints, stay the same
        self.model, *self.optimizers = self.accelerator.prepare(model, *build_optimizers(config, model))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = AveragedWeights(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.ema)
        self.companion = companion
        if companion is not None:
            companion.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(companion)
        self.step = 0
        self._seconds_before = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._num_updates = 0
        self._flops = self._frames = 0
        self._precise = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        self._resume()
        if config.log_with:
            # Figures past the checkpoint are written again; TensorBoard shows the last ones.
            self.accelerator.init_trackers("tensorboard")
        self._started = time.monotonic()
        self._interval_started = None  # the first step waits for the first data; the clock starts after it
        self._bar = tqdm(
            total=config.num_steps, initial=self.step, disable=not self.accelerator.is_main_process, smoothing=0.05,
            mininterval=5.0, desc=self.folder.name,
        )  # fmt: skip

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            return
        try:
            self._end(error)
        except RuntimeError as late:
            if isinstance(late, TrainingError) or not is_death_of_worker(late):
                raise
            self._end(late)  # the pipe broke first, and the signal of the same death came while that was being told

    def _end(self, error: BaseException) -> None:
        """Raise what an error means for the run as a `TrainingError`; nothing for errors that say it themselves."""
        self._bar.close()
        if is_death_of_worker(error):
            raise TrainingError(
                f"A data process died after step {self.step}, most often for want of memory: fewer `num_workers` need less. "
                f"{self._last_good()}"
            ) from error
        if isinstance(error, OSError | SafetensorError):
            file, reason = getattr(error, "filename", None) or "A file", getattr(error, "strerror", None) or error
            raise TrainingError(f"{file} could not be read or written: {reason}. {self._last_good()}") from error

    def _last_good(self) -> str:
        checkpoints = self._checkpoints()
        if not checkpoints:
            return f"There is no checkpoint in {self.folder} yet."
        return f"The last checkpoint, {checkpoints[-1]}, is intact; the same command goes on from there."

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def _resume(self) -> None:
        checkpoints = self._checkpoints()
        if checkpoints:
            try:
                progress = json.loads((checkpoints[-1] / "progress.json").read_text())
                self.accelerator.load_state(str(checkpoints[-1]))
            except (OSError, EOFError, RuntimeError, SafetensorError, ValueError) as error:
                raise TrainingError(
                    f"{checkpoints[-1]} does not fit this model or is damaged ({' '.join(str(error).split())[:200]}); use another "
                    "`out`, or delete it to go on from the one before."
                ) from error
            self.accelerator.step = 0  # counts parts of a step, and here a step begins
            self.step, self._seconds_before = progress["step"], progress["seconds"]
            self._num_updates = progress.get("num_updates", 0)
            sums = progress.get("sums", {}).items()
            self._sums = {
                name: torch.tensor(
                    total, device=self.accelerator.device, dtype=self._precise if name == "loss_square" else None
                )
                for name, total in sums
            }
        if not self.accelerator.is_main_process:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "training_config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        log = self.folder / "log.jsonl"
        if log.is_file():
            # Lines past the checkpoint will be written again, with the same values; a kill may have left half a line.
            whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
            log.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= self.step))

    @property
    def network(self) -> torch.nn.Module:
        """The model without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def parts(self) -> list[int]:
        """The parts of a step that this process computes, of 0 .. `accumulation_steps` * processes - 1."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [index * world + rank for index in range(self.config.accumulation_steps)]

    @property
    def seconds(self) -> float:
        """Seconds trained, over all resumes."""
        return self._seconds_before + time.monotonic() - self._started

    def loader(self, dataset: Dataset, first: int, last: int) -> DataLoader:
        """The dataset's items `first` to `last` - 1 in order, rendered ahead of the training by the data processes."""
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=CountFrom(first, last),
            num_workers=self.config.num_workers,
            prefetch_factor=2 if self.config.num_workers else None,
        )

    def accumulate(self) -> contextlib.AbstractContextManager:
        """Around forward pass and `update` of one part of a step; only the last one exchanges gradients."""
        return self.accelerator.accumulate(self.model)

    def measure(self, num_frames: int, forward: Callable[[torch.nn.Module], torch.Tensor]) -> None:
        """Say what a part of a step is, for throughput and utilisation.

        Args:
            num_frames (int): frames that go through the model.
            forward: given the model without data (device "meta"), makes the part's forward pass and returns a scalar.
        """
        self._frames = num_frames
        self._flops = count_flops(self._empty_network(), forward)

    def _empty_network(self) -> torch.nn.Module:
        with torch.device("meta"):
            empty = self._class(**self._options)
        for name, parameter in empty.named_parameters():
            parameter.requires_grad_(name in self._trained)
        return empty

    def update(
        self, loss: torch.Tensor, by_timestep: tuple[torch.Tensor, torch.Tensor] | None = None, **figures: torch.Tensor
    ) -> bool:
        """Backward pass of a part; with the last part of a step the optimiser step, its log line and its checkpoint.

        Args:
            loss (torch.Tensor): scalar.
            by_timestep: sums of errors and their numbers in equal ranges of the timestep, for the log. None = not logged.
            figures: scalars for the log.

        Returns:
            True when a sample strip is due.

        Raises:
            TrainingError: the loss or a weight is not a number, or the checkpoint cannot be written; the last checkpoint is
                intact.
        """
        config = self.config
        self.accelerator.backward(loss)
        self._add(loss=loss, loss_square=loss.detach().to(self._precise).square(), **figures)
        if by_timestep is not None:
            self._add(error_sums=by_timestep[0], error_counts=by_timestep[1])
        self._num_updates += 1
        if not self.accelerator.sync_gradients:
            return False
        warm_up = min(1.0, (self.step + 1) / max(config.warmup_steps, 1))
        decay = 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(self.step / config.num_steps, 1.0)))
        norm = full_tensor(self.accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)).detach()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm_up * decay
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.companion is not None:
            self.companion.step(self.accelerator, config.learning_rate * warm_up * decay)
        self.ema.step(self.parameters)
        self.step += 1
        # A mean over updates, as of all figures; `norm` is one of a step.
        self._add(grad_norm=norm * config.accumulation_steps)
        self._sums["grad_norm_max"] = torch.maximum(self._sums.get("grad_norm_max", norm), norm)
        if self.step % config.log_every == 0 or self.step == config.num_steps:
            self._log()
        if self._interval_started is None:
            self._untimed, self._interval_started, self._interval_first = 0.0, time.monotonic(), self.step
        self._bar.update()
        if self.step % config.checkpoint_every == 0 or self.step == config.num_steps:
            self.checkpoint()
        return self.step % config.sample_every == 0 or self.step == config.num_steps

    def _add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def _share_sums(self) -> None:
        """Replace the sums since the last log line by their means over the processes, after checking the loss."""
        self._sums = {name: self.accelerator.reduce(total, "mean") for name, total in self._sums.items()}
        for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
            mean = float(self._sums[name]) / self._num_updates if name in self._sums else 0.0
            if not math.isfinite(mean):
                raise TrainingError(
                    f"The {what} became {mean} by step {self.step}: `learning_rate` is too high, or the data are no numbers. "
                    f"{self._last_good()}"
                )

    def _log(self) -> None:
        self._share_sums()
        sums, count = {name: total.tolist() for name, total in self._sums.items()}, self._num_updates
        largest, square = sums.pop("grad_norm_max"), sums.pop("loss_square") / count
        errors, numbers = sums.pop("error_sums", None), sums.pop("error_counts", None)
        means = {name: total / count for name, total in sums.items()}
        means |= {"loss_std": math.sqrt(max(square - means["loss"] ** 2, 0.0)), "grad_norm_max": largest}
        self._sums.clear()
        self._num_updates = 0
        means |= self._speed()
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, **means}
        if errors is not None:
            line["mse_by_timestep"] = [e / n if n else None for e, n in zip(errors, numbers, strict=True)]
            scalars = {f"mse_by_timestep/{index}": value for index, value in enumerate(line["mse_by_timestep"])}
            means |= {name: value for name, value in scalars.items() if value is not None}
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line | {"seconds": round(self.seconds, 1)}) + "\n")
        if self.config.log_with:
            self.accelerator.log(means, step=self.step)
        shown = {name: f"{means[name]:.4g}" for name in ("loss", "mse", "psnr", "frames_per_second") if name in means}
        if "mfu" in means:
            shown["MFU"] = f"{means['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)

    def _speed(self) -> dict[str, float]:
        """Frames a second of all processes, and model FLOP utilisation of a device, since the last line; see `untimed`."""
        if not self._frames or self._interval_started is None:
            return {}
        seconds = time.monotonic() - self._interval_started - self._untimed
        rate = (self.step - self._interval_first) * self.config.accumulation_steps / seconds
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32
        peak = self.config.peak_tflops * 1e12 or peak_flops(self.accelerator.device, dtype)
        self._untimed, self._interval_started, self._interval_first = 0.0, time.monotonic(), self.step
        return {
            "frames_per_second": rate * self._frames * self.accelerator.num_processes,
            "tflops": rate * self._flops / 1e12,
            "mfu": rate * self._flops / peak,
        }

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Around work that is no training: left out of the throughput."""
        started = time.monotonic()
        yield
        self._untimed += time.monotonic() - started

    def checkpoint(self) -> None:
        """Write the complete state under a temporary name, rename it, then drop all but the last two.

        Raises:
            TrainingError: it cannot be written, or weights are not numbers; earlier checkpoints are intact.
        """
        folder = self.folder / "checkpoints"
        target = folder / f"step-{self.step:08d}"
        partial_folder = folder / f"partial-{self.step:08d}"
        with self.untimed():
            self._share_sums()
            if not all(bool(full_tensor(parameter.isfinite().all())) for parameter in self.parameters):
                raise TrainingError(f"Weights are no numbers after step {self.step}. {self._last_good()}")
            try:
                self.accelerator.save_state(str(partial_folder))
                if self.accelerator.is_main_process:
                    progress = {
                        "step": self.step,
                        "seconds": self.seconds,
                        "processes": self.accelerator.num_processes,
                    }
                    sums = {name: total.tolist() for name, total in self._sums.items()}
                    progress |= {"num_updates": self._num_updates, "sums": sums}
                    (partial_folder / "progress.json").write_text(json.dumps(progress) + "\n")
                    if target.exists():
                        shutil.rmtree(target)
                    os.rename(partial_folder, target)
                    for old in self._checkpoints()[:-2]:
                        shutil.rmtree(old)
                    for broken in folder.glob("partial-*"):
                        shutil.rmtree(broken)
            except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
                shutil.rmtree(partial_folder, ignore_errors=True)
                if is_death_of_worker(error):  # a signal, which comes at any time
                    raise
                raise TrainingError(
                    f"The checkpoint of step {self.step} could not be written, most often because the disk is full "
                    f"({' '.join(str(error).split())[:200]}). {self._last_good()}"
                ) from error
            self.accelerator.wait_for_everyone()

    def averaged(self) -> torch.nn.Module | None:
        """A copy of the model with the averaged weights, in evaluation mode, on the main process; all must call this."""
        state = {name: full_tensor(parameter.detach()) for name, parameter in self.network.named_parameters()}
        names = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        state |= zip(names, self.ema.state_dict()["shadow_params"], strict=True)
        if not self.accelerator.is_main_process:
            return None
        copy = self._empty_network()
        copy.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return copy.requires_grad_(False).eval()

    @contextlib.contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """A new folder to write to, which takes the place of `<out>/name` once it is complete."""
        target, partial_folder, old = (self.folder / f"{prefix}{name}" for prefix in ("", ".partial-", ".old-"))
        for left_over in (partial_folder, old):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            yield partial_folder
        except BaseException:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise
        if target.exists():
            os.rename(target, old)
        os.rename(partial_folder, target)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """End the bar and the log. Processes stay connected: another run may follow."""
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
