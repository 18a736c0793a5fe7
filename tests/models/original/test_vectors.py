"""The published architectures and the released sampler against recorded outputs of the released code.

Every size, case and tolerance comes from the folder's manifest.json (tests/data/original/README.md says what the tensors
are). `ARDIFF_ORIGINAL_VECTORS=FOLDER python -m pytest tests/models/original` runs the tests on another folder of that layout.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ardiff import ADScheduler, ad_schedule, sample_fopp
from ardiff.models.autoencoder_arvae import DecoderCache
from ardiff.models.original import AutoencoderOriginal, OriginalTransformerModel
from ardiff.models.original.autoencoder_original import stored_from_tokens, tokens_from_stored
from ardiff.models.original.transformer_original import TimestepEmbedder, fixed_tables, position_table, visibility
from ardiff.pipelines.pipeline_original import (
    OriginalARDiffPipeline,
    ReleasedTables,
    denoise_as_released,
    released_windows,
)
from ardiff.training.losses import diffusion_loss
from ardiff.training.timesteps import _log_counts, sample_incremental


FOLDER = Path(os.environ.get("ARDIFF_ORIGINAL_VECTORS", Path(__file__).parents[2] / "data" / "original"))
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
FILES, SIZES, TOLERANCES = MANIFEST["files"], MANIFEST["config"], MANIFEST["tolerances"]
CASES = FILES["sampler_traces.safetensors"]["cases"]
NETWORK = "diffusion_model.model."
PREDICTION_TYPES = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
BASELINE_BETAS = {"beta_start": 8.5e-4, "beta_end": 1.2e-2}  # README.md, df_baseline
FORWARD = {"atol": TOLERANCES["single_forward_atol"], "rtol": 0.0}
TRACE = {"atol": TOLERANCES["trace_free_frames_atol"], "rtol": 0.0}
GIVEN = float(re.search(r"relative ([\d.e-]+)", TOLERANCES["trace_given_frames"])[1])
DECODED = {"atol": TOLERANCES["vae_decoded_atol"], "rtol": 0.0}
TABLE = {"atol": 0.0, "rtol": TOLERANCES["float_tables_rtol"]}
# Sines and cosines of timestep x frequency: processors differ in the last bit of a frequency's exponential, which a timestep
# of 999 makes 6e-5 of the angle. That is more than the manifest's forward tolerance, which is kept for all that follows.
FEATURES = {"atol": 999 * torch.finfo(torch.float32).eps, "rtol": 0.0}

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


@cache
def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def names(file: str, pattern: str) -> list[str]:
    """Tensors of a file whose whole name the pattern matches."""
    with safe_open(FOLDER / f"{file}.safetensors", framework="pt") as tensors:
        return sorted(name for name in tensors.keys() if re.fullmatch(pattern, name))  # noqa: SIM118


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(actual: torch.Tensor, expected: torch.Tensor, *, atol: float, rtol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def transformer_config(part: str, **options) -> dict:
    size = SIZES[part]
    return {
        "num_tokens": size["L"],
        "in_channels": size["C"],
        "width": size["hidden"],
        "depth": size["depth"],
        "num_heads": size["heads"],
        "window": size["F"],
        "num_context_tokens": size["ctx_tok"],
        "context_width": size["ctx_dim"],
    } | options


def build_transformer(**options) -> OriginalTransformerModel:
    model = OriginalTransformerModel(**transformer_config("dit", **options)).eval()
    weights = below(load("model"), NETWORK)
    del weights["pos_embed"]
    contexts = "class_emb" if options.get("class_names") else "context_emb"
    source = load("class_cond") if options.get("class_names") else load("model")
    model.load_state_dict(weights | {contexts: source[contexts]})
    return model


def build_rotary(kind: str, **options) -> OriginalTransformerModel:
    positions = "absolute" if kind == "out_qknorm_only" else "rotary"
    qk_norm = kind != "out_rope_only"
    config = transformer_config("rope", positions=positions, qk_norm=qk_norm, **options)
    model = OriginalTransformerModel(**config).eval()
    weights = below(load("rope_state"), NETWORK)
    weights = {name: tensor for name, tensor in weights.items() if "rotary_emb" not in name}
    if not qk_norm:
        weights = {name: tensor for name, tensor in weights.items() if "_norm." not in name}
    # The file has no context of its own: the vectors bring theirs.
    model.load_state_dict(weights | {"context_emb": model.context_emb.detach()})
    return model


def build_vae(kind: str) -> AutoencoderOriginal:
    size = SIZES["vae"]
    model = AutoencoderOriginal(
        image_size=size["image_size"],
        patch_size=size["patch"],
        width=size["width"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        num_tokens=size["num_latent_tokens"],
        latent_channels=size["token_size"],
        codebook_size=size["ffn_out"],
        pixel_channels=size["z_channels"],
        base_channels=size["hidden_channels"],
        channel_multipliers=size["channel_mult"],
        num_res_blocks=size["num_res_blocks"],
        clip_frames=SIZES["vae_T"] if kind == "temporal" else 1,
    )
    weights = below(load("model"), "vae.")
    model.load_state_dict(weights | (load("vae_temporal_extra_state") if kind == "temporal" else {}))
    return model.eval()


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """Our [-1, 1] to the vectors' [0, 1]."""
    return pixels * 0.5 + 0.5


