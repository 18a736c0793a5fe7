"""Published checkpoints to model folders: every packaging in, the same model out; every broken one refused, nothing left.

The checkpoint is that of the vectors under tests/data/original: the released wrapper's own state dict, at a tiny size.
"""

import fnmatch
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ardiff.convert
from ardiff import ADScheduler, ARDiffPipeline, cli
from ardiff.convert import UCF101_CLASSES, convert
from ardiff.pipelines.pipeline_original import OriginalARDiffPipeline


DATA = Path(__file__).parent / "data" / "original"
SIZES = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))["config"]
NETWORK = "diffusion_model.model."


def transformer_config(part):
    size = SIZES[part]
    names = {"num_tokens": "L", "in_channels": "C", "width": "hidden", "depth": "depth", "num_heads": "heads"}
    names |= {"window": "F", "num_context_tokens": "ctx_tok", "context_width": "ctx_dim"}
    return {ours: size[theirs] for ours, theirs in names.items()}


VAE_NAMES = {
    "image_size": "image_size",
    "patch_size": "patch",
    "width": "width",
    "num_layers": "layers",
    "num_heads": "heads",
    "num_tokens": "num_latent_tokens",
    "latent_channels": "token_size",
    "codebook_size": "ffn_out",
    "pixel_channels": "z_channels",
    "base_channels": "hidden_channels",
    "channel_multipliers": "channel_mult",
    "num_res_blocks": "num_res_blocks",
}
CONFIG = {
    "transformer": transformer_config("dit"),
    "vae": {ours: SIZES["vae"][theirs] for ours, theirs in VAE_NAMES.items()},
}


@pytest.fixture
def whole():
    """Transformer, tables and autoencoder (`vae.`) by name."""
    return load_file(DATA / "model.safetensors")


@pytest.fixture
def network(whole):
    return {name: tensor for name, tensor in whole.items() if not name.startswith("vae.")}


@pytest.fixture
def autoencoder(whole):
    return {name.removeprefix("vae."): tensor for name, tensor in whole.items() if name.startswith("vae.")}


def prefixed(tensors, prefix="module."):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def assert_holds(folder, network, autoencoder):
    """The folder loads as a pipeline, with exactly these weights."""
    pipe = ARDiffPipeline.from_pretrained(folder)
    assert type(pipe) is OriginalARDiffPipeline
    transformer = pipe.transformer.state_dict()
    assert (
        len(transformer) == sum(name.startswith((NETWORK, "c")) for name in network) - 1
    )  # without the position table
    for name, tensor in transformer.items():
        assert torch.equal(tensor, network.get(name, network.get(NETWORK + name))), name
    vae = pipe.vae.state_dict()
    assert vae.keys() == autoencoder.keys()
    assert all(torch.equal(tensor, autoencoder[name]) for name, tensor in vae.items())
    return pipe


# --- packagings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("layout", ["one file", "two files", "folder"])
def test_packagings(tmp_path, whole, network, autoencoder, suffix, prefix, layout):
    out, options = tmp_path / "out", {}
    if layout == "one file":
        source = write(prefixed(whole, prefix), tmp_path / f"model{suffix}")
    elif layout == "two files":
        source = write(prefixed(network, prefix), tmp_path / f"model{suffix}")
        options["vae"] = write(prefixed(autoencoder, prefix), tmp_path / f"ae{suffix}")
    else:
        source = tmp_path / "source"
        write(prefixed(network, prefix), source / "step" / f"model{suffix}")
        write(prefixed(autoencoder, prefix), source / "vae" / f"model{suffix}")
        # What training leaves beside them: the loss module, and an optimizer that nobody opens.
        write({"discriminator.weight": torch.zeros(3)}, source / "vae" / f"model_1{suffix}")
        (source / "step" / "optimizer.bin").write_bytes(b"not read")
    assert convert(source, out, config=CONFIG, **options) == out
    pipe = assert_holds(out, network, autoencoder)
    assert len(pipe(num_frames=SIZES["dit"]["F"], num_inference_steps=2, ar_step=1, output_type="latent").frames) == 1
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "scheduler", "transformer", "vae"]


