"""Training of the causal transformer on the tokens of a frozen autoencoder (AR-Diffusion sections 3.2 and 3.3).

Every clip is noised with one timestep per frame. Most clips get them from FoPP; a share gets equal timesteps and a share
rows of real sampling plans (FoPP almost never shows equal timesteps, or a single noisy frame behind clean ones).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from ardiff.data.clips import RandomClips, SceneClips, step_generator
from ardiff.data.latents import LatentClips, check_autoencoder
from ardiff.data.pixels import to_pixels
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.scheduling_ad import ADScheduler
from ardiff.training.autoencoder import clip_dataset
from ardiff.training.loop import PartsOfSteps, TrainingConfig, TrainingRun, option
from ardiff.training.losses import diffusion_loss, errors_by_timestep, snr_weight
from ardiff.training.timesteps import (
    sample_fopp,
    sample_incremental,
    sample_independent,
    sample_lagged,
    sample_synchronous,
)


SAMPLERS = {
    "fopp": sample_fopp,
    "synchronous": sample_synchronous,
    "independent": sample_independent,
    "incremental": sample_incremental,
    "lagged": sample_lagged,
}


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainingConfig(TrainingConfig):
    """Options of `ardiff train`."""

    vae: str = option("runs/autoencoder/vae", "folder of the trained autoencoder")
    width: int = option(256, "transformer width")
    depth: int = option(8, "transformer blocks")
    num_heads: int = option(4, "attention heads")
    prediction_type: str = option("sample", "'sample' (x0), 'epsilon' or 'v_prediction'")
    rescale_betas_zero_snr: bool = option(
        False, "leave nothing of a frame at the last timestep, where sampling starts"
    )
    commit_timestep: int = option(
        0, "how noisy sampling says that finished frames are, in timesteps, so that their errors are handed on less"
    )
    timesteps: str = option("fopp", f"law of the training timesteps: {', '.join(SAMPLERS)}")
    synchronous_share: float = option(0.1, "share of clips with one timestep for all frames")
    lagged_share: float = option(0.3, "share of clips with a row of a random sampling plan")
    timestep_candidates: int = option(
        1,
        "timesteps drawn for each clip, one of which is taken so that a step has all noise levels evenly; 1 = left to chance",
    )
    class_dropout: float = option(0.1, "share of clips trained without their class, for guidance")
    snr_cap: float = option(5.0, "x0 loss weight of a frame is min(1 + SNR, this); 1 = plain mean squared error")
    init_from: str = option("", "pipeline folder whose transformer to start from; '' = random weights")
    draws_per_clip: int = option(2, "how many times a clip is noised in a step; encoding it costs once")
    image_data: str = option(
        "scenes", "where single pictures come from, as `data`; classes are matched by their names"
    )
    images_per_clip: float = option(
        0.0, "pictures trained on beside every clip, each as a clip of one frame; 0 = none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps not in SAMPLERS:
            raise ValueError(f"`timesteps` must be one of {', '.join(SAMPLERS)} but is {self.timesteps!r}.")
        for name in ("draws_per_clip", "timestep_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 but is {getattr(self, name)}.")
        if self.snr_cap < 1.0:
            raise ValueError(f"`snr_cap` must be at least 1 but is {self.snr_cap}.")
        if self.images_per_clip < 0 or 0 < self.images_per_clip * self.batch_size < 1:
            raise ValueError(
                "`images_per_clip` must be 0 or give a batch at least one picture (1 / `batch_size`) but is "
                f"{self.images_per_clip}."
            )
        shares = self.synchronous_share, self.lagged_share
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"`synchronous_share` and `lagged_share` must be >= 0 and at most 1 together but are {shares}."
            )


# What paid on the scenes, see the README; the options' own defaults are the paper's.
RECIPE = {
    "optimizer": "muon", "synchronous_share": 0.2, "timestep_candidates": 8, "rescale_betas_zero_snr": True,
    "commit_timestep": 160,
}  # fmt: skip
PRESETS = {
    "scenes-64-cpu": DiffusionTrainingConfig(
        batch_size=8, num_steps=24_000, learning_rate=1.5e-3, checkpoint_every=250, sample_every=500, **RECIPE
    ),
    "scenes-64-gpu": DiffusionTrainingConfig(
        batch_size=128, num_steps=60_000, learning_rate=1e-3, width=384, depth=12, num_heads=6, ema_decay=0.9995,
        checkpoint_every=2000, sample_every=5000, num_workers=12, **RECIPE,
    ),
}  # fmt: skip


def draw_timesteps(
    config: DiffusionTrainingConfig,
    batch_size: int,
    num_frames: int,
    num_train_timesteps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Timesteps (batch_size, num_frames) by the configured law and the shares of synchronous and lagged clips.

    With several candidates a clip, these are sorted by their mean, a random one of each group of neighbours is taken, and the
    order is random again. Every candidate is as likely to be taken for a clip, so its law stays exactly what it is; only clips
    of one batch are no longer independent: their noise levels cover the range evenly, and the loss jumps less.
    """
    num_candidates = config.timestep_candidates
    sizes = batch_size * num_candidates, num_frames, num_train_timesteps
    timesteps = SAMPLERS[config.timesteps](*sizes, generator=generator)
    lagged = sample_lagged(*sizes, generator=generator)
    synchronous = sample_synchronous(*sizes, generator=generator)
    choice = torch.rand(sizes[0], 1, generator=generator)
    timesteps = torch.where(choice < config.lagged_share + config.synchronous_share, lagged, timesteps)
    timesteps = torch.where(choice < config.synchronous_share, synchronous, timesteps)
    if num_candidates == 1:
        return timesteps
    groups = timesteps.double().mean(1).argsort(stable=True).view(batch_size, num_candidates)
    taken = groups.gather(1, torch.randint(num_candidates, (batch_size, 1), generator=generator))[:, 0]
    return timesteps[taken[torch.randperm(batch_size, generator=generator)]]