def channels_last(latents: torch.Tensor) -> torch.Tensor:
    """(B, F, C, 1, L) to (B, F, L, C)."""
    return latents.squeeze(-2).transpose(-1, -2)


def sample(
    pipe: OriginalARDiffPipeline, noise: torch.Tensor, spec: dict, guidance: float, labels=None
) -> torch.Tensor:
    """Final latents of a run of the pipeline from given noise."""
    inputs = pipe.check_inputs(None, labels, noise.shape[1], spec["ardiff_step"], spec["S"], guidance, None)
    if labels is None:
        # A batch of videos without classes: as many as there is noise for.
        inputs = dataclasses.replace(inputs, batch_size=len(noise))
    return list(pipe._denoise(inputs, noise, guidance, None))[-1].latents


# --- the files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_file_is_that_of_the_manifest(file):
    assert hashlib.sha256((FOLDER / file).read_bytes()).hexdigest() == FILES[file]["sha256"]


# --- transformer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("dit_forward", r"out.*"))
def test_forward(name):
    kind, merge_mode, mask = name.split("/")
    vectors = load("dit_forward")
    context = vectors["context"] * (kind == "out")
    model = build_transformer(merge_mode=merge_mode, attention_mask=mask)
    close(model(vectors["x"], vectors["t"].long(), context), vectors[name], **FORWARD)


@pytest.mark.parametrize("name", names("rope_forward", r"out.*"))
def test_forward_rotary(name):
    kind, merge_mode, mask = name.split("/")
    vectors = load("rope_forward")
    model = build_rotary(kind, merge_mode=merge_mode, attention_mask=mask)
    close(model(vectors["x"], vectors["t"].long(), vectors["context"]), vectors[name], **FORWARD)


def test_rotary_table():
    expected = load("rope_state")[NETWORK + "rotary_emb.freqs"]
    close(fixed_tables(transformer_config("rope", positions="rotary"))["rotary_emb.freqs"], expected, **TABLE)


def test_position_table():
    expected = load("model")[NETWORK + "pos_embed"]
    table = fixed_tables(transformer_config("dit", positions="absolute"))["pos_embed"]
    close(table, expected, atol=TABLE["rtol"], rtol=TABLE["rtol"])


@pytest.mark.parametrize("name", names("schedule", r"pos_embed_\d+x\d+/values"))
def test_position_table_of_paper_size(name):
    width, num_positions = map(int, re.findall(r"\d+", name))
    rows = load("schedule")[name.replace("values", "rows")].long()
    table = position_table(num_positions, width, torch.float32, torch.device("cpu"))
    close(table[rows], load("schedule")[name], atol=TABLE["rtol"], rtol=TABLE["rtol"])


@pytest.mark.parametrize("name", names("schedule", r"timestep_embedding_\d+/values"))
def test_timestep_features(name):
    features = TimestepEmbedder(8, int(re.search(r"\d+", name)[0])).features
    timestep = load("schedule")[name.replace("values", "t")]
    assert timestep.max() <= 999
    close(features(timestep), load("schedule")[name], **FEATURES)


