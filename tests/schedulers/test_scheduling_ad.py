"""The masked per-frame DDIM step against closed forms, one frame at a time, and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler

from ardiff.schedulers.scheduling_ad import ADScheduler


PREDICTION_TYPES = ["sample", "epsilon", "v_prediction"]
# With whether the betas are rescaled, which noise as a prediction rules out.
KINDS = [(kind, False) for kind in PREDICTION_TYPES] + [("sample", True), ("v_prediction", True)]
B, F, L, C = 2, 5, 3, 4


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ready(prediction_type="sample", num_inference_steps=50, **config):
    scheduler = ADScheduler(prediction_type=prediction_type, **config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def diffusers_ddim(prediction_type, num_inference_steps=50, rescaled=False):
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescaled,
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def test_alphas_cumprod():
    alphas_cumprod = ADScheduler().alphas_cumprod
    assert alphas_cumprod.dtype == torch.float32
    expected = torch.tensor([0.9999000, 0.9997973, 0.9971389, 0.3312746, 0.0010490, 0.00073341])
    assert torch.allclose(alphas_cumprod[[0, 1, 21, 500, 981, 999]], expected, rtol=0, atol=1e-7)


def test_timesteps_are_trailing():
    timesteps = ready().timesteps
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == list(range(999, 0, -20))
    for num_inference_steps in (1, 3, 7, 30, 64, 999, 1000):
        timesteps = ready(num_inference_steps=num_inference_steps).timesteps
        assert timesteps.shape == (num_inference_steps,)
        assert timesteps[0] == 999
        assert (timesteps.diff() < 0).all()
        assert timesteps[-1] == round(1000 / num_inference_steps) - 1


def test_timestep_and_noise_level_of_a_step_index():
    scheduler = ready(num_inference_steps=4)
    step_index = torch.tensor([[0, 1, 2], [3, 4, 0]])
    timestep = scheduler.timestep_of(step_index)
    assert timestep.dtype == torch.int64
    assert timestep.tolist() == [[999, 749, 499], [249, 0, 999]]
    noise_level = scheduler.noise_level(step_index)
    assert noise_level.dtype == torch.float32
    assert noise_level.tolist() == [[1.0, 0.75, 0.5], [0.25, 0.0, 1.0]]
    assert torch.equal(noise_level[step_index < 4], ((timestep + 1) / 1000)[step_index < 4])


def test_finished_frames_are_shown_at_the_commit_timestep_and_given_ones_at_0():
    every_index = torch.arange(6)
    assert ready(num_inference_steps=4).timestep_of(every_index).tolist() == [999, 749, 499, 249, 0, 0]
    trusting_less = ready(num_inference_steps=4, commit_timestep=80)
    assert trusting_less.timestep_of(every_index).tolist() == [999, 749, 499, 249, 80, 0]
    # They are no noisier for that: neither their level nor any step of the others changes.
    assert trusting_less.noise_level(every_index[:-1]).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    sample, index = normal(B, 4, L, C), torch.arange(4)
    stepped, expected = (
        scheduler.step(0.5 * sample, index, sample).prev_sample
        for scheduler in (trusting_less, ready(num_inference_steps=4))
    )
    assert torch.equal(stepped, expected)


@pytest.mark.parametrize(("prediction_type", "rescaled"), KINDS)
@pytest.mark.parametrize("num_inference_steps", [1, 7, 50])
def test_a_perfect_model_reaches_the_clean_frames_along_the_exact_path(prediction_type, rescaled, num_inference_steps):
    scheduler = ready(prediction_type, num_inference_steps, rescale_betas_zero_snr=rescaled)
    clean, noise = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    sample = scheduler.add_noise(clean, noise, scheduler.timestep_of(torch.zeros(B, F, dtype=torch.int64)))
    for index in range(num_inference_steps):
        step_index = torch.full((F,), index)
        timesteps = scheduler.timestep_of(step_index).expand(B, F)
        model_output = scheduler.training_target(clean, noise, timesteps)
        output = scheduler.step(model_output, step_index, sample)
        assert torch.allclose(output.pred_original_sample, clean, rtol=0, atol=1e-11)
        sample = output.prev_sample
        if index + 1 < num_inference_steps:
            expected = scheduler.add_noise(clean, noise, scheduler.timestep_of(step_index + 1).expand(B, F))
            assert torch.allclose(sample, expected, rtol=0, atol=1e-12)
    assert torch.allclose(sample, clean, rtol=0, atol=1e-12)
    if prediction_type == "sample":
        assert torch.equal(sample, clean)


def test_rescaled_betas_leave_nothing_at_the_last_timestep():
    plain, rescaled = ADScheduler(), ADScheduler(rescale_betas_zero_snr=True)
    clean, noise = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    last = torch.full((B, F), 999)
    assert torch.equal(rescaled.add_noise(clean, noise, last), noise)
    assert not torch.equal(plain.add_noise(clean, noise, last), noise)
    assert rescaled.alphas_cumprod[0] == plain.alphas_cumprod[0]
    assert (rescaled.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize(("rescaled", "spread"), [(False, 0.64), (True, 1.0)])
def test_what_all_frames_share_keeps_its_spread_from_pure_noise(rescaled, spread):
    """A direction of a whole clip, such as its brightness, of variance 2,000 beside noise of variance 1, and the model that
    is best for it. The trace that the paper's betas leave there tells it, in pure noise, that all clips are alike."""
    scheduler, variance = ready(num_inference_steps=1000, rescale_betas_zero_snr=rescaled), 2000.0
    sample = torch.ones(1, 1, 1, 1, dtype=torch.float64)  # one standard deviation of the noise
    for index, alpha_bar in enumerate(scheduler._alphas_cumprod.flip(0)):
        guess = alpha_bar.sqrt() * variance * sample / (alpha_bar * variance + 1 - alpha_bar)
        sample = scheduler.step(guess, torch.tensor([index]), sample).prev_sample
    assert sample.item() / variance**0.5 == pytest.approx(spread, abs=0.01)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(F,), (B, F)])
