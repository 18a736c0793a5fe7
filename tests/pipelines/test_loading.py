"""Which model and which device a name means."""

import pytest

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