@pytest.mark.parametrize("name", names("dit_forward", r"attn_mask/.*"))
def test_attention_mask(name):
    size = SIZES["dit"]
    visible = visibility(name.split("/")[1], size["ctx_tok"], size["F"], size["L"], torch.device("cpu"))
    assert torch.equal(~visible, load("dit_forward")[name].bool())


def test_activations():
    """Every recorded value inside the network; recorded for the last clip alone."""
    vectors, model, seen = load("dit_forward"), build_transformer(), {}

    def record(module, name, come_in=None):
        def hook(_, inputs, output):
            seen[name] = output
            if come_in is not None:
                seen[come_in] = inputs[0]

        module.register_forward_hook(hook)

    record(model.x_embedder, "x_embedder_out")
    record(model.c_embedder, "context_tokens")
    record(model.t_embedder.features, "t_freq")
    record(model.t_embedder, "t_emb")
    for index, block in enumerate(model.blocks):
        record(block, f"block{index}_out")
        record(block.adaLN_modulation, f"block{index}_adaLN_out")
        record(block.attn, f"block{index}_attn_out", f"block{index}_attn_in")
        record(block.mlp, f"block{index}_mlp_out", f"block{index}_mlp_in")
    model(vectors["x"][1:2], vectors["t"][1:2].long(), vectors["context"][1:2])
    expected = below(vectors, "act/")
    assert expected
    for name, tensor in expected.items():
        tolerance = FEATURES if name == "t_freq" else FORWARD
        torch.testing.assert_close(
            seen[name].reshape(tensor.shape), tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "file", "name"),
    [
        ({}, "model", "diffusion_model.alphas_cumprod"),
        (BASELINE_BETAS, "schedule", "df_baseline/alphas_cumprod"),
    ],
)
def test_noise_schedule(options, file, name):
    close(ADScheduler(**options).alphas_cumprod, load(file)[name], **TABLE)


def test_noise_rates():
    scheduler, one = ADScheduler(), torch.ones(1, 1, 1, 1)
    timesteps = torch.arange(len(scheduler))[:, None]
    signal, noise = (
        scheduler.add_noise(
            a.expand(len(scheduler), -1, -1, -1), b.expand(len(scheduler), -1, -1, -1), timesteps
        ).flatten()
        for a, b in ((one, 0 * one), (0 * one, one))
    )
    close(signal, load("model")["diffusion_model.sqrt_alphas_cumprod"], **TABLE)
    close(noise, load("model")["diffusion_model.sqrt_one_minus_alphas_cumprod"], **TABLE)


@pytest.mark.parametrize("steps", [int(name.split("/")[1]) for name in names("schedule", r"ddim/\d+/timesteps")])
def test_released_tables(steps):
    vectors, tables = load("schedule"), ReleasedTables.of(ADScheduler(), steps)
    assert torch.equal(tables.timesteps, vectors[f"ddim/{steps}/timesteps"].long())
    close(tables.alphas, vectors[f"ddim/{steps}/alphas"], **TABLE)
    close(tables.alphas_prev, vectors[f"ddim/{steps}/alphas_prev"], **TABLE)


@pytest.mark.parametrize("name", [name.removesuffix("/window") for name in names("schedule", r"plan/.*/window")])
def test_plan(name):
    vectors, scheduler = below(load("schedule"), name + "/"), ADScheduler()
    num_frames, steps, ar_step, window = map(int, re.findall(r"\d+", name))
    tables = ReleasedTables.of(scheduler, steps)
    plan = ad_schedule(num_frames, len(tables.timesteps), ar_step)
    assert torch.equal(plan, vectors["step_index"].long())
    assert torch.equal(tables.shown(plan, len(scheduler)), vectors["timesteps"].long())
    assert torch.equal(plan.diff(dim=0, prepend=torch.zeros_like(plan[:1])), vectors["update_mask"].long())
    assert torch.equal(released_windows(plan, window), vectors["window"].long())


# --- latents and loss -------------------------------------------------------------------------------------------


