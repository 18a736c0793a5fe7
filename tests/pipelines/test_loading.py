"""Which model and which device a name means."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import ardiff
from ardiff.pipelines.loading import DEFAULT_MODEL, choose_device, find_model, load_pipeline


def test_device_is_kept_or_chosen():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in {"cuda", "mps", "cpu"}


def test_a_bundled_name_is_its_folder_unless_such_a_folder_is_here(tmp_path, monkeypatch):
    assert find_model() == find_model(DEFAULT_MODEL) == ardiff.bundled_model()
    assert find_model("me/model") == "me/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert find_model(DEFAULT_MODEL) == DEFAULT_MODEL


def test_a_folder_is_loaded_and_a_wrong_name_told(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "mine")
    assert load_pipeline(str(tmp_path / "mine"), device="cpu").class_names == tiny_pipeline.class_names
    with pytest.raises(ValueError, match="does not exist"):
        load_pipeline(str(tmp_path / "missing"), device="cpu")


def test_offloaded_models_give_the_same_video(tiny_pipeline):
    arguments = {
        "class_labels": ["clouds"],
        "num_frames": 4,
        "num_inference_steps": 4,
        "ar_step": 2,
        "output_type": "np",
    }
    arguments["prompt_frames"] = np.full((1, 32, 32, 3), 90, np.uint8)
    plain = tiny_pipeline(**arguments, generator=torch.Generator().manual_seed(0)).frames
    # Accelerate's hooks with a CPU for the device: without a hook that runs, weights have no values at all.
    for module in (tiny_pipeline.vae, tiny_pipeline.transformer):
        cpu_offload(module, execution_device=torch.device("cpu"))
    assert tiny_pipeline.transformer.device.type == "meta"
    offloaded = tiny_pipeline(**arguments, generator=torch.Generator().manual_seed(0)).frames
    np.testing.assert_array_equal(offloaded, plain)


def test_offloading_needs_an_accelerator():
    with pytest.raises(ValueError, match="`offload` needs an accelerator"):
        load_pipeline(device="cpu", offload=True)
