"""The encoder does not know time, the decoder never looks ahead, and streaming decode equals batch decode."""

import pytest
import torch

from ardiff import AutoencoderARVAE
from ardiff.models.autoencoder_arvae import DecoderCache


def latents_of(generator, num_frames=7, dtype=torch.float64):
    return torch.randn(2, num_frames, 4, 4, generator=generator, dtype=dtype)


@torch.no_grad()
def test_encoder_sees_each_frame_alone(tiny_vae, generator):
    frames = torch.rand(2, 5, 3, 32, 32, generator=generator) * 2 - 1
    order = torch.tensor([3, 1, 4, 0, 2])
    posterior, shuffled = tiny_vae.encode(frames), tiny_vae.encode(frames[:, order])
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 4, 4)
    assert torch.allclose(shuffled.mean, posterior.mean[:, order], atol=1e-5)
    assert torch.allclose(shuffled.logvar, posterior.logvar[:, order], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(7))
def test_decoder_looks_back_over_its_window_and_never_ahead(tiny_vae, generator, changed):
    tiny_vae.double()
    latents = latents_of(generator)
    before = tiny_vae.decode(latents)
    latents[:, changed] += 1.0
    touched = (tiny_vae.decode(latents) != before).flatten(2).any(-1).any(0).tolist()
    window = tiny_vae.config.temporal_window
    assert touched == [changed <= frame < changed + window for frame in range(7)]


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 7, [3, 1, 3], [7], [2, 5]])
def test_streaming_decode_equals_batch_decode(tiny_vae, generator, parts):
    tiny_vae.double()
    latents = latents_of(generator)
    cache = DecoderCache()
    streamed = torch.cat([tiny_vae.decode(part, cache) for part in latents.split(parts, dim=1)], dim=1)
    assert torch.allclose(streamed, tiny_vae.decode(latents), atol=1e-12, rtol=0)
    assert cache.tokens.shape[1] == tiny_vae.config.temporal_window - 1


@torch.no_grad()
def test_statistics_standardise_the_latents_and_leave_pixels_alone(tiny_vae, generator):
    tiny_vae.double()
    frames = torch.rand(2, 3, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    raw = tiny_vae.encode(frames)
    drawn = tiny_vae.decode(raw.mode())
    mean, std = raw.mean.flatten(0, 2).mean(0), raw.mean.flatten(0, 2).std(0)
    tiny_vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    scaled = tiny_vae.encode(frames)
    assert torch.allclose(scaled.mean.flatten(0, 2).mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(scaled.mean.flatten(0, 2).std(0), torch.ones(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((0.5 * scaled.logvar).exp() * std, (0.5 * raw.logvar).exp(), rtol=1e-9)
    assert torch.allclose(tiny_vae.decode(scaled.mode()), drawn, atol=1e-9)


def test_kl_of_the_standard_normal_is_zero_and_grows_with_the_mean(tiny_vae, generator):
    posterior = tiny_vae.encode(torch.zeros(1, 1, 3, 32, 32))
    posterior.mean, posterior.logvar = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    assert posterior.kl().item() == 0.0
    posterior.mean = torch.full((1, 1, 4, 4), 2.0)
    assert posterior.kl().item() == pytest.approx(2.0)
    samples = torch.stack([posterior.sample(generator) for _ in range(2000)])
    assert samples.mean().item() == pytest.approx(2.0, abs=0.03)
    assert samples.std().item() == pytest.approx(1.0, abs=0.03)


def test_second_stage_leaves_the_encoder_alone(tiny_vae, generator):
    frames = torch.rand(1, 4, 3, 32, 32, generator=generator) * 2 - 1
    reconstruction, _ = tiny_vae(frames, generator=generator, train_encoder=False)
    reconstruction.square().mean().backward()
    learning = {name.split(".")[0] for name, parameter in tiny_vae.named_parameters() if parameter.grad is not None}
    assert "temporal_blocks" in learning
    assert not {"encoder_stem", "encoder_blocks", "encoder_norm", "encoder_queries", "to_moments"} & learning


def test_save_and_load(tiny_vae, generator, tmp_path):
    tiny_vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    tiny_vae.save_pretrained(tmp_path)
    loaded = AutoencoderARVAE.from_pretrained(tmp_path)
    frames = torch.rand(1, 2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.equal(loaded.encode(frames).mode(), tiny_vae.encode(frames).mode())


def test_errors_name_what_came(tiny_vae):
    with pytest.raises(
        ValueError, match=r"`frames` must have shape \(batch, frames, 3, 32, 32\) but has \(1, 3, 32, 32\)"
    ):
        tiny_vae.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"`latents` must have shape \(batch, frames, 4, 4\) but has \(1, 2, 5, 4\)"):
        tiny_vae.decode(torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="`image_size` must be a positive multiple of 16 but is 50"):
        AutoencoderARVAE(image_size=50)
    with pytest.raises(ValueError, match="`temporal_window` must be at least 1 but is 0"):
        AutoencoderARVAE(temporal_window=0)