def test_latents():
    vectors = load("latents_loss")
    tokens = tokens_from_stored(vectors["raw_latents"])
    close(tokens, vectors["zs"], **FORWARD)
    close(stored_from_tokens(tokens), vectors["post"], **FORWARD)


def test_loss_and_gradients():
    vectors, model = load("latents_loss"), build_transformer()
    losses = {"x0": "loss", "eps": "loss_eps", "v": "loss_v"}
    timesteps = vectors["t"].long()
    noisy = ADScheduler().add_noise(vectors["zs"], vectors["noise"], timesteps)
    close(noisy, vectors["x_noisy"], **FORWARD)
    output = model(noisy, timesteps, model.conditional_context(None, len(noisy)))
    close(output.detach(), vectors["pred"], **FORWARD)
    for kind, name in losses.items():
        target = ADScheduler(prediction_type=PREDICTION_TYPES[kind]).training_target(
            vectors["zs"], vectors["noise"], timesteps
        )
        loss = diffusion_loss(output, target)
        close(loss.detach(), vectors[name].reshape(()), atol=0.0, rtol=TOLERANCES["loss_rtol"])
        if kind == "x0":
            loss.backward(retain_graph=True)
    gradients = below(vectors, "grad/")
    assert gradients
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        close(parameters[name.removeprefix(NETWORK)].grad, expected, **FORWARD)


# --- sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sampler_trace(case):
    spec, vectors = CASES[case], below(load("sampler_traces"), case + "/")
    num_given, window, guidance = spec["cond_frames"], spec["window"], spec["guidance"]
    scheduler = ADScheduler(prediction_type=PREDICTION_TYPES[spec["parameterization"]])
    tables = ReleasedTables.of(scheduler, spec["S"])
    plan = ad_schedule(spec["total_frames"], len(tables.timesteps), spec["ardiff_step"])
    assert len(plan) == spec["iterations"]
    assert torch.equal(plan, vectors["step_index"].long())
    pipe = OriginalARDiffPipeline(build_vae("image"), build_transformer(), scheduler, compat=True)
    inputs = pipe.check_inputs(None, None, spec["total_frames"], spec["ardiff_step"], spec["S"], guidance, None)
    network, shown = pipe._guided_network(inputs, guidance), []

    def predict(latents, timestep):
        shown.append(timestep[0])
        return network(latents, timestep)

    latents = vectors["x_T"].clone()
    if num_given:
        assert torch.equal(vectors["cond_mask"].flatten(), (torch.arange(spec["total_frames"]) < num_given).float())
        latents[:, :num_given] = vectors["cond_x0"][:, :num_given]
    states = list(
        denoise_as_released(predict, latents, plan, scheduler, tables, window=window, num_prompt_frames=num_given)
    )
    windows = vectors["window"].tolist()
    for timestep, row, (first, end) in zip(shown, vectors["timesteps"], windows, strict=True):
        assert torch.equal(timestep, row[first:end].long())
    trace = torch.stack([state.latents for state in states])
    close(trace[:, :, num_given:], vectors["latents"][:, :, num_given:], **TRACE)
    expected = vectors["latents"][:, :, :num_given]
    scale = expected.abs().amax() if num_given else 0.0
    close(trace[:, :, :num_given], expected, atol=float(GIVEN * scale), rtol=0.0)
    if "pred_x0" in vectors:
        guesses = [state.guess[:, first:end] for state, (first, end) in zip(states, windows, strict=True)]
        close(torch.stack(guesses), vectors["pred_x0"], **TRACE)


@pytest.mark.parametrize("guided", [True, False])
def test_class_conditional_sampling(guided):
    spec, vectors = FILES["class_cond.safetensors"], load("class_cond")
    class_names = [str(index) for index in range(spec["num_class"])]
    pipe = OriginalARDiffPipeline(
        build_vae("image"), build_transformer(class_names=class_names), ADScheduler(), compat=True
    )
    guidance = spec["guidance"] if guided else 1.0
    latents = sample(pipe, vectors["x_T"], spec, guidance, vectors["class_ids"].tolist())
    close(stored_from_tokens(latents), vectors["out_guided" if guided else "out_unguided"], **TRACE)


