"""AR-Diffusion: video generation with one timestep per frame (CVPR 2025, arXiv 2503.07418).

Layers, imports go down only: cli, demo, serving > pipelines, training, evaluation > models, schedulers, data.
"""

from pathlib import Path

from ardiff.models import ARDiffTransformerModel, AutoencoderARVAE, FrameKVCache
from ardiff.pipelines import ARDiffPipeline
from ardiff.schedulers import ADScheduler, ad_schedule
from ardiff.training.timesteps import sample_fopp


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


def bundled_model(name: str = "scenes-64") -> Path:
    """Folder of a model that comes with the repository (assets/models/<name>).

    Raises:
        ValueError: there is none of that name; lists those there are.
    """
    models = Path(__file__).resolve().parent.parent / "assets" / "models"
    if not (models / name / "model_index.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in models.glob("*/model_index.json"))) or "none"
        raise ValueError(f"`name` must be one of the bundled models ({known}) but is {name!r}.")
    return models / name
