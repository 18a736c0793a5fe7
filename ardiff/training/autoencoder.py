"""Training of the AR-VAE in two stages (AR-Diffusion section 3.2).

Stage "frames": encoder and decoder on single frames. Stage "decoder": the encoder is frozen, so latents do not change any
more, and the decoder learns to use the frames before. Losses: `losses.reconstruction_loss` and a small KL term.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ardiff.data.benchmarks import open_set
from ardiff.data.clips import SceneClips, ShuffledFrames, VideoClips, step_generator
from ardiff.data.pixels import to_pixels, to_uint8
from ardiff.data.scenes import SCENES
from ardiff.data.video import write_video
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.training.loop import TrainingConfig, TrainingRun, option
from ardiff.training.losses import reconstruction_loss


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """Options of `ardiff train-autoencoder`."""

    stage: str = option("frames", "'frames' (encoder and decoder) or 'decoder' (temporal part, encoder frozen)")
    init_from: str = option("", "autoencoder folder to start from; needed by stage 'decoder'")
    latent_channels: int = option(16, "channels per token")
    width: int = option(192, "token width")
    kl_weight: float = option(4e-4, "weight of the KL term")
    picture_share: float = option(0.15, "share of generic pictures among the frames of stage 'frames'")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("frames", "decoder"):
            raise ValueError(f"`stage` must be 'frames' or 'decoder' but is {self.stage!r}.")
        if self.stage == "decoder" and not self.init_from:
            raise ValueError("`init_from` must name a trained autoencoder folder for stage 'decoder' but is empty.")
        if not 0.0 <= self.picture_share < 1.0:
            raise ValueError(f"`picture_share` must be in [0, 1) but is {self.picture_share}.")


PRESETS = {
    "scenes-64-cpu": AutoencoderTrainingConfig(num_steps=5_000, batch_size=64, checkpoint_every=250, sample_every=250),
    "scenes-64-cpu-decoder": AutoencoderTrainingConfig(
        stage="decoder", init_from="runs/autoencoder/vae", num_steps=3_000, batch_size=6, num_frames=6, learning_rate=5e-4,
        checkpoint_every=100, sample_every=200,
    ),
    "scenes-64-gpu": AutoencoderTrainingConfig(num_steps=60_000, batch_size=256, checkpoint_every=2000, num_workers=8),
}  # fmt: skip


def clip_dataset(config: TrainingConfig, batch_size: int, rank: int) -> SceneClips | VideoClips:
    """The clips a training configuration asks for."""
    if config.data == "scenes":
        return SceneClips(SCENES, batch_size, config.num_frames, config.image_size, config.seed, rank)
    found = open_set(config.data)
    sizes = batch_size, config.num_frames, config.image_size, config.seed
    return VideoClips(found.videos, found.class_names, *sizes, rank, config.stride)


@torch.no_grad()
def measure_latents(vae: AutoencoderARVAE, frames: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of the raw tokens of frames (N, 1, 3, S, S)."""
    latents = torch.cat([vae.encode(part).mode() for part in frames.split(64)]).flatten(0, -2).double()
    return latents.mean(0).tolist(), latents.std(0).tolist()


def train_autoencoder(config: AutoencoderTrainingConfig) -> Path:
    """Train, or go on where the run folder stands; returns the folder of the averaged model (`<out>/vae`)."""
    if config.init_from:
        vae = AutoencoderARVAE.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        torch.random.default_generator.manual_seed(config.seed)
        vae = AutoencoderARVAE(
            image_size=config.image_size, latent_channels=config.latent_channels, width=config.width
        )
    frames_only = config.stage == "frames"
    if not frames_only:
        encoder_parts = (vae.encoder_stem, vae.encoder_blocks, vae.encoder_norm, vae.to_moments)
        for part in encoder_parts:
            part.requires_grad_(False)
        vae.encoder_queries.requires_grad_(False)
    run = TrainingRun(config, vae.train())
    rank = run.accelerator.process_index
    if frames_only:
        clips = clip_dataset(config, max(64, config.batch_size // config.num_frames), rank)
        dataset = ShuffledFrames(clips, config.batch_size, config.picture_share)
        per_item = dataset.num_batches
    else:
        dataset, per_item = clip_dataset(config, config.batch_size, rank), 1
    for item in run.loader(dataset, run.step // per_item, -(-config.num_steps // per_item)):
        batches = item[run.step % per_item :] if frames_only else [item[0]]
        for batch in batches:
            if run.step >= config.num_steps:
                break
            frames = to_pixels(batch.to(run.accelerator.device))
            generator = step_generator(config.seed, run.step, rank)
            reconstruction, posterior = run.model(frames, generator=generator, train_encoder=frames_only)
            pixels = reconstruction_loss(reconstruction, frames)
            kl = posterior.kl()
            mse = (reconstruction.detach().float() - frames).square().mean()
            loss = pixels + config.kl_weight * kl if frames_only else pixels
            if run.update(loss, pixels=pixels, kl=kl, psnr=-10.0 * torch.log10(mse / 4.0)):
                export_autoencoder(run, frames)
    run.close()
    return run.folder / "vae"


def export_autoencoder(run: TrainingRun, frames: torch.Tensor) -> None:
    """Write the averaged model to `<out>/vae` and a strip (input above, reconstruction below) to `samples/`."""
    if not run.accelerator.is_main_process:
        return
    run.swap_in_average()
    vae = run.network
    if run.config.stage == "frames":
        # The statistics make the exported latents unit-variance; training itself goes on with the raw tokens.
        mean, std = measure_latents(vae, frames)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(run.folder / "vae")
    strip = frames.flatten(0, 1)[:16]
    with torch.no_grad():
        drawn = vae.decode(vae.encode(strip[:, None]).mode())[:, 0]
    if run.config.stage == "frames":
        vae.register_to_config(latents_mean=None, latents_std=None)
    run.swap_out_average()
    pair = torch.cat([to_uint8(strip), to_uint8(drawn)], dim=1).cpu().numpy()
    write_video(list(pair), run.folder / "samples" / f"step-{run.step:08d}.png")
    (run.folder / "progress.json").write_text(json.dumps({"step": run.step, "minutes": run.seconds / 60}) + "\n")


def preset(name: str, **changes: object) -> AutoencoderTrainingConfig:
    """A preset with some options changed."""
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)} but is {name!r}.")
    return replace(PRESETS[name], **changes)
