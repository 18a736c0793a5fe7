"""What the pipeline hands out: one `ARDiffStep` per iteration, one `ARDiffPipelineOutput` per call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass(frozen=True, kw_only=True)
class ARDiffStep:
    """State after one iteration (one network call with its guidance half).

    Attributes:
        iteration (int): 1-based; num_iterations (int or None): of the whole plan; None = it has no end.
        first_frame (int): the frame that the next two begin with: 0, or in a video without end the first that is held.
        step_index (torch.Tensor of shape (F,)): int64, the plan's row: 0 = noise, N = clean.
        noise_level (torch.Tensor of shape (F,)): float in [0, 1], what the noise map draws.
        frame_evaluations (int): frames that went through the network in this iteration, the guidance half not counted.
        finished (list of (int, array)): frames finished in this iteration, in order, with their index; uint8 (H, W, 3)
            for one video, (B, H, W, 3) for a batch. Prompt frames, as decoded from their tokens, come in iteration 1.
    """

    iteration: int
    num_iterations: int | None
    step_index: torch.Tensor
    noise_level: torch.Tensor
    frame_evaluations: int
    finished: list[tuple[int, np.ndarray]]
    decode_guess: Callable[[Sequence[int]], list[np.ndarray]]
    first_frame: int = 0

    def preview(self, frames: Sequence[int]) -> list[np.ndarray]:
        """The current guess of some frames, decoded, shaped like those of `finished`; never changes the result.

        Args:
            frames: frame indices in [0, F). A waiting frame shows decoded noise. Not those that were finished more than
                a window of frames ago: their tokens are gone.
        """
        return self.decode_guess(frames)


@dataclass
class ARDiffPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        frames: (B, F, ...), by `output_type`: "pil" list of lists of images; "np" float32 (B, F, H, W, 3) in [0, 1]; "pt"
            float32 (B, F, 3, H, W) in [0, 1]; "latent" (B, F, L, C).
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor
