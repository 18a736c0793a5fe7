"""What the operator of a studio lets its visitors do: one table of limits, from a preset, a file or the environment.

Where they come from, the later ones over the earlier:

1. a preset: `laptop` for whoever runs the studio alone, `space` for a page that strangers open, `space-cpu` for such a
   page without an accelerator. Without a word it is one of the latter two where SPACE_ID is set, as the Hub sets it
   (ACCELERATOR, too), and `laptop` elsewhere; ARDIFF_LIMITS=space chooses.
2. a TOML file, where ARDIFF_LIMITS is its path: the keys are the fields of `Limits`, and `preset` is what it starts from.

       preset = "space"
       frames = 32
       models = ["scenes-64", "me/*"]

3. ARDIFF_LIMIT_<FIELD> for one field: ARDIFF_LIMIT_FRAMES=32, ARDIFF_LIMIT_MODELS=scenes-64,me/* (between commas).

A name that is not a field, a value of wrong form or out of its range: ValueError with one sentence that names where it stood.
A megabyte is 2**20 bytes. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


PREFIX = "ARDIFF_LIMIT_"


def _limit(default: Any, text: str, low: float = 0, high: float = 0) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high})


def _kind(field: dataclasses.Field) -> str:
    return "a whole number" if field.type == "int" else "a number"


def _check_number(field: dataclasses.Field, value: Any) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    right = isinstance(value, int) if field.type == "int" else isinstance(value, int | float)
    if not right or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"`{field.name}` ({field.metadata['help']}) must be {_kind(field)} from {low:g} to {high:g} but is {value!r}."
        )


def _check_models(value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise ValueError(f"`models` must be names, * for any characters, but is {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a visitor, or all of them together, may ask for. The defaults are those of the preset `space`.

    Every field says in its metadata what it bounds (`help`) and from where to where it may be set (`low`, `high`).
    Raises ValueError with one sentence.
    """

    frames: int = _limit(64, "frames of a run, prompt frames included", 4, 4096)
    steps: int = _limit(100, "denoising steps of every frame", 5, 1000)
    prompt_frames: int = _limit(8, "prompt frames of a run", 1, 64)
    samples: int = _limit(4, "runs from one press of the button, shown as rows", 1, 16)
    pixels: int = _limit(
        40_000_000, "pixels of an uploaded picture, or of a video's frame, that are decoded", 4096, 2**28
    )
    upload_megabytes: float = _limit(50.0, "megabytes of an uploaded file", 0.1, 4096)
    upload_seconds: float = _limit(60.0, "seconds that an uploaded video lasts", 0.1, 86_400)
    queue: int = _limit(20, "runs that wait for the model", 1, 1000)
    run_seconds: float = _limit(120.0, "seconds of a run; then it ends and what is finished is kept", 1, 86_400)
    runs_per_visitor: int = _limit(2, "runs of one visitor that wait or are under way at the same time", 1, 1000)
    models: tuple[str, ...] = _limit((), "models beside the one that is served, as names with * for any characters")
    disk_megabytes: float = _limit(2048.0, "megabytes of all kept runs; the oldest go first", 1, 2**20)
    keep_seconds: float = _limit(3600.0, "seconds that a finished run is kept", 60, 2_592_000)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "models":
                _check_models(value)
            else:
                _check_number(field, value)
        if self.prompt_frames >= self.frames:
            raise ValueError(
                f"`prompt_frames` must be less than `frames`, {self.frames}, but is {self.prompt_frames}."
            )
        if self.disk_megabytes < self.upload_megabytes:
            raise ValueError(
                f"`disk_megabytes` must be at least `upload_megabytes`, {self.upload_megabytes:g}, "
                f"but is {self.disk_megabytes:g}."
            )

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_megabytes * 2**20)

    @property
    def disk_bytes(self) -> int:
        return int(self.disk_megabytes * 2**20)

    def allows_model(self, name: str) -> bool:
        """Whether a visitor may ask for this model: a folder's name or a Hub id, in small and capital letters as given."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)


PRESETS = {
    "space": Limits(),
    "space-cpu": Limits(frames=32, steps=60, samples=2, queue=10, run_seconds=60.0),
    "laptop": Limits(
        frames=512,
        steps=250,
        upload_megabytes=500.0,
        upload_seconds=600.0,
        run_seconds=3600.0,
        runs_per_visitor=20,
        models=("*",),
        disk_megabytes=8192.0,
        keep_seconds=86_400.0,
    ),
}
"""Limits by name; see the module's text for which one holds."""


def read_limits(environ: Mapping[str, str] = os.environ) -> Limits:
    """The limits that the environment asks for; see the module's text. Raises ValueError with one sentence."""
    here = "laptop"
    if "SPACE_ID" in environ:
        here = "space-cpu" if environ.get("ACCELERATOR") == "none" else "space"
    source = environ.get("ARDIFF_LIMITS") or here
    limits = PRESETS[source] if source in PRESETS else _read_file(Path(source))
    given = {}
    for name, text in environ.items():
        if name.startswith(PREFIX):
            field = _field(name.removeprefix(PREFIX).lower(), name)
            given[field.name] = _parse(field, text, name)
    return _replace(limits, given, "the environment")


def _read_file(path: Path) -> Limits:
    if not path.is_file():
        raise ValueError(
            f"ARDIFF_LIMITS must be {', '.join(PRESETS)} or a TOML file that exists but is {str(path)!r}."
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be TOML but is not: {error}.") from error
    preset = given.pop("preset", "space")
    if preset not in PRESETS:
        raise ValueError(f"`preset` in {path} must be one of {', '.join(PRESETS)} but is {preset!r}.")
    given = {_field(name, str(path)).name: value for name, value in given.items()}
    if isinstance(given.get("models"), list):
        given["models"] = tuple(given["models"])
    return _replace(PRESETS[preset], given, str(path))


def _replace(limits: Limits, given: Mapping[str, Any], where: str) -> Limits:
    try:
        return dataclasses.replace(limits, **given)
    except ValueError as error:
        raise ValueError(f"{error} (from {where})") from error


def _field(name: str, where: str) -> dataclasses.Field:
    for field in dataclasses.fields(Limits):
        if field.name == name:
            return field
    known = ", ".join(field.name for field in dataclasses.fields(Limits))
    raise ValueError(f"A limit must be one of {known} but {where} has {name!r}.")


def _parse(field: dataclasses.Field, text: str, name: str) -> Any:
    if field.name == "models":
        return tuple(entry.strip() for entry in text.split(",")) if text.strip() else ()
    try:
        return (int if field.type == "int" else float)(text)
    except ValueError as error:
        raise ValueError(f"{name} must be {_kind(field)} but is {text!r}.") from error


def read_accounts(text: str) -> list[tuple[str, str]]:
    """Who may sign in, from lines of `user:password`. Raises ValueError with one sentence that has no password in it."""
    accounts = [tuple(line.strip().split(":", 1)) for line in text.splitlines() if line.strip()]
    if not accounts or not all(len(account) == 2 and all(account) for account in accounts):
        raise ValueError("Accounts must be lines of user:password, at least one; there is another line or none.")
    return accounts
