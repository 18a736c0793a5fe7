"""The pipeline of models that cannot be cached: given stays given, finished stays finished, the window is never overrun."""

import numpy as np
import pytest
import torch
from tiny_original import WINDOW, build

from ardiff import ADScheduler, ARDiffPipeline, ad_schedule
from ardiff.pipelines.pipeline_original import OriginalARDiffPipeline, ReleasedTables


N = 5


def arguments(**options):
    defaults = {"num_frames": 7, "ar_step": 2, "num_inference_steps": N}
    return defaults | {"generator": torch.Generator().manual_seed(0)} | options


def prompt(count=2):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(256, (count, 10, 12, 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def trace(pipe, prompt_frames=None, **options):
    """Start latents, then those after every iteration, (R + 1, B, F, L, C), and the plan."""
    options = {"num_frames": 7, "ar_step": 2, "num_inference_steps": N, "guidance_scale": 2.0} | options
    generator = torch.Generator().manual_seed(0)
    inputs = pipe.check_inputs(prompt_frames, options.pop("class_labels", None), **options, generator=generator)
    latents = pipe._start_latents(inputs, generator, torch.float32)
    states = pipe._denoise(inputs, latents, options["guidance_scale"], None)
    return torch.stack([latents, *[state.latents for state in states]]), inputs.schedule


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("num_prompts", [0, 2])
@pytest.mark.parametrize(("num_frames", "ar_step"), [(WINDOW, 0), (WINDOW, 2), (9, 2), (9, N), (7, [0, 0, N, 0])])
def test_only_active_frames_change(prediction_type, num_prompts, num_frames, ar_step):
    if not isinstance(ar_step, int):
        num_frames = len(ar_step) + 1 + num_prompts
    latents, plan = trace(
        build(prediction_type=prediction_type), prompt(num_prompts) or None, num_frames=num_frames, ar_step=ar_step
    )
    before = torch.zeros_like(plan[:1])
    before[:, :num_prompts] = N
    updated = plan != torch.cat([before, plan[:-1]])
    changed = (latents[1:] != latents[:-1]).flatten(3).any(-1)[:, 0]
    assert torch.equal(changed, updated)
    assert latents.isfinite().all()


def test_one_window_is_the_masked_step_of_all_its_frames():
    """A second, plainer way to write it: the whole window in, the scheduler's own mask over all frames."""
    pipe = build()
    latents, plan = trace(pipe, num_frames=WINDOW, guidance_scale=1.0)
    scheduler, sample = ADScheduler(), latents[0]
    scheduler.set_timesteps(N)
    before = torch.zeros_like(plan[0])
    context = pipe.transformer.conditional_context(None, 1)
    for row, expected in zip(plan, latents[1:], strict=True):
        with torch.no_grad():
            output = pipe.transformer(sample, scheduler.timestep_of(before)[None], context)
        sample = scheduler.step(output, before, sample, row != before).prev_sample
        assert torch.allclose(sample, expected, atol=1e-6)
        before = row


def test_the_window_ends_with_the_last_frame_that_has_started():
    pipe, seen = build(), []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1][0]))
    pipe.scheduler = ADScheduler(commit_timestep=80)
    _, plan = trace(pipe, prompt(), num_frames=9, guidance_scale=1.0)
    pipe.scheduler.set_timesteps(N)
    timesteps = [*pipe.scheduler.timesteps.tolist(), 80]
    before = [N, N] + [0] * 7
    for shown, row in zip(seen, plan, strict=True):
        end = max(WINDOW, 1 + int((row > 0).nonzero().max()))
        # The first two are given.
        expected = [0, 0] + [timesteps[index] for index in before[2:]]
        assert shown.tolist() == expected[end - WINDOW : end]
        before = row.tolist()


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("clip_frames", [1, 4])
def test_stream_and_call_agree(compat, clip_frames):
    pipe = build(compat=compat, clip_frames=clip_frames)
    steps = list(pipe.stream(prompt(), **arguments()))
    finished = [item for step in steps for item in step.finished]
    assert [index for index, _ in finished] == list(range(7))
    assert [step.iteration for step in steps] == list(range(1, len(steps) + 1))
    assert {step.num_iterations for step in steps} == {len(steps)}
    assert {step.frame_evaluations for step in steps} == {WINDOW}
    assert torch.allclose(steps[-1].noise_level, torch.zeros(7))
    if compat:  # decoded when all is over
        assert [index for index, _ in steps[-1].finished] == list(range(7))
    else:
        assert [index for index, _ in steps[0].finished] == [0, 1]
    video = pipe(prompt(), output_type="np", **arguments()).frames
    assert np.array_equal((video[0] * 255).round(), np.stack([frame for _, frame in finished]))


