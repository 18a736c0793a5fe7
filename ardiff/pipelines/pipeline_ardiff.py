"""Video generation with one timestep per frame (AR-Diffusion, arXiv 2503.07418, section 3.3).

`ARDiffPipeline.stream` yields once per iteration of the AD schedule; `__call__` drains it. Shapes: B batch, F frames, P
prompt frames, L tokens per frame, C latent channels.
What is evaluated: the active frames, and before them, at timestep 0, the finished frames that are not in the cache yet.
So F frames of N steps cost F * N + (F - 1) evaluations (F * N when the gap is 0); waiting frames cost nothing.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

from ardiff.data.pixels import to_pixels, to_uint8
from ardiff.data.video import fit_frame, read_video
from ardiff.models.autoencoder_arvae import AutoencoderARVAE, DecoderCache
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.pipelines.pipeline_output import ARDiffPipelineOutput, ARDiffStep
from ardiff.schedulers.ad_schedule import ad_schedule, check_window
from ardiff.schedulers.scheduling_ad import ADScheduler


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PromptFrames = Sequence[PIL.Image.Image | np.ndarray] | np.ndarray | str | os.PathLike


@dataclass(frozen=True)
class _Inputs:
    """Checked arguments of a run."""

    prompts: torch.Tensor | None  # (B, P, 3, S, S) in [-1, 1]
    labels: torch.Tensor | None  # (B,) int64
    schedule: torch.Tensor  # (R, F)
    scheduler: ADScheduler  # this run's own: runs with other numbers of steps may be under way
    num_inference_steps: int  # as asked for
    batch_size: int
    num_prompt_frames: int


@dataclass(frozen=True)
class _Iteration:
    """Latents after one iteration and the x0 guess they came from, both (B, F, L, C)."""

    row: int
    latents: torch.Tensor
    guess: torch.Tensor
    frame_evaluations: int
    num_finished: int  # so many first frames have their last value


class ARDiffPipeline(DiffusionPipeline):
    """Asynchronous video diffusion: text-free, optionally class-conditional and continued from prompt frames.

    Args:
        vae (AutoencoderARVAE): frames <-> tokens.
        transformer (ARDiffTransformerModel): the causal denoiser.
        scheduler (ADScheduler): noise levels and the DDIM step.
    """

    model_cpu_offload_seq = "vae->transformer"
    supports_frame_cache = True

    def __init__(self, vae: AutoencoderARVAE, transformer: ARDiffTransformerModel, scheduler: ADScheduler) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "ARDiffPipeline":
        """Load a folder or a Hub repository (`revision`, `cache_dir`, `token` as usual); `dtype`, `device_map` as diffusers.

        A Hub repository is fetched whole first: diffusers looks up classes of other packages only in folders.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            if path.is_absolute() or len(path.parts) > 2:
                raise ValueError(
                    f"`pretrained_model_name_or_path` must be a model folder or a Hub id but is {path}, which does not exist."
                )
            hub = {
                key: kwargs.pop(key) for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
            }
            path = snapshot_download(
                str(pretrained_model_name_or_path), allow_patterns=["*.json", "*.safetensors"], **hub
            )
        if cls is ARDiffPipeline and cls.load_config(str(path)).get("_class_name") == "OriginalARDiffPipeline":
            from ardiff.pipelines.pipeline_original import OriginalARDiffPipeline

            return OriginalARDiffPipeline.from_pretrained(path, **kwargs)
        return super().from_pretrained(str(path), **kwargs)

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return self.vae.config.image_size

    @property
    def min_frames(self) -> int:
        """Fewest frames that a video of this model can have."""
        return 1

    def is_guided(self, guidance_scale: float, has_class: bool) -> bool:
        """Whether a run evaluates everything twice, with its condition and without."""
        return guidance_scale != 1.0 and has_class

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.transformer.config.class_names)

    def check_inputs(
        self,
        prompt_frames: PromptFrames | None,
        class_labels: Sequence[str | int] | None,
        num_frames: int,
        ar_step: int | Sequence[int],
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> _Inputs:
        """Turn the arguments of a run into tensors and a plan.

        Raises:
            ValueError: one sentence naming the argument, what is allowed and what came.
        """
        if isinstance(class_labels, (str, int)):
            class_labels = [class_labels]
        prompts = None if prompt_frames is None else self._prompt_pixels(prompt_frames)
        sizes = {
            "class_labels": None if class_labels is None else len(class_labels),
            "generator": len(generator) if isinstance(generator, list) else None,
            "prompt_frames": len(prompts) if prompts is not None and len(prompts) > 1 else None,
        }
        given = {name: size for name, size in sizes.items() if size is not None}
        batch_size = max(given.values(), default=1)
        if batch_size < 1 or any(size != batch_size for size in given.values()):
            raise ValueError(
                "`class_labels`, a list `generator` and a batch of `prompt_frames` must have one entry per video but have "
                + ", ".join(f"{size} (`{name}`)" for name, size in given.items()) + "."
            )  # fmt: skip
        num_prompt_frames = 0 if prompts is None else prompts.shape[1]
        if isinstance(num_frames, int) and num_frames <= num_prompt_frames:
            raise ValueError(
                f"`num_frames` counts the prompt frames too and must be more than their number, {num_prompt_frames}, "
                f"but is {num_frames}."
            )
        if not 1.0 <= guidance_scale <= 20.0:
            raise ValueError(f"`guidance_scale` must be in [1, 20] but is {guidance_scale}.")
        schedule, scheduler = self._plan(num_frames, num_inference_steps, ar_step, num_prompt_frames)
        return _Inputs(
            prompts=None if prompts is None else prompts.expand(batch_size, -1, -1, -1, -1),
            labels=None
            if class_labels is None
            else torch.tensor([self._class_index(label) for label in class_labels]),
            schedule=schedule,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            num_prompt_frames=num_prompt_frames,
        )

    def _plan(
        self, num_frames: int, num_inference_steps: int, ar_step: int | Sequence[int], num_prompt_frames: int
    ) -> tuple[torch.Tensor, ADScheduler]:
        """The AD schedule of a run and a scheduler of its own."""
        schedule = ad_schedule(num_frames, num_inference_steps, ar_step, num_prompt_frames=num_prompt_frames)
        check_window(schedule, self.transformer.config.window, num_prompt_frames=num_prompt_frames)
        scheduler = ADScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return schedule, scheduler

    def _class_index(self, label: str | int) -> int:
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.class_names):
            return label
        known = ", ".join(self.class_names) or "none, the model is unconditional"
        raise ValueError(
            f"`class_labels` must name classes of this model ({known}) or their numbers but has {label!r}."
        )

    def _prompt_pixels(self, prompt_frames: PromptFrames) -> torch.Tensor:
        """Prompt frames as (B or 1, P, 3, S, S) in [-1, 1], cropped to the model's square."""
        if isinstance(prompt_frames, (str, os.PathLike)):
            prompt_frames = read_video(prompt_frames)
        if isinstance(prompt_frames, np.ndarray) and prompt_frames.ndim == 5:
            videos = list(prompt_frames)
        elif isinstance(prompt_frames, np.ndarray) and prompt_frames.ndim != 4:
            raise ValueError(
                "`prompt_frames` as an array must be uint8 of shape (frames, height, width, 3), or (batch, frames, height, "
                f"width, 3), but has shape {prompt_frames.shape}."
            )
        else:
            videos = [prompt_frames]
        if any(len(video) == 0 for video in videos):
            raise ValueError("`prompt_frames` must hold at least one frame but is empty; leave it out for no prompt.")
        fitted = [[fit_frame(frame, self.image_size) for frame in video] for video in videos]
        return to_pixels(torch.from_numpy(np.stack([np.stack(video) for video in fitted])))

    @torch.no_grad()
    def reconstruct(self, prompt_frames: PromptFrames) -> list[np.ndarray]:
        """Frames as the model sees them: encoded to tokens and decoded again; a list of uint8 (S, S, 3)."""
        pixels = self._prompt_pixels(prompt_frames).to(self._execution_device, self.vae.dtype)
        return list(to_uint8(self.vae.decode(self.vae.encode(pixels).mode())).cpu().numpy()[0])

    def _start_latents(
        self, inputs: _Inputs, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Noise, and the prompt's tokens in front, (B, F, L, C).

        Noise is drawn frame by frame, for prompt frames too: frame f starts from the same noise whatever the length of
        the video and of its prompt.
        """
        config, device = self.transformer.config, self._execution_device
        shape = (inputs.batch_size, 1, config.num_tokens, config.in_channels)
        noise = [
            randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            for _ in range(inputs.schedule.shape[1])
        ]
        latents = torch.cat(noise, dim=1)
        if inputs.prompts is not None:
            tokens = self.vae.encode(inputs.prompts.to(device, self.vae.dtype)).mode()
            latents[:, : inputs.num_prompt_frames] = tokens.to(dtype)
        return latents

    def _denoise(
        self, inputs: _Inputs, latents: torch.Tensor, guidance_scale: float, use_cache: bool | None
    ) -> Iterator[_Iteration]:
        """Run the plan; yields after every iteration. The plan is read as Python ints: nothing waits for the device."""
        use_cache = use_cache is not False
        device, scheduler, num_steps = latents.device, inputs.scheduler, inputs.scheduler.num_inference_steps
        guided = self.is_guided(guidance_scale, inputs.labels is not None)
        labels = None if inputs.labels is None else inputs.labels.to(device)
        if guided:
            labels = torch.cat([torch.full_like(labels, self.transformer.null_class), labels])
        cache = self.transformer.new_cache(inputs.batch_size * (1 + guided), device) if use_cache else None
        before = torch.zeros_like(inputs.schedule[0])
        before[: inputs.num_prompt_frames] = num_steps
        for row, after in enumerate(inputs.schedule):
            active = [
                frame for frame, (a, b) in enumerate(zip(before.tolist(), after.tolist(), strict=True)) if a != b
            ]
            start, stop = active[0], active[-1] + 1
            # Finished frames in front of the active ones: with a cache only those it does not hold yet.
            first = cache.num_committed if use_cache else 0
            timestep = scheduler.timestep_of(before[first:stop]).to(device)
            sample = latents[:, first:stop]
            model_input = torch.cat([sample, sample]) if guided else sample
            output = self.transformer(
                model_input.to(self.transformer.dtype),
                timestep.expand(len(model_input), -1),
                labels,
                cache=cache,
                num_commit=start - first if use_cache else 0,
            )[:, start - first :].to(latents.dtype)
            if guided:
                without, with_class = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            result = scheduler.step(output, before[start:stop], latents[:, start:stop])
            guess = torch.cat([latents[:, :start], result.pred_original_sample, latents[:, stop:]], dim=1)
            latents = torch.cat([latents[:, :start], result.prev_sample, latents[:, stop:]], dim=1)
            before = after
            yield _Iteration(row, latents, guess, stop - first, int((after == num_steps).sum()))

    @torch.no_grad()
    def stream(
        self,
        prompt_frames: PromptFrames | None = None,
        class_labels: Sequence[str | int] | None = None,
        num_frames: int = 16,
        ar_step: int | Sequence[int] = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        use_cache: bool | None = None,
    ) -> Iterator[ARDiffStep]:
        """Generate a video and yield after every iteration. Closing the generator stops the run and frees its memory.

        Args:
            prompt_frames: given first frames: PIL images or uint8 (H, W, 3) arrays, a uint8 array (P, H, W, 3) or
                (B, P, H, W, 3), or the path of a video. Cropped to the model's square. None = none.
            class_labels: one class name or number per video. None = no class.
            num_frames: frames of the video, prompt frames included; more than there are prompt frames.
            ar_step: lag between neighbouring frames in [0, `num_inference_steps`], or one lag for every new frame after
                the first. 0 = all together, `num_inference_steps` = one frame after the other.
            num_inference_steps: denoising steps per frame, in [1, 1000].
            guidance_scale: in [1, 20]; above 1 the class is followed more closely at twice the cost. Needs `class_labels`.
            generator: source of the noise; a list has one per video. None = torch's global generator.
            use_cache: False evaluates all frames again in every iteration: same result to rounding, far slower. None =
                True where the pipeline `supports_frame_cache`.

        Raises:
            ValueError: see `check_inputs`; also when more frames would be in flight than the model's window holds.
        """
        inputs = self.check_inputs(
            prompt_frames, class_labels, num_frames, ar_step, num_inference_steps, guidance_scale, generator
        )
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        try:
            latents = self._start_latents(inputs, generator, dtype)
            decoder_cache, num_decoded = DecoderCache(), 0
            for state in self._denoise(inputs, latents, guidance_scale, use_cache):
                step_index = inputs.schedule[state.row]
                finished = []
                if state.num_finished > num_decoded:
                    tokens = state.latents[:, num_decoded : state.num_finished].to(self.vae.dtype)
                    frames = to_uint8(self.vae.decode(tokens, decoder_cache)).cpu().numpy()
                    finished = [(num_decoded + i, _squeeze(frames[:, i])) for i in range(frames.shape[1])]
                    num_decoded = state.num_finished
                yield ARDiffStep(
                    iteration=state.row + 1,
                    num_iterations=len(inputs.schedule),
                    step_index=step_index,
                    noise_level=inputs.scheduler.noise_level(step_index),
                    frame_evaluations=state.frame_evaluations,
                    finished=finished,
                    decode_guess=lambda frames, guess=state.guess: self._decode_frames(guess, frames),
                )
        finally:
            self.maybe_free_model_hooks()

    def _first_frame_behind(self, frame: int) -> int:
        """The earliest frame that the decoder looks at for `frame`."""
        return max(frame - self.vae.config.temporal_window + 1, 0)

    @torch.no_grad()
    def _decode_frames(self, latents: torch.Tensor, frames: Sequence[int]) -> list[np.ndarray]:
        """Decode some frames of a clip in one batch, each with the earlier frames that the decoder looks at."""
        num_frames = latents.shape[1]
        if any(not 0 <= frame < num_frames for frame in frames):
            raise ValueError(f"`frames` must be frame indices in [0, {num_frames - 1}] but are {list(frames)}.")
        if not frames:
            return []
        first = self._first_frame_behind(min(frames))
        decoded = to_uint8(self.vae.decode(latents[:, first : max(frames) + 1].to(self.vae.dtype))).cpu().numpy()
        return [_squeeze(decoded[:, frame - first]) for frame in frames]

    @torch.no_grad()
    def __call__(
        self,
        prompt_frames: PromptFrames | None = None,
        class_labels: Sequence[str | int] | None = None,
        num_frames: int = 16,
        ar_step: int | Sequence[int] = 5,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        use_cache: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ARDiffPipelineOutput | tuple:
        """Generate whole videos; the arguments of `stream`, and `output_type`: "pil", "np", "pt" or "latent"."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}.")
        arguments = (prompt_frames, class_labels, num_frames, ar_step, num_inference_steps, guidance_scale, generator)
        if output_type == "latent":
            inputs = self.check_inputs(*arguments)
            latents = self._start_latents(
                inputs, generator, torch.promote_types(self.transformer.dtype, torch.float32)
            )
            for state in self._denoise(inputs, latents, guidance_scale, use_cache):
                latents = state.latents
            self.maybe_free_model_hooks()
            return ARDiffPipelineOutput(frames=latents) if return_dict else (latents,)
        collected = []
        for step in self.stream(*arguments, use_cache=use_cache):
            collected += [frame if frame.ndim == 4 else frame[None] for _, frame in step.finished]
        video = np.stack(collected, axis=1)
        if output_type == "pil":
            frames = [[PIL.Image.fromarray(frame) for frame in clip] for clip in video]
        elif output_type == "np":
            frames = video.astype(np.float32) / 255.0
        else:
            frames = torch.from_numpy(video).movedim(-1, -3).float() / 255.0
        return ARDiffPipelineOutput(frames=frames) if return_dict else (frames,)


def _squeeze(frame: np.ndarray) -> np.ndarray:
    """(1, H, W, 3) to (H, W, 3): a single video's frame has no batch axis."""
    return frame[0] if len(frame) == 1 else frame
