"""A model that runs elsewhere, with the face of a pipeline: what the page's process holds of a replica's model.

What goes over the wire is plain: numbers, names and CPU arrays. How it goes is the caller's (`cluster.py`); no Ray here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download

from ardiff.data.pixels import to_uint8
from ardiff.pipelines.loading import find_model
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline, PromptFrames
from ardiff.pipelines.pipeline_output import ARDiffStep


ATTEMPTS = 3
"""Replicas that a run is offered to when the first one dies before its first step; later on nothing is run twice."""


class ReplicaLost(RuntimeError):
    """The replica that had a run is gone. The message is a sentence for the visitor."""

    def __init__(self) -> None:
        super().__init__(
            "The machine that was making this video stopped; what had finished is kept. Please run it again."
        )


@dataclass(frozen=True, kw_only=True)
class RemoteStep(ARDiffStep):
    """A step that came over the wire with all that can be shown of it.

    Attributes:
        guesses (tuple of (int, array)): pictures of some unfinished frames, decoded where the model is, as it had time.
    """

    guesses: tuple[tuple[int, np.ndarray], ...]


def pack_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ARDiffPipeline.stream` for the wire: the generator goes as its state, a uint8 array."""
    return {**arguments, "generator": arguments["generator"].get_state().numpy()}


def unpack_arguments(packed: Mapping[str, Any]) -> dict[str, Any]:
    generator = torch.Generator("cpu")
    generator.set_state(torch.from_numpy(np.array(packed["generator"])))
    return {**packed, "generator": generator}


def pack_step(step: ARDiffStep, guesses: Sequence[tuple[int, np.ndarray]]) -> dict[str, Any]:
    return {
        "iteration": step.iteration,
        "num_iterations": step.num_iterations,
        "step_index": step.step_index.cpu().numpy(),
        "noise_level": step.noise_level.cpu().numpy(),
        "frame_evaluations": step.frame_evaluations,
        "finished": step.finished,
        "guesses": tuple(guesses),
    }


def unpack_step(packed: Mapping[str, Any]) -> RemoteStep:
    pictures = dict(packed["guesses"])
    tensors = {name: torch.from_numpy(np.array(packed[name])) for name in ("step_index", "noise_level")}
    return RemoteStep(**{**packed, **tensors}, decode_guess=lambda frames: [pictures[frame] for frame in frames])


class RemotePipeline:
    """The near half of a pipeline whose `stream` comes from a replica.

    Everything but `stream`, `device` and `reconstruct` is asked of a pipeline of the same class and configuration whose
    transformer has no weights (meta device); its autoencoder is here, so that prompt frames are shown without a replica.

    Args:
        name: as the replicas know the model: a folder, a Hub id or a bundled model's name that every machine can read.
        open_steps: (name, packed arguments) -> packed steps; raises `ReplicaLost`, and what the model raised.
        device: where the model runs, in words for the page.
    """

    def __init__(
        self, name: str, open_steps: Callable[[str, dict[str, Any]], Iterator[dict[str, Any]]], device: str
    ) -> None:
        self.name = name
        self.device = self._execution_device = device
        self._open_steps = open_steps
        self._near = load_near_half(name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._near, attribute)

    def stream(self, **arguments: Any) -> Iterator[RemoteStep]:
        """As `ARDiffPipeline.stream`, bit for bit with as many threads; `generator` is required and is not advanced.

        Raises what that raises, and `ReplicaLost`.
        """
        packed = pack_arguments(arguments)
        for attempt in range(1, ATTEMPTS + 1):
            begun, steps = False, self._open_steps(self.name, packed)
            try:
                for step in steps:
                    begun = True
                    yield unpack_step(step)
                return
            except ReplicaLost:
                if begun or attempt == ATTEMPTS:
                    raise
            finally:
                steps.close()

    @torch.no_grad()
    def reconstruct(self, prompt_frames: PromptFrames) -> list[np.ndarray]:
        """As `ARDiffPipeline.reconstruct`, on this machine's CPU."""
        vae = self._near.vae
        pixels = self._near._prompt_pixels(prompt_frames).to(vae.dtype)
        return list(to_uint8(vae.decode(vae.encode(pixels).mode())).numpy()[0])


def load_near_half(name: str) -> ARDiffPipeline:
    """A pipeline on the CPU whose transformer has no weights. Raises ValueError or OSError as `load_pipeline` does."""
    path = Path(find_model(name))
    if not path.is_dir():
        path = Path(snapshot_download(name, allow_patterns=["*.json", "vae/*.safetensors"]))
    module, class_name = ARDiffPipeline.load_config(path)["transformer"]
    transformer_class = getattr(importlib.import_module(module), class_name)
    with torch.device("meta"):
        transformer = transformer_class.from_config(transformer_class.load_config(path / "transformer"))
    return ARDiffPipeline.from_pretrained(path, transformer=transformer, dtype=torch.float32)
