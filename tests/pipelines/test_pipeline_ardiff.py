"""The pipeline: one plan, exact caching, and nothing that looks changes anything."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import PIL.Image
import pytest
import torch

from ardiff import ARDiffPipeline, ad_schedule
from ardiff.data.video import write_video


N = 6
PLANS = [(1, 0), (5, 0), (5, 1), (5, 2), (9, 3), (5, N), (6, [0, N, 0, N, 0]), (5, [0, 1, 2, 3])]


def run(pipe, seed=0, **arguments):
    arguments = {"class_labels": ["clouds"], "num_frames": 5, "ar_step": 2, "num_inference_steps": N} | arguments
    return pipe(generator=torch.Generator().manual_seed(seed), **arguments)


def picture(seed=0, height=40, width=50):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()


@pytest.mark.parametrize(("num_frames", "ar_step"), PLANS)
@pytest.mark.parametrize("num_prompts", [0, 2])
def test_cached_equals_uncached(tiny_pipeline, num_frames, ar_step, num_prompts):
    tiny_pipeline.vae.double()
    tiny_pipeline.transformer.double()
    prompts = [picture(seed) for seed in range(num_prompts)] or None
    arguments = {"prompt_frames": prompts, "num_frames": num_frames + num_prompts, "ar_step": ar_step}
    cached = run(tiny_pipeline, output_type="latent", **arguments).frames
    uncached = run(tiny_pipeline, output_type="latent", use_cache=False, **arguments).frames
    assert cached.dtype == torch.float64
    assert (cached - uncached).abs().max() <= 1e-10
    assert cached.std() > 0.1


def test_cached_equals_uncached_when_the_window_slides(tiny_pipeline):
    from ardiff import ADScheduler, ARDiffTransformerModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = ARDiffTransformerModel(num_tokens=4, in_channels=4, width=32, depth=2, num_heads=2, window=3)
        for parameter in narrow.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    pipe = ARDiffPipeline(tiny_pipeline.vae.double(), narrow.double(), ADScheduler())
    pipe.set_progress_bar_config(disable=True)
    frames = [
        run(pipe, class_labels=None, num_frames=12, ar_step=3, use_cache=use, output_type="latent").frames
        for use in (True, False)
    ]
    assert (frames[0] - frames[1]).abs().max() <= 1e-10


@pytest.fixture
def not_causal(tiny_pipeline):
    from ardiff import ADScheduler, ARDiffTransformerModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ARDiffTransformerModel(
            num_tokens=4, in_channels=4, width=32, depth=2, num_heads=2, window=4, class_names=["clouds"], causal=False
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    pipe = ARDiffPipeline(tiny_pipeline.vae.double(), model.double(), ADScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("ar_step", [0, 2, N])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_model_that_is_not_causal_is_shown_the_whole_window(not_causal, ar_step, guidance_scale):
    found = run(not_causal, num_frames=4, ar_step=ar_step, guidance_scale=guidance_scale, output_type="latent").frames
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)], dim=1)
    scheduler = not_causal.scheduler
    scheduler.set_timesteps(N)
    before = torch.zeros(4, dtype=torch.long)
    for after in ad_schedule(4, N, ar_step):
        timestep = scheduler.timestep_of(before)[None]
        with torch.no_grad():
            with_class, without = (
                not_causal.transformer(latents, timestep, torch.tensor([label])) for label in (0, 1)
            )
        output = without + guidance_scale * (with_class - without)
        latents = scheduler.step(output, before, latents, update_mask=before != after).prev_sample
        before = after
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-10)


def test_a_model_that_is_not_causal_slides_its_window_and_refuses_a_cache(not_causal):
    assert not not_causal.supports_frame_cache
    steps = list(not_causal.stream(num_frames=7, ar_step=2, num_inference_steps=N, class_labels=["clouds"]))
    assert {step.frame_evaluations for step in steps} == {4}
    assert [index for step in steps for index, _ in step.finished] == list(range(7))
    with pytest.raises(ValueError, match="`use_cache` must be None or False"):
        run(not_causal, num_frames=4, use_cache=True)
    with pytest.raises(ValueError, match="`num_frames` must be at least 4, the window of this model, but is 3"):
        run(not_causal, num_frames=3)


@pytest.mark.parametrize(("num_frames", "ar_step"), PLANS)
@pytest.mark.parametrize("num_prompts", [0, 2])
def test_evaluations_are_the_least_possible(tiny_pipeline, num_frames, ar_step, num_prompts):
    """F * N updates, a commit per frame that a later active frame needs, and one evaluation per prompt frame."""
    seen = []
    tiny_pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[1], kwargs["num_commit"])), with_kwargs=True
    )
    total = num_frames + num_prompts
    schedule = ad_schedule(total, N, ar_step, num_prompt_frames=num_prompts)
    prompts = [picture(seed) for seed in range(num_prompts)] or None
    steps = list(
        tiny_pipeline.stream(
            prompts,
            num_frames=total,
            ar_step=ar_step,
            num_inference_steps=N,
            generator=torch.Generator().manual_seed(0),
        )
    )
    new = schedule[:, num_prompts:]
    finished_in_row = (new == N).int().argmax(0)
    commits = sum(int(row < finished_in_row[-1]) for row in finished_in_row)
    assert len(seen) == len(schedule)
    assert sum(frames for frames, _ in seen) == num_frames * N + commits + num_prompts
    assert sum(commit for _, commit in seen) == commits + num_prompts
    assert [step.frame_evaluations for step in steps] == [frames for frames, _ in seen]
    if isinstance(ar_step, int):
        assert commits == (num_frames - 1 if ar_step > 0 else 0)


def test_stream_follows_the_plan_and_call_drains_it(tiny_pipeline):
    schedule = ad_schedule(7, N, 2, num_prompt_frames=2)
    prompts = [picture(0), picture(1)]
    arguments = {"class_labels": ["balls"], "num_frames": 7, "ar_step": 2, "num_inference_steps": N}
    steps = list(tiny_pipeline.stream(prompts, generator=torch.Generator().manual_seed(3), **arguments))
    assert torch.equal(torch.stack([step.step_index for step in steps]), schedule)
    assert [step.iteration for step in steps] == list(range(1, len(schedule) + 1))
    assert {step.num_iterations for step in steps} == {len(schedule)}
    for step in steps:
        assert torch.allclose(step.noise_level, (N - step.step_index) / N)
    finished = [item for step in steps for item in step.finished]
    assert [index for index, _ in finished] == list(range(7))
    assert [index for index, _ in steps[0].finished] == [0, 1]
    assert all(frame.dtype == np.uint8 and frame.shape == (32, 32, 3) for _, frame in finished)
    video = run(tiny_pipeline, seed=3, prompt_frames=prompts, output_type="np", **arguments).frames
    assert np.array_equal((video[0] * 255).round().astype(np.uint8), np.stack([frame for _, frame in finished]))


def test_a_longer_video_starts_with_the_same_frames(tiny_pipeline):
    tiny_pipeline.transformer.double()
    short = run(tiny_pipeline, num_frames=4, output_type="latent").frames
    long = run(tiny_pipeline, num_frames=7, output_type="latent").frames
    assert torch.allclose(long[:, :4], short, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ar_step", [0, 2, N])
def test_a_preview_changes_no_bit(tiny_pipeline, ar_step):
    arguments = {"class_labels": ["sunset"], "num_frames": 5, "ar_step": ar_step, "num_inference_steps": N}
    state = torch.get_rng_state()
    watched = []
    for step in tiny_pipeline.stream(generator=torch.Generator().manual_seed(0), **arguments):
        previews = step.preview([4, 1])
        assert [preview.shape for preview in previews] == [(32, 32, 3)] * 2
        watched += [frame for _, frame in step.finished]
    assert torch.equal(torch.get_rng_state(), state)
    plain = run(tiny_pipeline, output_type="np", **arguments).frames[0]
    assert np.array_equal(np.stack(watched), (plain * 255).round().astype(np.uint8))
    # In the last iteration every guess is the result.
    last = step.preview(range(5))
    assert np.abs(np.stack(last).astype(int) - np.stack(watched).astype(int)).max() <= 1


def test_a_batch_equals_single_videos(tiny_pipeline):
    tiny_pipeline.transformer.double()
    tiny_pipeline.vae.double()
    labels, seeds = ["balls", "clouds"], (4, 9)
    arguments = {"num_frames": 4, "ar_step": 3, "num_inference_steps": N, "output_type": "latent"}
    together = tiny_pipeline(
        class_labels=labels, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **arguments
    ).frames
    for index, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        single = tiny_pipeline(class_labels=[label], generator=torch.Generator().manual_seed(seed), **arguments).frames
        assert torch.allclose(together[index], single[0], atol=1e-12, rtol=0)
    frames = [frame for step in tiny_pipeline.stream(class_labels=labels, num_frames=2, num_inference_steps=2, ar_step=0)
              for _, frame in step.finished]  # fmt: skip
    assert [frame.shape for frame in frames] == [(2, 32, 32, 3)] * 2


def test_guidance(tiny_pipeline):
    plain = run(tiny_pipeline, guidance_scale=1.0, output_type="latent").frames
    strong = run(tiny_pipeline, guidance_scale=3.0, output_type="latent").frames
    assert not torch.allclose(plain, strong, atol=1e-3)
    # Without a class there is nothing to guide towards.
    assert torch.equal(
        run(tiny_pipeline, class_labels=None, guidance_scale=3.0, output_type="latent").frames,
        run(tiny_pipeline, class_labels=None, guidance_scale=1.0, output_type="latent").frames,
    )


def test_guidance_is_the_two_branches_combined(tiny_pipeline):
    """One step to the end: the result is u + g (c - u) of the two single runs."""
    tiny_pipeline.transformer.double()
    once = {"num_inference_steps": 1, "ar_step": 0, "output_type": "latent"}
    without = run(tiny_pipeline, class_labels=None, **once).frames
    with_class = run(tiny_pipeline, guidance_scale=1.0, **once).frames
    guided = run(tiny_pipeline, guidance_scale=2.5, **once).frames
    assert torch.allclose(guided, without + 2.5 * (with_class - without), atol=1e-9)


def test_prompt_frames_of_every_kind(tiny_pipeline, tmp_path):
    frames = [picture(seed, 32, 32) for seed in range(3)]
    expected = run(tiny_pipeline, prompt_frames=frames, output_type="latent").frames
    images = [PIL.Image.fromarray(frame) for frame in frames]
    for prompts in (images, np.stack(frames), np.stack(frames)[None]):
        assert torch.equal(run(tiny_pipeline, prompt_frames=prompts, output_type="latent").frames, expected)
    assert not torch.equal(run(tiny_pipeline, output_type="latent").frames, expected)
    path = tmp_path / "clip.mp4"
    write_video(frames, path)
    video = run(tiny_pipeline, prompt_frames=path, output_type="np").frames
    assert video.shape == (1, 5, 32, 32, 3)


def test_prompt_frames_stay_given(tiny_pipeline):
    frames = [picture(0, 32, 32), picture(1, 32, 32)]
    video = run(tiny_pipeline, prompt_frames=frames, output_type="np").frames[0]
    seen = np.stack(tiny_pipeline.reconstruct(frames))
    assert np.array_equal((video[:2] * 255).round().astype(np.uint8), seen)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(tiny_pipeline, output_type):
    frames = run(tiny_pipeline, output_type=output_type).frames
    if output_type == "pil":
        assert [len(clip) for clip in frames] == [5]
        assert frames[0][0].size == (32, 32)
    else:
        shape = {"np": (1, 5, 32, 32, 3), "pt": (1, 5, 3, 32, 32), "latent": (1, 5, 4, 4)}[output_type]
        assert tuple(frames.shape) == shape
        if output_type != "latent":
            assert 0 <= frames.min() <= frames.max() <= 1


def test_closing_the_generator_frees_the_run(tiny_pipeline, monkeypatch):
    caches = []
    new_cache = tiny_pipeline.transformer.new_cache

    def remember(*arguments):
        cache = new_cache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(tiny_pipeline.transformer, "new_cache", remember)
    stream = tiny_pipeline.stream(num_frames=5, num_inference_steps=N)
    next(stream)
    assert caches[0]() is not None
    stream.close()
    gc.collect()
    assert caches[0]() is None
    assert torch.is_grad_enabled()


def test_two_runs_at_once_do_not_meet(tiny_pipeline):
    def frames_of(steps):
        return [frame for step in steps for _, frame in step.finished]

    def start(num_inference_steps, seed):
        arguments = {"num_frames": 4, "ar_step": 2, "num_inference_steps": num_inference_steps}
        return tiny_pipeline.stream(generator=torch.Generator().manual_seed(seed), **arguments)

    alone = [frames_of(start(3, 0)), frames_of(start(9, 1))]
    first, second = start(3, 0), start(9, 1)
    first_steps, second_steps = [], []
    for step in first:
        first_steps.append(step)
        second_steps.append(next(second))
    second_steps += second
    assert np.array_equal(alone[0], frames_of(first_steps))
    assert np.array_equal(alone[1], frames_of(second_steps))


def test_grad_mode_does_not_leak_between_yields(tiny_pipeline):
    for step in tiny_pipeline.stream(num_frames=2, num_inference_steps=2, ar_step=0):
        assert torch.is_grad_enabled()
        step.preview([0])
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("arguments", [{}, {"device_map": "balanced"}, {"low_cpu_mem_usage": True}])
def test_round_trip(tiny_pipeline, tmp_path, arguments):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = ARDiffPipeline.from_pretrained(tmp_path, dtype=torch.float32, **arguments)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, output_type="latent").frames, run(tiny_pipeline, output_type="latent").frames)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_round_trip_in_a_fresh_process(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    code = (
        "import sys, torch\n"
        "from ardiff import ARDiffPipeline\n"
        "pipe = ARDiffPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "frames = pipe(class_labels=['clouds'], num_frames=5, ar_step=2, num_inference_steps=6,\n"
        "              generator=torch.Generator().manual_seed(0), output_type='latent').frames\n"
        "print(frames.double().sum().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    expected = run(tiny_pipeline, output_type="latent").frames.double().sum().item()
    assert float(result.stdout) == pytest.approx(expected, abs=1e-4)


def test_half_precision_weights_load_as_asked(tiny_pipeline, tmp_path):
    tiny_pipeline.vae.half()
    tiny_pipeline.transformer.half()
    tiny_pipeline.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = ARDiffPipeline.from_pretrained(tmp_path, dtype=dtype)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.transformer.dtype == loaded.vae.dtype == dtype
        frames = run(loaded, output_type="latent").frames
        assert frames.dtype == torch.float32
        assert frames.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 17, "ar_step": 0}, "`ar_step` must be at least 1 .* window holds 16 frames .* 17 in flight"),
        ({"ar_step": 7}, r"`ar_step` must be in \[0, 6\] but is 7"),
        ({"ar_step": -1}, r"`ar_step` must be in \[0, 6\] but is -1"),
        ({"num_frames": 0}, "`num_frames` .* is 0"),
        ({"class_labels": ["dogs"]}, "`class_labels` must name classes of this model .*balls.* but has 'dogs'"),
        ({"class_labels": [3]}, "`class_labels` .* but has 3"),
        ({"guidance_scale": 0.5}, r"`guidance_scale` must be in \[1, 20\] but is 0.5"),
        ({"output_type": "gif"}, "`output_type` must be one of pil, np, pt, latent but is 'gif'"),
        ({"prompt_frames": []}, "`prompt_frames` must hold at least one frame"),
        ({"prompt_frames": np.zeros((4, 4), np.uint8)}, "`prompt_frames` as an array"),
        ({"prompt_frames": [picture()] * 5}, "`num_frames` counts the prompt frames too .* 5, but is 5"),
        ({"prompt_frames": "no/such/clip.mp4"}, "clip.mp4"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` must be in"),
    ],
)
def test_bad_input_is_one_clear_sentence(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        run(tiny_pipeline, **arguments)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="model folder or a Hub id but is .*nowhere"):
        ARDiffPipeline.from_pretrained(tmp_path / "nowhere")
