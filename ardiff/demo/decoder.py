"""What visitors upload, decoded in a process of its own: bounded memory and time, no secrets, no way to write a file.

The process stays for the next file, because starting one takes longer than decoding most pictures; one that dies or takes
too long is replaced. It answers with numbers and text (a line of JSON, then the pixels), never with pickles, so that
whoever takes it over gets no further. Memory and processor time are bounded where the system can (Linux, most of Unix),
the time that passes everywhere.
"""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ardiff.data.video import fit_frame, iter_video, read_image, video_seconds
from ardiff.demo.presets import (
    IMAGE_SUFFIXES,
    SETTINGS_BYTES,
    VIDEO_SUFFIXES,
    GenerationRequest,
    Prompt,
    is_video,
    read_settings,
    shown,
)
from ardiff.serving.limits import Limits


PROCESSES = 2
"""Files that are decoded at the same time: one that takes long does not hold up everyone."""

FILES_EACH = 200
"""Files that a process decodes before a fresh one takes its place."""

BASE_BYTES, BYTES_PER_PIXEL = 192 * 2**20, 32
"""Memory to decode a file: a turned picture with transparency takes 22 bytes per pixel, a video of few references 24."""

VIEW_SIDE = 160
"""Longest side in pixels of the picture that shows a prompt frame's crop."""

MAX_NUMBER = 2**31 - 1

KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
"""All that the process sees of the environment: tokens and passwords stay out."""


class Decoder:
    """Reads uploads within an operator's limits. Every method may be called from any thread and raises ValueError with
    one sentence for a file that cannot be used.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.seconds = 10.0 + limits.upload_seconds / 2
        """Processor time for one upload; three times as much may pass."""
        self._lock = threading.Lock()
        self._places = threading.Semaphore(PROCESSES)
        self._idle: list[_Process] = []
        self._closed = False

    def prompt(self, paths: Sequence[str | Path], size: int, *, start: int, stride: int, count: int) -> Prompt:
        """Pictures, or `count` frames of one video, every `stride`-th from `start` on, as a `Prompt` of `size` pixels."""
        paths, most = [Path(path) for path in paths], self.limits.prompt_frames
        for path in paths:
            self._check_file(path)
        if any(map(is_video, paths)) and len(paths) > 1:
            raise ValueError(f"Give either pictures or one video as prompt, got a video among {len(paths)} files.")
        if len(paths) > most:
            raise ValueError(f"There can be at most {most} prompt frames, got {len(paths)} pictures.")
        for name, value, low, high in (
            ("first frame taken from the video (`start`)", start, 0, MAX_NUMBER),
            ("stride of the video (`stride`)", stride, 1, MAX_NUMBER),
            ("number of frames taken from the video", count, 1, most),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"The {name} must be from {low} to {high}, got {shown(value)}.")
        told, (frames, *pictures) = self._ask(
            "prompt", paths=[str(path) for path in paths], size=size, start=start, stride=stride, count=count
        )
        views = tuple((picture, tuple(crop)) for picture, crop in zip(pictures, told["crops"], strict=True))
        return Prompt(frames, ", ".join(path.name for path in paths), views)

    def settings(self, path: str | Path) -> GenerationRequest:
        """The request that a settings file asks for."""
        path = Path(path)
        _check_regular(path)
        if path.stat().st_size > SETTINGS_BYTES:
            raise ValueError(
                f"A settings file has at most {SETTINGS_BYTES // 2**20} MB, got {path.stat().st_size / 2**20:.0f} MB."
            )
        told, frames = self._ask("settings", path=str(path))
        return GenerationRequest(**told["request"], prompt=Prompt(frames[0], told["source"]) if frames else None)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    def _check_file(self, path: Path) -> None:
        if path.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise ValueError(
                f"`{shown_name(path)}` is neither a picture (png, jpg, webp, bmp) nor a video (mp4, mov, webm, gif)."
            )
        _check_regular(path)
        size = path.stat().st_size
        if size == 0:
            raise ValueError(f"`{shown_name(path)}` is empty (0 bytes).")
        if size > self.limits.upload_bytes:
            raise ValueError(
                f"`{shown_name(path)}` has {size / 2**20:.0f} MB; at most {self.limits.upload_megabytes:g} MB are read."
            )

    def _ask(self, task: str, **arguments: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        with self._places:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or not process.alive:
                process = _Process(self.limits, self.seconds)
            try:
                return process.ask({"task": task, **arguments})
            finally:
                with self._lock:
                    keep = process.alive and process.files < FILES_EACH and not self._closed
                    if keep:
                        self._idle.append(process)
                if not keep:
                    process.end()


class _Process:
    """The parent's side of one decoding process."""

    def __init__(self, limits: Limits, seconds: float) -> None:
        bounds = {
            "seconds": seconds,
            "bytes": BASE_BYTES + BYTES_PER_PIXEL * limits.pixels,
            "pixels": limits.pixels,
            "upload_seconds": limits.upload_seconds,
        }
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        # One thread each: threads reserve address space, and the visitors share the cores with the model.
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ardiff.demo.decoder", json.dumps(bounds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        self._seconds, self._most_bytes = 3 * seconds, 4 * limits.pixels
        self.files = 0

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
        self.files += 1
        clock = threading.Timer(self._seconds, self._child.kill)
        clock.start()
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
            told = json.loads(self._child.stdout.readline(2**20))
            if "error" in told:
                raise ValueError(str(told["error"])[:1000])
            shapes = [tuple(map(int, shape)) for shape in told["shapes"]]
            if any(min(shape) < 1 for shape in shapes) or sum(map(math.prod, shapes)) > self._most_bytes:
                raise OSError
            return told, [self._read(shape) for shape in shapes]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            self.end()
            raise ValueError("The upload takes more memory or time to read than is allowed here.") from error
        finally:
            clock.cancel()

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        pixels = self._child.stdout.read(math.prod(shape))
        if len(pixels) < math.prod(shape):
            raise OSError
        return np.frombuffer(bytearray(pixels), np.uint8).reshape(shape)

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        self._child.stdout.close()
        try:
            self._child.stdin.close()
        except BrokenPipeError:
            pass


