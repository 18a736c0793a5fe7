"""The menu of models: the ones the operator allows, each loaded when it is first asked for.

A model is known by its name alone; nothing that a visitor sends is ever taken for a path or a Hub id.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.models.packed import can_pack
from ardiff.pipelines.loading import bundled_models
from ardiff.serving.limits import Limits


LOADED_MODELS = 2
"""Models that are kept in memory; the one that was asked for longest ago makes room for the next."""


@dataclass
class Cost:
    """Seconds per model call and per frame evaluation: what the page's estimate is made of, once they are `measured`.

    Until then they are a guess, for what cannot do without one.
    """

    call: float = 0.02
    frame: float = 0.004
    preview: float | None = None
    measured: bool = False

    def record(self, call: float, frame: float) -> None:
        self.call, self.frame, self.measured = call, frame, True

    def seconds(self, calls: float, evaluations: float, guided: bool) -> float:
        return calls * self.call + evaluations * self.frame * (2 if guided else 1)

    def learn(self, predicted: float, taken: float) -> None:
        """Move both figures half-way towards what a whole run took; a guess all the way."""
        factor = taken / max(predicted, 1e-6)
        if self.measured:
            factor = float(np.clip(factor, 0.2, 5.0)) ** 0.5
        self.record(self.call * factor, self.frame * factor)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes on the device beside the weights, about.

    `packed` for the copy of the weights that a run on a CPU makes; `cache` once, `frame` for every frame that a call
    evaluates, both twice with guidance; `decoded` for every frame that is decoded in one go.
    """

    packed: int
    cache: int
    frame: int
    decoded: int

    def bytes(self, evaluated: int, decoded: int, guided: bool) -> int:
        twice = 2 if guided else 1
        return self.packed + self.cache * twice + max(self.frame * evaluated * twice, self.decoded * decoded)


@dataclass(eq=False)
class LoadedModel:
    """A pipeline that has been loaded, by the name it has on the page; `cost` outlives its leaving memory."""

    name: str
    pipeline: Any
    cost: Cost = field(default_factory=Cost)

    @property
    def image_size(self) -> int:
        return self.pipeline.image_size

    @property
    def scenes(self) -> tuple[str, ...]:
        return tuple(self.pipeline.class_names or ())

    @property
    def window(self) -> int:
        return self.pipeline.transformer.config.window

    @property
    def device(self) -> str:
        # Not where the weights are: those of an offloaded model wait in main memory.
        return str(self.pipeline._execution_device)

    @property
    def whole_window(self) -> bool:
        """Whether every call evaluates the whole window, because what is finished cannot be cached."""
        return not self.pipeline.supports_frame_cache

    def evaluations(self, plan: np.ndarray) -> np.ndarray:
        """Frames that each call of a plan (R, F) evaluates, (R,); prompt frames count once, where they are committed."""
        if self.whole_window:
            return np.full(len(plan), self.window)
        before = np.concatenate([np.zeros_like(plan[:1]), plan[:-1]])
        return (plan > before).sum(axis=1)

    @property
    def memory(self) -> Memory:
        """What a run of this model takes: a block of the transformer holds 18 numbers per feature of its tokens at its peak,
        and decoding a frame holds one and a half of its largest layer (peaks of allocations, counted on a CPU).
        """
        transformer, vae = self.pipeline.transformer, self.pipeline.vae
        size, tokens = transformer.dtype.itemsize, transformer.config.num_tokens * transformer.config.width
        channels = vae.config["stem_channels"][0] if "stem_channels" in vae.config else vae.config["base_channels"]
        cached = 0 if self.whole_window else 2 * transformer.config.depth * (self.window - 1)
        decoded = 3 * channels * self.image_size**2 * vae.dtype.itemsize // 2
        packs = not self.whole_window and self.device == "cpu" and can_pack(transformer.blocks[0].qkv)
        packed = sum(weight.nbytes for weight in transformer.blocks.parameters()) if packs else 0
        return Memory(packed=packed, cache=cached * tokens * size, frame=18 * tokens * size, decoded=decoded)

    def run_memory(self, plan: np.ndarray, num_prompt_frames: int, guided: bool) -> int:
        """Bytes that a run of a plan (R, F) takes beside the weights, about."""
        finished = (plan == plan.max()).sum(axis=1)
        together = int(np.diff(finished, prepend=num_prompt_frames).max())
        return self.memory.bytes(int(self.evaluations(plan).max()), max(together, num_prompt_frames), guided)

    def facts(self) -> dict[str, Any]:
        """What the browser needs to judge a plan: what the model can do, and its seconds per call and frame evaluation."""
        return {
            "name": self.name,
            "window": self.window,
            "shortest": self.pipeline.min_frames,
            "whole_window": self.whole_window,
            "always_guided": self.pipeline.is_guided(2.0, False),
            "call": self.cost.call,
            "frame": self.cost.frame,
            "measured": self.cost.measured,
            "memory": vars(self.memory),
        }


class ModelMenu:
    """Models by name, the first one being what a visitor starts with.

    Args:
        sources: for every name a function that gives its `ARDiffPipeline`, on its device.
        on_load: called with every model that was loaded for the first time.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Any]], on_load: Callable[[LoadedModel], Any]) -> None:
        if not sources:
            raise ValueError("There must be at least one model to choose from, got none.")
        self._sources = dict(sources)
        self._on_load = on_load
        self._lock = threading.Lock()
        self._loaded: dict[str, LoadedModel] = {}  # the one asked for last is at the end
        self._costs: dict[str, Cost] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def get(self, name: str | None = None) -> LoadedModel:
        """The model of this name, None = the first one; loading one takes seconds, and who else asks waits.

        Raises ValueError with one sentence when there is none of that name or it cannot be loaded.
        """
        name = self.names[0] if name is None else name
        if name not in self._sources:
            raise ValueError(f"The model (`model`) must be one of {', '.join(self.names)}, got {name!r}.")
        with self._lock:
            model = self._loaded.pop(name, None)
            if model is None:
                while len(self._loaded) >= LOADED_MODELS:
                    self._loaded.pop(next(iter(self._loaded)))
                try:
                    pipeline = self._sources[name]()
                except (OSError, RuntimeError) as error:
                    raise ValueError(
                        f"The model {name} could not be loaded: {' '.join(str(error).split())}"
                    ) from error
                fresh = name not in self._costs
                model = LoadedModel(name, pipeline, self._costs.setdefault(name, Cost()))
                if fresh:
                    self._on_load(model)
            self._loaded[name] = model
        return model


def choose_models(models: Sequence[str | Path] | None, limits: Limits) -> dict[str, str]:
    """The menu's names, and the folder, Hub id or bundled model that each stands for; None: the bundled models.

    A folder with a whole path goes by its last part: visitors need not learn where things lie on the host.

    Raises:
        ValueError: the operator's limits leave a model out, or two have the same name; one sentence.
    """
    if not models:
        first, *others = bundled_models()
        return {name: name for name in [first, *filter(limits.allows_model, others)]}
    names = [str(model) for model in models]
    for name in names[1:]:
        if not limits.allows_model(name):
            raise ValueError(
                f"`--model` may name, after the first, what the limits allow ({', '.join(limits.models) or 'nothing'}), "
                f"but has {name}; ARDIFF_LIMIT_MODELS sets that."
            )
    menu = {Path(name).name if Path(name).is_absolute() else name: name for name in names}
    if len(menu) < len(names):
        raise ValueError(
            f"`--model` must name models that differ in the last part of their path but has {', '.join(names)}."
        )
    return menu
