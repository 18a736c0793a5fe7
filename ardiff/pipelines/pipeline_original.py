"""Generation with the published checkpoints: a window of frames slides over the video and is evaluated whole every time.

Shapes: B batch, F frames, W frames of the window, P given frames, L tokens per frame, C latent channels, N steps per frame.
In the published transformer every frame of the window has a part in every other, those that have not started included. So
nothing is cached, an iteration costs W evaluations, and a video has at least W frames.

Two executors, both of them functions of a `predict(window latents (B, W, L, C), timestep (B, W))` that returns the guided
network output. `denoise_window` is ours. `denoise_as_released` repeats the released sampler with everything in it that
changes numbers:

- frames that are not updated pass through the DDIM formula all the same: finished ones grow by 2e-5 an iteration, and with
  noise or v prediction shrink by 0.4 %;
- given frames are shown at timestep 1, go through a meaningless update, are put back before the next iteration, and are left
  wrong after the last one; they do not shorten the plan;
- the last step ends at alpha_bar of timestep 0 instead of 1;
- timesteps are 1, 1 + c, ... with c = floor(1000 / steps): more steps than asked for where c does not divide 1000;
- a frame that leaves the window before it is finished stays as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ardiff.models.original import AutoencoderOriginal, OriginalTransformerModel
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline, _Inputs, _Iteration
from ardiff.schedulers.ad_schedule import ad_schedule
from ardiff.schedulers.scheduling_ad import ADScheduler


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def denoise_window(
    predict: Predict,
    latents: torch.Tensor,
    schedule: torch.Tensor,
    scheduler: ADScheduler,
    *,
    window: int,
    num_prompt_frames: int = 0,
) -> Iterator[_Iteration]:
    """Run a plan; yields after every iteration.

    The window ends with the last frame that has started, and is not moved before frame W starts. Finished frames are shown
    at the commit timestep, given ones at 0, waiting ones at the first timestep, and none of these changes by a bit.

    Args:
        latents (torch.Tensor of shape (B, F, L, C)): noise, given frames in front; F >= W.
        schedule (torch.Tensor of shape (R, F)): a plan of `ad_schedule` with at most W frames in flight.
        scheduler: with its timesteps set.
    """
    num_steps = scheduler.num_inference_steps
    before = torch.zeros_like(schedule[0])
    before[:num_prompt_frames] = num_steps
    is_given = torch.arange(schedule.shape[1]) < num_prompt_frames
    for row, after in enumerate(schedule):
        active = (before != after).nonzero().flatten().tolist()
        start, stop = active[0], active[-1] + 1
        first = max(stop - window, 0)
        timestep = scheduler.timestep_of((before + is_given)[first : first + window]).to(latents.device)
        output = predict(latents[:, first : first + window], timestep.expand(len(latents), -1))
        result = scheduler.step(output[:, start - first : stop - first], before[start:stop], latents[:, start:stop])
        guess = torch.cat([latents[:, :start], result.pred_original_sample, latents[:, stop:]], dim=1)
        latents = torch.cat([latents[:, :start], result.prev_sample, latents[:, stop:]], dim=1)
        before = after
        yield _Iteration(row, latents, guess, window, int((after == num_steps).sum()))


@dataclass(frozen=True)
class ReleasedTables:
    """Timesteps and alphas of the released sampler, all in order of growing noise.

    Attributes:
        timesteps (torch.Tensor of shape (N,)): int64.
        alphas, alphas_prev (torch.Tensor of shape (N + 1,)): alpha_bar before and after a step, float64 of the float32
            values; the last entry is for frames that have not started.
    """

    timesteps: torch.Tensor
    alphas: torch.Tensor
    alphas_prev: torch.Tensor

    @classmethod
    def of(cls, scheduler: ADScheduler, num_inference_steps: int) -> "ReleasedTables":
        """Tables for the steps that were asked for; N may be more.

        Raises:
            ValueError: that number leads the released code past the last training timestep, or is out of range.
        """
        num_train, alpha_bar = len(scheduler), scheduler.alphas_cumprod.double()
        if not 1 <= num_inference_steps <= num_train:
            raise ValueError(f"`num_inference_steps` must be in [1, {num_train}] but is {num_inference_steps}.")
        timesteps = torch.arange(0, num_train, num_train // num_inference_steps) + 1
        if timesteps[-1] >= num_train:
            raise ValueError(
                f"`num_inference_steps` must be one that the released sampler can do, which ends at timestep "
                f"{int(timesteps[-1])} of {num_train - 1} with {num_inference_steps}; 5, 10, 20, 25 and 50 work."
            )
        last = alpha_bar[-1:]
        return cls(
            timesteps=timesteps,
            alphas=torch.cat([alpha_bar[timesteps], last]),
            alphas_prev=torch.cat([alpha_bar[:1], alpha_bar[timesteps[:-1]], last]),
        )

    def shown(self, step_index: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
        """Timestep that the network is shown for a step index *after* an iteration, same shape, int64."""
        noisiest = self.timesteps.new_tensor([num_train_timesteps - 1])
        return torch.cat([self.timesteps, noisiest])[len(self.timesteps) - step_index]


def released_windows(schedule: torch.Tensor, window: int) -> torch.Tensor:
    """First frame of the window and the one after its last, per iteration of a plan (R, F): (R, 2), int64.

    It moves by one frame at most, when the frame next to it is updated.
    """
    updated = schedule != torch.cat([torch.zeros_like(schedule[:1]), schedule[:-1]])
    end, windows = window, []
    for row in updated.tolist():
        end += end < len(row) and row[end]
        windows.append((end - window, end))
    return torch.tensor(windows)


def denoise_as_released(
    predict: Predict,
    latents: torch.Tensor,
    schedule: torch.Tensor,
    scheduler: ADScheduler,
    tables: ReleasedTables,
    *,
    window: int,
    num_prompt_frames: int = 0,
) -> Iterator[_Iteration]:
    """Run a plan as the released sampler does; yields after every iteration. See the head of this file for what differs.

    Args:
        latents (torch.Tensor of shape (B, F, L, C)): noise, given frames in front; F >= W.
        schedule (torch.Tensor of shape (R, F)): `ad_schedule` of N steps, given frames not counted as such.
        scheduler: for the noise levels and the prediction type; its own timesteps are not used.
    """
    num_train, num_steps, device = len(scheduler), len(tables.timesteps), latents.device
    kind = scheduler.config.prediction_type
    given = latents[:, :num_prompt_frames]
    # Rounded from float64: 1 / alpha_bar - 1 of the rounded value would lose four digits at timestep 1.
    alpha_bar = scheduler._alphas_cumprod
    rates = [alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar.rsqrt(), (1 / alpha_bar - 1).sqrt()]
    rates = torch.stack(rates, dim=-1).to(latents.dtype).to(device)
    ends = [
        tables.alphas.sqrt(),
        (1 - tables.alphas).sqrt(),
        tables.alphas_prev.sqrt(),
        (1 - tables.alphas_prev).sqrt(),
    ]
    ends = torch.stack(ends, dim=-1).to(latents.dtype).to(device)
    before = torch.zeros_like(schedule[0])
    for row, (after, (first, end)) in enumerate(
        zip(schedule, released_windows(schedule, window).tolist(), strict=True)
    ):
        latents = torch.cat([given, latents[:, num_prompt_frames:]], dim=1)
        sample = latents[:, first:end]
        timestep = tables.shown(after, num_train)
        timestep[:num_prompt_frames] = 1
        timestep = timestep[first:end].to(device)
        output = predict(sample, timestep.expand(len(latents), -1))
        updated = (after != before)[first:end].to(device)[:, None, None]
        output = torch.where(updated, output, sample)

        signal, noise, inverse_signal, noise_to_signal = rates[timestep][:, :, None, None].unbind(1)
        index = num_steps - after[first:end].to(device)
        root, rest, root_prev, rest_prev = ends[index][:, :, None, None].unbind(1)
        if kind == "sample":
            clean, epsilon = output, (inverse_signal * sample - output) / noise_to_signal
        elif kind == "epsilon":
            clean, epsilon = (sample - rest * output) / root, output
        else:
            clean, epsilon = signal * sample - noise * output, signal * output + noise * sample
        moved = root_prev * clean + rest_prev * epsilon
        guess = torch.cat([latents[:, :first], clean, latents[:, end:]], dim=1)
        latents = torch.cat([latents[:, :first], moved, latents[:, end:]], dim=1)
        before = after
        last = row + 1 == len(schedule)
        yield _Iteration(row, latents, guess, window, schedule.shape[1] if last else 0)


class OriginalARDiffPipeline(ARDiffPipeline):
    """`ARDiffPipeline` for the published checkpoints: the same calls and steps, without a cache.

    Without `class_labels` a `guidance_scale` above 1 leads a model without classes away from an empty context (all zeros).

    Args:
        vae (AutoencoderOriginal): frames <-> tokens.
        transformer (OriginalTransformerModel): the denoiser of a window of frames.
        scheduler (ADScheduler): noise levels and the DDIM step.
        compat (bool): True repeats the released sampler to the bit of its quirks (`denoise_as_released`): one gap for all
            frames, plans that overrun the window are run all the same, and frames are decoded after the last iteration.
    """

    supports_frame_cache = False

    def __init__(
        self,
        vae: AutoencoderOriginal,
        transformer: OriginalTransformerModel,
        scheduler: ADScheduler,
        compat: bool = False,
    ) -> None:
        super().__init__(vae, transformer, scheduler)
        self.register_to_config(compat=compat)

    @property
    def min_frames(self) -> int:
        return self.transformer.config.window

    def is_guided(self, guidance_scale: float, has_class: bool) -> bool:
        # With classes, no label is the very context that guidance leads away from.
        return guidance_scale != 1.0 and (has_class or not self.class_names)

    def _plan(
        self, num_frames: int, num_inference_steps: int, ar_step: int | Sequence[int], num_prompt_frames: int
    ) -> tuple[torch.Tensor, ADScheduler]:
        if not self.config.compat:
            return super()._plan(num_frames, num_inference_steps, ar_step, num_prompt_frames)
        if not isinstance(ar_step, int):
            raise ValueError(f"`ar_step` must be one int where `compat` is on but is {ar_step!r}.")
        self._check_whole_window(num_frames)
        ad_schedule(num_frames, num_inference_steps, ar_step)  # refuses what is out of range
        num_steps = len(ReleasedTables.of(self.scheduler, num_inference_steps).timesteps)
        scheduler = ADScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return ad_schedule(num_frames, num_steps, ar_step), scheduler

    def _start_latents(
        self, inputs: _Inputs, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return super()._start_latents(inputs, generator, dtype).get(0, inputs.schedule.shape[1])

    def _denoise(
        self, inputs: _Inputs, latents: torch.Tensor, guidance_scale: float, use_cache: bool | None
    ) -> Iterator[_Iteration]:
        if use_cache:
            raise ValueError(
                "`use_cache` must be None or False: later frames change the keys and values of earlier ones in this model."
            )
        predict = self._guided_network(inputs, guidance_scale)
        options = {"window": self.transformer.config.window, "num_prompt_frames": inputs.num_prompt_frames}
        if self.config.compat:
            tables = ReleasedTables.of(inputs.scheduler, inputs.num_inference_steps)
            return denoise_as_released(predict, latents, inputs.schedule, inputs.scheduler, tables, **options)
        return denoise_window(predict, latents, inputs.schedule, inputs.scheduler, **options)

    def _guided_network(self, inputs: _Inputs, guidance_scale: float) -> Predict:
        transformer, labels = self.transformer, inputs.labels
        guided = self.is_guided(guidance_scale, labels is not None)
        context = transformer.conditional_context(labels, inputs.batch_size)
        if guided:
            context = torch.cat([transformer.unconditional_context(inputs.batch_size), context])

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if not guided:
                return transformer(sample.to(transformer.dtype), timestep, context).to(sample.dtype)
            doubled = torch.cat([sample, sample]).to(transformer.dtype)
            output = transformer(doubled, torch.cat([timestep, timestep]), context).to(sample.dtype)
            without, with_context = output.chunk(2)
            return without + guidance_scale * (with_context - without)

        return predict

    def _first_frame_behind(self, frame: int) -> int:
        return frame - frame % self.vae.config.clip_frames
