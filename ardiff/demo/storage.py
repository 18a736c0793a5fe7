"""What the studio keeps on disk: a folder for every run, and what visitors sent, within the operator's bytes and time.

A run's folder holds `settings.json`, its finished frames `frame-0000.png` and on, those that its video has before them
(`earlier-00000.png` and on, of the runs that it goes on from), and the files that were made of them.
"""

import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ardiff.data.video import read_image, write_video
from ardiff.demo.presets import FPS, GenerationRequest, Recovered, read_settings, span
from ardiff.serving.limits import Limits


EXPORTS = {"mp4": "video.mp4", "gif": "video.gif", "webp": "video.webp", "zip": "frames.zip", "json": "settings.json"}
"""What a run can be kept as, and the file's name."""


class RunStore:
    """The folders of all runs, `runs`, and what visitors sent and a server copied for them, `uploads`.

    Both together stay within the disk budget of `limits`; `close` removes them. May be used from any thread.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._home = Path(tempfile.mkdtemp(prefix="ardiff-studio-")).resolve()
        self.runs, self.uploads = self._home / "runs", self._home / "uploads"
        self.runs.mkdir()
        self.uploads.mkdir()
        self._lock = threading.Lock()
        self._live: set[str] = set()
        self._of_the_page: frozenset[Path] = frozenset()
        self._sizes: dict[str, int] = {}

    def find(self, run_id: str) -> Path:
        """The folder of a run of this server. Raises ValueError when there is none (any more)."""
        named = isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id)
        folder = self.runs / run_id if named else None
        if folder is None or not folder.is_dir():
            raise ValueError(
                f"That run is not kept any more: finished frames stay for {span(self.limits.keep_seconds)} at most."
            )
        return folder

    def begin(self, run_id: str, request: GenerationRequest) -> None:
        """Make the folder of a run, which no sweep removes until `end`; with the frames of the run that it goes on from.

        Raises ValueError with one sentence where the disk has no room for it; nothing of it is left then.
        """
        earlier = [] if request.continues is None else video_frames(self.find(request.continues))
        folder = self.runs / run_id
        with self._lock:
            self._live.add(run_id)
        try:
            folder.mkdir()
            self.add_settings(run_id, request.settings())
            for index, path in enumerate(earlier):
                shutil.copy(path, folder / f"earlier-{index:05d}.png")
        except OSError as error:
            self.end(run_id)
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(
                f"The server cannot keep a run on its disk ({error.strerror}), so none was begun."
            ) from error

    # A run is read while it grows: a file has its name only when it is whole.

    def add_settings(self, run_id: str, settings: Mapping[str, Any]) -> None:
        part = self.runs / run_id / "settings.part"
        part.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        part.replace(part.with_suffix(".json"))

    def add_frame(self, run_id: str, index: int, frame: np.ndarray) -> None:
        part = self.runs / run_id / f"frame-{index:04d}.part"
        Image.fromarray(frame).save(part, "png")
        part.replace(part.with_suffix(".png"))

    def end(self, run_id: str) -> None:
        with self._lock:
            self._live.discard(run_id)
            self._sizes.pop(run_id, None)

    def recover(self, run_id: str) -> Recovered:
        """What is kept of a run, live or over. Raises ValueError with one sentence when nothing is."""
        folder = self.find(run_id)
        request = read_settings((folder / "settings.json").read_text(encoding="utf-8"))
        frames = [read_image(path) for path in sorted(folder.glob("frame-*.png"))]
        return Recovered(run_id, request, frames)

    def export(self, run_id: str, kind: str) -> Path:
        """A kept run's video as a file: `kind` is one of EXPORTS. Raises ValueError with one sentence."""
        if kind not in EXPORTS:
            raise ValueError(f"A run can be kept as {', '.join(EXPORTS)}, got {kind!r}.")
        folder = self.find(run_id)
        path = folder / EXPORTS[kind]
        with self._lock:
            growing = run_id in self._live
        if not path.is_file() or (growing and kind != "json"):
            frames = [read_image(frame) for frame in video_frames(folder)]
            if not frames:
                raise ValueError("There is no finished frame to keep.")
            write_video(frames, path, fps=FPS)
            self._weigh(folder)
        return path

    def keep_page_files(self) -> None:
        """Take all that is in `uploads` now for a part of the page, which no sweep removes."""
        self._of_the_page = frozenset(self.uploads.rglob("*"))

    def sweep(self, max_age: float | None = None, max_bytes: int | None = None) -> None:
        """Remove runs that ended, and uploads that came, more than `max_age` seconds ago, and the oldest above `max_bytes`.

        None are the operator's limits. Runs that are under way stay, and so does what the page itself is made of.
        """
        max_age = self.limits.keep_seconds if max_age is None else max_age
        max_bytes = self.limits.disk_bytes if max_bytes is None else max_bytes
        with self._lock:
            live = set(self._live)
        over = []
        for folder in self.runs.iterdir():
            with suppress(FileNotFoundError):  # another thread sweeps too
                size = self._sizes.get(folder.name) or self._weigh(folder)
                over.append((folder.stat().st_mtime, size, folder))
        for path in self.uploads.rglob("*"):
            with suppress(FileNotFoundError):
                told = path.lstat()
                if not stat.S_ISDIR(told.st_mode) and path not in self._of_the_page:
                    over.append((told.st_mtime, _occupied(told), path))
        over.sort(key=lambda entry: entry[0], reverse=True)
        kept = 0
        for ended, size, path in over:
            kept += size
            if path.name in live or (kept <= max_bytes and time.time() - ended <= max_age):
                continue
            kept -= size
            if path.parent == self.runs:
                shutil.rmtree(path, ignore_errors=True)
                self._sizes.pop(path.name, None)
            else:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty: something came in between
                    path.parent.rmdir()

    def close(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)

    def _weigh(self, folder: Path) -> int:
        """Bytes on disk of a run's folder; known from then on."""
        size = 0
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # it just got its name
                size += _occupied(path.lstat())
        self._sizes[folder.name] = size
        return size


def video_frames(folder: Path) -> list[Path]:
    """The frames of a run's video, in order: those of the runs it goes on from, then its own new ones."""
    earlier, own = sorted(folder.glob("earlier-*.png")), sorted(folder.glob("frame-*.png"))
    if not earlier:
        return own
    request = read_settings((folder / "settings.json").read_text(encoding="utf-8"))
    return earlier + own[request.num_prompt_frames :]


def _occupied(told: os.stat_result) -> int:
    """Bytes that a file takes on disk: a small one takes a block."""
    return max(told.st_size, 4096)
