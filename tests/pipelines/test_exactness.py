"""The engine against the slow, obvious sampler: the same frames, the fewest evaluations, and memory that does not grow."""

import gc
import itertools
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ardiff import ADScheduler, ARDiffPipeline, ARDiffTransformerModel, ad_schedule
from ardiff.pipelines.loading import load_pipeline
from ardiff.schedulers.ad_schedule import check_window, profile_gaps


GUIDANCE = 2.5
LABEL = 1


def pipeline(vae, window, depth=2, commit_timestep=0):
    """Random weights large enough that every path matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformer = ARDiffTransformerModel(
            num_tokens=4, in_channels=4, width=32, depth=depth, num_heads=2, window=window, class_names=["a", "b"]
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    pipe = ARDiffPipeline(vae, transformer.eval(), ADScheduler(commit_timestep=commit_timestep))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, num_frames, num_steps, ar_step, **arguments):
    return pipe(
        class_labels=[LABEL], num_frames=num_frames, ar_step=ar_step, num_inference_steps=num_steps,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments,
    ).frames  # fmt: skip


@torch.no_grad()
def obvious(pipe, num_frames, num_steps, ar_step, prompt_frames=()):
    """Every frame, finished and waiting ones too, in every iteration and for either guidance half; nothing is kept."""
    model, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(model.dtype, torch.float32)
    latents = torch.cat([torch.randn(1, 1, 4, 4, generator=generator, dtype=dtype) for _ in range(num_frames)], dim=1)
    before, num_prompts = torch.zeros(num_frames, dtype=torch.int64), len(prompt_frames)
    if num_prompts:
        latents[:, :num_prompts] = pipe.vae.encode(pipe._prompt_pixels(prompt_frames)).mode()
        before[:num_prompts] = num_steps
    for after in ad_schedule(num_frames, num_steps, ar_step, num_prompt_frames=num_prompts):
        timestep = torch.cat([scheduler.timesteps, torch.tensor([scheduler.config.commit_timestep])])[before][None]
        timestep[:, :num_prompts] = 0
        without = model(latents, timestep)
        with_class = model(latents, timestep, torch.tensor([LABEL]))
        output = without + GUIDANCE * (with_class - without)
        latents = scheduler.step(output, before, latents, update_mask=before != after).prev_sample
        before = after
    return latents


PLANS = [(6, 0, 16), (6, 5, 16), (4, 50, 16), (7, 20, 3), (6, 25, 2), (4, [0, 50, 0], 2), (5, [0, 3, 20, 50], 4)]


@pytest.mark.parametrize(
    ("num_frames", "ar_step", "window", "dtype", "limit"),
    [
        *((*plan, torch.float64, 1e-10) for plan in PLANS),
        *((*plan, torch.float32, 1e-4) for plan in [(6, 5, 16), (4, 50, 16), (6, 25, 2)]),
    ],
)
def test_fifty_steps_equal_the_obvious_sampler(tiny_vae, num_frames, ar_step, window, dtype, limit):
    pipe = pipeline(tiny_vae, window)
    pipe.transformer.to(dtype)
    frames, expected = run(pipe, num_frames, 50, ar_step), obvious(pipe, num_frames, 50, ar_step)
    assert frames.dtype == expected.dtype == dtype
    assert frames.std() > 0.1
    assert (frames - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(("num_frames", "ar_step", "window"), [(6, 2, 16), (4, 10, 16), (7, 4, 3)])
def test_a_commit_timestep_changes_what_is_shown_and_nothing_else(tiny_vae, num_frames, ar_step, window):
    pipe = pipeline(tiny_vae, window, commit_timestep=80)
    pipe.transformer.double()
    frames, expected = run(pipe, num_frames, 10, ar_step), obvious(pipe, num_frames, 10, ar_step)
    assert (frames - expected).abs().max() <= 1e-10 * expected.abs().max()
    prompt = [torch.full((32, 32, 3), 50 * frame, dtype=torch.uint8).numpy() for frame in range(2)]
    for use_cache in (True, False):
        continued = run(pipe, num_frames, 10, ar_step, prompt_frames=prompt, use_cache=use_cache)
        expected = obvious(pipe, num_frames, 10, ar_step, prompt)
        assert (continued - expected).abs().max() <= 1e-10 * expected.abs().max()
    pipe.scheduler = ADScheduler()
    plain = run(pipe, num_frames, 10, ar_step)
    assert torch.equal(plain[:, 0], frames[:, 0])
    assert (plain[:, -1] - frames[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(("num_frames", "ar_step", "window"), [(6, 5, 16), (7, 20, 3), (6, 25, 2)])
def test_what_lies_in_unused_slots_is_never_read(tiny_vae, num_frames, ar_step, window):
    """NaN behind what is held: in slots of frames that have not started and in those of frames that are out of sight."""
    pipe = pipeline(tiny_vae, window)
    expected = run(pipe, num_frames, 50, ar_step)
    poisoned = []

    def poison(module, args, kwargs):
        cache = kwargs["cache"]
        cache.reserve(args[0].shape[1])
        unused = cache.storage[..., cache.num_held :, :, :]
        unused.fill_(float("nan"))
        poisoned.append(unused.numel())

    pipe.transformer.register_forward_pre_hook(poison, with_kwargs=True)
    assert torch.equal(run(pipe, num_frames, 50, ar_step), expected)
    assert min(poisoned) > 0


def grid():
    for num_frames, num_steps, window, num_prompts in itertools.product((1, 2, 5), (1, 3), (2, 16), (0, 3)):
        gaps = {"even 0": 0, "even 1": 1, "even N": num_steps}
        for profile in ("chunks", "ramp"):
            gaps[profile] = profile_gaps(
                profile, gap=num_steps, chunk=2, num_new_frames=num_frames, num_inference_steps=num_steps
            )
        for name, ar_step in gaps.items():
            plan = ad_schedule(num_frames + num_prompts, num_steps, ar_step, num_prompt_frames=num_prompts)
            try:
                check_window(plan, window, num_prompt_frames=num_prompts)
            except ValueError:
                continue
            yield pytest.param(
                num_frames, num_steps, ar_step, window, num_prompts,
                id=f"F{num_frames}-N{num_steps}-{name}-W{window}-P{num_prompts}",
            )  # fmt: skip


@pytest.mark.parametrize(("num_frames", "num_steps", "ar_step", "window", "num_prompts"), list(grid()))
def test_counters(tiny_vae, num_frames, num_steps, ar_step, window, num_prompts):
    """N + the sum of gaps calls; F * N evaluations, and one for every frame that is followed by one that finishes later."""
    pipe, calls, commits = pipeline(tiny_vae, window, depth=1), [], []

    def count(module, args, kwargs):
        calls.append(args[0].shape[1])
        commits.append(kwargs["num_commit"])

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    prompts = [torch.full((32, 32, 3), 50 * frame, dtype=torch.uint8).numpy() for frame in range(num_prompts)]
    run(pipe, num_frames + num_prompts, num_steps, ar_step, prompt_frames=prompts or None)
    gaps = [ar_step] * (num_frames - 1) if isinstance(ar_step, int) else list(ar_step)
    assert len(calls) == num_steps + sum(gaps)
    # The frames that finish together with the last one are never committed.
    together = 1 + sum(1 for _ in itertools.takewhile(lambda gap: gap == 0, reversed(gaps)))
    assert sum(commits) == num_frames - together + num_prompts
    assert sum(calls) == num_frames * num_steps + sum(commits)
    if isinstance(ar_step, int) and ar_step > 0:
        assert sum(calls) - num_prompts == num_frames * num_steps + num_frames - 1


class NothingWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a device: values read off tensors, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("ar_step", [0, 1, 3])
def test_the_loop_waits_for_nothing(tiny_vae, ar_step):
    pipe = pipeline(tiny_vae, window=6)
    inputs = pipe.check_inputs(None, [LABEL], 6, ar_step, 6, GUIDANCE, None)
    start = pipe._start_latents(inputs, torch.Generator().manual_seed(0), torch.float32)
    states = pipe._denoise(inputs, start, GUIDANCE, True)
    with NothingWaits():
        assert len(list(states)) == len(inputs.schedule)


# --- without end ------------------------------------------------------------------------------------------------


def test_a_video_without_end_is_a_long_video_that_goes_on(tiny_vae):
    pipe = pipeline(tiny_vae, window=4)
    arguments = {"class_labels": [LABEL], "ar_step": 2, "num_inference_steps": 5, "guidance_scale": GUIDANCE}
    streams = [
        pipe.stream(num_frames=frames, generator=torch.Generator().manual_seed(0), **arguments)
        for frames in (None, 12)
    ]
    steps = list(zip(*streams, strict=False))
    assert len(steps) == 5 + 11 * 2
    for endless, finite in steps:
        assert endless.num_iterations is None
        stop = endless.first_frame + len(endless.step_index)
        shown = slice(endless.first_frame, min(stop, 12))
        assert torch.equal(endless.step_index[: shown.stop - shown.start], finite.step_index[shown])
        assert [frame for frame, _ in endless.finished] == [frame for frame, _ in finite.finished]
        assert all((a == b).all() for (_, a), (_, b) in zip(endless.finished, finite.finished, strict=True))
    assert steps[-1][0].first_frame > 0
    with pytest.raises(ValueError, match="tokens of frames before 7 are gone"):
        steps[-1][1].preview([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ar_step": 0}, "`ar_step` must be >= 1 but is 0"),
        ({"ar_step": [1, 2]}, "`ar_step` must be an integer >= 1 but is"),
        ({"ar_step": 1}, "`ar_step` must be at least 2 for endless frames at 6 steps"),
        ({"ar_step": 2, "use_cache": False}, "`use_cache` must not be False where `num_frames` is None"),
    ],
)
def test_a_video_without_end_has_its_limits(tiny_vae, arguments, message):
    pipe = pipeline(tiny_vae, window=4)
    with pytest.raises(ValueError, match=message):
        next(pipe.stream(num_frames=None, num_inference_steps=6, **arguments))
    with pytest.raises(ValueError, match="`num_frames` must be a number: a video without end has no result"):
        pipe(num_frames=None, ar_step=2)


def live_bytes():
    """Bytes of all tensors there are, each storage once."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        # isinstance would ask proxies, which warn; packed weights have no storage to ask
        if issubclass(type(tensor), torch.Tensor) and not tensor.is_mkldnn
    }
    return sum(storages.values())