def test_end_to_end():
    """Frames to tokens and back, and noise to frames."""
    spec, vectors = FILES["end_to_end.safetensors"], load("end_to_end")
    pipe = OriginalARDiffPipeline(build_vae("image"), build_transformer(), ADScheduler(), compat=True)
    tokens = pipe.vae.encode(load("vae_golden")["frames"] * 2 - 1).mode()
    close(tokens, vectors["zs"], **FORWARD)
    close(unit(pipe.vae.decode(tokens[:1])), vectors["xs_rec_clip0"], **DECODED)
    latents = sample(pipe, vectors["x_T"], spec, spec["guidance"])
    close(unit(pipe.vae.decode(latents)), vectors["xs_pred"], **DECODED)


# --- autoencoder ------------------------------------------------------------------------------------------------


def test_encoder():
    vectors, vae = load("vae_golden"), build_vae("image")
    tokens = vae.encode(vectors["frames"] * 2 - 1)
    moments = torch.cat([tokens.mean, tokens.logvar], dim=-1).flatten(0, 1)
    close(moments.transpose(1, 2).unsqueeze(2), vectors["encoder_moments"], **FORWARD)
    close(tokens.mean, channels_last(vectors["latents"]), **FORWARD)


@pytest.mark.parametrize("kind", ["image", "temporal"])
def test_decoder(kind):
    vectors, vae, seen = load("vae_golden"), build_vae(kind), {}
    vae.decoder.register_forward_hook(lambda module, inputs, output: seen.update(decoder_logits=output))
    vae.pixel_quantize_conv.register_forward_hook(
        lambda module, inputs, output: seen.update(pixel_decoder_input=output)
    )
    latents = channels_last(vectors["latents"])
    vae.decode(latents[:1])
    for name, tensor in seen.items():
        if f"{name}_{kind}_clip0" in vectors:
            close(tensor, vectors[f"{name}_{kind}_clip0"], **DECODED)
    close(unit(vae.decode(latents)), vectors[f"decoded_{kind}"], **DECODED)
    random_latents = channels_last(vectors["random_latents"])
    close(unit(vae.decode(random_latents)), vectors[f"decoded_{kind}_from_random"], **DECODED)


@pytest.mark.parametrize("kind", ["image", "temporal"])
@pytest.mark.parametrize("sizes", [[1], [2, 4, 1, 3], [7, 2]])
def test_decoding_in_parts_gives_the_recorded_frames(kind, sizes):
    """The clips one after the other, in parts that need not end where a clip does."""
    vectors, vae, cache = load("vae_golden"), build_vae(kind), DecoderCache()
    latents = channels_last(vectors["latents"]).flatten(0, 1)[None]
    rest, frames = latents, []
    for size in itertools.cycle(sizes):
        frames.append(vae.decode(rest[:, :size], cache))
        rest = rest[:, size:]
        if not rest.shape[1]:
            break
    close(unit(torch.cat(frames, dim=1)[0]), vectors[f"decoded_{kind}"].flatten(0, 1), **DECODED)


# --- training timesteps -----------------------------------------------------------------------------------------


def test_fopp_counts():
    spec, vectors = FILES["fopp.safetensors"], load("fopp")
    num_frames, num_timesteps = spec["F"], spec["T"]
    forwards = [_log_counts(num_frames - 2 - frame, num_timesteps).exp().flip(0) for frame in range(num_frames - 1)]
    one = torch.ones(num_timesteps, dtype=torch.float64)
    suffix = torch.stack([*forwards, one], dim=1)
    prefix = torch.stack(
        [one, *[_log_counts(frame - 1, num_timesteps).exp() for frame in range(1, num_frames)]], dim=1
    )
    close(suffix, vectors["mat_s"], **TABLE)
    close(prefix, vectors["mat_e"], **TABLE)


