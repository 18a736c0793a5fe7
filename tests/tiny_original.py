"""A pipeline of the published architecture, tiny, with seeded weights: frames of 8 pixels, a window of four."""

import torch

from ardiff import ADScheduler
from ardiff.models.original import AutoencoderOriginal, OriginalTransformerModel
from ardiff.pipelines.pipeline_original import OriginalARDiffPipeline


WINDOW = 4


def build(class_names=(), clip_frames=1, prediction_type="sample", compat=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = OriginalTransformerModel(
            num_tokens=3,
            width=16,
            depth=2,
            num_heads=2,
            window=WINDOW,
            num_context_tokens=2,
            context_width=8,
            class_names=list(class_names),
        )
        vae = AutoencoderOriginal(
            image_size=8,
            patch_size=2,
            width=16,
            num_layers=2,
            num_heads=2,
            num_tokens=3,
            codebook_size=8,
            pixel_channels=4,
            base_channels=32,
            channel_multipliers=[1, 1],
            num_res_blocks=1,
            clip_frames=clip_frames,
        )
    scheduler = ADScheduler(prediction_type=prediction_type)
    pipe = OriginalARDiffPipeline(vae.eval(), transformer.eval(), scheduler, compat=compat)
    pipe.set_progress_bar_config(disable=True)
    return pipe