def test_shards_in_and_out(tmp_path, whole, network, autoencoder, monkeypatch):
    monkeypatch.setattr(ardiff.convert, "SHARD_BYTES", 200_000)
    names = sorted(whole)
    for index in range(3):
        part = {name: whole[name] for name in names[index::3]}
        write(part, tmp_path / "in" / f"model-0000{index + 1}-of-00003.safetensors")
    convert(tmp_path / "in", tmp_path / "out", config=CONFIG)
    assert len(list((tmp_path / "out" / "transformer").glob("*-of-*.safetensors"))) > 2
    assert_holds(tmp_path / "out", network, autoencoder)


def test_half_precision_stays(tmp_path, whole):
    source = write({name: tensor.half() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    convert(source, tmp_path / "out", config=CONFIG)
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_temporal_decoder_is_seen(tmp_path, network, autoencoder):
    temporal = autoencoder | load_file(DATA / "vae_temporal_extra_state.safetensors")
    source = write(network | prefixed(temporal, "vae."), tmp_path / "model.safetensors")
    convert(source, tmp_path / "out", config=CONFIG)
    assert assert_holds(tmp_path / "out", network, temporal).vae.config.clip_frames == 16


def test_rotary_checkpoint_with_its_repeated_table(tmp_path, autoencoder, network):
    rotary = load_file(DATA / "rope_state.safetensors")
    table = rotary[NETWORK + "rotary_emb.freqs"]
    buffers = {name: tensor for name, tensor in network.items() if not name.startswith((NETWORK, "context"))}
    repeated = {f"{NETWORK}blocks.{i}.attn.rotary_emb.freqs": table for i in range(SIZES["rope"]["depth"])}
    context = {"context_emb": torch.ones(SIZES["rope"]["ctx_tok"], SIZES["rope"]["ctx_dim"])}
    source = write(rotary | repeated | context | buffers, tmp_path / "model.bin")
    vae = write(autoencoder, tmp_path / "vae.bin")
    config = CONFIG | {"transformer": transformer_config("rope") | {"positions": "rotary", "qk_norm": True}}
    convert(source, tmp_path / "out", vae=vae, config=config)
    assert_holds(tmp_path / "out", rotary | context, autoencoder)


@pytest.mark.parametrize("dataset", [None, "ucf"])
def test_classes_of_ucf(tmp_path, whole, dataset):
    contexts = whole.pop("context_emb")
    whole["class_emb"] = contexts.repeat(102, 1, 1)
    convert(write(whole, tmp_path / "ucf.safetensors"), tmp_path / "out", dataset, config=CONFIG)
    assert ARDiffPipeline.from_pretrained(tmp_path / "out").class_names == UCF101_CLASSES
    assert len(set(UCF101_CLASSES)) == 101
    assert list(UCF101_CLASSES[:2]) == ["ApplyEyeMakeup", "ApplyLipstick"]
    assert UCF101_CLASSES[-1] == "YoYo"


def test_dataset_picks_by_path(tmp_path, network, autoencoder):
    others = {name: tensor + 1 if name == "context_emb" else tensor for name, tensor in network.items()}
    write(network, tmp_path / "in" / "SkyTimelapse" / "model.safetensors")
    write(others, tmp_path / "in" / "FaceForensics" / "model.safetensors")
    write(autoencoder, tmp_path / "in" / "vae.safetensors")
    convert(tmp_path / "in", tmp_path / "out", "face", config=CONFIG)
    assert_holds(tmp_path / "out", others, autoencoder)
    with pytest.raises(
        ValueError, match=r"one transformer but has 2 \(FaceForensics.*Sky.*give its file, or `dataset`"
    ):
        convert(tmp_path / "in", tmp_path / "other", config=CONFIG)
    with pytest.raises(ValueError, match="must hold one transformer of taichi but has 0"):
        convert(tmp_path / "in", tmp_path / "other", "taichi", config=CONFIG)


def test_hub_fetches_one_dataset(tmp_path, network, autoencoder, monkeypatch):
    """The Hub's client is replaced by a folder: which files are asked for is ours."""
    hub, local = tmp_path / "hub", tmp_path / "local"
    for path in ("sky/model.safetensors", "ucf/model.safetensors"):
        write(network, hub / path)
    write(autoencoder, hub / "vae.safetensors")
    (hub / "README.md").write_text("no weights")
    names = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]

    def fetch(repository, allow_patterns):
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub / name, local / name)
        return str(local)

    monkeypatch.setattr(ardiff.convert.HfApi, "list_repo_files", lambda api, repository: names)
    monkeypatch.setattr(ardiff.convert, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="`dataset` must be one of sky, ucf: owner/name has all of these"):
        convert("owner/name", tmp_path / "out", config=CONFIG)
    with pytest.raises(ValueError, match="`dataset`|of face"):
        convert("owner/name", tmp_path / "out", "face", config=CONFIG)
    shutil.rmtree(local, ignore_errors=True)
    convert("owner/name", tmp_path / "out", "sky", config=CONFIG)
    fetched = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    assert fetched == ["sky/model.safetensors", "vae.safetensors"]
    assert_holds(tmp_path / "out", network, autoencoder)


