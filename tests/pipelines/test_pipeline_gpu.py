"""On an accelerator the pipeline gives what it gives on a CPU: noise is drawn on the CPU generator's side."""

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE is None, reason="there is no accelerator")
@pytest.mark.parametrize("ar_step", [0, 2, 6])
def test_an_accelerator_gives_the_same_video(tiny_pipeline, ar_step):
    arguments = {"class_labels": ["clouds"], "num_frames": 5, "ar_step": ar_step, "num_inference_steps": 6}
    frames = [
        tiny_pipeline.to(device)(generator=torch.Generator().manual_seed(0), output_type="latent", **arguments).frames
        for device in ("cpu", DEVICE)
    ]
    assert frames[1].device.type == DEVICE
    assert (frames[0] - frames[1].cpu()).abs().max() < 1e-2