def training_clips(config: DiffusionTrainingConfig) -> RandomClips | SceneClips:
    """The clips that `data` asks for: tokens of `latents:FOLDER`, or frames."""
    kind, _, folder = config.data.partition(":")
    if kind == "latents":
        return LatentClips(folder, config.batch_size, config.num_frames, config.seed, stride=config.stride)
    return clip_dataset(config, config.batch_size, rank=0)


@dataclass(frozen=True)
class Source:
    """Where batches come from: clips, of frames or of tokens, and the model's class of every label they have.

    `classes` is int64 (labels + 1,); the last is "no class", for label -1.
    """

    clips: RandomClips | SceneClips
    classes: torch.Tensor

    @property
    def cached(self) -> bool:
        return isinstance(self.clips, LatentClips)


def image_source(config: DiffusionTrainingConfig, class_names: Sequence[str]) -> Source:
    """The single pictures that `image_data` asks for; those of an unknown class have none."""
    batch_size = round(config.images_per_clip * config.batch_size)
    # Another seed: pictures drawn from the same set as the clips are to be other ones.
    clips = training_clips(
        replace(
            config,
            data=config.image_data,
            batch_size=batch_size,
            num_frames=1,
            images_per_clip=0.0,
            seed=config.seed + 1,
        )
    )
    numbers = [class_names.index(name) if name in class_names else len(class_names) for name in clips.class_names]
    return Source(clips, torch.tensor([*numbers, len(class_names)]))


def new_transformer(
    config: DiffusionTrainingConfig, vae: AutoencoderARVAE, class_names: Sequence[str], *, causal: bool = True
) -> ARDiffTransformerModel:
    """An untrained network of the configured size, for the tokens of `vae`; weights from torch's default generator."""
    return ARDiffTransformerModel(
        num_tokens=vae.num_tokens,
        in_channels=vae.config.latent_channels,
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        window=config.num_frames,
        class_names=list(class_names),
        causal=causal,
    )


def train_diffusion(config: DiffusionTrainingConfig) -> Path:
    """Train, or go on where the run folder stands; returns the folder of the pipeline (`<out>/pipeline`)."""
    vae = AutoencoderARVAE.from_pretrained(config.vae, dtype=torch.float32).eval().requires_grad_(False)
    if vae.config.image_size != config.image_size:
        raise ValueError(
            f"`image_size` must be the autoencoder's, {vae.config.image_size}, but is {config.image_size}."
        )
    torch.random.default_generator.manual_seed(config.seed)
    scheduler = ADScheduler(
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        commit_timestep=config.commit_timestep,
    )
    clips = training_clips(config)
    class_names = list(clips.class_names)
    transformer = new_transformer(config, vae, class_names)
    if config.init_from:
        source = ARDiffTransformerModel.from_pretrained(config.init_from, subfolder="transformer", dtype=torch.float32)
        transformer.load_state_dict(source.state_dict())
    sources = [Source(clips, torch.arange(len(class_names) + 1))]
    if config.images_per_clip:
        sources.append(image_source(config, class_names))
    for source in sources:
        if source.cached:
            check_autoencoder(source.clips.folder, vae)
    with TrainingRun(config, transformer.train()) as run:
        vae.to(run.accelerator.device)
        shapes = [(source.clips.batch_size * config.draws_per_clip, source.clips.num_frames) for source in sources]
        num_frames = sum(math.prod(shape) for shape in shapes)
        run.measure(num_frames, lambda model: sum(empty_pass(model, *shape) for shape in shapes))
        dataset = PartsOfSteps(run.parts, *(source.clips for source in sources))
        for parts in run.loader(dataset, run.step, config.num_steps):
            for part, batches in zip(run.parts, parts, strict=True):
                generator = step_generator(config.seed, run.step, part)
                with run.accumulate():
                    losses = [
                        denoise(run, vae, scheduler, batch, source, generator)
                        for batch, source in zip(batches, sources, strict=True)
                    ]
                    # Every frame counts the same, whether it is alone or in a clip.
                    shares = [math.prod(shape) / num_frames for shape in shapes]
                    due = run.update(
                        sum(share * loss.weighted for share, loss in zip(shares, losses, strict=True)),
                        tuple(sum(sums) for sums in zip(*(loss.by_timestep for loss in losses), strict=True)),
                        **{name: loss.plain for name, loss in zip(("mse", "image_mse"), losses, strict=False)},
                    )
            if due and run.step < config.num_steps:
                export_pipeline(run, vae, scheduler)
        export_pipeline(run, vae, scheduler)
        run.close()
    return run.folder / "pipeline"


