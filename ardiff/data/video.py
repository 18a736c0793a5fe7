"""Pictures and videos in, videos out: the only module that opens files a person brings.

Pixels are uint8 (H, W, 3), RGB, everywhere here; F counts frames. Videos are read with PyAV and pictures with Pillow;
MP4 is written by the ffmpeg binary that comes with imageio-ffmpeg (through moviepy), so no system ffmpeg is needed.
"""

import contextlib
import itertools
import math
import os
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image, ImageOps


MAX_PIXELS = 40_000_000
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# Container formats that hold pictures themselves. Playlists (HLS, concat) are left out: they make ffmpeg open other files.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv,asf"
WRITE_SUFFIXES = (".mp4", ".gif", ".webp", ".png", ".zip")
MIN_MP4_SIDE = 256


def read_video(
    path: str | os.PathLike | BinaryIO,
    *,
    size: int | None = None,
    max_frames: int | None = None,
    stride: int = 1,
    start: int = 0,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Frames of a video file, uint8 (F, H, W, 3), turned upright where the file asks for a quarter turn.

    Frames start, start + stride, ... are kept, at most `max_frames`; decoding stops after the last of them, so the cost
    does not grow with the length of the file.

    Args:
        path: MP4, MOV, MKV, WebM, AVI, GIF, MPEG, Ogg, FLV or WMV; frames of at most 40 megapixels. Or a file that is
            open for reading and has a `name`.
        size: side in px of the square that every frame is fitted to (`fit_frame`), >= 1. None keeps the video's size.
        max_frames: >= 1. None reads to the end.
        stride: every how many frames one is kept, >= 1.
        start: first frame, 0-based.
        resample: Pillow's filter for `size`.

    Raises:
        ValueError: an argument is out of range, or the file is missing, empty, not a video, damaged within the frames
            that are read, changes its frame size, or has no frame at `start`.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` must be >= 1 but is {max_frames}.")
    with contextlib.closing(iter_video(path, size=size, stride=stride, start=start, resample=resample)) as frames:
        return np.stack(list(itertools.islice(frames, max_frames)))


def iter_video(
    path: str | os.PathLike | BinaryIO,
    *,
    size: int | None = None,
    stride: int = 1,
    start: int = 0,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[np.ndarray]:
    """The frames of `read_video` one by one, so that a long video needs no memory; its arguments and errors.

    `max_pixels`: of a frame, at most. What is wrong with the file or an argument is raised when the frame that it concerns is asked for.
    """
    for name, value, least in (("stride", stride, 1), ("start", start, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be >= {least} but is {value}.")
    path = _source(path)
    num_decoded, shape = 0, None
    try:
        with _open_video(path) as container:
            # A stream of a codec that ffmpeg does not know has no codec context.
            stream = next((stream for stream in container.streams.video if stream.codec_context is not None), None)
            if stream is None:
                raise ValueError(f"{path.name} has no readable video in it.")
            # Not by frames: threads ahead of the reader swallow the error of a file that is cut off.
            stream.thread_type = "SLICE"
            _check_pixels(path.name, stream.width, stream.height, max_pixels)
            for index, frame in enumerate(container.decode(stream)):
                num_decoded += 1
                if index < start or (index - start) % stride:
                    continue
                _check_pixels(path.name, frame.width, frame.height, max_pixels)
                picture = frame.to_ndarray(format="rgb24")
                if frame.rotation % 90 == 0:
                    picture = np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))
                if size is not None:
                    picture = fit_frame(picture, size, resample)
                if shape not in (None, picture.shape):
                    raise ValueError(f"{path.name} must keep one frame size but changes it in frame {index}.")
                shape = picture.shape
                yield picture
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} cannot be read as a video; it may be damaged or of another type.") from error
    if not num_decoded:
        raise ValueError(f"{path.name} has no readable video in it.")
    if shape is None:
        raise ValueError(f"`start` must be less than the {num_decoded} frames of {path.name} but is {start}.")


def count_frames(path: str | os.PathLike | BinaryIO) -> int:
    """How many frames a video file says it has, by its header or else by its packets, without decoding it.

    Damaged files and unusual streams can decode to another number.

    Raises:
        ValueError: the file is missing, empty or not a video.
    """
    path = _source(path)
    try:
        with _open_video(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path.name} has no readable video in it.")
            stream = container.streams.video[0]
            return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} cannot be read as a video; it may be damaged or of another type.") from error


def video_seconds(path: str | os.PathLike) -> float:
    """How long a video file says it lasts, in seconds, without decoding it; 0.0 when it does not say.

    Raises:
        ValueError: the file is missing, empty or not a video.
    """
    path = _existing_file(path)
    try:
        with _open_video(path) as container:
            return (container.duration or 0) / av.time_base
    except av.error.FFmpegError as error:
        raise ValueError(f"{path.name} cannot be read as a video; it may be damaged or of another type.") from error


def read_image(path: str | os.PathLike | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture file as uint8 (H, W, 3): turned upright (EXIF), transparency on white, first frame of an animation.

    `path` may also be a file that is open for reading and has a `name`.

    Raises:
        ValueError: the file is missing, empty, over `max_pixels` (checked before decoding), or not a readable BMP, GIF,
            JPEG, PNG or WebP picture.
    """
    path = _source(path)
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            _check_pixels(path.name, *image.size, max_pixels)
            return _flatten(image, path.name)
    # Pillow warns, then refuses, far above our own limit: the same sentence for both.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path.name} must have at most {max_pixels / 1e6:g} megapixels but has more.") from error
    # What Pillow raises for damaged files: UnidentifiedImageError and truncation are OSError, bad PNG chunks SyntaxError.
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path.name} cannot be read as a picture; it may be damaged or of another type.") from error


def fit_frame(
    frame: np.ndarray | Image.Image, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """The middle square of a picture, resized to uint8 (size, size, 3). A picture of that size comes back unchanged.

    Args:
        frame: uint8 (H, W, 3), or a PIL picture (turned upright, transparency on white) of at most 40 megapixels.
        size: side in px, >= 1.
        resample: Pillow's filter.
    """
    if size < 1:
        raise ValueError(f"`size` must be >= 1 but is {size}.")
    if isinstance(frame, Image.Image):
        _check_pixels("`frame`", *frame.size)
        pixels = _flatten(frame, "`frame`")
    else:
        pixels = _checked_frame(frame, "`frame`")
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels.copy()
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    # One resampling for crop and resize: the box may lie between pixels.
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(pixels).resize((size, size), resample, box=box))


def write_video(
    frames: np.ndarray | Sequence[np.ndarray | Image.Image], path: str | os.PathLike, fps: float = 8
) -> Path:
    """Write frames to a file, by its suffix; the file appears whole or not at all. Returns the path.

    - .mp4: H.264, yuv420p, no B-frames, index in front: plays in every browser. Frames whose short side is under
      256 px are enlarged by a whole factor (nearest pixel, so nothing blurs) until it is at least 256 px, because
      players smear tiny videos; an odd side then repeats its last row or column, as yuv420p needs even sides.
    - .gif: endless loop, one palette for all frames; equal neighbours become one longer frame. Ticks are 1/100 s and
      browsers slow down anything shorter than 2 of them, so above 50 fps it plays at 50.
    - .webp: animated, endless loop.
    - .png: one picture, the frames side by side from left to right.
    - .zip: the frames as they are, frame-0000.png and so on.

    Args:
        frames: at least one uint8 (H, W, 3) picture, array or PIL, all of one size.
        path: file to write; its folder must exist. An existing file is replaced.
        fps: frames per second in [1, 60]; of no effect for .png and .zip.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        raise ValueError(f"`path` must end in one of {', '.join(WRITE_SUFFIXES)} but is {path.name}.")
    if not path.parent.is_dir():
        raise ValueError(f"`path` must be in an existing folder but {path.parent} is not one.")
    if not 1 <= fps <= 60:
        raise ValueError(f"`fps` must be in [1, 60] but is {fps}.")
    pictures = [
        _flatten(frame, "`frames`") if isinstance(frame, Image.Image) else _checked_frame(frame, "`frames`")
        for frame in frames
    ]
    if not pictures:
        raise ValueError("`frames` must have at least one frame but is empty.")
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"`frames` must all have one size but have {len(sizes)}: {sorted(sizes)}.")

    video = np.stack(pictures)
    # Same folder, so that the rename is atomic; same suffix, which tells ffmpeg the container.
    unfinished = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        if suffix == ".mp4":
            _write_mp4(video, unfinished, fps)
        elif suffix == ".gif":
            _write_gif(video, unfinished, fps)
        elif suffix == ".webp":
            _write_webp(video, unfinished, fps)
        elif suffix == ".zip":
            _write_zip(video, unfinished)
        else:
            Image.fromarray(np.concatenate(video, axis=1)).save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _write_mp4(video: np.ndarray, path: Path, fps: float) -> None:
    # Not above: whoever only reads files, as the process for uploads does, does without it.
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    factor = max(1, math.ceil(MIN_MP4_SIDE / min(video.shape[1:3])))
    height, width = factor * video.shape[1], factor * video.shape[2]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    ffmpeg_params = ["-crf", "17", "-bf", "0", "-movflags", "+faststart"]
    # Colours are converted and labelled as BT.709: without a label players guess, and guess differently.
    ffmpeg_params += ["-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"]
    ffmpeg_params += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    # moviepy's own writer class: its clips resample in time and can lose or repeat a frame.
    writer = FFMPEG_VideoWriter(str(path), (width + width % 2, height + height % 2), fps, ffmpeg_params=ffmpeg_params)
    process = writer.proc
    with writer:
        for frame in video:
            enlarged = frame.repeat(factor, axis=0).repeat(factor, axis=1)
            writer.write_frame(np.pad(enlarged, padding, mode="edge"))
    if process.returncode or not path.is_file() or not path.stat().st_size:
        raise RuntimeError(f"ffmpeg could not write a {width} x {height} video (exit status {process.returncode}).")


def _write_gif(video: np.ndarray, path: Path, fps: float) -> None:
    # One palette for all frames: a palette per frame flickers.
    palette = Image.fromarray(np.concatenate(video, axis=0)).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in video]
    ticks = np.rint(np.arange(len(video) + 1) * 100 / min(fps, 50)).astype(int)
    durations = (10 * np.diff(ticks)).tolist()
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, disposal=1)


def _write_webp(video: np.ndarray, path: Path, fps: float) -> None:
    images = [Image.fromarray(frame) for frame in video]
    durations = np.diff(np.rint(np.arange(len(video) + 1) * 1000 / fps).astype(int)).tolist()
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, quality=90, method=4)


def _write_zip(video: np.ndarray, path: Path) -> None:
    # Stored, not deflated: PNG is compressed already.
    with zipfile.ZipFile(path, "w") as archive:
        for index, frame in enumerate(video):
            with archive.open(f"frame-{index:04d}.png", "w") as member:
                Image.fromarray(frame).save(member, "PNG")


def _flatten(image: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation applied, transparency on white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} must have 8 or 16 bits per channel but has 32.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _checked_frame(frame: np.ndarray, name: str) -> np.ndarray:
    if not isinstance(frame, np.ndarray):
        raise ValueError(f"{name} must be uint8 of shape (H, W, 3) or a PIL picture but is a {type(frame).__name__}.")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise ValueError(f"{name} must be uint8 of shape (H, W, 3) but is {frame.dtype} of shape {frame.shape}.")
    return frame


def _check_pixels(name: str, width: int, height: int, most: int = MAX_PIXELS) -> None:
    if width * height > most:
        raise ValueError(
            f"{name} must have at most {most / 1e6:g} megapixels but has {width * height / 1e6:.1f} "
            f"({width} x {height})."
        )


def _open_video(path: Path | BinaryIO) -> av.container.InputContainer:
    return av.open(
        str(path) if isinstance(path, Path) else path,
        options={"format_whitelist": VIDEO_FORMATS},
        metadata_errors="replace",
    )


def _source(path: str | os.PathLike | BinaryIO) -> Path | BinaryIO:
    return path if hasattr(path, "read") else _existing_file(path)


def _existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if not path.stat().st_size:
        raise ValueError(f"{path.name} is empty (0 bytes).")
    return path
