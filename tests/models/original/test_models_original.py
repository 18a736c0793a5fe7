"""What the vectors do not show: who sees whom, files, number formats, refusals."""

import pytest
import torch

from ardiff.models.original import AutoencoderOriginal, OriginalTransformerModel


TRANSFORMER = {
    "num_tokens": 3,
    "width": 16,
    "num_heads": 2,
    "window": 4,
    "num_context_tokens": 2,
    "context_width": 8,
}
VAE = {
    "image_size": 8,
    "patch_size": 2,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_tokens": 3,
    "codebook_size": 8,
    "pixel_channels": 4,
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
}


def build(model_class, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(**config).eval()


def inputs(seed=0, batch_size=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, 4, 3, 4, generator=generator)
    return latents, torch.randint(1000, (batch_size, 4), generator=generator)


@torch.no_grad()
def change_of_first_frame(**config):
    """How far the first frame's output moves when the last frame and its timestep change."""
    model, (latents, timestep) = build(OriginalTransformerModel, **TRANSFORMER | config), inputs()
    context = model.conditional_context(None, 2)
    other, later = latents.clone(), timestep.clone()
    other[:, -1], later[:, -1] = 1.0, 0
    return (model(latents, timestep, context) - model(other, later, context))[:, 0].abs().max().item()


def test_only_the_strict_mask_is_causal():
    assert change_of_first_frame(depth=1, attention_mask="video_temporal_causal") == 0.0
    assert change_of_first_frame(depth=2, attention_mask="video_temporal_causal") > 1e-4
    assert change_of_first_frame(depth=2, attention_mask="temporal_causal") == 0.0
    assert change_of_first_frame(depth=1, attention_mask="none") > 1e-4


@pytest.mark.parametrize("options", [{}, {"class_names": ["a", "b"], "positions": "rotary", "qk_norm": True}])
def test_transformer_survives_a_folder(tmp_path, options):
    model, (latents, timestep) = build(OriginalTransformerModel, **TRANSFORMER, depth=2, **options), inputs()
    model.save_pretrained(tmp_path)
    loaded = OriginalTransformerModel.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [each(latents, timestep, each.conditional_context(None, 2)) for each in (model, loaded)]
    assert torch.equal(*outputs)


def test_transformer_runs_in_bfloat16():
    model, (latents, timestep) = build(OriginalTransformerModel, **TRANSFORMER, depth=2), inputs()
    with torch.no_grad():
        full = model(latents, timestep, model.conditional_context(None, 2))
        model.to(torch.bfloat16)
        half = model(latents.bfloat16(), timestep, model.conditional_context(None, 2))
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().max() < 0.1 * full.abs().max()


def test_contexts():
    plain = build(OriginalTransformerModel, **TRANSFORMER, depth=1)
    named = build(OriginalTransformerModel, **TRANSFORMER, depth=1, class_names=["a", "b"])
    assert torch.equal(plain.conditional_context(None, 2), plain.context_emb.expand(2, -1, -1))
    assert not plain.unconditional_context(2).any()
    labels = torch.tensor([1, 0])
    assert torch.equal(named.conditional_context(labels, 2), named.class_emb[labels])
    assert torch.equal(named.conditional_context(None, 2), named.unconditional_context(2))
    assert torch.equal(named.unconditional_context(2), named.class_emb[[0, 0]])
    with pytest.raises(ValueError, match="this model has no classes"):
        plain.conditional_context(labels, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_mode": "add"}, "`merge_mode` must be one of share_norm, .* but is 'add'"),
        ({"attention_mask": "causal"}, "`attention_mask` must be one of none, .* but is 'causal'"),
        ({"positions": "learned"}, "`positions` must be one of absolute, rotary but is 'learned'"),
        ({"width": 18}, "`width` must be a multiple of 2 \\* `num_heads` = 4 but is 18"),
    ],
)
def test_transformer_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        OriginalTransformerModel(**TRANSFORMER | {"depth": 1} | options)


def test_transformer_refuses_shapes():
    model, (latents, timestep) = build(OriginalTransformerModel, **TRANSFORMER, depth=1), inputs()
    context = model.conditional_context(None, 2)
    with pytest.raises(ValueError, match=r"shape \(batch, 4, 3, 4\) but has \(2, 3, 3, 4\)"):
        model(latents[:, 1:], timestep[:, 1:], context)
    with pytest.raises(ValueError, match=r"`timestep` must have shape \(2, 4\) but has \(4,\)"):
        model(latents, timestep[0], context)
    with pytest.raises(ValueError, match=r"`context` must have shape \(2, 2, 8\) but has \(1, 2, 8\)"):
        model(latents, timestep, context[:1])


@pytest.mark.parametrize("clip_frames", [1, 4])
def test_autoencoder_survives_a_folder(tmp_path, clip_frames):
    vae = build(AutoencoderOriginal, **VAE, clip_frames=clip_frames)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderOriginal.from_pretrained(tmp_path)
    latents = inputs()[0]
    with torch.no_grad():
        assert torch.equal(vae.decode(latents), loaded.decode(latents))


def test_tokens_are_on_the_sphere_and_their_length_means_nothing():
    vae = build(AutoencoderOriginal, **VAE)
    frames = torch.rand(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        tokens = vae.encode(frames).mode()
        assert torch.allclose(tokens.norm(dim=-1), torch.ones(1, 2, 3))
        assert torch.allclose(vae.decode(tokens), vae.decode(tokens * 3), atol=1e-5)


def test_a_later_frame_changes_no_earlier_one():
    vae, latents = build(AutoencoderOriginal, **VAE, clip_frames=4), inputs()[0]
    other = latents.clone()
    other[:, -1] = 1.0
    with torch.no_grad():
        frames, others = vae.decode(latents), vae.decode(other)
    assert torch.equal(frames[:, :-1], others[:, :-1])
    assert not torch.equal(frames[:, -1], others[:, -1])
    with torch.no_grad():
        assert torch.allclose(vae.decode(latents[:, :2]), frames[:, :2], atol=1e-5)


def test_an_earlier_frame_of_another_clip_changes_nothing():
    vae, latents = build(AutoencoderOriginal, **VAE, clip_frames=2), inputs()[0]
    other = latents.clone()
    other[:, 1] = 1.0
    with torch.no_grad():
        assert torch.equal(vae.decode(latents)[:, 2:], vae.decode(other)[:, 2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, "`patch_size` must divide `image_size` 8 and be .* 2, but is 4"),
        ({"clip_frames": 0}, "`clip_frames` must be at least 1 but is 0"),
    ],
)
def test_autoencoder_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderOriginal(**VAE | options)


def test_autoencoder_refuses_shapes():
    vae = build(AutoencoderOriginal, **VAE)
    with pytest.raises(ValueError, match=r"\(batch, frames, 3, 8, 8\) but has \(3, 8, 8\)"):
        vae.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"\(batch, frames, 3, 4\) but has \(1, 2, 4, 4\)"):
        vae.decode(torch.zeros(1, 2, 4, 4))
