"""What keeps the training steady: even noise levels, qk-norm, and the figures of `examples/stability.py`."""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ardiff import ARDiffTransformerModel, AutoencoderARVAE, bundled_model
from ardiff.data.latents import cache_latents
from ardiff.training.diffusion import DiffusionTrainingConfig, draw_timesteps, preset


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "examples/stability.py"
    spec = importlib.util.spec_from_file_location("stability", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def drawn():
    """Draws (batches, 4, 2) at 4 timesteps, and (batches, 8, 16) at 1000, of so many candidates a clip."""

    def draw(num_candidates, *sizes, num_batches, **options):
        config = DiffusionTrainingConfig(timestep_candidates=num_candidates, **options)
        generator = torch.Generator().manual_seed(0)
        return torch.stack([draw_timesteps(config, *sizes, generator) for _ in range(num_batches)])

    return draw


def test_even_noise_levels_have_the_law_of_a_clip(drawn):
    timesteps = drawn(3, 4, 2, 4, num_batches=1000, synchronous_share=0.0, lagged_share=0.0)
    # FoPP with 2 frames and 4 timesteps: through an anchor at (0, t) go 4 - t sequences, through (1, t) go t + 1.
    law = {(a, b): (1 / (4 - a) + 1 / (b + 1)) / 8 for a in range(4) for b in range(a, 4)}
    for position in range(4):
        counts = Counter(map(tuple, timesteps[:, position].tolist()))
        chi_square = sum((counts[key] - 1000 * p) ** 2 / (1000 * p) for key, p in law.items())
        assert set(counts) <= set(law)
        assert abs(chi_square - 9) < 5 * math.sqrt(18)


def test_even_noise_levels_differ_less_from_step_to_step(drawn):
    alone, even = (drawn(k, 8, 16, 1000, num_batches=80).double().mean((1, 2)) for k in (1, 8))
    assert even.std() < 0.5 * alone.std()
    assert abs(even.mean() - alone.mean()) < 45  # 4 standard errors of the difference


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="`timestep_candidates` must be at least 1 but is 0"):
        DiffusionTrainingConfig(timestep_candidates=0)


def test_qk_norm_takes_the_size_of_queries_and_keys_away(generator):
    tokens, timesteps = torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([[0, 300, 900]] * 2)
    outputs = {}
    for qk_norm in (True, False):
        torch.manual_seed(0)
        model = ARDiffTransformerModel(
            num_tokens=4, in_channels=4, width=16, depth=2, num_heads=2, window=4, qk_norm=qk_norm
        )
        with torch.no_grad():
            model.proj_out.weight.normal_(std=0.1)
            outputs[qk_norm] = [model(tokens, timesteps)]
            for block in model.blocks:
                block.qkv.weight[:32] *= 5
                block.qkv.bias[:32] *= 5
            outputs[qk_norm].append(model(tokens, timesteps))
    torch.testing.assert_close(*outputs[True], atol=1e-5, rtol=1e-5)
    assert (outputs[False][0] - outputs[False][1]).abs().max() > 1e-3
    old = {name: value for name, value in model.config.items() if name != "qk_norm"}
    assert ARDiffTransformerModel.from_config(old).config.qk_norm


def test_spread_is_that_of_the_noise_and_not_of_the_trend(script):
    steps, noise = np.arange(2000), np.random.default_rng(0).normal(scale=0.2, size=2000)
    norms = list(np.exp(-steps / 500 + noise))
    assert np.log(script.beside_median(norms)).std() == pytest.approx(0.2, rel=0.1)
    assert script.wobble(norms) == pytest.approx(0.2, rel=0.1)
    norms[700] *= 20
    assert np.flatnonzero(script.beside_median(norms) > script.SPIKE).tolist() == [700 - script.WINDOW // 2]


def test_a_run_is_measured_and_one_without_numbers_is_a_result(script, tmp_path):
    vae = AutoencoderARVAE.from_pretrained(bundled_model() / "vae", dtype=torch.float32).eval().requires_grad_(False)
    script.write_clips(tmp_path / "clips", 3)
    names = cache_latents(f"videos:{tmp_path / 'clips'}", vae, tmp_path / "tokens", progress=False)["class_names"]
    draws = script.held_out_draws(vae, sorted({*names, *script.SCENES}), 2)
    assert draws["noisy"].shape == (6, 16, 16, 16)
    options = {
        "data": f"latents:{tmp_path / 'tokens'}", "num_steps": 44, "warmup_steps": 2, "batch_size": 1, "draws_per_clip": 1,
        "width": 16, "depth": 1, "num_heads": 1, "num_workers": 0, "log_every": 1, "checkpoint_every": 44, "device": "cpu",
        "mixed_precision": "no", "out": str(tmp_path / "run"),
    }  # fmt: skip
    draws["labels"] %= len(names)
    good = script.train(preset("scenes-64-cpu", **options), True, vae, draws, 11, 3)
    figures = script.figures_of(good, 2)
    assert set(figures) == {*script.TRAINING, *script.AVERAGES}
    assert len(good["curve"]["weights"]) == 4
    assert figures["error, weights"] < good["curve"]["weights"][0]  # it has learned
    assert good["held_out"]["weights"]["mse"] != good["held_out"]["average 0.9"]["mse"]
    bad = script.train(preset("scenes-64-cpu", **options, learning_rate=1e30), True, vae, draws, 11, 3)
    rows = script.table_rows({"0.01": {"base": [good, good], "without qk-norm": [good, bad]}}, 2)
    assert [row["survived"] for row in rows] == ["2 of 2", "1 of 2"]
    assert rows[1]["differences"]["loss_spread"] == [0.0]
