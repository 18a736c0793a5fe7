"""What is compared, at which size, and where it is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ardiff.data.scenes import SCENES
from ardiff.evaluation.prediction import NUM_FRAMES, HeldOutClip
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.schedulers.ad_schedule import profile_gaps
from ardiff.schedulers.scheduling_ad import ADScheduler
from ardiff.training.diffusion import PRESETS


NUM_LONG_FRAMES = 64
NUM_BLOCKS = NUM_LONG_FRAMES // NUM_FRAMES
# At gap 0 more frames would be in flight than the window holds: synchronous blocks, each with as many frames behind it.
CHUNK = 8

Count = Callable[[int], object]  # hears of frame evaluations as they are done; one of training counts as three


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to train and sample: the law of the timesteps, attention to later frames or not, what is predicted, and the
    rest of a recipe under the names that `DiffusionTrainingConfig` has for it."""

    name: str
    law: str = "fopp"
    causal: bool = True
    prediction_type: str = "sample"
    rescale_betas_zero_snr: bool = False
    synchronous_share: float = 0.0
    lagged_share: float = 0.0
    timestep_candidates: int = 1
    commit_timestep: int = 0

    def scheduler(self) -> ADScheduler:
        """Of training and of sampling."""
        return ADScheduler(
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
            commit_timestep=self.commit_timestep,
        )


BASE = Configuration(name="fopp")
BUNDLED = PRESETS["scenes-64-cpu"]
CONFIGURATIONS = (
    BASE,
    Configuration(name="independent", law="independent"),
    Configuration(name="synchronous", law="synchronous"),
    Configuration(name="incremental", law="incremental"),
    Configuration(name="not-causal", causal=False),
    Configuration(name="epsilon", prediction_type="epsilon"),
    Configuration(name="v", prediction_type="v_prediction"),
)
# Beyond what the paper compares; `--quick` with them takes longer than half an hour.
RECIPE_CONFIGURATIONS = (
    Configuration(name="zero-snr", rescale_betas_zero_snr=True),
    Configuration(name="commit", commit_timestep=BUNDLED.commit_timestep),
    Configuration(name="independent-commit", law="independent", commit_timestep=BUNDLED.commit_timestep),
    Configuration(
        name="recipe",
        rescale_betas_zero_snr=BUNDLED.rescale_betas_zero_snr,
        synchronous_share=BUNDLED.synchronous_share,
        lagged_share=BUNDLED.lagged_share,
        timestep_candidates=BUNDLED.timestep_candidates,
        commit_timestep=BUNDLED.commit_timestep,
    ),
)
LABELS = {
    "fopp": "FoPP, causal, x0 (base)",
    "independent": "independent timesteps (Diffusion Forcing)",
    "synchronous": "synchronous timesteps",
    "incremental": "plain incremental timesteps",
    "not-causal": "attention not causal",
    "epsilon": "predicts the noise",
    "v": "predicts v",
    "zero-snr": "zero terminal SNR",
    "commit": "FoPP, finished frames shown as noisy",
    "independent-commit": "independent timesteps, finished frames shown as noisy",
    "recipe": "bundled recipe (zero terminal SNR, shares of synchronous and lagged rows, finished frames shown as noisy)",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and measured; all of it the same for every configuration.

    Attributes:
        scenes: names of SCENES, the classes.
        num_training_clips: of each scene, 64 frames long, encoded once; 16 frames of one are drawn at a time.
        width, depth, num_heads: of the transformer. batch_size, num_steps, learning_rate: of the training.
        num_inference_steps: N; the timestep gaps are 0, 5 and N.
        num_clips, num_long_clips, num_prompts: samples of 16 frames, of 64 frames and continuations, of each scene.
        num_real: clips of each scene that all samples are compared with.
        mixed_precision: "no" or "bf16", of training and sampling.
    """

    scenes: tuple[str, ...]
    num_training_clips: int
    width: int
    depth: int
    num_heads: int
    batch_size: int
    num_steps: int
    learning_rate: float
    num_inference_steps: int
    num_clips: int
    num_long_clips: int
    num_prompts: int
    num_real: int
    mixed_precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 6:  # else the gaps 5 and N are one
            raise ValueError(f"`num_inference_steps` must be at least 6 but is {self.num_inference_steps}.")
        if not 2 <= self.num_long_clips <= self.num_clips:
            raise ValueError(
                f"`num_long_clips` must be in [2, `num_clips` = {self.num_clips}] but is {self.num_long_clips}."
            )

    @property
    def gaps(self) -> tuple[int, int, int]:
        return 0, 5, self.num_inference_steps

    def long_plans(self) -> dict[str, int | tuple[int, ...]]:
        """`ar_step` of the videos of 64 frames, by name: gap 0 inside blocks that follow one another, then the gaps."""
        steps = self.num_inference_steps
        blocks = profile_gaps("chunks", gap=0, chunk=CHUNK, num_new_frames=NUM_LONG_FRAMES, num_inference_steps=steps)
        return {"0": blocks, "5": 5, str(steps): steps}


SIZES = {
    "quick": Size(
        scenes=("pendulum", "sunset"),
        num_training_clips=192,
        width=64,
        depth=4,
        num_heads=2,
        batch_size=6,
        num_steps=1200,
        learning_rate=5e-3,
        num_inference_steps=10,
        num_clips=16,
        num_long_clips=6,
        num_prompts=12,
        num_real=64,
    ),
    "full": Size(
        scenes=SCENES,
        num_training_clips=4096,
        width=256,
        depth=8,
        num_heads=4,
        batch_size=64,
        num_steps=20_000,
        learning_rate=1.5e-3,
        num_inference_steps=50,
        num_clips=128,
        num_long_clips=64,
        num_prompts=64,
        num_real=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where one ablation stands and what it is; what a worker process needs."""

    out: Path
    vae: str
    size: Size
    device: str

    def load_vae(self) -> AutoencoderARVAE:
        vae = AutoencoderARVAE.from_pretrained(self.vae, dtype=torch.float32)
        return vae.eval().requires_grad_(False).to(self.device)

    @property
    def sampling_dtype(self) -> str:
        return "bfloat16" if self.size.mixed_precision == "bf16" else "float32"

    def run_folder(self, configuration: Configuration, seed: int) -> Path:
        return self.out / "runs" / f"{configuration.name}-seed{seed}"

    def clips(self, num_clips: int) -> list[HeldOutClip]:
        """The first so many held-out clips of every scene, scene after scene."""
        return [
            HeldOutClip(scene=scene, index=index, seed=0) for scene in self.size.scenes for index in range(num_clips)
        ]