def test_frames_outside_the_mask_keep_every_bit(prediction_type, shape):
    scheduler = ready(prediction_type)
    sample, model_output = normal(B, F, L, C, dtype=torch.float32), normal(B, F, L, C, seed=1, dtype=torch.float32)
    mask = torch.tensor([True, False, True, False, False]).expand(shape).clone()
    if len(shape) == 2:
        mask[1] = ~mask[1]
    step_index = torch.where(mask, 49, 50)  # the others are finished: there is no step from index N
    output = scheduler.step(model_output, step_index, sample, mask)
    kept = ~mask.expand(B, F)
    assert torch.equal(output.prev_sample[kept], sample[kept])
    assert torch.equal(output.pred_original_sample[kept], sample[kept])
    assert (output.prev_sample[~kept] != sample[~kept]).all()
    assert output.prev_sample.isfinite().all()


def test_an_update_of_a_finished_frame_is_not_quietly_wrong():
    sample = normal(1, 2, L, C)
    output = ready().step(sample, torch.tensor([50, 3]), sample)
    assert output.prev_sample[:, 0].isnan().all()
    assert output.prev_sample[:, 1].isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_vectorised_step_equals_one_frame_at_a_time(prediction_type):
    scheduler = ready(prediction_type)
    generator = torch.Generator().manual_seed(3)
    sample, model_output = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    step_index = torch.randint(50, (B, F), generator=generator)
    mask = torch.rand(B, F, generator=generator) < 0.6
    output = scheduler.step(model_output, step_index, sample, mask)
    for clip in range(B):
        for frame in range(F):
            one = (slice(clip, clip + 1), slice(frame, frame + 1))
            alone = scheduler.step(model_output[one], step_index[one], sample[one], mask[one])
            assert torch.equal(output.prev_sample[one], alone.prev_sample)
            assert torch.equal(output.pred_original_sample[one], alone.pred_original_sample)
    shared = scheduler.step(model_output, step_index[0], sample, mask[0])
    repeated = scheduler.step(model_output, step_index[:1].expand(B, F), sample, mask[:1].expand(B, F))
    assert torch.equal(shared.prev_sample, repeated.prev_sample)


@pytest.mark.parametrize(("prediction_type", "rescaled"), KINDS)
@pytest.mark.parametrize("num_inference_steps", [1, 10, 50])
def test_synchronous_sampling_equals_diffusers_ddim(prediction_type, rescaled, num_inference_steps):
    scheduler = ready(prediction_type, num_inference_steps, rescale_betas_zero_snr=rescaled)
    reference = diffusers_ddim(prediction_type, num_inference_steps, rescaled)
    assert torch.equal(reference.timesteps, scheduler.timesteps)
    sample = expected = normal(B, F, L, C)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        model_output = 0.3 * torch.tanh(expected) + 0.1 * normal(B, F, L, C, seed=index)
        ours = scheduler.step(model_output, torch.full((F,), index), sample)
        theirs = reference.step(model_output, timestep, expected)
        # diffusers keeps its alphas in float32; at timestep 999 the noise prediction is divided by sqrt(7e-4).
        assert torch.allclose(ours.pred_original_sample, theirs.pred_original_sample, rtol=2e-4, atol=2e-4)
        sample, expected = ours.prev_sample, theirs.prev_sample
        assert torch.allclose(sample, expected, rtol=2e-5, atol=2e-5)


def test_each_frame_of_a_plan_equals_diffusers_ddim_at_its_own_step():
    scheduler, reference = ready(), diffusers_ddim("sample")
    sample, model_output = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    step_index = torch.tensor([49, 40, 21, 7, 0])
    output = scheduler.step(model_output, step_index, sample)
    for frame, index in enumerate(step_index.tolist()):
        timestep = int(scheduler.timesteps[index])
        expected = reference.step(model_output[:, frame], timestep, sample[:, frame]).prev_sample
        assert torch.allclose(output.prev_sample[:, frame], expected, rtol=1e-5, atol=1e-5)


