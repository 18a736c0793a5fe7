"""Noise schedule and the masked DDIM step for frames that stand at different noise levels.

Shapes: B batch, F frames, ... any trailing dimensions (tokens and channels of a frame), N inference steps, T training
timesteps. A step index counts the denoising steps a frame has had (0 = noise, N = clean).
Paper: section 3.1 (forward process) and 3.3 (asynchronous sampling with DDIM, eta = 0).
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")


@dataclass
class ADSchedulerOutput(BaseOutput):
    """Result of one step.

    Attributes:
        prev_sample (torch.Tensor of shape (B, F, ...)): the sample after the step; frames that are not in the update
            mask are the sample's, bit for bit.
        pred_original_sample (torch.Tensor of shape (B, F, ...)): the current guess of the clean frames; the sample
            itself for frames that are not in the update mask.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class ADScheduler(SchedulerMixin, ConfigMixin):
    """Scaled-linear betas, noise per frame, and one vectorised DDIM step for all frames.

    Args:
        num_train_timesteps: T, >= 1. A timestep is int64 in [0, T), larger = noisier.
        beta_start: first beta, in (0, `beta_end`].
        beta_end: last beta, in [`beta_start`, 1). Betas are linear in their square roots.
        prediction_type: what the model returns: "sample" (the clean frame), "epsilon" (the noise) or "v_prediction".
        rescale_betas_zero_snr: whether nothing is left of a frame at timestep T - 1 (Lin et al., arXiv 2305.08891). The
            paper's betas leave a trace, which frames that start together add up: a model trained with it takes pure noise
            for a clip of average brightness. Not with "epsilon", where noise alone tells nothing.
        commit_timestep: how noisy the model is told that frames which it finished are, in [0, T). 0, the paper's: clean.
            More: it trusts them less, and their errors are handed on less; no noise is added to them (Diffusion Forcing,
            arXiv 2407.01392, on stabilising long videos). Given frames are always shown as clean.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        prediction_type: str = "sample",
        rescale_betas_zero_snr: bool = False,
        commit_timestep: int = 0,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be >= 1 but is {num_train_timesteps}.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"`beta_start` and `beta_end` must satisfy 0 < beta_start <= beta_end < 1 but are {beta_start} and "
                f"{beta_end}."
            )
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES} but is {prediction_type!r}.")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "`prediction_type` must be 'sample' or 'v_prediction' with `rescale_betas_zero_snr` but is 'epsilon'."
            )
        if rescale_betas_zero_snr and num_train_timesteps == 1:
            raise ValueError("`num_train_timesteps` must be >= 2 with `rescale_betas_zero_snr` but is 1.")
        if not 0 <= commit_timestep < num_train_timesteps:
            raise ValueError(f"`commit_timestep` must be in [0, {num_train_timesteps - 1}] but is {commit_timestep}.")
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        # Factors like sqrt(1 - alpha_bar) cancel at small timesteps: they come from the float64 values (CPU) and only
        # the finished factor is rounded to the sample's dtype.
        self._alphas_cumprod = (1 - betas).cumprod(0)
        self.alphas_cumprod = self._alphas_cumprod.float()
        self._noise_table = torch.stack([self._alphas_cumprod.sqrt(), (1 - self._alphas_cumprod).sqrt()], dim=-1)
        self._step_table = None
        self._table_cache = {}
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the N timesteps of sampling: tau_k = round(T * (N - k) / N) - 1 for step index k = 0..N - 1.

        Args:
            num_inference_steps: N, in [1, `num_train_timesteps`].
            device: where `timesteps` (int64, shape (N,), decreasing) goes. None = CPU.
        """
        num_train = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= num_train:
            raise ValueError(f"`num_inference_steps` must be in [1, {num_train}] but is {num_inference_steps}.")
        remaining = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64)
        timesteps = (num_train * remaining / num_inference_steps).round().long() - 1
        alpha_t = self._alphas_cumprod[timesteps]
        alpha_prev = torch.cat([alpha_t[1:], alpha_t.new_ones(1)])

        # clean = p * sample + q * model_output;   prev = r * sample + s * clean   (DDIM with eta = 0)
        if self.config.prediction_type == "sample":
            p, q = torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
        elif self.config.prediction_type == "epsilon":
            p, q = alpha_t**-0.5, -((1 - alpha_t) / alpha_t).sqrt()
        else:
            p, q = alpha_t.sqrt(), -((1 - alpha_t).sqrt())
        r = ((1 - alpha_prev) / (1 - alpha_t)).sqrt()
        s = alpha_prev.sqrt() - r * alpha_t.sqrt()
        table = torch.stack([p, q, r, s], dim=-1)
        # There is no step from index N: a frame that is updated there anyway becomes NaN instead of quietly wrong.
        self._step_table = torch.cat([table, table.new_full((1, 4), float("nan"))])
        self._table_cache.clear()
        self.num_inference_steps = num_inference_steps
        self.timesteps = timesteps.to(device)

    def timestep_of(self, step_index: torch.Tensor) -> torch.Tensor:
        """Timestep shown to the model for a step index in [0, N + 1], same shape, int64.

        N, a finished frame, gives `commit_timestep`; N + 1, which stands for a given frame, gives 0.
        """
        self._check_timesteps_set()
        timesteps = self.timesteps.to(step_index.device)
        return torch.cat([timesteps, timesteps.new_tensor([self.config.commit_timestep, 0])])[step_index]

    def noise_level(self, step_index: torch.Tensor) -> torch.Tensor:
        """Share of noise left, (N - step_index) / N in [0, 1], same shape, float32."""
        self._check_timesteps_set()
        return (self.num_inference_steps - step_index).float() / self.num_inference_steps

    def step(
        self,
        model_output: torch.Tensor,
        step_index: torch.Tensor,
        sample: torch.Tensor,
        update_mask: torch.Tensor | None = None,
    ) -> ADSchedulerOutput:
        """Advance frames by one step each, deterministically.

        Args:
            model_output (torch.Tensor of shape (B, F, ...)): what the model returned, see `prediction_type`.
            step_index (torch.Tensor of shape (F,) or (B, F)): int64, index before the step, in [0, N - 1] for frames
                that are updated, in [0, N] for the others.
            sample (torch.Tensor of shape (B, F, ...)): float32 or float64.
            update_mask (torch.Tensor of shape (F,) or (B, F)): bool, frames to advance. None = all of them.
        """
        self._check_timesteps_set()
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, but has "
                f"{tuple(model_output.shape)}."
            )
        _check_per_frame("step_index", step_index, sample)
        table = self._table("_step_table", sample)
        coefficients = table[step_index.to(sample.device)].unbind(-1)
        p, q, r, s = (_per_frame(coefficient, sample) for coefficient in coefficients)
        clean = p * sample + q * model_output.to(sample.dtype)
        prev = r * sample + s * clean
        if update_mask is not None:
            _check_per_frame("update_mask", update_mask, sample)
            updated = _per_frame(update_mask.to(sample.device), sample)
            clean = torch.where(updated, clean, sample)
            prev = torch.where(updated, prev, sample)
        return ADSchedulerOutput(prev_sample=prev, pred_original_sample=clean)

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy frames sqrt(alpha_bar) * original + sqrt(1 - alpha_bar) * noise.

        Args:
            original (torch.Tensor of shape (B, F, ...)): clean frames.
            noise (torch.Tensor of shape (B, F, ...)): standard normal.
            timesteps (torch.Tensor of shape (B, F) or (F,)): int64 in [0, T), one per frame.
        """
        signal_rate, noise_rate = self._rates(original, timesteps)
        return signal_rate * original + noise_rate * noise

    def training_target(self, original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should return for `add_noise(original, noise, timesteps)`; same shapes as there."""
        if self.config.prediction_type == "sample":
            return original
        if self.config.prediction_type == "epsilon":
            return noise
        signal_rate, noise_rate = self._rates(original, timesteps)
        return signal_rate * noise - noise_rate * original

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _rates(self, original: torch.Tensor, timesteps: torch.Tensor) -> list[torch.Tensor]:
        _check_per_frame("timesteps", timesteps, original)
        rates = self._table("_noise_table", original)[timesteps.to(original.device)].unbind(-1)
        return [_per_frame(rate, original) for rate in rates]

    def _table(self, name: str, like: torch.Tensor) -> torch.Tensor:
        # Rounded on the CPU (not every device has float64) and kept, so that a step does not wait for a copy.
        key = (name, like.device, like.dtype)
        if key not in self._table_cache:
            self._table_cache[key] = getattr(self, name).to(like.dtype).to(like.device)
        return self._table_cache[key]

    def _check_timesteps_set(self) -> None:
        if self.num_inference_steps is None:
            raise RuntimeError("Call `set_timesteps` before sampling.")


def _check_per_frame(name: str, value: torch.Tensor, sample: torch.Tensor) -> None:
    if sample.ndim < 2 or tuple(value.shape) not in (tuple(sample.shape[:2]), (sample.shape[1],)):
        raise ValueError(
            f"`{name}` must have one value per frame, shape (F,) or (B, F) of a (B, F, ...) sample, but has shape "
            f"{tuple(value.shape)} for a sample of shape {tuple(sample.shape)}."
        )


def _per_frame(value: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """(F,) or (B, F) with trailing ones, so that it broadcasts over a (B, F, ...) sample."""
    return value.reshape(*value.shape, *[1] * (sample.ndim - 2))
