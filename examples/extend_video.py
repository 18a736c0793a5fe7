"""Go on from the first four frames of a video: `python examples/extend_video.py clip.mp4 longer.mp4`."""

import argparse

import torch

from ardiff import ARDiffPipeline, bundled_model
from ardiff.data.video import read_video, write_video


def main() -> None:
    parser = argparse.ArgumentParser(description="Go on from the first four frames of a video.")
    parser.add_argument("clip", help="the video to go on from")
    parser.add_argument("out", help="the video to write: .mp4, .gif or .webp")
    args = parser.parse_args()

    pipe = ARDiffPipeline.from_pretrained(bundled_model(), dtype=torch.float32)
    prompt_frames = read_video(args.clip, size=pipe.image_size, max_frames=4)
    # One after the other: a new frame starts when the frame before it is clean.
    video = pipe(
        prompt_frames=prompt_frames,
        num_frames=16,
        ar_step=50,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    write_video((video * 255).round().astype("uint8"), args.out, fps=8)


if __name__ == "__main__":
    main()
