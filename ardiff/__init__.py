"""AR-Diffusion: video generation with one timestep per frame (CVPR 2025, arXiv 2503.07418).

Layers, imports go down only: cli, demo, serving > pipelines, training, evaluation > models, schedulers, data.
The names below are imported when they are first asked for, so that `ardiff --help` does not wait for torch.
"""

from importlib import import_module


__version__ = "0.1.0"

__all__ = [
    "ADScheduler",
    "ARDiffPipeline",
    "ARDiffTransformerModel",
    "AutoencoderARVAE",
    "FrameKVCache",
    "ad_schedule",
    "bundled_model",
    "sample_fopp",
]

_MODULES = {
    "ADScheduler": "ardiff.schedulers",
    "ARDiffPipeline": "ardiff.pipelines",
    "ARDiffTransformerModel": "ardiff.models",
    "AutoencoderARVAE": "ardiff.models",
    "FrameKVCache": "ardiff.models",
    "ad_schedule": "ardiff.schedulers",
    "bundled_model": "ardiff.pipelines.loading",
    "sample_fopp": "ardiff.training.timesteps",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