# --- refusals ---------------------------------------------------------------------------------------------------


BLOCK = NETWORK + "blocks.1.mlp.fc1.weight"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


class Payload:
    """What a hostile file holds: unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(tmp_path, source, message, **options):
    """The conversion fails with this message and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", **{"config": CONFIG} | options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (BLOCK, "drop", rf"transformer of this configuration: 1 missing \({re.escape(BLOCK)}\)\.$"),
        ("vae.latent_tokens", "drop", r"autoencoder of this configuration: 1 missing \(latent_tokens\)\.$"),
        ("context_emb", "drop", r"1 missing \(context_emb\)"),
        ("diffusion_model.logvar", "drop", r"1 missing \(diffusion_model.logvar\)"),
        (BLOCK, "cut", rf"1 of another shape \({re.escape(BLOCK)}: \(255, 64\) instead of \(256, 64\)\)"),
        (NETWORK + "head.weight", "add", r"1 unexpected \(diffusion_model.model.head.weight\)"),
        ("vae.loss.weight", "add", r"autoencoder of this configuration: 1 unexpected \(loss.weight\)"),
        (BLOCK, "round", rf"1 not floating-point \({re.escape(BLOCK)}\)"),
        (NETWORK + "pos_embed", "shift", "has another diffusion_model.model.pos_embed than the configuration gives"),
    ],
)
def test_wrong_tensors_are_listed(tmp_path, whole, name, change, message):
    if change == "drop":
        del whole[name]
    else:
        whole[name] = {
            "cut": lambda tensor: tensor[:-1].contiguous(),
            "add": lambda tensor: torch.zeros(3),
            "round": lambda tensor: tensor.int(),
            "shift": lambda tensor: tensor + 1,
        }[change](whole.get(name))
    refused(tmp_path, write(whole, tmp_path / "model.safetensors"), message)


def test_all_that_is_wrong_is_said_at_once(tmp_path, whole):
    del whole[BLOCK], whole["vae.latent_tokens"]
    whole["class_emb"] = torch.zeros(2)
    source = write(whole, tmp_path / "model.safetensors")
    refused(
        tmp_path,
        source,
        r"1 missing \(.*fc1.*; 1 unexpected \(class_emb\)\..*1 missing \(latent_tokens\)",
        dataset="sky",
    )


def test_the_published_configuration_is_expected(tmp_path, whole):
    source = write(whole, tmp_path / "model.safetensors")
    refused(
        tmp_path,
        source,
        r"250 missing \(.* and 230 more\).*context_emb: \(7, 24\) instead of \(77, 768\)",
        config=None,
    )