def test_noise_and_target_per_frame_equal_diffusers():
    scheduler, reference = ADScheduler(prediction_type="v_prediction"), diffusers_ddim("v_prediction")
    clean, noise = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    timesteps = torch.randint(1000, (B, F), generator=torch.Generator().manual_seed(2))
    flat = (clean.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten())
    expected = reference.add_noise(*flat).unflatten(0, (B, F))
    assert torch.allclose(scheduler.add_noise(clean, noise, timesteps), expected, rtol=0, atol=2e-5)
    expected = reference.get_velocity(*flat).unflatten(0, (B, F))
    assert torch.allclose(scheduler.training_target(clean, noise, timesteps), expected, rtol=0, atol=2e-5)
    assert ADScheduler().training_target(clean, noise, timesteps) is clean
    assert ADScheduler(prediction_type="epsilon").training_target(clean, noise, timesteps) is noise


def test_float32_factors_are_rounded_float64_factors():
    # From float32 alphas the factor sqrt(1 - alpha_bar) at timestep 0 would be off by 1e-4 of itself.
    scheduler = ADScheduler()
    zeros, ones = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    noise_rate = scheduler.add_noise(zeros, ones, torch.tensor([[0, 1]])).flatten()
    beta_1 = (1e-4**0.5 + (0.02**0.5 - 1e-4**0.5) / 999) ** 2
    expected = torch.tensor([1e-4, 1 - (1 - 1e-4) * (1 - beta_1)], dtype=torch.float64).sqrt()
    assert torch.allclose(noise_rate.double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_sample_is_kept(dtype):
    sample = normal(B, F, L, C, dtype=dtype)
    scheduler = ready("epsilon")
    output = scheduler.step(sample.float(), torch.arange(F), sample)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert scheduler.add_noise(sample, sample, torch.arange(F)).dtype == dtype


def test_changing_the_number_of_steps_changes_the_step():
    sample, index = normal(1, 1, L, C), torch.tensor([1])
    scheduler = ready(num_inference_steps=50)
    scheduler.step(sample, index, sample)
    scheduler.set_timesteps(10)
    expected = ready(num_inference_steps=10).step(0.5 * sample, index, sample).prev_sample
    assert torch.equal(scheduler.step(0.5 * sample, index, sample).prev_sample, expected)


def test_save_and_load(tmp_path):
    scheduler = ADScheduler(
        num_train_timesteps=100,
        beta_start=1e-3,
        beta_end=0.1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        commit_timestep=7,
    )
    scheduler.save_pretrained(tmp_path)
    loaded = ADScheduler.from_pretrained(tmp_path)
    assert type(loaded) is ADScheduler
    assert dict(loaded.config) == dict(scheduler.config)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert len(loaded) == 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 0}, "`num_train_timesteps` must be >= 1 but is 0"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_start": 0.1}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"prediction_type": "x0"}, "`prediction_type` must be one of .* but is 'x0'"),
        (
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            "`prediction_type` must be 'sample' or 'v_prediction' with `rescale_betas_zero_snr` but is 'epsilon'",
        ),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "`num_train_timesteps` must be >= 2 .* but is 1"),
        ({"commit_timestep": -1}, r"`commit_timestep` must be in \[0, 999\] but is -1"),
        ({"commit_timestep": 1000}, r"`commit_timestep` must be in \[0, 999\] but is 1000"),
    ],
)
def test_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ADScheduler(**config)


def test_wrong_calls_are_refused():
    scheduler, sample = ADScheduler(), normal(B, F, L, C)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        scheduler.step(sample, torch.zeros(F, dtype=torch.int64), sample)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        scheduler.timestep_of(torch.zeros(F, dtype=torch.int64))
    for num_inference_steps in (0, 1001):
        with pytest.raises(ValueError, match=r"`num_inference_steps` must be in \[1, 1000\]"):
            scheduler.set_timesteps(num_inference_steps)
    scheduler.set_timesteps(10)
    index = torch.zeros(F, dtype=torch.int64)
    with pytest.raises(ValueError, match="`model_output` must have the shape of `sample`"):
        scheduler.step(sample[:, 1:], index, sample)
    with pytest.raises(ValueError, match="`step_index` must have one value per frame"):
        scheduler.step(sample, index[:, None], sample)
    with pytest.raises(ValueError, match="`update_mask` must have one value per frame"):
        scheduler.step(sample, index, sample, torch.ones(B, dtype=torch.bool))
    with pytest.raises(ValueError, match="`timesteps` must have one value per frame"):
        scheduler.add_noise(sample, sample, torch.zeros(B, dtype=torch.int64))


def test_a_step_that_reuses_the_guess_is_a_step_left_out():
    """Two steps with the same guess of the clean frames are one step twice as long: caching a frame's guess in time changes
    its path no differently than fewer steps do, so there is one option for both."""
    fine, coarse = ready(num_inference_steps=10), ready(num_inference_steps=5)
    sample, guess = normal(B, F, L, C), normal(B, F, L, C, seed=1)
    for index in range(5):
        twice = sample
        for part in (2 * index, 2 * index + 1):
            twice = fine.step(guess, torch.full((F,), part), twice).prev_sample
        once = coarse.step(guess, torch.full((F,), index), sample).prev_sample
        assert torch.allclose(twice, once, rtol=0, atol=1e-12)
