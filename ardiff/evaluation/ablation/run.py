"""All of it: clips once, then every configuration with every seed, here or in several processes, resumed where it stopped."""

import functools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from ardiff.evaluation.ablation.clips import (
    encode_training_clips,
    measure_real_clips,
    training_file,
    training_parts,
)
from ardiff.evaluation.ablation.measuring import measure
from ardiff.evaluation.ablation.reporting import gather, write_tables
from ardiff.evaluation.ablation.settings import CONFIGURATIONS, NUM_LONG_FRAMES, Configuration, Count, Job, Size
from ardiff.evaluation.ablation.training import train
from ardiff.evaluation.prediction import NUM_FRAMES, NUM_PROMPT_FRAMES
from ardiff.evaluation.report import write_json
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.ad_schedule import ad_schedule, plan_counts


MAX_SEEDS = 10


def ablate(
    out: str | os.PathLike,
    size: Size,
    *,
    vae: str | os.PathLike,
    num_seeds: int = 3,
    configurations: Sequence[Configuration] = CONFIGURATIONS,
    processes: int = 1,
    device: str = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict:
    """Train and measure every configuration with every seed; returns what `results.json` holds.

    A run whose `result.json` exists is not done again, one that was stopped goes on. After every run `results.json`,
    `table.md` and the CSV files are written from the results that there are.

    Args:
        out: folder of the ablation; one of other settings is refused.
        vae: folder of the autoencoder, which stays as it is.
        num_seeds: in [2, 10]. processes: at once, each with one CPU thread or a GPU of its own in turn, >= 1.
        command: the command line, to be written beside the results.

    Raises:
        ValueError: an argument is out of its range, or the folder holds an ablation of other settings.
    """
    if not 2 <= num_seeds <= MAX_SEEDS:
        raise ValueError(f"`num_seeds` must be in [2, {MAX_SEEDS}] but is {num_seeds}.")
    if processes < 1:
        raise ValueError(f"`processes` must be at least 1 but is {processes}.")
    job = Job(out=Path(out), vae=str(vae), size=size, device=str(device))
    (job.out / "data").mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(size)))
    check_settings(job.out / "settings.json", settings)
    results_file = job.out / "results.json"
    before = json.loads(results_file.read_text(encoding="utf-8"))["seconds"] if results_file.exists() else 0.0
    started = time.monotonic()
    runs = [(configuration, seed) for seed in range(num_seeds) for configuration in configurations]
    with Workers(processes, device) as workers, tqdm(unit="frame", unit_scale=True, disable=not progress) as bar:
        bar.total = len(runs) * frame_evaluations(size, CONFIGURATIONS[0])
        todo = [
            (encode_training_clips, job, *part)
            for part in training_parts(size)
            if not training_file(job, *part).exists()
        ]
        todo += [
            (measure_real_clips, job, part)
            for part in ("real", "other_real", "openings")
            if not (job.out / "data" / f"{part}.safetensors").exists()
        ]
        bar.set_description("clips")
        for _ in workers(todo, bar, counted=False):
            pass
        missing = [run for run in runs if not (job.run_folder(*run) / "result.json").exists()]
        bar.total = sum(frame_evaluations(size, configuration) for configuration, _ in missing)
        bar.set_description(f"{len(runs) - len(missing)}/{len(runs)} runs")
        bar.reset(bar.total)
        for _ in workers([(train_and_measure, job, *run) for run in missing], bar, counted=True):
            seconds = before + time.monotonic() - started
            results = gather(job, runs, command=command, processes=processes, seconds=seconds)
            write_tables(results, job.out)
            bar.set_description(f"{len(results['runs'])}/{len(runs)} runs")
    seconds = before + time.monotonic() - started
    results = gather(job, runs, command=command, processes=processes, seconds=seconds)
    write_tables(results, job.out)
    return results


def check_settings(path: Path, settings: dict) -> None:
    """Write them, or refuse a folder that has others."""
    if not path.exists():
        write_json(settings, path)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
    if different:
        raise ValueError(f"`out` must be a new folder or one of the same size but {path} differs in {different}.")


def frame_evaluations(size: Size, configuration: Configuration) -> int:
    """Frames that the network evaluates in one run, one of training counted as three; the unit of the progress bar."""
    total = 3 * NUM_FRAMES * size.batch_size * size.num_steps
    plans = [(NUM_FRAMES, gap, 0, size.num_clips) for gap in size.gaps]
    plans += [(NUM_LONG_FRAMES, plan, 0, size.num_long_clips) for plan in size.long_plans().values()]
    plans += [(NUM_FRAMES, 5, NUM_PROMPT_FRAMES, size.num_prompts)]
    for num_frames, gap, num_prompt_frames, num_clips in plans:
        plan = ad_schedule(num_frames, size.num_inference_steps, gap, num_prompt_frames=num_prompt_frames)
        counts = plan_counts(plan, num_prompt_frames=num_prompt_frames)
        each = counts.frame_evaluations if configuration.causal else counts.iterations * NUM_FRAMES
        total += each * num_clips * len(size.scenes)
    return total


def train_and_measure(job: Job, configuration: Configuration, seed: int, count: Count) -> None:
    """Train one configuration with one seed and measure it; `result.json` in its folder is written last."""
    folder, started, used = job.run_folder(configuration, seed), time.monotonic(), time.process_time()
    vae = job.load_vae()
    transformer = train(job, vae, configuration, seed, count)
    trained = time.monotonic()
    pipe = ARDiffPipeline(vae, transformer.eval(), configuration.scheduler())
    figures = measure(job, pipe, folder, count)
    figures |= {"train_seconds": trained - started, "measure_seconds": time.monotonic() - trained}
    figures["cpu_seconds"] = time.process_time() - used
    transformer.save_pretrained(folder / "transformer")
    write_json({**asdict(configuration), "seed": seed, **figures}, folder / "result.json")
    shutil.rmtree(folder / "checkpoints")


class Workers:
    """Runs tasks in this process, or several at once in others, and keeps the bar going; a context manager."""

    def __init__(self, processes: int, device: str) -> None:
        self.pool = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self.counter = context.Value("q", 0)
            arguments = self.counter, context.Value("i", 0), str(device)
            self.pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=arguments)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, tasks: Sequence[tuple], bar: tqdm, *, counted: bool) -> Iterator[None]:
        """Do all tasks, (function, job, arguments...); yields whenever one is done. `counted` ones are given a counter."""
        if self.pool is None:
            for function, *arguments in tasks:
                function(*arguments, *([bar.update] if counted else []))
                yield
            return
        pending = {self.pool.submit(_run, counted, *task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            with self.counter.get_lock():
                new, self.counter.value = self.counter.value, 0
            bar.update(new)
            for future in done:
                future.result()
                yield


_counter = None  # shared by the worker processes


def _start(counter: object, numbers: object, device: str) -> None:
    global _counter
    disable_progress_bar()
    torch.set_num_threads(1)
    # The trainers' own bars would overwrite each other.
    tqdm.__init__ = functools.partialmethod(_init_silent, tqdm.__init__)
    _counter = counter
    if device == "cuda":
        with numbers.get_lock():
            torch.cuda.set_device(numbers.value % torch.cuda.device_count())
            numbers.value += 1


def _init_silent(bar: tqdm, init: Callable, *arguments: object, **options: object) -> None:
    init(bar, *arguments, **options | {"disable": True})


def _run(counted: bool, function: Callable, job: Job, *arguments: object) -> None:
    def count(frame_evaluations: int) -> None:
        with _counter.get_lock():
            _counter.value += frame_evaluations

    function(job, *arguments, *([count] if counted else []))
