"""Video generation with one timestep per frame (AR-Diffusion, arXiv 2503.07418, section 3.3).

`ARDiffPipeline.stream` yields once per iteration of the AD schedule; `__call__` drains it. Shapes: B batch, F frames, P
prompt frames, L tokens per frame, C latent channels.
What is evaluated: the active frames, and before them, at the commit timestep, the finished ones that the cache lacks.
So F frames of N steps cost F * N + (F - 1) evaluations (F * N when the gap is 0); waiting frames cost nothing.
What is held: the window of the model, the frames in flight, and nothing that grows with the video.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from ardiff.models.frame_cache import FrameKVCache
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.pipelines.pipeline_output import ARDiffPipelineOutput, ARDiffStep
from ardiff.schedulers.ad_schedule import ADPlan, ad_schedule, check_window
from ardiff.schedulers.scheduling_ad import ADScheduler


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PromptFrames = Sequence[PIL.Image.Image | np.ndarray] | np.ndarray | str | os.PathLike


@dataclass(frozen=True)
class _Inputs:
    """Checked arguments of a run."""

    prompts: torch.Tensor | None  # (B, P, 3, S, S) in [-1, 1]
    labels: torch.Tensor | None  # (B,) int64
    schedule: ADPlan | torch.Tensor  # R rows of F step indices
    scheduler: ADScheduler  # this run's own: runs with other numbers of steps may be under way
    num_inference_steps: int  # as asked for
    batch_size: int
    num_prompt_frames: int


@dataclass(frozen=True)
class _Iteration:
    """Latents after one iteration and the x0 guess they came from, both (B, frames, L, C), of the frames that are held."""

    row: int
    latents: torch.Tensor
    guess: torch.Tensor
    frame_evaluations: int
    num_finished: int  # so many first frames have their last value
    first: int = 0  # the first frame that is held


class StartLatents:
    """What frames start from, (B, 1, L, C) each: the prompt's tokens, then noise, drawn the first time it is asked for.

    Noise is drawn frame by frame and in order, for prompt frames too: frame f starts from the same noise whatever the
    length of the video and of its prompt.
    """

    def __init__(self, prompt: torch.Tensor | None, draw: Callable[[], torch.Tensor]) -> None:
        self._prompt = () if prompt is None else prompt.split(1, dim=1)
        self._draw = draw
        self._first, self._frames = 0, deque()

    def get(self, first: int, stop: int) -> torch.Tensor:
        """(B, stop - first, L, C) of frames that have not been forgotten."""
        while (frame := self._first + len(self._frames)) < stop:
            noise = self._draw()
            self._frames.append(self._prompt[frame].to(noise.dtype) if frame < len(self._prompt) else noise)
        return torch.cat([self._frames[frame - self._first] for frame in range(first, stop)], dim=1)

    def forget(self, stop: int) -> None:
        """Let go of the frames before `stop`."""
        while self._first < stop:
            self._frames.popleft()
            self._first += 1


Network = Callable[[torch.Tensor, torch.Tensor, FrameKVCache | None, int], torch.Tensor]
"""Latents (B, F, L, C), step indices (F,), the cache and how many frames to commit to it -> the guided output (B, F, L, C)."""


def denoise(
    network: Network,
    start_latents: StartLatents,
    plan: ADPlan,
    scheduler: ADScheduler,
    cache: FrameKVCache | None,
    *,
    window: int,
) -> Iterator[_Iteration]:
    """Run a plan; yields after every iteration. The plan is read as Python ints: nothing waits for the device.

    A call evaluates the frames [first, stop): the finished ones that the cache does not hold yet, at step index N (given
    ones at N + 1), which commits them, then the active ones. Without a cache `first` is 0: everything again in every call, the slow and obvious
    way to the same result. Held are the frames in flight and, for previews, the last `window` finished ones.
    """
    num_steps = plan.num_inference_steps
    held, latents = 0, start_latents.get(0, plan.num_prompt_frames + 1)
    for index, row in enumerate(plan.rows()):
        if row.stop > held + latents.shape[1]:
            latents = torch.cat([latents, start_latents.get(held + latents.shape[1], row.stop)], dim=1)
        first = 0 if cache is None else cache.num_committed
        num_behind = row.start - first
        behind = [num_steps + (frame < plan.num_prompt_frames) for frame in range(first, row.start)]
        steps = torch.tensor(behind + list(row.steps)).to(latents.device, non_blocking=True)
        output = network(latents[:, first - held :], steps, cache, 0 if cache is None else num_behind)[:, num_behind:]
        finished, active = latents[:, : row.start - held], latents[:, row.start - held :]
        result = scheduler.step(output, steps[num_behind:], active)
        guess = torch.cat([finished, result.pred_original_sample], dim=1)
        latents = torch.cat([finished, result.prev_sample], dim=1)
        yield _Iteration(index, latents, guess, row.stop - first, row.num_finished, held)
        if cache is not None and row.num_finished - window > held:
            latents = latents[:, row.num_finished - window - held :]
            held = row.num_finished - window
            start_latents.forget(held)


class ARDiffPipeline(DiffusionPipeline):
    """Asynchronous video diffusion: text-free, optionally class-conditional and continued from prompt frames.

    Args:
        vae (AutoencoderARVAE): frames <-> tokens.
        transformer (ARDiffTransformerModel): the causal denoiser.
        scheduler (ADScheduler): noise levels and the DDIM step.
    """

    model_cpu_offload_seq = "vae->transformer"

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
    def supports_frame_cache(self) -> bool:
        """Whether finished frames can be kept: not where later frames change earlier ones."""
        return self.transformer.config.causal

    @property
    def min_frames(self) -> int:
        """Fewest frames that a video of this model can have."""
        return 1 if self.supports_frame_cache else self.transformer.config.window

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
        num_frames: int | None,
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
        self, num_frames: int | None, num_inference_steps: int, ar_step: int | Sequence[int], num_prompt_frames: int
    ) -> tuple[ADPlan | torch.Tensor, ADScheduler]:
        """The AD schedule of a run and a scheduler of its own."""
        schedule = ADPlan(num_frames, num_inference_steps, ar_step, num_prompt_frames=num_prompt_frames)
        check_window(schedule, self.transformer.config.window)
        if not self.supports_frame_cache:
            self._check_whole_window(num_frames)
            schedule = ad_schedule(num_frames, num_inference_steps, ar_step, num_prompt_frames=num_prompt_frames)
        scheduler = ADScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return schedule, scheduler

    def _check_whole_window(self, num_frames: int | None) -> None:
        if num_frames is None:
            raise ValueError("`num_frames` must be a number: this model evaluates a whole window of a known video.")
        if num_frames < self.min_frames:
            raise ValueError(
                f"`num_frames` must be at least {self.min_frames}, the window of this model, but is {num_frames}."
            )

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
    ) -> StartLatents:
        config, device = self.transformer.config, self._execution_device
        shape = (inputs.batch_size, 1, config.num_tokens, config.in_channels)
        prompt = None
        if inputs.prompts is not None:
            prompt = self.vae.encode(inputs.prompts.to(device, self.vae.dtype)).mode()
        return StartLatents(prompt, lambda: randn_tensor(shape, generator=generator, device=device, dtype=dtype))

    def _denoise(
        self, inputs: _Inputs, start_latents: StartLatents, guidance_scale: float, use_cache: bool | None
    ) -> Iterator[_Iteration]:
        """Run the plan; yields after every iteration."""
        if not self.supports_frame_cache:
            return self._denoise_whole_window(inputs, start_latents, guidance_scale, use_cache)
        cache = None
        if use_cache is not False:
            guided = self.is_guided(guidance_scale, inputs.labels is not None)
            cache = self.transformer.new_cache(inputs.batch_size * (1 + guided), self._execution_device)
        network = self._network(inputs, guidance_scale)
        window = self.transformer.config.window
        return denoise(network, start_latents, inputs.schedule, inputs.scheduler, cache, window=window)

    def _network(self, inputs: _Inputs, guidance_scale: float) -> Network:
        """The guided network of a run.

        Both guidance halves are one batch. What timesteps and classes do is computed here, for the whole run.
        """
        transformer, device = self.transformer, self._execution_device
        dtype = transformer.dtype  # looks through all modules
        guided = self.is_guided(guidance_scale, inputs.labels is not None)
        labels = torch.full((inputs.batch_size,), transformer.null_class) if inputs.labels is None else inputs.labels
        if guided:
            labels = torch.cat([torch.full_like(labels, transformer.null_class), labels])
        labels, video = labels.unique(return_inverse=True)
        timesteps = inputs.scheduler.timestep_of(torch.arange(inputs.scheduler.num_inference_steps + 2))
        # (labels, N + 2, ...) each
        tables = transformer.modulate(timesteps.expand(len(labels), -1).to(device), labels.to(device))
        video = video[:, None].to(device)
        run_layers = transformer.pack() if device.type == "cpu" else None

        def network(
            latents: torch.Tensor, steps: torch.Tensor, cache: FrameKVCache | None = None, num_commit: int = 0
        ) -> torch.Tensor:
            sample = torch.cat([latents, latents]) if guided else latents
            modulation = tuple(table[video, steps] for table in tables)
            output = transformer(
                sample.to(dtype), cache=cache, num_commit=num_commit, modulation=modulation, run_layers=run_layers
            ).to(latents.dtype)
            if not guided:
                return output
            without, with_class = output.chunk(2)
            return without + guidance_scale * (with_class - without)

        return network

    def _denoise_whole_window(
        self, inputs: _Inputs, start_latents: StartLatents, guidance_scale: float, use_cache: bool | None
    ) -> Iterator[_Iteration]:
        """Run the plan with a network that is not causal: every iteration evaluates the window, waiting frames included."""
        from ardiff.pipelines.pipeline_original import denoise_window

        if use_cache:
            raise ValueError(
                "`use_cache` must be None or False: later frames change the keys and values of earlier ones in this model."
            )
        latents = start_latents.get(0, inputs.schedule.shape[1])
        transformer, guided = self.transformer, self.is_guided(guidance_scale, inputs.labels is not None)
        labels = None if inputs.labels is None else inputs.labels.to(latents.device)

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            sample = sample.to(transformer.dtype)
            output = transformer(sample, timestep, labels).to(latents.dtype)
            if not guided:
                return output
            without = transformer(sample, timestep).to(latents.dtype)
            return without + guidance_scale * (output - without)

        return denoise_window(
            predict,
            latents,
            inputs.schedule,
            inputs.scheduler,
            window=transformer.config.window,
            num_prompt_frames=inputs.num_prompt_frames,
        )

    @torch.no_grad()
    def stream(
        self,
        prompt_frames: PromptFrames | None = None,
        class_labels: Sequence[str | int] | None = None,
        num_frames: int | None = 16,
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
            num_frames: frames of the video, prompt frames included; more than there are prompt frames. None = the video
                goes on until the generator is closed, in constant memory, for one int `ar_step` >= 1.
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
        if num_frames is None and use_cache is False:
            raise ValueError("`use_cache` must not be False where `num_frames` is None: every call would cost more.")
        try:
            start_latents = self._start_latents(inputs, generator, self._latents_dtype)
            decoder_cache, num_decoded = DecoderCache(), 0
            for state in self._denoise(inputs, start_latents, guidance_scale, use_cache):
                finished = []
                if state.num_finished > num_decoded:
                    tokens = state.latents[:, num_decoded - state.first : state.num_finished - state.first]
                    frames = to_uint8(self.vae.decode(tokens.to(self.vae.dtype), decoder_cache)).cpu().numpy()
                    finished = [(num_decoded + i, _squeeze(frames[:, i])) for i in range(frames.shape[1])]
                    num_decoded = state.num_finished
                if num_frames is None:
                    shown = range(state.first, state.first + state.latents.shape[1])
                    step_index = inputs.schedule.step_index(state.row, shown.start, shown.stop)
                else:
                    shown, step_index = range(num_frames), inputs.schedule[state.row]
                yield ARDiffStep(
                    iteration=state.row + 1,
                    num_iterations=None if num_frames is None else len(inputs.schedule),
                    first_frame=shown.start,
                    step_index=step_index,
                    noise_level=inputs.scheduler.noise_level(step_index),
                    frame_evaluations=state.frame_evaluations,
                    finished=finished,
                    decode_guess=partial(self._decode_guess, state, start_latents, shown),
                )
        finally:
            self.maybe_free_model_hooks()

    @property
    def _latents_dtype(self) -> torch.dtype:
        return torch.promote_types(self.transformer.dtype, torch.float32)

    def _first_frame_behind(self, frame: int) -> int:
        """The earliest frame that the decoder looks at for `frame`."""
        return max(frame - self.vae.config.temporal_window + 1, 0)

    @torch.no_grad()
    def _decode_guess(
        self, state: _Iteration, start_latents: StartLatents | torch.Tensor, shown: range, frames: Sequence[int]
    ) -> list[np.ndarray]:
        """Decode some frames of a clip in one batch, each with the earlier frames that the decoder looks at."""
        if any(frame not in shown for frame in frames):
            raise ValueError(f"`frames` must be frame indices in [{shown[0]}, {shown[-1]}] but are {list(frames)}.")
        if not frames:
            return []
        first, stop = self._first_frame_behind(min(frames)), max(frames) + 1
        if first < state.first:
            raise ValueError(
                f"`frames` must not have been finished for more than about {self.transformer.config.window} frames but are "
                f"{list(frames)}: tokens of frames before {state.first} are gone."
            )
        latents, num_held = state.guess, state.first + state.guess.shape[1]
        if stop > num_held:
            latents = torch.cat([latents, start_latents.get(num_held, stop)], dim=1)
        latents = latents[:, first - state.first : stop - state.first].to(self.vae.dtype)
        decoded = to_uint8(self.vae.decode(latents)).cpu().numpy()
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
        if num_frames is None:
            raise ValueError(
                "`num_frames` must be a number: a video without end has no result, only `stream` makes one."
            )
        arguments = (prompt_frames, class_labels, num_frames, ar_step, num_inference_steps, guidance_scale, generator)
        if output_type == "latent":
            inputs, finished, num_finished = self.check_inputs(*arguments), [], 0
            start_latents = self._start_latents(inputs, generator, self._latents_dtype)
            for state in self._denoise(inputs, start_latents, guidance_scale, use_cache):
                if state.num_finished > num_finished:
                    # A copy: a view would keep all that is held alive.
                    new = slice(num_finished - state.first, state.num_finished - state.first)
                    finished.append(state.latents[:, new].clone())
                    num_finished = state.num_finished
            latents = torch.cat(finished, dim=1)
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