@dataclass(frozen=True)
class DenoisingLoss:
    """Losses of one batch: `weighted` with gradient; `plain` and sums and numbers `by_timestep` of squared errors without."""

    weighted: torch.Tensor
    plain: torch.Tensor
    by_timestep: tuple[torch.Tensor, torch.Tensor]


def denoise(
    run: TrainingRun,
    vae: AutoencoderARVAE,
    scheduler: ADScheduler,
    batch: tuple[torch.Tensor, torch.Tensor],
    source: Source,
    generator: torch.Generator,
) -> DenoisingLoss:
    """Noise a batch of clips, let the model denoise it, and compare; everything drawn comes from `generator`."""
    config, device = run.config, run.accelerator.device
    num_timesteps = scheduler.config.num_train_timesteps
    clean, labels = batch
    clean = clean.to(device)
    if not source.cached:
        with torch.no_grad(), run.accelerator.autocast():
            clean = vae.encode(to_pixels(clean)).mode().float()
    clean = clean.repeat(config.draws_per_clip, 1, 1, 1)
    labels = source.classes[labels].repeat(config.draws_per_clip)
    dropped = torch.rand(len(labels), generator=generator) < config.class_dropout
    labels = torch.where(dropped, source.classes[-1], labels).to(device)
    timesteps = draw_timesteps(config, *clean.shape[:2], num_timesteps, generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    output = run.model(scheduler.add_noise(clean, noise, timesteps), timesteps, labels)
    target = scheduler.training_target(clean, noise, timesteps)
    weight = None
    if config.prediction_type == "sample":
        weight = snr_weight(scheduler.alphas_cumprod, timesteps, config.snr_cap)
    return DenoisingLoss(
        diffusion_loss(output, target, weight),
        diffusion_loss(output.detach(), target),
        errors_by_timestep(output, target, timesteps, num_timesteps),
    )


def empty_pass(model: ARDiffTransformerModel, batch_size: int, num_frames: int) -> torch.Tensor:
    """A pass of the model on the device "meta", for counting; a scalar."""
    tokens = torch.empty(batch_size, num_frames, model.config.num_tokens, model.config.in_channels, device="meta")
    timesteps = torch.empty(batch_size, num_frames, dtype=torch.int64, device="meta")
    return model(tokens, timesteps, torch.empty(batch_size, dtype=torch.int64, device="meta")).sum()


def export_pipeline(run: TrainingRun, vae: AutoencoderARVAE, scheduler: ADScheduler) -> None:
    """Write the averaged model as a pipeline in half precision to `<out>/pipeline`, and one clip per class to `samples/`."""
    with run.untimed():
        transformer = run.averaged()
        if transformer is None:
            return
        pipeline = ARDiffPipeline(vae, transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        classes = pipeline.class_names[:8] or None
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(classes) if classes else 2)]
        clips = pipeline(
            class_labels=classes, num_frames=run.config.num_frames, num_inference_steps=25, ar_step=5,
            generator=generators, output_type="np",
        ).frames  # fmt: skip
        strips = (clips * 255).round().astype("uint8").transpose(0, 2, 1, 3, 4)
        Image.fromarray(strips.reshape(len(clips) * strips.shape[1], -1, 3)).save(
            run.folder / "samples" / f"step-{run.step:08d}.png"
        )
        with run.publish("pipeline") as folder:
            ARDiffPipeline(half_precision(vae), half_precision(transformer), scheduler).save_pretrained(folder)


def half_precision(model: ModelMixin) -> ModelMixin:
    """A float16 copy whose configuration does not tell the path it was loaded from."""
    copy = type(model)(**{name: value for name, value in model.config.items() if not name.startswith("_")})
    copy.load_state_dict(model.state_dict())
    return copy.half()


def preset(name: str, **changes: object) -> DiffusionTrainingConfig:
    """A preset with some options changed."""
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)} but is {name!r}.")
    return replace(PRESETS[name], **changes)
