"""The operator's limits: where they come from, which one wins, and what is refused with which words."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest

from ardiff.serving.limits import PREFIX, PRESETS, Limits, read_limits


def numbers():
    return [field for field in dataclasses.fields(Limits) if field.name != "models"]


def test_a_desk_and_a_space_get_their_own():
    assert read_limits({}) == PRESETS["laptop"]
    assert read_limits({"SPACE_ID": "me/ardiff"}) == PRESETS["space"]
    assert read_limits({"SPACE_ID": "me/ardiff", "ACCELERATOR": "none"}) == PRESETS["space-cpu"]
    assert read_limits({"SPACE_ID": "me/ardiff", "ACCELERATOR": "l4"}) == PRESETS["space"]
    assert read_limits({"ARDIFF_LIMITS": "space"}) == PRESETS["space"]
    assert read_limits({"ARDIFF_LIMITS": "laptop", "SPACE_ID": "me/ardiff"}) == PRESETS["laptop"]


def test_strangers_get_no_more_than_an_owner():
    for field in numbers():
        few, some, many = (getattr(PRESETS[name], field.name) for name in ("space-cpu", "space", "laptop"))
        assert few <= some <= many, field.name
    assert PRESETS["laptop"].allows_model("any/model")
    assert not PRESETS["space"].allows_model("any/model")


def test_file_over_preset_and_environment_over_file(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text('preset = "laptop"\nframes = 32\nupload_megabytes = 20\nmodels = ["scenes-64", "me/*"]\n')
    limits = read_limits({"ARDIFF_LIMITS": str(path), "ARDIFF_LIMIT_FRAMES": "48", "ARDIFF_LIMIT_RUN_SECONDS": "2.5"})
    assert limits == dataclasses.replace(
        PRESETS["laptop"], frames=48, upload_megabytes=20, models=("scenes-64", "me/*"), run_seconds=2.5
    )
    assert limits.upload_bytes == 20 * 1024 * 1024
    path.write_text("steps = 50\n")
    assert read_limits({"ARDIFF_LIMITS": str(path)}) == dataclasses.replace(PRESETS["space"], steps=50)


@pytest.mark.parametrize("field", numbers(), ids=lambda field: field.name)
def test_every_number_is_read_from_the_environment_within_its_range(field):
    name, low, high = PREFIX + field.name.upper(), field.metadata["low"], field.metadata["high"]
    base = {"ARDIFF_LIMITS": "space", "ARDIFF_LIMIT_PROMPT_FRAMES": "3", "ARDIFF_LIMIT_UPLOAD_MEGABYTES": "1"}
    base |= {"ARDIFF_LIMIT_DISK_MEGABYTES": "1000000", "ARDIFF_LIMIT_FRAMES": "100"}
    for value in (low, high):
        assert getattr(read_limits({**base, name: str(value)}), field.name) == value
    whole = field.type == "int"
    for wrong in (low - 1, high + 1, -math.inf, "nan", "many", "", "1.5" if whole else "1,5"):
        with pytest.raises(ValueError, match=field.name + "|" + name) as refused:
            read_limits({**base, name: str(wrong)})
        assert "\n" not in str(refused.value)
    assert field.metadata["help"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"samples": True}, "`samples`"),
        ({"frames": 3}, "`frames` (frames of a run, prompt frames included) must be a whole number from 4"),
        ({"frames": 16.0}, "`frames`"),
        ({"upload_seconds": math.nan}, "`upload_seconds`"),
        ({"run_seconds": "60"}, "`run_seconds`"),
        ({"frames": 8, "prompt_frames": 8}, "`prompt_frames` must be less than `frames`, 8, but is 8"),
        ({"disk_megabytes": 10}, "`disk_megabytes` must be at least `upload_megabytes`, 50, but is 10"),
        ({"models": ["a"]}, "`models`"),
        ({"models": "a"}, "`models`"),
        ({"models": ("",)}, "`models`"),
    ],
)
def test_wrong_values_are_refused(values, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        Limits(**values)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ARDIFF_LIMIT_FRAME": "3"}, "'frame'"),
        (
            {"ARDIFF_LIMITS": "desk"},
            "ARDIFF_LIMITS must be space, space-cpu, laptop or a TOML file that exists but is 'desk'",
        ),
        ({"ARDIFF_LIMIT_MODELS": "a,,b"}, "models"),
    ],
)
def test_a_wrong_environment_is_refused(environ, named):
    with pytest.raises(ValueError, match=named):
        read_limits(environ)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("frame = 3", "'frame'"),
        ('preset = "desk"', "`preset`"),
        ("frames = [3]", "`frames`"),
        ('frames = "32"', "`frames`"),
        ("models = [1]", "`models`"),
        ("frames = ", "must be TOML"),
        ("frames = 5000", "from 4 to 4096 but is 5000"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, text, named):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        read_limits({"ARDIFF_LIMITS": str(path)})
    assert str(path) in str(refused.value)


def test_models_are_names_with_stars():
    limits = read_limits({"ARDIFF_LIMIT_MODELS": "scenes-64, me/*"})
    assert limits.models == ("scenes-64", "me/*")
    assert [limits.allows_model(name) for name in ("scenes-64", "me/x", "you/x", "scenes-65", "Me/x")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert read_limits({"ARDIFF_LIMIT_MODELS": ""}).models == ()


def test_limits_cannot_be_moved():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["space"].frames = 1000


def test_limits_need_nothing_but_the_standard_library():
    code = "import sys, ardiff.serving.limits; print(sorted({'torch', 'yaml', 'huggingface_hub', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
