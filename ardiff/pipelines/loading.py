"""Which model and which device a name means: shared by the command line and the studio."""

from pathlib import Path

import torch

from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline


DEFAULT_MODEL = "scenes-64"
"""The bundled model that is used where none is named."""

BUNDLE = Path(__file__).resolve().parents[2] / "assets" / "models"


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with the repository (assets/models/*), the default one first."""
    names = sorted(path.parent.name for path in BUNDLE.glob("*/model_index.json"))
    return tuple(sorted(names, key=lambda name: name != DEFAULT_MODEL))


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Folder of a model that comes with the repository (assets/models/<name>).

    Raises:
        ValueError: there is none of that name; lists those there are.
    """
    if name not in bundled_models():
        known = ", ".join(bundled_models()) or "none"
        raise ValueError(f"`name` must be one of the bundled models ({known}) but is {name!r}.")
    return BUNDLE / name


def choose_device(name: str = "auto") -> str:
    """`auto` is the first of cuda, mps, cpu that is there; any other name is returned as it came."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_model(name: str | None = None) -> str | Path:
    """A folder or Hub id as given; the name of a bundled model is its folder, None the default one."""
    if name is None:
        return bundled_model(DEFAULT_MODEL)
    return bundled_model(name) if name in bundled_models() and not Path(name).exists() else name


def load_pipeline(
    model: str | None = None, *, device: str = "auto", dtype: torch.dtype = torch.float32, offload: bool = False
) -> ARDiffPipeline:
    """Load a folder, Hub id or bundled model's name and put it on a device. Raises ValueError or OSError with one sentence.

    `offload`: the models stay in main memory until they are needed, and the autoencoder returns there while the network
    works (accelerate's hooks): less memory on the device, slower. Needs an accelerator.
    """
    device = choose_device(device)
    if offload and torch.device(device).type == "cpu":
        raise ValueError("`offload` needs an accelerator: on cpu the models are in main memory anyway.")
    pipeline = ARDiffPipeline.from_pretrained(find_model(model), dtype=dtype)
    if not offload:
        return pipeline.to(device)
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline
