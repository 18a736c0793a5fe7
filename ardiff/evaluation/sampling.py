"""Videos of a model for an evaluation, over several processes; the result does not depend on how many.

What is generated together is fixed by the requests, and every video has a seed of its own.
"""

import collections
import copy
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar

from ardiff.evaluation.prediction import run_pipeline
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.scheduling_ad import ADScheduler


def open_pipeline(
    model: str | os.PathLike | ARDiffPipeline, device: str | torch.device, commit_timestep: int | None = None
) -> ARDiffPipeline:
    """The pipeline to measure, in float32 unless it was given as one, on `device`.

    With a `commit_timestep` in [0, 999] for the model's own, it is a copy that shares its parts: one that was given keeps its own.
    """
    pipe = model if isinstance(model, ARDiffPipeline) else ARDiffPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.to(device)
    if commit_timestep is not None:
        pipe = copy.copy(pipe)
        pipe.scheduler = ADScheduler.from_config(pipe.scheduler.config, commit_timestep=commit_timestep)
    return pipe


def model_name(model: str | os.PathLike | ARDiffPipeline) -> str:
    """What a report says of the model that was measured."""
    return (model.name_or_path or "pipeline") if isinstance(model, ARDiffPipeline) else str(model)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Videos to generate in one batch: a seed, and a class where there are any, for each; the rest as `run_pipeline`."""

    seeds: tuple[int, ...]
    class_labels: tuple[str, ...] | None
    num_frames: int
    gap: int
    num_inference_steps: int
    guidance_scale: float
    dtype: str
    prompt_frames: np.ndarray | None = None

    def run(self, pipe: ARDiffPipeline) -> tuple[np.ndarray, int]:
        return run_pipeline(
            pipe,
            generators=[torch.Generator().manual_seed(seed) for seed in self.seeds],
            class_labels=self.class_labels,
            num_frames=self.num_frames,
            gap=self.gap,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            dtype=self.dtype,
            prompt_frames=self.prompt_frames,
        )


class Sampler:
    """Runs requests in order: here, or in processes that each load the model; "cuda" gives them the GPUs in turn.

    The processes show finished frames as noisy as `pipe` does; all else is as `model` is stored.

    A context manager: leaving it ends the processes.

    Raises:
        ValueError: several processes are asked for, and the model is not one that they can load.
    """

    def __init__(self, model: str | os.PathLike | ARDiffPipeline, pipe: ARDiffPipeline, processes: int) -> None:
        self.pipe, self.processes, self.pool = pipe, processes, None
        if processes == 1:
            return
        if isinstance(model, ARDiffPipeline):
            raise ValueError("`model` must be a folder or a Hub id for more than one process but is a pipeline.")
        # Not forks of this process, which may hold threads and a GPU; where possible, of one that has imported all.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        num_threads = max(torch.get_num_threads() // processes, 1)
        commit_timestep = pipe.scheduler.config.commit_timestep
        arguments = str(model), str(pipe.device), commit_timestep, num_threads, context.Value("i", 0)
        self.pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=arguments)

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, requests: Iterable[Request]) -> Iterator[tuple[np.ndarray, int]]:
        """Videos (B, F, S, S, 3) of every request, and the frame evaluations of each video."""
        requests = iter(requests)
        if self.pool is None:
            yield from (request.run(self.pipe) for request in requests)
            return
        # One request more than there are processes is under way: finished videos do not pile up.
        ahead = itertools.islice(requests, self.processes + 1)
        running = collections.deque(self.pool.submit(_run, request) for request in ahead)
        while running:
            videos = running.popleft().result()
            running.extend(self.pool.submit(_run, request) for request in itertools.islice(requests, 1))
            yield videos


_own: ARDiffPipeline | None = None  # of this process


def _start(model: str, device: str, commit_timestep: int, num_threads: int, counter: object) -> None:
    global _own
    disable_progress_bar()
    torch.set_num_threads(num_threads)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.device(device).type == "cuda":
        device = f"cuda:{number % torch.cuda.device_count()}"
    _own = open_pipeline(model, device, commit_timestep)


def _run(request: Request) -> tuple[np.ndarray, int]:
    return request.run(_own)