def memory_and_time(pipe, num_frames, marks, **arguments):
    """Bytes of live tensors and CPU seconds when so many frames are finished; nothing is kept of what was yielded."""
    done, bytes_at, seconds_at = 0, [], []
    for step in pipe.stream(num_frames=num_frames, generator=torch.Generator().manual_seed(0), **arguments):
        done += len(step.finished)
        if step.finished and done in marks:
            bytes_at.append(live_bytes() - step.step_index.nbytes - step.noise_level.nbytes)
            seconds_at.append(time.process_time())
        if done == marks[-1]:
            return bytes_at, seconds_at


@pytest.mark.parametrize(("num_frames", "marks"), [(None, (100, 1000, 2000)), (300, (100, 300))])
def test_two_thousand_frames_take_the_memory_of_a_few(tiny_vae, num_frames, marks):
    """The row of the plan that a step of a finite video carries, 12 bytes a frame, is not counted."""
    pipe = pipeline(tiny_vae, window=4, depth=1)
    arguments = {"class_labels": [LABEL], "guidance_scale": 1.0, "num_inference_steps": 1, "ar_step": 1}
    held, _ = memory_and_time(pipe, num_frames, marks, **arguments)
    assert len(set(held)) == 1


@pytest.mark.slow
def test_two_thousand_frames_of_the_bundled_model():
    """Memory to the byte, and the time of a frame: the last 500 take no longer than the first."""
    pipe = load_pipeline()
    marks = (100, 600, 1500, 2000)
    arguments = {"class_labels": ["clouds"], "num_inference_steps": 2, "ar_step": 1, "guidance_scale": 1.0}
    held, seconds = memory_and_time(pipe, None, marks, **arguments)
    assert len(set(held)) == 1
    early, late = seconds[1] - seconds[0], seconds[3] - seconds[2]  # of the CPU, 500 frames each
    assert late <= 1.3 * early
