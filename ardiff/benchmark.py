"""What the engine costs beside the sampler of the paper: counters first, then seconds.

Contestants, in one process, with the same weights and from the same noise:

- `reference`: the paper's schedule, a window of 16 frames that is evaluated whole in every call;
- `separate`: a cache of finished frames, each written in a call of its own;
- `merged`: the same, written within the next call;
- `table`: and what timesteps and classes do is computed once. This is what the pipeline runs;
- `bfloat16`: and weights, keys and values in bfloat16.

On a CPU all of them run on the same packed weights (`models/packed.py`).
They take turns, forwards in one round and backwards in the next, so that a busy moment does not hit one of them alone; a ratio
is taken within a round. Times are of the latents; decoding is measured apart.
"""

import copy
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ardiff.models import ARDiffTransformerModel
from ardiff.models.autoencoder_arvae import DecoderCache
from ardiff.models.frame_cache import FrameKVCache
from ardiff.models.original import AutoencoderOriginal
from ardiff.pipelines.loading import load_pipeline
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline, Network, _Inputs, _Iteration, denoise
from ardiff.pipelines.pipeline_original import denoise_window
from ardiff.schedulers.ad_schedule import ad_schedule
from ardiff.schedulers.scheduling_ad import ADScheduler


SIZES = ("mini", "published")
"""mini: the bundled model. published: the size of the authors' checkpoints (28 layers of width 1152, 32 tokens, frames of 256
pixels), strictly causal, with random weights."""

CONTESTANTS = ("reference", "separate", "merged", "table", "bfloat16")
GUIDANCE = 2.0


@dataclass
class Counters:
    """Calls of the network, and in them frames, commits and floating-point operations, a guidance half not counted twice."""

    forwards: int = 0
    frame_evaluations: int = 0
    commits: int = 0
    flops: int = 0


@dataclass(kw_only=True)
class Run:
    """One run of one contestant, seconds from the first call on; a frame is finished when its tokens are on the host."""

    counters: Counters
    total_s: float
    cpu_s: float
    finished_s: list[float] = field(repr=False)
    latents: torch.Tensor = field(repr=False)


# --- contestants ------------------------------------------------------------------------------------------------


def build_pipeline(size: str, device: str) -> ARDiffPipeline:
    """The pipeline of one of `SIZES`, float32."""
    if size not in SIZES:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)} but is {size!r}.")
    if size == "mini":
        return load_pipeline(device=device)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        transformer = ARDiffTransformerModel(
            num_tokens=32, in_channels=4, width=1152, depth=28, num_heads=16, window=16, class_names=["any"]
        )
        # The output layers start at zero, and kernels are faster on zeros.
        for parameter in (
            transformer.modulation.weight,
            transformer.modulation_out.weight,
            transformer.proj_out.weight,
        ):
            torch.nn.init.normal_(parameter, std=0.02)
        vae = AutoencoderOriginal()
    return ARDiffPipeline(vae.eval(), transformer.eval(), ADScheduler())


def plain_predict(pipe: ARDiffPipeline, inputs: _Inputs) -> Callable[..., torch.Tensor]:
    """The guided network without a table: (latents (B, F, L, C), timestep (B, F), ...), embedded in every call."""
    transformer = pipe.transformer
    labels = torch.cat([torch.full_like(inputs.labels, transformer.null_class), inputs.labels]).to(transformer.device)
    run_layers, dtype = transformer.pack(), transformer.dtype

    def predict(latents: torch.Tensor, timestep: torch.Tensor, **options) -> torch.Tensor:
        sample = torch.cat([latents, latents]).to(dtype)
        output = transformer(sample, torch.cat([timestep, timestep]), labels, run_layers=run_layers, **options).to(
            latents.dtype
        )
        without, with_class = output.chunk(2)
        return without + GUIDANCE * (with_class - without)

    return predict


def separate_commits(network: Network) -> Network:
    """The same network, but commits are a call of their own."""

    def separated(
        latents: torch.Tensor, steps: torch.Tensor, cache: FrameKVCache | None = None, num_commit: int = 0
    ) -> torch.Tensor:
        if not num_commit:
            return network(latents, steps, cache, 0)
        behind = network(latents[:, :num_commit], steps[:num_commit], cache, num_commit)
        return torch.cat([behind, network(latents[:, num_commit:], steps[num_commit:], cache, 0)], dim=1)

    return separated


