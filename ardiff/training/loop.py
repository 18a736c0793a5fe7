"""What both trainers share: accelerator, EMA, exact resume, JSONL log and progress bar. No model code.

Everything a step draws comes from generators seeded by (seed, step), and a checkpoint holds the complete state, so a run
that was killed goes on with the loss curve it would have had.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm


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
    ema_decay: float = option(0.999, "decay of the averaged weights (what is saved as the model)")
    max_grad_norm: float = option(1.0, "gradient clipping")
    mixed_precision: str = option("bf16", "'no' or 'bf16'")
    device: str = option("auto", "auto, cuda, mps or cpu")
    num_workers: int = option(1, "data processes; 0 renders in the training process")
    checkpoint_every: int = option(1000, "steps between checkpoints (the last two are kept)")
    log_every: int = option(50, "steps between lines of log.jsonl")
    sample_every: int = option(1000, "steps between sample strips in samples/")

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
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {getattr(self, name)}.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"`mixed_precision` must be 'no' or 'bf16' but is {self.mixed_precision!r}.")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'muon' but is {self.optimizer!r}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"`ema_decay` must be in [0, 1) but is {self.ema_decay}.")


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


class TrainingRun:
    """One run folder: `training_config.json`, `log.jsonl`, `checkpoints/step-*`, `samples/`.

    `model` is trained on the parameters that require gradients. An existing folder is resumed at its last checkpoint.
    """

    def __init__(self, config: TrainingConfig, model: torch.nn.Module) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model, *self.optimizers = self.accelerator.prepare(model, *build_optimizers(config, model))
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.ema)
        self.step = 0
        self._seconds_before = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._resume()
        self._started = time.monotonic()
        self._bar = tqdm(
            total=config.num_steps, initial=self.step, disable=not self.accelerator.is_main_process, smoothing=0.05,
            mininterval=5.0, desc=self.folder.name,
        )  # fmt: skip

    def _resume(self) -> None:
        checkpoints = sorted((self.folder / "checkpoints").glob("step-*"))
        if checkpoints:
            self.accelerator.load_state(str(checkpoints[-1]))
            progress = json.loads((checkpoints[-1] / "progress.json").read_text())
            self.step, self._seconds_before = progress["step"], progress["seconds"]
        if not self.accelerator.is_main_process:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder / "training_config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        log = self.folder / "log.jsonl"
        if log.exists():
            # Lines past the checkpoint will be written again, with the same values; a kill may have left half a line.
            whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
            log.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= self.step))

    @property
    def network(self) -> torch.nn.Module:
        """The model without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

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

    def update(self, loss: torch.Tensor, **figures: torch.Tensor) -> bool:
        """One optimiser step, its log line and its checkpoint; True when a sample strip is due.

        Raises:
            RuntimeError: the loss is not a number; the last checkpoint is intact.
        """
        config = self.config
        warm_up = min(1.0, (self.step + 1) / max(config.warmup_steps, 1))
        decay = 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(self.step / config.num_steps, 1.0)))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm_up * decay
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        self.step += 1
        for name, value in {"loss": loss, "grad_norm": norm, **figures}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        if self.step % config.log_every == 0 or self.step == config.num_steps:
            self._log(self.step % config.log_every or config.log_every)
        self._bar.update()
        if self.step % config.checkpoint_every == 0 or self.step == config.num_steps:
            self.checkpoint()
        return self.step % config.sample_every == 0 or self.step == config.num_steps

    def _log(self, num_steps: int) -> None:
        means = {name: float(value) / num_steps for name, value in self._sums.items()}
        self._sums.clear()
        if not math.isfinite(means["loss"]):
            raise RuntimeError(
                f"The loss became {means['loss']} by step {self.step}; the last checkpoint in {self.folder} is intact. "
                "Lower `learning_rate` and run the same command again."
            )
        if self.accelerator.is_main_process:
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": self.step, **means, "seconds": round(self.seconds, 1)}) + "\n")
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()}, refresh=False)

    def checkpoint(self) -> None:
        """Write the complete state under a temporary name, rename it, then drop all but the last two."""
        folder = self.folder / "checkpoints"
        target = folder / f"step-{self.step:08d}"
        partial = folder / f"partial-{self.step:08d}"
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            progress = {"step": self.step, "seconds": self.seconds, "processes": self.accelerator.num_processes}
            (partial / "progress.json").write_text(json.dumps(progress) + "\n")
            if target.exists():
                shutil.rmtree(target)
            os.rename(partial, target)
            for old in sorted(folder.glob("step-*"))[:-2]:
                shutil.rmtree(old)
            for broken in folder.glob("partial-*"):
                shutil.rmtree(broken)
        self.accelerator.wait_for_everyone()

    def swap_in_average(self) -> None:
        """Put the averaged weights into the model; `swap_out_average` undoes it."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)

    def swap_out_average(self) -> None:
        self.ema.restore(self.parameters)

    def close(self) -> None:
        self._bar.close()
        self.accelerator.end_training()
