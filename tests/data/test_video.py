"""Files in and files out: what is written plays anywhere and reads back, and what cannot be read is named."""

import subprocess
import zipfile
import zlib

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from ardiff.data.video import fit_frame, read_image, read_video, video_seconds, write_video


def clip(num_frames=8, height=64, width=64):
    """A moving bright square on a colour gradient: every frame differs, and each corner has its own colour."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    frames[..., 0] = 40 + 160 * x // width
    frames[..., 1] = 40 + 160 * y // height
    frames[..., 2] = 90
    for index in range(num_frames):
        left = index * (width - 8) // max(num_frames - 1, 1)
        frames[index, height // 4 : height // 2, left : left + 8] = (230, 220, 30)
    return frames


def mean_error(first, second):
    return np.abs(first.astype(float) - second.astype(float)).mean()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, data):
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    size = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def run_ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps", "expected"),
    [
        (8, 64, 64, 8, (256, 256)),
        (1, 64, 64, 8, (256, 256)),
        (5, 37, 51, 24, (260, 358)),  # 7 times 37 x 51 is 259 x 357: both odd
        (3, 300, 401, 1, (300, 402)),
        (17, 256, 320, 60, (256, 320)),
        (16, 64, 96, 29.97, (256, 384)),
    ],
)
def test_mp4_plays_everywhere(tmp_path, num_frames, height, width, fps, expected):
    frames = clip(num_frames, height, width)
    path = write_video(frames, tmp_path / "clip.mp4", fps=fps)
    with av.open(str(path)) as container:
        assert len(container.streams) == 1
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.has_b_frames is False
        assert stream.frames == num_frames
        assert (stream.height, stream.width) == expected
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
    read = read_video(path)
    assert read.shape == (num_frames, *expected, 3)
    factor = max(1, -(-256 // min(height, width)))
    inside = read[:, : factor * height : factor, : factor * width : factor]
    assert mean_error(inside, frames) < 4
    assert list(tmp_path.iterdir()) == [path], "a temporary file is left"


def test_mp4_index_is_in_front(tmp_path):
    data = write_video(clip(), tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_mp4_colours_are_labelled_and_kept(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 60, 200)]
    frames = np.stack([np.full((64, 64, 3), colour, dtype=np.uint8) for colour in colours])
    path = write_video(frames, tmp_path / "colours.mp4")
    assert np.abs(read_video(path)[:, 128, 128].astype(int) - colours).max() <= 4
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (av.video.reformatter.Colorspace.ITU709, 1)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
@pytest.mark.parametrize("num_frames", [1, 8])
def test_animated_pictures(tmp_path, suffix, num_frames):
    frames = clip(num_frames, 48, 60)
    path = write_video(frames, tmp_path / f"clip{suffix}", fps=8)
    with Image.open(path) as image:
        assert image.size == (60, 48)
        assert getattr(image, "n_frames", 1) == num_frames
        durations = []
        for index in range(num_frames):
            image.seek(index)
            assert mean_error(np.asarray(image.convert("RGB")), frames[index]) < 8
            durations.append(image.info.get("duration"))
        if num_frames > 1:
            assert image.info["loop"] == 0
            assert sum(durations) == num_frames * 125


def test_gif_is_never_faster_than_browsers_allow(tmp_path):
    with Image.open(write_video(clip(4), tmp_path / "fast.gif", fps=60)) as image:
        for index in range(4):
            image.seek(index)
            assert image.info["duration"] == 20


def test_gif_reads_back_as_a_video(tmp_path):
    frames = clip(6)
    assert mean_error(read_video(write_video(frames, tmp_path / "clip.gif")), frames) < 8


def test_png_is_a_strip_from_left_to_right(tmp_path):
    frames = clip(3, 20, 30)
    strip = read_image(write_video(frames, tmp_path / "strip.png"))
    assert strip.shape == (20, 90, 3)
    assert np.array_equal(strip, np.concatenate(list(frames), axis=1))


def test_zip_holds_the_frames_as_they_are(tmp_path):
    frames = clip(3, 20, 30)
    with zipfile.ZipFile(write_video(frames, tmp_path / "frames.zip")) as archive:
        assert archive.namelist() == ["frame-0000.png", "frame-0001.png", "frame-0002.png"]
        kept = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(np.stack(kept), frames)


def test_frames_may_be_a_list_of_pictures(tmp_path):
    frames = clip(3)
    expected = write_video(frames, tmp_path / "a.png").read_bytes()
    assert write_video(list(frames), tmp_path / "b.png").read_bytes() == expected
    assert write_video([Image.fromarray(frame) for frame in frames], tmp_path / "c.png").read_bytes() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "clip.avi"}, r"`path` must end in one of .mp4, .gif, .webp, .png, .zip but is clip.avi"),
        ({"path": "missing/clip.mp4"}, "`path` must be in an existing folder"),
        ({"fps": 0.5}, r"`fps` must be in \[1, 60\] but is 0.5"),
        ({"fps": 61}, r"`fps` must be in \[1, 60\] but is 61"),
        ({"fps": float("nan")}, r"`fps` must be in \[1, 60\]"),
        ({"frames": clip().astype(np.float32) / 255}, r"`frames` must be uint8 .* but is float32"),
        ({"frames": clip()[..., 0]}, r"`frames` must be uint8 of shape \(H, W, 3\)"),
        ({"frames": clip()[..., :2]}, r"`frames` must be uint8 of shape \(H, W, 3\)"),
        ({"frames": [clip().tolist()]}, "`frames` must be uint8 .* but is a list"),
        ({"frames": []}, "`frames` must have at least one frame"),
        ({"frames": [clip()[0], clip(height=32)[0]]}, "`frames` must all have one size but have 2"),
    ],
)
def test_wrong_videos_are_not_written(tmp_path, arguments, message):
    arguments = {"frames": clip(), "path": "clip.mp4", **arguments}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ValueError, match=message):
        write_video(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr("moviepy.video.io.ffmpeg_writer.FFMPEG_BINARY", "false")
    with pytest.raises((OSError, RuntimeError)):
        write_video(clip(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_video(clip(), path)
    assert len(read_video(path)) == 8


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(source, target):
        assert source.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr("ardiff.data.video.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(clip(), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_subset_of_frames(tmp_path):
    path = write_video(clip(20), tmp_path / "clip.mp4")
    everything = read_video(path)
    assert np.array_equal(read_video(path, start=3, stride=4), everything[3::4])
    assert np.array_equal(read_video(path, start=3, stride=4, max_frames=2), everything[3::4][:2])
    assert np.array_equal(read_video(path, max_frames=99), everything)
    assert np.array_equal(read_video(path, max_frames=1, start=19), everything[19:])
    small = read_video(path, max_frames=2, size=32)
    assert np.array_equal(small, np.stack([fit_frame(frame, 32) for frame in everything[:2]]))


def test_decoding_stops_after_the_last_frame_that_is_kept(tmp_path):
    whole = write_video(clip(300), tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(len(whole) * 0.7)])
    assert len(read_video(path, max_frames=2)) == 2
    with pytest.raises(ValueError, match=r"cut\.mp4 cannot be read as a video"):
        read_video(path)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied_as_ffmpeg_does(tmp_path, rotation):
    source = write_video(clip(2, 256, 320), tmp_path / "flat.mp4")
    turned = tmp_path / "turned.mp4"
    run_ffmpeg("-display_rotation", rotation, "-i", source, "-c", "copy", turned)
    raw = run_ffmpeg("-i", turned, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    shape = (2, 256, 320, 3) if rotation % 180 == 0 else (2, 320, 256, 3)
    read = read_video(turned)
    assert read.shape == shape
    assert mean_error(read, np.frombuffer(raw, dtype=np.uint8).reshape(shape)) < 2


@pytest.mark.parametrize("read", [read_video, read_image])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"This is a text file.\n" * 100, r"notes\.mp4 cannot be read as a (video|picture)"),
        (b"", r"notes\.mp4 is empty \(0 bytes\)"),
        (None, r"notes\.mp4 is not a file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, read, content, message):
    path = tmp_path / "notes.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)
    with pytest.raises(ValueError, match="is not a file"):
        read(tmp_path)


def test_a_video_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", path)
    with pytest.raises(ValueError, match=r"sound\.mp4 has no readable video in it"):
        read_video(path)


def test_a_playlist_does_not_open_other_files(tmp_path):
    write_video(clip(), tmp_path / "clip.mp4")
    path = tmp_path / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with pytest.raises(ValueError, match=r"list\.mp4 cannot be read as a video"):
        read_video(path)
    with pytest.raises(ValueError, match=r"list\.mp4 cannot be read as a video"):
        video_seconds(path)


def test_video_seconds(tmp_path):
    path = write_video(clip(16), tmp_path / "clip.mp4", fps=8)
    assert video_seconds(path) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 8}, r"`start` must be less than the 8 frames of clip\.mp4 but is 8"),
        ({"start": -1}, "`start` must be >= 0 but is -1"),
        ({"stride": 0}, "`stride` must be >= 1 but is 0"),
        ({"max_frames": 0}, "`max_frames` must be >= 1 but is 0"),
        ({"size": 0}, "`size` must be >= 1 but is 0"),
    ],
)
def test_wrong_subsets_are_refused(tmp_path, arguments, message):
    path = write_video(clip(), tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match=message):
        read_video(path, **arguments)


@pytest.mark.parametrize(("width", "height"), [(8200, 5001), (10_000, 9500), (20_000, 20_000)])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, width, height):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(ValueError, match=r"huge\.png must have at most 40 megapixels but has"):
        read_image(path)


def test_a_real_41_megapixel_picture_is_refused(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("L", (8200, 5001)).save(path, compress_level=1)
    with pytest.raises(ValueError, match=r"huge\.png must have at most 40 megapixels but has 41\.0 \(8200 x 5001\)"):
        read_image(path)
    with Image.open(path) as image, pytest.raises(ValueError, match="`frame` must have at most 40 megapixels"):
        fit_frame(image, 64)


def test_a_cut_picture_is_refused(tmp_path):
    Image.fromarray(clip(1)[0]).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as a picture; it may be damaged"):
        read_image(tmp_path / "cut.png")


def test_pictures_are_turned_upright(tmp_path):
    pixels = clip(1, 20, 30)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    expected = [[[10, 20, 30], [127, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    assert read_image(tmp_path / "clear.png").tolist() == expected
    assert fit_frame(Image.fromarray(pixels), 2).tolist() == expected


def test_grey_and_16_bit_pictures(tmp_path):
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        assert np.array_equal(read_image(tmp_path / name), np.repeat(grey[..., None], 3, axis=2))
    with pytest.raises(ValueError, match="`frame` must have 8 or 16 bits per channel but has 32"):
        fit_frame(Image.fromarray(grey.astype(np.float32)), 2)


def test_fit_frame_takes_the_middle_square():
    frame = np.zeros((40, 100, 3), dtype=np.uint8)
    frame[:, :30] = 255  # outside the middle square
    frame[:, 70:] = 255
    frame[10:30, 40:60] = (0, 200, 0)
    fitted = fit_frame(frame, 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted[10, 10].tolist() == [0, 200, 0]
    assert fitted[:, :, 0].max() < 30
    assert np.array_equal(fit_frame(frame.transpose(1, 0, 2).copy(), 20), fitted.transpose(1, 0, 2))
    assert np.array_equal(fit_frame(Image.fromarray(frame), 20), fitted)


def test_fit_frame_leaves_a_fitting_frame_alone():
    frame = clip(1)[0]
    fitted = fit_frame(frame, 64)
    assert np.array_equal(fitted, frame)
    assert not np.shares_memory(fitted, frame)
    with pytest.raises(ValueError, match=r"`frame` must be uint8 of shape \(H, W, 3\) but is float64"):
        fit_frame(frame / 255, 64)
