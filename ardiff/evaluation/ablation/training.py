"""One configuration, trained with one seed."""

import torch

from ardiff.data.clips import step_generator
from ardiff.evaluation.ablation.clips import TrainingTokens
from ardiff.evaluation.ablation.settings import Configuration, Count, Job
from ardiff.evaluation.prediction import NUM_FRAMES
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.training.diffusion import DiffusionTrainingConfig, draw_timesteps, new_transformer
from ardiff.training.loop import TrainingRun
from ardiff.training.losses import diffusion_loss, snr_weight


def train(
    job: Job, vae: AutoencoderARVAE, configuration: Configuration, seed: int, count: Count
) -> ARDiffTransformerModel:
    """The trained model with its averaged weights. A run that was stopped goes on at its last checkpoint."""
    size = job.size
    config = DiffusionTrainingConfig(
        out=str(job.run_folder(configuration, seed)),
        seed=seed,
        num_frames=NUM_FRAMES,
        width=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        batch_size=size.batch_size,
        num_steps=size.num_steps,
        learning_rate=size.learning_rate,
        optimizer="muon",
        warmup_steps=max(size.num_steps // 20, 1),
        mixed_precision=size.mixed_precision,
        device=job.device,
        checkpoint_every=max(size.num_steps // 4, 1),
        log_every=max(size.num_steps // 50, 1),
        sample_every=size.num_steps,
        prediction_type=configuration.prediction_type,
        timesteps=configuration.law,
        rescale_betas_zero_snr=configuration.rescale_betas_zero_snr,
        synchronous_share=configuration.synchronous_share,
        lagged_share=configuration.lagged_share,
        timestep_candidates=configuration.timestep_candidates,
        commit_timestep=configuration.commit_timestep,
    )
    torch.random.default_generator.manual_seed(seed)
    scheduler = configuration.scheduler()
    transformer = new_transformer(config, vae, size.scenes, causal=configuration.causal)
    clips = TrainingTokens(job)
    run = TrainingRun(config, transformer.train())
    device = run.accelerator.device
    count(3 * NUM_FRAMES * size.batch_size * run.step)
    while run.step < size.num_steps:
        generator = step_generator(seed, run.step)
        clean, labels = clips.batch(generator)
        # The noise is drawn before the timesteps, whose laws take different numbers of draws: it is the same for all.
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(config, *clean.shape[:2], len(scheduler), generator).to(device)
        clean, noise = clean.to(device), noise.to(device)
        output = run.model(scheduler.add_noise(clean, noise, timesteps), timesteps, labels.to(device))
        target = scheduler.training_target(clean, noise, timesteps)
        weight = None
        if config.prediction_type == "sample":
            weight = snr_weight(scheduler.alphas_cumprod, timesteps, config.snr_cap)
        run.update(diffusion_loss(output, target, weight))
        count(3 * NUM_FRAMES * size.batch_size)
    model = run.averaged()
    run.close()
    return model
