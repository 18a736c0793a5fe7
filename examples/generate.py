"""Sixteen frames of drifting clouds, each said the moment it is finished: `python examples/generate.py`."""

import torch

from ardiff import ARDiffPipeline, bundled_model
from ardiff.data.video import write_video


def main() -> None:
    pipe = ARDiffPipeline.from_pretrained(bundled_model(), dtype=torch.float32)
    frames = []
    for step in pipe.stream(
        class_labels=["clouds"], num_frames=16, ar_step=5, generator=torch.Generator().manual_seed(0)
    ):
        for frame_index, frame in step.finished:
            print(f"frame {frame_index} after call {step.iteration} of {step.num_iterations}")
            frames.append(frame)
    write_video(frames, "clouds.mp4", fps=8)


if __name__ == "__main__":
    main()