def start(
    name: str, pipe: ARDiffPipeline, batch_size: int, num_frames: int, gap: int, num_steps: int
) -> Iterator[_Iteration]:
    """The iterations of one contestant."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch_size)]
    inputs = pipe.check_inputs(None, [0] * batch_size, num_frames, gap, num_steps, GUIDANCE, generators)
    latents, window = pipe._start_latents(inputs, generators, torch.float32), pipe.transformer.config.window
    scheduler, predict = inputs.scheduler, plain_predict(pipe, inputs)
    if name == "reference":
        plan, window = ad_schedule(num_frames, num_steps, gap), min(window, num_frames)
        return denoise_window(predict, latents.get(0, num_frames), plan, scheduler, window=window)

    def network(sample: torch.Tensor, steps: torch.Tensor, cache: FrameKVCache, num_commit: int) -> torch.Tensor:
        timestep = scheduler.timestep_of(steps).expand(batch_size, -1)
        return predict(sample, timestep, cache=cache, num_commit=num_commit)

    if name == "separate":
        network = separate_commits(network)
    elif name != "merged":
        network = pipe._network(inputs, GUIDANCE)
    cache = pipe.transformer.new_cache(2 * batch_size)
    return denoise(network, latents, inputs.schedule, scheduler, cache, window=window)


# --- measuring --------------------------------------------------------------------------------------------------


def count_call(
    counters: Counters, model: ARDiffTransformerModel, num_frames: int, num_held: int, num_commit: int
) -> None:
    """Add one call. Operations are those the model needs, masked ones not counted: a multiplication and an addition are two."""
    config = model.config
    per_token = 12 * config.width**2 * config.depth + 2 * config.width * config.in_channels
    visible = sum(min(config.window, num_held + index + 1) for index in range(num_frames))
    attention = 2 * config.width * config.depth * config.num_tokens**2 * visible
    counters.forwards += 1
    counters.frame_evaluations += num_frames
    counters.commits += num_commit
    counters.flops += 2 * (num_frames * config.num_tokens * per_token + attention)


@torch.no_grad()
def run_once(
    name: str,
    pipe: ARDiffPipeline,
    *,
    batch_size: int,
    num_frames: int,
    gap: int,
    num_steps: int,
    calls: int | None = None,
) -> Run:
    """One run of a contestant, or its first `calls` iterations."""
    counters, finished, times = Counters(), [], []

    def count(model: ARDiffTransformerModel, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("cache")
        count_call(counters, model, args[0].shape[1], cache.num_held if cache else 0, kwargs.get("num_commit", 0))

    handle = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        began, cpu_began, num_finished = time.perf_counter(), time.process_time(), 0
        for state in start(name, pipe, batch_size, num_frames, gap, num_steps):
            if state.num_finished > num_finished:
                tokens = state.latents[:, num_finished - state.first : state.num_finished - state.first]
                tokens = tokens.to("cpu", copy=True)  # a view would keep all frames in flight alive
                times += [time.perf_counter() - began] * tokens.shape[1]
                finished.append(tokens)
                num_finished = state.num_finished
            if state.row + 1 == calls:
                break
        total, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    finally:
        handle.remove()
    latents = torch.cat(finished, dim=1) if finished else torch.empty(0)
    return Run(counters=counters, total_s=total, cpu_s=cpu, finished_s=times, latents=latents)


class LivePeak(TorchDispatchMode):
    """Counts the bytes of the tensors that come into being within it: `now` those that live, `peak` the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:  # those are weights, packed
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(name: str, pipe: ARDiffPipeline, **case) -> int:
    """Most bytes of live tensors in a run, weights not counted.

    On a CPU of the plan with the same frames in flight and the fewest steps: what is alive depends on nothing else but, by a
    few kB, the table of timesteps.
    """
    device = pipe.transformer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_once(name, pipe, **case)
        return torch.cuda.max_memory_allocated(device) - before
    gap = case["gap"]
    case |= {"num_steps": -(-case["num_steps"] // gap), "gap": 1} if gap else {"num_steps": 1}
    with LivePeak() as live:
        run_once(name, pipe, **case)
    return live.peak


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Fastest of some rounds: of a machine that has other work, the one it hindered least."""
    work()
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_flops(rows: int, inner: int, columns: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(device, dtype)
    right = torch.randn(inner, columns, generator=generator).to(device, dtype)
    return 2 * rows * inner * columns / seconds_of(lambda: left @ right, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**24 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


@torch.no_grad()
def decode_seconds(pipe: ARDiffPipeline, batch_size: int) -> float:
    """Seconds to decode one more frame of every video."""
    config, device = pipe.transformer.config, pipe.vae.device
    tokens = torch.randn(
        batch_size, 1, config.num_tokens, config.in_channels, generator=torch.Generator().manual_seed(0)
    )
    tokens, cache = tokens.to(device, pipe.vae.dtype), DecoderCache()
    return seconds_of(lambda: pipe.vae.decode(tokens, cache).cpu(), device)


# --- the report -------------------------------------------------------------------------------------------------


def benchmark(
    *,
    size: str = "mini",
    device: str = "cpu",
    frames: Sequence[int] = (16,),
    gaps: Sequence[int] = (0, 5, 50),
    num_steps: int = 50,
    rounds: int = 3,
    batch_size: int = 1,
    threads: int = 1,
    contestants: Sequence[str] = CONTESTANTS,
) -> dict:
    """Run every contestant on every plan.

    Args:
        size: one of `SIZES`. device: a torch device.
        frames, gaps: the plans; F frames at every gap in [0, `num_steps`] that the model's window allows.
        rounds: how often each contestant runs, >= 1. batch_size: videos at once. threads: of a CPU, >= 1.
        contestants: some of `CONTESTANTS`; the first is what the ratios are taken over.

    Returns:
        A dict that JSON can hold.

    Raises:
        ValueError: an argument is out of its range, or a plan does not fit the window.
    """
    for name, value in (("rounds", rounds), ("batch_size", batch_size), ("threads", threads)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1 but is {value}.")
    unknown = [name for name in contestants if name not in CONTESTANTS]
    if unknown or not contestants:
        raise ValueError(f"`contestants` must be some of {', '.join(CONTESTANTS)} but has {unknown or 'none'}.")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pipe = build_pipeline(size, device)
        half = None
        if "bfloat16" in contestants:
            half = ARDiffPipeline(pipe.vae, copy.deepcopy(pipe.transformer).bfloat16(), pipe.scheduler)
        pipes = {name: half if name == "bfloat16" else pipe for name in contestants}
        place = pipe.transformer.device
        cases = [
            {"batch_size": batch_size, "num_frames": f, "gap": g, "num_steps": num_steps} for f in frames for g in gaps
        ]
        for case in cases:  # refuses what does not fit, before anything is measured
            pipe.check_inputs(None, None, case["num_frames"], case["gap"], num_steps, GUIDANCE, None)
        side = 1024 if place.type == "cpu" else 8192
        report = {
            "size": size,
            "device": torch.cuda.get_device_name(place)
            if place.type == "cuda"
            else f"{place.type}, {threads} threads",
            "torch": torch.__version__,
            "gemm_flops": {
                str(dtype).removeprefix("torch."): gemm_flops(side, side, side, place, dtype)
                for dtype in sorted({pipes[name].transformer.dtype for name in contestants}, key=str)
            },
            "copy_bytes_per_s": copy_bandwidth(place),
            "weights_bytes": sum(parameter.nbytes for parameter in pipe.transformer.parameters()),
            "decode_frame_s": decode_seconds(pipe, batch_size),
            "cells": [measure(pipes, case, rounds) for case in cases],
        }
    finally:
        torch.set_num_threads(threads_before)
    return report


def measure(pipes: dict[str, ARDiffPipeline], case: dict, rounds: int) -> dict:
    """One plan: all contestants, `rounds` times."""
    runs = {name: [] for name in pipes}
    shape = {name: [shape_gemm(pipe, name, case)] for name, pipe in pipes.items()}
    for name, pipe in pipes.items():
        run_once(name, pipe, **case, calls=3)
    for index in range(rounds):
        for name in pipes if index % 2 == 0 else reversed(pipes):
            runs[name].append(run_once(name, pipes[name], **case))
    first = next(iter(pipes))
    cell = {key: case[key] for key in ("num_frames", "gap", "num_steps", "batch_size")} | {"contestants": {}}
    for name, pipe in pipes.items():
        shape[name].append(shape_gemm(pipe, name, case))
        counters = runs[name][0].counters
        flops = 2 * case["batch_size"] * counters.flops
        intervals = [
            later - earlier
            for run in runs[name]
            for earlier, later in zip(run.finished_s, run.finished_s[1:], strict=False)
        ]
        total = statistics.median(run.total_s for run in runs[name])
        cell["contestants"][name] = {
            "forwards": counters.forwards,
            "frame_evaluations": counters.frame_evaluations,
            "commits": counters.commits,
            "flops": flops,
            "total_s": spread([run.total_s for run in runs[name]]),
            "first_frame_s": spread([run.finished_s[0] for run in runs[name]]),
            # Of a gap of 0 all frames come at once.
            "interval_p50_s": quantile(intervals, 0.5) if case["gap"] else None,
            "interval_p95_s": quantile(intervals, 0.95) if case["gap"] else None,
            "flops_per_s": flops / total,
            "shape_gemm_flops": shape[name],
            "weights_bytes_per_s": counters.forwards * sum(p.nbytes for p in pipe.transformer.parameters()) / total,
            "peak_bytes": peak_bytes(name, pipe, **case),
            "times_faster": spread([a.total_s / b.total_s for a, b in zip(runs[first], runs[name], strict=True)]),
            "times_faster_cpu": spread([a.cpu_s / b.cpu_s for a, b in zip(runs[first], runs[name], strict=True)]),
            "difference": difference(runs[name][0].latents, runs[first][0].latents),
        }
    return cell


def shape_gemm(pipe: ARDiffPipeline, name: str, case: dict) -> float:
    """Operations a second of the largest product of a block at this run's usual number of tokens."""
    model = pipe.transformer
    in_flight = -(-case["num_steps"] // case["gap"]) if case["gap"] else case["num_frames"]
    num_frames = min(model.config.window if name == "reference" else in_flight, case["num_frames"])
    rows = 2 * case["batch_size"] * num_frames * model.config.num_tokens
    return gemm_flops(rows, model.config.width, 4 * model.config.width, model.device, model.dtype)


def difference(latents: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference in parts of the largest value."""
    return float((latents - other).abs().max() / other.abs().max())


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and largest."""
    return [statistics.median(values), min(values), max(values)]


def quantile(values: Sequence[float], share: float) -> float | None:
    return float(torch.tensor(values).quantile(share)) if values else None


def format_benchmark(report: dict) -> str:
    """Tables for people: what was counted, then what was timed; the report as one line of JSON last."""
    gemms = ", ".join(f"{value / 1e9:.1f} GFLOP/s in {dtype}" for dtype, value in report["gemm_flops"].items())
    lines = [
        f"{report['size']} on {report['device']}, torch {report['torch']}",
        f"large matrix product: {gemms}; copy: {report['copy_bytes_per_s'] / 1e9:.1f} GB/s; "
        f"decoding a frame: {report['decode_frame_s'] * 1e3:.1f} ms",
        "",
        f"{'frames':>6} {'gap':>4}  {'':<10} {'calls':>6} {'frames evaluated':>17} {'commits':>8} {'GFLOP':>9} {'peak MB':>8} "
        f"{'difference':>11}",
    ]
    rows = [
        (f"{cell['num_frames']:>6} {cell['gap']:>4}  {name:<10}", one)
        for cell in report["cells"]
        for name, one in cell["contestants"].items()
    ]
    lines += [
        f"{head} {one['forwards']:>6} {one['frame_evaluations']:>17} {one['commits']:>8} {one['flops'] / 1e9:>9.1f} "
        f"{one['peak_bytes'] / 1e6:>8.1f} {one['difference']:>11.1e}"
        for head, one in rows
    ]
    lines += [
        "",
        f"{'frames':>6} {'gap':>4}  {'':<10} {'total s':>24} {'first frame s':>14} {'interval p50, p95 ms':>21} {'GFLOP/s':>8} "
        f"{'of GEMM':>8} {'weights GB/s':>13} {'times faster':>24}",
    ]
    for head, one in rows:
        interval = "all at once"
        if one["interval_p50_s"] is not None:
            interval = f"{one['interval_p50_s'] * 1e3:.1f}, {one['interval_p95_s'] * 1e3:.1f}"
        share = one["flops_per_s"] / statistics.mean(one["shape_gemm_flops"])
        lines.append(
            f"{head} {format_spread(one['total_s']):>24} {one['first_frame_s'][0]:>14.3f} {interval:>21} "
            f"{one['flops_per_s'] / 1e9:>8.1f} {share:>8.0%} {one['weights_bytes_per_s'] / 1e9:>13.1f} "
            f"{format_spread(one['times_faster']):>24}"
        )
    lines += ["", "Median and range of the rounds. Difference: largest, of the tokens, from the first contestant's."]
    return "\n".join([*lines, json.dumps(report)])


def format_spread(values: Sequence[float]) -> str:
    median, low, high = values
    return f"{median:.2f} ({low:.2f}..{high:.2f})"