@pytest.mark.parametrize("clip_frames", [1, 4])
def test_a_preview_shows_finished_frames_and_changes_no_bit(clip_frames):
    pipe = build(clip_frames=clip_frames)
    plain = pipe(output_type="np", **arguments()).frames
    frames = []
    for step in pipe.stream(**arguments()):
        step.preview(list(range(7)))
        for index, frame in step.finished:
            assert np.abs(frame.astype(int) - step.preview([index])[0]).max() <= 1
            frames.append(frame)
    assert np.array_equal((plain[0] * 255).round(), np.stack(frames))


def test_a_folder_brings_its_own_pipeline(tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    loaded = ARDiffPipeline.from_pretrained(tmp_path)
    assert type(loaded) is OriginalARDiffPipeline
    assert not loaded.config.compat
    assert not loaded.supports_frame_cache
    latents = [each(output_type="latent", **arguments()).frames for each in (pipe, loaded)]
    assert torch.equal(*latents)
    assert ARDiffPipeline.from_pretrained(tmp_path, compat=True).config.compat


def test_guidance_leads_away_from_an_empty_context():
    pipe, seen = build(), []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    pipe(output_type="latent", **arguments(guidance_scale=1.0))
    assert {len(context) for context in seen} == {1}
    seen.clear()
    pipe(output_type="latent", **arguments(guidance_scale=3.0))
    assert all(
        torch.equal(context, torch.stack([0 * pipe.transformer.context_emb, pipe.transformer.context_emb]))
        for context in seen
    )


def test_guidance_leads_away_from_class_0():
    pipe, seen = build(class_names=["run", "jump"]), []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    pipe(output_type="latent", class_labels=["jump", "run"], **arguments())
    assert all(torch.equal(context, pipe.transformer.class_emb[[0, 0, 1, 0]]) for context in seen)
    seen.clear()
    pipe(output_type="latent", **arguments())  # no class: nothing to lead away from
    assert all(torch.equal(context, pipe.transformer.class_emb[[0]]) for context in seen)


def test_compat_moves_what_should_stand_still():
    (ours, plan), (released, _) = (trace(build(compat=compat), num_frames=WINDOW) for compat in (False, True))
    finished = int((plan[:, 0] == N).nonzero()[0]) + 1
    assert torch.equal(ours[finished, :, 0], ours[-1, :, 0])
    growth = released[-1, :, 0] / released[finished, :, 0]
    alpha, tables = ADScheduler().alphas_cumprod.double(), ReleasedTables.of(ADScheduler(), N)
    rate = alpha[0].sqrt() + (1 - alpha[0]).sqrt() * (1 - alpha[1].sqrt()) / (1 - alpha[1]).sqrt()
    assert int(tables.timesteps[0]) == 1
    assert torch.allclose(growth.double(), (rate ** (len(plan) - finished)).expand(growth.shape), atol=1e-5)


def test_compat_leaves_given_frames_changed():
    for compat in (False, True):
        latents, _ = trace(build(compat=compat), prompt(), num_frames=WINDOW, ar_step=0)
        assert torch.equal(latents[-1, :, :2], latents[0, :, :2]) is not compat


def test_compat_does_the_steps_of_the_released_code():
    steps = list(build(compat=True).stream(**arguments(num_inference_steps=6, ar_step=6)))
    assert torch.equal(torch.stack([step.step_index for step in steps]), ad_schedule(7, 7, 6))


@pytest.mark.parametrize(
    ("compat", "options", "message"),
    [
        (False, {"num_frames": 3}, "`num_frames` must be at least 4, the window of this model, but is 3"),
        (True, {"num_frames": 3}, "`num_frames` must be at least 4"),
        (False, {"ar_step": 1}, "`ar_step` must be at least 2 for 7 frames"),
        (False, {"use_cache": True}, "`use_cache` must be None or False"),
        (True, {"ar_step": [1] * 6}, "`ar_step` must be one int where `compat` is on"),
        (True, {"ar_step": N + 1}, "`ar_step` must be in \\[0, 5\\] but is 6"),
        (
            True,
            {"num_inference_steps": 27},
            "`num_inference_steps` must be one that the released sampler can do, .* 1000 of 999",
        ),
        (False, {"class_labels": ["cat"]}, "the model is unconditional"),
    ],
)
def test_refuses(compat, options, message):
    with pytest.raises(ValueError, match=message):
        next(build(compat=compat).stream(**arguments(**options)))
