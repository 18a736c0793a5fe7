"""Training of the AR-VAE in two stages (AR-Diffusion section 3.2).

Stage "frames": encoder and decoder on single frames. Stage "decoder": the encoder is frozen, so latents do not change any
more, and the decoder learns to use the frames before. Losses: pixels, a small KL term, and where asked
for a perceptual and an adversarial one.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ardiff.data.benchmarks import open_set
from ardiff.data.clips import SceneClips, ShuffledFrames, VideoClips, step_generator
from ardiff.data.pixels import to_pixels, to_uint8
from ardiff.data.scenes import SCENES
from ardiff.data.video import write_video
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.training.adversarial import Adversary
from ardiff.training.loop import PartsOfSteps, TrainingConfig, TrainingRun, option
from ardiff.training.losses import PIXEL_LOSSES, reconstruction_loss
from ardiff.training.perceptual import PerceptualLoss


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingConfig(TrainingConfig):
    """Options of `ardiff train-autoencoder`."""

    stage: str = option("frames", "'frames' (encoder and decoder) or 'decoder' (temporal part, encoder frozen)")
    init_from: str = option("", "autoencoder folder to start from; needed by stage 'decoder'")
    latent_channels: int = option(16, "channels per token")
    width: int = option(192, "token width")
    kl_weight: float = option(4e-4, "weight of the KL term")
    picture_share: float = option(0.15, "share of generic pictures among the frames of stage 'frames'")
    pixel_loss: str = option("mixed", "'mixed' (L1 + 2 L2 + L1 of the gradients) or 'l1'")
    perceptual_weight: float = option(1.0, "weight of the perceptual loss, where `perceptual_vgg` is given")
    perceptual_vgg: str = option(
        "", "file with torchvision's VGG-16 (state dict or safetensors); '' = no perceptual loss"
    )
    perceptual_heads: str = option(
        "", "file with the linear layers of LPIPS for VGG; '' = all channels count the same"
    )
    adversarial_weight: float = option(0.0, "weight of the adversarial loss; 0 = none")
    adversarial_start: int = option(0, "step from which on the discriminator takes part")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("frames", "decoder"):
            raise ValueError(f"`stage` must be 'frames' or 'decoder' but is {self.stage!r}.")
        if self.stage == "decoder" and not self.init_from:
            raise ValueError("`init_from` must name a trained autoencoder folder for stage 'decoder' but is empty.")
        if not 0.0 <= self.picture_share < 1.0:
            raise ValueError(f"`picture_share` must be in [0, 1) but is {self.picture_share}.")
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"`pixel_loss` must be 'mixed' or 'l1' but is {self.pixel_loss!r}.")
        for name in ("perceptual_weight", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0 but is {getattr(self, name)}.")
        if self.perceptual_heads and not self.perceptual_vgg:
            raise ValueError("`perceptual_heads` must come with `perceptual_vgg`, which is empty.")
        if self.adversarial_weight and self.image_size < 32:
            raise ValueError(f"`image_size` must be at least 32 with an adversarial loss but is {self.image_size}.")


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
    perceptual = PerceptualLoss(config.perceptual_vgg, config.perceptual_heads) if config.perceptual_vgg else None
    adversary = None
    if config.adversarial_weight:
        adversary = Adversary(config.adversarial_weight, config.adversarial_start, config.learning_rate, config.seed)
    with TrainingRun(config, vae.train(), adversary) as run:
        device = run.accelerator.device
        if perceptual is not None:
            perceptual.to(device)
        if frames_only:
            clips = clip_dataset(config, max(64, config.batch_size // config.num_frames), rank=0)
            dataset = ShuffledFrames(clips, config.batch_size, config.picture_share)
            per_item, shape = dataset.num_batches, (config.batch_size, 1)
        else:
            dataset = clip_dataset(config, config.batch_size, rank=0)
            per_item, shape = 1, (config.batch_size, config.num_frames)
        run.measure(math.prod(shape), lambda model: empty_pass(model, *shape, train_encoder=frames_only))
        parts_of_steps = PartsOfSteps(run.parts, dataset)
        for parts in run.loader(parts_of_steps, run.step // per_item, -(-config.num_steps // per_item)):
            for index in range(run.step % per_item, min(per_item, run.step % per_item + config.num_steps - run.step)):
                for part, (item,) in zip(run.parts, parts, strict=True):
                    frames = to_pixels((item[index] if frames_only else item[0]).to(device))
                    generator = step_generator(config.seed, run.step, part)
                    with run.accumulate():
                        reconstruction, posterior = run.model(frames, generator=generator, train_encoder=frames_only)
                        if config.pixel_loss == "l1":
                            loss = F.l1_loss(reconstruction.float(), frames)
                        else:
                            loss = reconstruction_loss(reconstruction, frames)
                        figures = {"pixels": loss, "kl": posterior.kl()}
                        if perceptual is not None:
                            figures["perceptual"] = perceptual(reconstruction, frames)
                            loss = loss + config.perceptual_weight * figures["perceptual"]
                        if adversary is not None and run.step >= config.adversarial_start:
                            added, figures["discriminator"] = adversary.losses(loss, reconstruction, frames)
                            figures["adversarial"] = added
                            loss = loss + added
                        if frames_only:
                            loss = loss + config.kl_weight * figures["kl"]
                        mse = (reconstruction.detach().float() - frames).square().mean()
                        due = run.update(loss, psnr=-10.0 * torch.log10(mse / 4.0), **figures)
                if due:
                    export_autoencoder(run, frames)
        run.close()
    return run.folder / "vae"


def empty_pass(model: AutoencoderARVAE, batch_size: int, num_frames: int, *, train_encoder: bool) -> torch.Tensor:
    """A pass of the model on the device "meta", for counting; a scalar."""
    size = model.config.image_size
    return model(torch.empty(batch_size, num_frames, 3, size, size, device="meta"), train_encoder=train_encoder)[
        0
    ].sum()


def export_autoencoder(run: TrainingRun, frames: torch.Tensor) -> None:
    """Write the averaged model to `<out>/vae` and a strip (input above, reconstruction below) to `samples/`."""
    with run.untimed():
        vae = run.averaged()
        if vae is None:
            return
        strip = frames.flatten(0, 1)[:16]
        with torch.no_grad():
            drawn = vae.decode(vae.encode(strip[:, None]).mode())[:, 0]
        if run.config.stage == "frames":
            # The statistics make the exported latents unit-variance; training itself goes on with the raw tokens.
            mean, std = measure_latents(vae, frames)
            vae.register_to_config(latents_mean=mean, latents_std=std)
        with run.publish("vae") as folder:
            vae.save_pretrained(folder)
        pair = torch.cat([to_uint8(strip), to_uint8(drawn)], dim=1).cpu().numpy()
        write_video(list(pair), run.folder / "samples" / f"step-{run.step:08d}.png")
        progress = {"step": run.step, "minutes": run.seconds / 60}
        (run.folder / "progress.json").write_text(json.dumps(progress) + "\n")


def preset(name: str, **changes: object) -> AutoencoderTrainingConfig:
    """A preset with some options changed."""
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)} but is {name!r}.")
    return replace(PRESETS[name], **changes)