def test_another_noise_schedule(tmp_path, whole):
    betas = {"beta_start": 8.5e-4, "beta_end": 1.2e-2}
    whole["diffusion_model.alphas_cumprod"] = ADScheduler(**betas).alphas_cumprod
    source = write(whole, tmp_path / "model.safetensors")
    refused(tmp_path, source, "another noise schedule: its alphas_cumprod ends at 0.00466 instead of 0.0007334")
    convert(source, tmp_path / "out", config=CONFIG | {"scheduler": betas | {"prediction_type": "v_prediction"}})
    assert ARDiffPipeline.from_pretrained(tmp_path / "out").scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(tmp_path, whole, suffix):
    source = write(whole, tmp_path / f"model{suffix}")
    cut_off(source)
    refused(tmp_path, source, f"model{suffix} cannot be read: it is cut off")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, whole):
    touched = tmp_path / "touched"
    source = write(whole | {"context_emb": Payload(touched)}, tmp_path / "model.bin")
    refused(tmp_path, source, "model.bin is refused: it holds more than tensors")
    assert not touched.exists()


def test_a_pickle_of_something_else(tmp_path):
    refused(tmp_path, write([torch.zeros(1)], tmp_path / "model.pt"), "model.pt must be a state dict")


def test_the_same_tensor_twice(tmp_path, whole):
    source = write(whole | {"module.context_emb": whole["context_emb"]}, tmp_path / "model.pt")
    refused(tmp_path, source, "model.pt has context_emb twice")


def test_no_autoencoder(tmp_path, network):
    source = write(network, tmp_path / "in" / "model.safetensors")
    refused(tmp_path, source, "model.safetensors has no autoencoder in it .*: `vae` must give its file")
    refused(tmp_path, source.parent, r"must hold one autoencoder but has 0 \(none\)")
    refused(tmp_path, source, "`vae` must be a file or a folder that exists", vae=tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "kinetics"}, "`dataset` must be one of sky, taichi, ucf, face but is 'kinetics'"),
        (
            {"config": {"unet": {}}},
            "`config` must map transformer, vae, scheduler to options of theirs but has 'unet'",
        ),
        ({"config": {"vae": {"depth": 3}}}, "has 'vae': {'depth': 3}, which knows image_size"),
    ],
)
def test_wrong_arguments(tmp_path, whole, options, message):
    refused(tmp_path, write(whole, tmp_path / "model.safetensors"), message, **options)


def test_wrong_source(tmp_path):
    refused(
        tmp_path, tmp_path / "none", "`source` must be a Hub id, a folder or a file but is .*, which does not exist"
    )
    text = tmp_path / "model.txt"
    text.write_text("weights")
    refused(tmp_path, text, "must hold one transformer but has 0")


def test_out_is_never_overwritten(tmp_path, whole):
    source = write(whole, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", config=CONFIG)  # empty: fine
    refused(tmp_path, source, "`out` must be a folder that does not exist or is empty")
    with pytest.raises(ValueError, match="`out` must be in a folder that exists"):
        convert(source, tmp_path / "no" / "out", config=CONFIG)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, whole, monkeypatch, error):
    source, written = write(whole, tmp_path / "model.safetensors"), []

    def save(tensors, path, **options):
        if written:
            raise error
        save_file(tensors, path, **options)
        written.append(path)

    monkeypatch.setattr(ardiff.convert, "save_file", save)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", config=CONFIG)
    assert written
    assert list(tmp_path.iterdir()) == [source]


# --- command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path, whole, network, autoencoder, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    source = write(network, tmp_path / "model.safetensors")
    vae = write(autoencoder, tmp_path / "vae.safetensors")
    arguments = ["convert", source, "--out", tmp_path / "out", "--vae", vae, "--dataset", "sky", "--config", config]
    assert cli.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert "100%" in captured.err
    assert_holds(tmp_path / "out", network, autoencoder)
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert re.fullmatch("ardiff: `out` must be .*\n", capsys.readouterr().err)
    assert cli.main(["convert", "owner/name", "--out", str(tmp_path / "hub")]) == 2  # the tests are offline
    assert re.fullmatch("ardiff: .*offline.*\n", capsys.readouterr().err)