@pytest.mark.parametrize(("draw", "kind"), [(sample_fopp, "mid"), (sample_incremental, "plain")])
def test_training_timesteps_follow_the_exact_law(draw, kind):
    """Marginals, and first frame against last, of as many draws as the released sampler was recorded with."""
    spec, vectors = FILES["fopp.safetensors"], load("fopp")
    num_frames, num_timesteps, count = spec["F"], spec["T"], spec["draws"]
    timesteps = draw(count, num_frames, num_timesteps, generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(timesteps, num_timesteps).sum(0).double()
    joint = torch.bincount(timesteps[:, 0] * num_timesteps + timesteps[:, -1], minlength=num_timesteps**2)
    for ours, theirs, law in (
        (counts, vectors[f"hist_{kind}"], vectors[f"exact_marginal_{kind}"]),
        (
            joint.reshape(num_timesteps, -1),
            vectors[f"joint_first_last_{kind}_counts"],
            vectors[f"exact_joint_first_last_{kind}"],
        ),
    ):
        deviation = (count * law * (1 - law)).sqrt()
        for observed in (ours, theirs):
            assert ((observed - count * law).abs() <= 6 * deviation + 1e-6).all()


# --- paper size -------------------------------------------------------------------------------------------------


def formula_weights(model: torch.nn.Module, prefix: str, salt: int) -> None:
    """Fill a model on the meta device with the manifest's seeded weights; a thread for every core."""

    def draw(item):
        name, tensor = item
        key = name if name in ("context_emb", "class_emb") else prefix + name
        generator = np.random.RandomState((zlib.crc32(key.encode()) + salt) % 2**32)  # noqa: NPY002 - the manifest's rule
        values = torch.from_numpy(generator.standard_normal(tensor.numel()).astype(np.float32)).view(tensor.shape)
        if tensor.ndim == 1:
            values = 1 + 0.1 * values if key.endswith(".weight") else values.mul_(0.05)
        elif key.rpartition(".")[2] in ("context_emb", "class_emb"):
            values.mul_(0.1)
        elif "embedding" in key or "token" in key:
            values.mul_(0.5)
        else:
            values.div_(tensor[0].numel() ** 0.5)
        return name, values

    # The largest first, so that no thread is left with one at the end.
    items = sorted(model.state_dict().items(), key=lambda item: -item[1].numel())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        model.load_state_dict(dict(pool.map(draw, items)), assign=True)


def test_transformer_of_paper_size():
    spec, vectors = FILES["paper_size_dit.safetensors"], load("paper_size_dit")
    with torch.device("meta"):
        model = OriginalTransformerModel(depth=spec["depth"]).eval()
    formula_weights(model, NETWORK, spec["weights"]["salt"])
    tolerance = {"atol": TOLERANCES["paper_size_dit_atol"], "rtol": 0.0}
    arguments = vectors["x"], vectors["t"].long()
    close(model(*arguments, model.conditional_context(None, 1)), vectors["out"], **tolerance)
    close(model(*arguments, model.unconditional_context(1)), vectors["out_zero_context"], **tolerance)


def test_autoencoder_of_paper_size():
    spec, vectors = FILES["paper_size_vae.safetensors"], load("paper_size_vae")
    with torch.device("meta"):
        model = AutoencoderOriginal().eval()
    formula_weights(model, "vae.", spec["weights"]["salt"])
    tolerance = {"atol": TOLERANCES["paper_size_vae_atol"], "rtol": 0.0}
    size = model.config.image_size
    frame = torch.arange(spec["num_frames"], dtype=torch.float64)[:, None, None, None]
    channel = torch.arange(3, dtype=torch.float64)[:, None, None]
    row = torch.arange(size, dtype=torch.float64)[:, None]
    column = torch.arange(size, dtype=torch.float64)
    across = torch.sin(column / (9 + 3 * frame + channel) + 0.3 * frame)
    frames = (0.5 + 0.5 * across * torch.cos(row / (13 - 2 * channel) + 0.7 * frame)).float()[None]
    close(frames[..., ::8, ::8], vectors["frames_sub8"], **FORWARD)
    latents = model.encode(frames * 2 - 1).mean
    close(latents, channels_last(vectors["latents"]), **tolerance)
    decoded = unit(model.decode(latents))
    close(decoded[..., ::8, ::8], vectors["decoded_sub8"], **tolerance)
    close(torch.stack([decoded.mean(), decoded.std()]), vectors["decoded_mean_std"], **tolerance)
