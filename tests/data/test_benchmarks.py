"""Sets of videos on small stand-ins with the folders, lists and names of the real ones."""

import json
import logging
import tarfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ardiff import cli
from ardiff.data.benchmarks import KINDS, check_set, format_check, open_set, parse_name
from ardiff.data.clips import Video, VideoClips


def pictures(num_frames, seed, height=24, width=48):
    """Random patches of 8 px: they survive a codec, and every frame differs."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(256, (num_frames, height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    return patches.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()


def write_file(path, num_frames=6, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 48, 24, "yuv420p"
        for picture in pictures(num_frames, seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder, num_frames=6, seed=0, name="frame{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(num_frames, seed), start=1):
        Image.fromarray(picture).save(folder / name.format(number))


def names(found):
    return [video.name for video in found.videos]


# --- layouts ------------------------------------------------------------------------------------------------------


def test_faceforensics(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for number in range(count):
            write_file(tmp_path / split / "original" / f"{split}{number}.avi")
            write_file(tmp_path / split / "altered" / f"{split}{number}.avi")
    found = open_set(f"faceforensics:{tmp_path}")
    assert names(found) == ["train0.avi", "train1.avi", "train2.avi"]  # the altered ones are no faces of anybody
    assert found.class_names == ()
    assert found.published == 704
    assert len(open_set(f"faceforensics/val:{tmp_path}").videos) == 1
    assert len(open_set(f"faceforensics/all:{tmp_path / 'test' / 'original'}").videos) == 2
    with pytest.raises(ValueError, match=r"must hold a folder train/original or train/videos or train but .*/all:"):
        open_set(f"faceforensics:{tmp_path / 'test'}")


def test_faceforensics_as_folders_of_frames(tmp_path):
    write_frames(tmp_path / "train" / "id7", 12, seed=3)
    (video,) = open_set(f"faceforensics:{tmp_path}").videos
    assert video.count_frames() == 12
    frames = [Image.fromarray(frame) for frame in pictures(12, 3)]
    # 9 before 10; the short side resized, bicubic, then the middle square.
    expected = [np.asarray(frame.resize((16, 8), Image.Resampling.BICUBIC))[:, 4:12] for frame in frames]
    np.testing.assert_array_equal(video.read(8), np.stack(expected))


def test_sky_timelapse(tmp_path):
    for split, long, shots in (("sky_train", "-0KX", 3), ("sky_train", "Z8s", 1), ("sky_test", "abc", 1)):
        for shot in range(1, shots + 1):
            write_frames(tmp_path / split / long / f"{long}_{shot}", 2 + 2 * shot, shot, f"{long}_frames_{{:08d}}.jpg")
    found = open_set(f"sky-timelapse:{tmp_path}")
    assert names(found) == ["-0KX/-0KX_1", "-0KX/-0KX_2", "-0KX/-0KX_3", "Z8s/Z8s_1"]
    assert found.class_names == ()
    assert [video.count_frames() for video in found.videos] == [4, 6, 8, 4]
    assert names(open_set(f"sky-timelapse/test:{tmp_path}")) == ["abc/abc_1"]
    report = check_set(f"sky-timelapse:{tmp_path}", num_frames=3, stride=2)
    assert list(report["too_short"]) == ["-0KX/-0KX_1", "Z8s/Z8s_1"]
    assert (report["num_clips"], report["num_windows"]) == (2 + 4, 2 + 4)


def test_taichi_hd_as_files_and_as_folders_of_that_name(tmp_path):
    write_file(tmp_path / "train" / "a#000#128.mp4", 5)
    write_frames(tmp_path / "train" / "b#128#256.mp4", 4, name="{:07d}.png")
    write_file(tmp_path / "test" / "c#000#128.mp4", 3)
    found = open_set(f"taichi-hd/train:{tmp_path}")
    assert names(found) == ["a#000#128.mp4", "b#128#256.mp4"]
    assert [len(video.read(16)) for video in found.videos] == [5, 4]
    assert open_set(f"taichi-hd/test:{tmp_path}").published == 285


@pytest.fixture
def ucf(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 HandstandPushups\n3 YoYo\n")
    # Capitals as in the real lists: the class is HandstandPushups, its files are v_HandStandPushups.
    for name in ("ApplyEyeMakeup/v_ApplyEyeMakeup", "HandstandPushups/v_HandStandPushups", "YoYo/v_YoYo"):
        for group in (1, 8):
            write_file(tmp_path / f"{name}_g0{group}_c01.avi", 4, seed=group)
    (lists / "trainlist01.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g08_c01.avi 2\n"
        "YoYo/v_YoYo_g08_c01.avi 3\nYoYo/v_YoYo_g09_c01.avi 3\n"
    )
    (lists / "testlist01.txt").write_text("HandstandPushups/v_HandstandPushups_g01_c01.avi\n")
    return tmp_path


def test_ucf_101(ucf, caplog):
    found = open_set(f"ucf-101:{ucf}")
    assert found.name == "ucf-101/train"
    assert found.class_names == ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
    assert [video.label for video in found.videos] == [0, 1, 2]
    assert [video.name.split("/")[0] for video in found.videos] == list(found.class_names)
    assert found.missing == ["YoYo/v_YoYo_g09_c01.avi"]
    assert "lacks 1 of the videos it lists" in caplog.text
    (test,) = open_set(f"ucf-101/test:{ucf}").videos
    assert (test.label, test.name) == (1, "HandstandPushups/v_HandStandPushups_g01_c01.avi")
    assert len(open_set(f"ucf-101/all:{ucf}").videos) == 6
    with pytest.raises(ValueError, match="must hold ucfTrainTestlist/trainlist03.txt"):
        open_set(f"ucf-101/train03:{ucf}")
    with pytest.raises(ValueError, match=r"ucf-101 has the splits all, test01, .* but is 'val'"):
        open_set(f"ucf-101/val:{ucf}")


def test_ucf_101_as_frames_without_classes_file(tmp_path):
    for name in ("v_YoYo_g01_c01", "v_Archery_g02_c03"):
        write_frames(tmp_path / "jpegs_256" / name, 3)
    found = open_set(f"ucf-101/all:{tmp_path}")
    assert found.class_names == ("Archery", "YoYo")
    assert [found.class_names[video.label] for video in found.videos] == ["Archery", "YoYo"]


def test_folders_of_videos_and_of_images(tmp_path):
    write_file(tmp_path / "clips" / "run" / "one.mp4", 3)
    write_frames(tmp_path / "clips" / "walk" / "two", 5)
    videos = open_set(str(tmp_path / "clips"))
    assert (names(videos), videos.class_names) == (["run/one.mp4", "walk/two"], ("run", "walk"))
    images = open_set(f"images:{tmp_path / 'clips'}")
    assert len(images.videos) == 5
    clips = VideoClips(images.videos, images.class_names, batch_size=2, num_frames=1, size=8, seed=0)
    assert clips[0][0].shape == (2, 1, 8, 8, 3)
    assert clips.class_names == ("walk",)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ucf-101:/a/b", ("ucf-101", "train", "/a/b")),
        ("ucf-101/test03:/a:b", ("ucf-101", "test03", "/a:b")),
        ("images:a", ("images", "all", "a")),
        ("a/b", ("videos", "all", "a/b")),
        ("C:/videos", ("videos", "all", "C:/videos")),
    ],
)
def test_names_of_sets(name, parts):
    kind, split, folder = parse_name(name)
    assert (kind, split, str(folder)) == parts


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match="`data` must name a folder"):
        open_set(f"{kind}:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match=r"has none\.|none can be used"):
        open_set(f"{kind}/all:{tmp_path}")


# --- lazily, and what is damaged ------------------------------------------------------------------------------------


def test_opening_a_set_opens_no_video(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.mp4").write_bytes(b"no video at all")
    assert names(open_set(f"taichi-hd:{tmp_path}")) == ["a.mp4"]


@pytest.fixture
def partly_damaged(tmp_path):
    for number in range(3):
        write_file(tmp_path / f"good{number}.mp4", 6, seed=number)
    whole = (tmp_path / "good0.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.avi").write_bytes(b"RIFF" + bytes(200))
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    write_file(tmp_path / "short.mp4", 2)
    return tmp_path


def clips_of(folder, seed=0):
    found = open_set(str(folder))
    return VideoClips(found.videos, found.class_names, batch_size=3, num_frames=4, size=16, seed=seed)


def test_damaged_videos_are_left_out_named_once_and_change_no_later_step(partly_damaged, caplog):
    clips = clips_of(partly_damaged)
    steps = [clips[step][0] for step in range(12)]
    assert set(clips.left_out) == {"empty.mp4", "garbage.avi", "half.mp4", "short.mp4"}
    for name in clips.left_out:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    assert "short.mp4 must have at least 4 frames for a clip but has 2" in caplog.text
    for step in (5, 11):
        assert torch.equal(clips_of(partly_damaged)[step][0], steps[step])
    good = [np.stack(Video(name=p.name, path=p).read(16)) for p in sorted(partly_damaged.glob("good*"))]
    windows = [torch.from_numpy(video[start : start + 4]) for video in good for start in range(3)]
    seen = {next(i for i, window in enumerate(windows) if torch.equal(clip, window)) for s in steps for clip in s}
    assert len(seen) == 9  # every start of every good video


def test_a_header_that_promises_too_much_costs_no_clip(tmp_path):
    write_file(tmp_path / "one.mp4", 6)

    class Boasting(VideoClips):
        def count_frames(self, index, exact=False):
            return super().count_frames(index, exact) + (0 if exact else 30)

    found = open_set(str(tmp_path))
    clips = Boasting(found.videos, (), batch_size=20, num_frames=4, size=8, seed=0)
    assert clips[0][0].shape == (20, 4, 8, 8, 3)
    assert clips.left_out == {}


def test_check_names_everything_and_the_exit_code_says_so(partly_damaged, tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR)
    out = tmp_path / "check.json"
    arguments = ["data-check", str(partly_damaged), "--num-frames", "4", "--out", str(out)]
    assert cli.main([*arguments, "--decode"]) == 1
    report = json.loads(out.read_text())
    assert set(report["damaged"]) == {"empty.mp4", "garbage.avi", "half.mp4"}
    assert report["too_short"] == {"short.mp4": 2}
    assert (report["num_videos"], report["num_frames"], report["num_clips"]) == (7, 20, 9)
    printed = capsys.readouterr().out
    for text in (
        "7 videos; 20 frames, 2 to 6 a video",
        "damaged: 3",
        "garbage.avi cannot be read",
        "short.mp4 (2 frames)",
    ):
        assert text in printed
    for path in partly_damaged.glob("[!g]*.mp4"):
        path.unlink()
    (partly_damaged / "garbage.avi").unlink()
    assert cli.main(arguments[:-2]) == 0
    assert "nothing is missing (headers were read only)" in capsys.readouterr().out


def test_check_of_ucf_101_says_what_is_missing(ucf):
    report = check_set(f"ucf-101:{ucf}", num_frames=2)
    assert report["missing"] == ["YoYo/v_YoYo_g09_c01.avi"]
    assert (report["num_classes"], report["published"]) == (3, 9537)
    assert report["num_windows"] == 3  # one every 128 frames
    text = format_check(report, num_named=0)
    assert "3 videos, 9537 published" in text
    assert "listed but missing: 1\n    ... and 1 more" in text


# --- tar files ------------------------------------------------------------------------------------------------------


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, file in members.items():
            tar.add(file, arcname=name)


@pytest.fixture
def shards(tmp_path):
    files, folder = tmp_path / "files", tmp_path / "shards"
    folder.mkdir(), files.mkdir()
    for number in range(4):
        write_file(files / f"{number}.mp4", 5, seed=number)
        (files / f"{number}.cls").write_text(f"{number % 2}\n")
    (files / "caption.txt").write_text("a caption")
    for shard in range(2):
        numbers = (2 * shard, 2 * shard + 1)
        members = {f"{n:04d}.mp4": files / f"{n}.mp4" for n in numbers}
        members |= {f"{n:04d}.cls": files / f"{n}.cls" for n in numbers} | {
            f"{numbers[0]:04d}.txt": files / "caption.txt"
        }
        write_tar(folder / f"part-{shard:06d}.tar", members)
    return tmp_path


def test_shards_give_the_clips_of_the_files(shards):
    found, files = open_set(f"shards:{shards / 'shards'}"), open_set(str(shards / "files"))
    assert names(found)[0] == "part-000000.tar/0000.mp4"
    assert found.class_names == ("0", "1")
    assert [video.label for video in found.videos] == [0, 1, 0, 1]
    arguments = {"batch_size": 3, "num_frames": 3, "size": 16, "seed": 1}
    packed, plain = (VideoClips(each.videos, each.class_names, **arguments) for each in (found, files))
    for step in range(3):
        assert torch.equal(packed[step][0], plain[step][0])
    assert set(packed[0][1].tolist()) <= {0, 1}
    (shards / "shards" / "classes.txt").write_text("balls\nclouds\n")
    assert open_set(f"shards:{shards / 'shards'}").class_names == ("balls", "clouds")


def test_damaged_shards_and_unknown_classes_are_named(shards):
    folder = shards / "shards"
    (folder / "classes.txt").write_text("balls\n")
    tar = folder / "part-000001.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    found = open_set(f"shards:{folder}")
    assert names(found) == ["part-000000.tar/0000.mp4", "part-000001.tar/0002.mp4"]
    assert "which is none of the 1 of the set" in found.damaged["part-000000.tar/0001.mp4"]
    report = check_set(f"shards:{folder}", num_frames=2)
    assert "ends after" in report["damaged"]["part-000001.tar/0002.mp4"]