def shown_name(path: Path) -> str:
    """A file's name in a sentence."""
    return path.name if len(path.name) <= 60 else f"{path.name[:50]}...{path.suffix[:8]}"


def _check_regular(path: Path) -> None:
    """A visitor's file is a file itself, not a way to another one."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        mode = 0
    if not stat.S_ISREG(mode):
        raise ValueError(f"`{shown_name(path)}` is not a file.")


# The process's side -------------------------------------------------------------------------------------------------


def _decode_prompt(
    bounds: dict[str, Any], paths: list[str], size: int, start: int, stride: int, count: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    if is_video(paths[0]):
        path, most = Path(paths[0]), bounds["upload_seconds"]
        seconds = video_seconds(path)
        if seconds > most:
            raise ValueError(f"`{shown_name(path)}` lasts {seconds:.0f} s; at most {most:.0f} s are accepted.")
        given = islice(iter_video(path, stride=stride, start=start, max_pixels=bounds["pixels"]), count)
    else:
        given = (read_image(path, max_pixels=bounds["pixels"]) for path in paths)
    frames, views, crops = [], [], []
    for picture in given:
        frames.append(fit_frame(picture, size))
        view, crop = _view(picture)
        views.append(view)
        crops.append(crop)
    return {"crops": crops}, [np.stack(frames), *views]


def _decode_settings(bounds: dict[str, Any], path: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    request = read_settings(Path(path).read_text(encoding="utf-8", errors="replace"), bounds["pixels"])
    settings = {name: value for name, value in request.settings().items() if name != "prompt"}
    if request.prompt is None:
        return {"request": settings}, []
    return {"request": settings, "source": request.prompt.source[:1000]}, [request.prompt.frames]


def _view(picture: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A small copy of a whole picture, and the centre square that becomes the frame, in [0, 1]."""
    image = Image.fromarray(picture)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    image.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return np.asarray(image), (left, top, 1 - left, 1 - top)


TASKS: dict[str, Callable[..., tuple[dict[str, Any], list[np.ndarray]]]] = {
    "prompt": _decode_prompt,
    "settings": _decode_settings,
}


def _bound(bounds: dict[str, Any]) -> Callable[[], None]:
    """Bound this process for good; returns what grants it processor time for one more upload."""
    try:
        import resource
    except ImportError:  # not Unix
        return lambda: None

    import psutil

    most = psutil.Process().memory_info().vms + bounds["bytes"]
    for kind, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a system that knows the limit but does not take it
            continue

    def grant() -> None:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(spent.ru_utime + spent.ru_stime + bounds["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))

    return grant


def _serve() -> None:
    bounds = json.loads(sys.argv[1])
    # Whatever a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The operator's bound holds in the place of Pillow's, and is checked before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    grant = _bound(bounds)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        grant()
        try:
            told, arrays = TASKS[request.pop("task")](bounds, **request)
        except ValueError as error:
            told, arrays = {"error": " ".join(str(error).split())}, []
        except MemoryError:
            told, arrays = {"error": "The upload takes more memory to read than is allowed here."}, []
        except Exception:
            told, arrays = {"error": "The upload cannot be read; it may be damaged or of another type."}, []
        told["shapes"] = [array.shape for array in arrays]
        answers.write(json.dumps(told).encode() + b"\n")
        for array in arrays:
            answers.write(np.ascontiguousarray(array).data)
        answers.flush()


if __name__ == "__main__":
    _serve()
