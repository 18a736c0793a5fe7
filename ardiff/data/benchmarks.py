"""Sets of videos by name: the four of the paper in the folders that they are usually unpacked to, and generic ones.

A set is named as KIND[/SPLIT]:FOLDER, or as a folder alone, which is a folder of videos:

    faceforensics   {train,val,test}/{original,videos,}/...     video files or folders of frames (FaceForensics, not ++)
    sky-timelapse   {sky_train,sky_test}/<video>/<shot>/*.jpg   or video files; also {train,test}
    taichi-hd       {train,test}/<clip>.mp4                     files, or folders of frames of that name
    ucf-101         <Class>/v_<Class>_gNN_cNN.avi               files or folders of frames, by ucfTrainTestlist/*.txt
    videos          <class>/...                                 video files and folders of frames; classes are optional
    images          <class>/...                                 pictures, each a video of one frame
    shards          *.tar                                       see `shards.py`

The split is "train" where none is named; "all" is everything below the folder. UCF-101 has three divisions: train01 to
train03 and test01 to test03, and "train" is train01.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ardiff.data.clips import Video, find_pictures, find_videos, label_by_folder
from ardiff.data.shards import find_shards


LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class VideoSet:
    """What was found.

    Attributes:
        name, folder: as the set was named, split included.
        videos: in the order of their names, or of the split's list.
        class_names: of their labels; empty = no classes.
        missing: names in the split's list of which there is no video.
        damaged: what could not be read, name to reason; here only what is seen without opening videos.
        published: how many videos the split has according to its authors, where they say.
    """

    name: str
    folder: Path
    videos: list[Video]
    class_names: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    published: int | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of the paper.

    Attributes:
        splits: to the folders that may hold one, the first that is there does. Empty for UCF-101, which has lists.
        published: videos of a split. FaceForensics: its paper, arXiv 1803.09179; Sky-Timelapse: its readme (shots);
            Taichi-HD: First Order Motion Model, NeurIPS 2019; UCF-101: its lists.
        window_step: frames between the starts of the clips that the paper's training enumerates.
    """

    splits: dict[str, tuple[str, ...]]
    published: dict[str, int]
    window_step: int


BENCHMARKS = {
    "faceforensics": Benchmark(
        splits={split: (f"{split}/original", f"{split}/videos", split) for split in ("train", "val", "test")},
        published={"train": 704, "val": 150, "test": 150},
        window_step=16,
    ),
    "sky-timelapse": Benchmark(
        splits={split: (f"sky_{split}", split) for split in ("train", "test")},
        published={"train": 2392, "test": 225},
        window_step=1,
    ),
    "taichi-hd": Benchmark(
        splits={split: (split,) for split in ("train", "test")},
        published={"train": 3049, "test": 285},
        window_step=64,
    ),
    "ucf-101": Benchmark(
        splits={},
        published={
            "train01": 9537, "test01": 3783, "train02": 9586, "test02": 3734, "train03": 9624, "test03": 3696, "all": 13320
        },
        window_step=128,
    ),
}  # fmt: skip
KINDS = (*BENCHMARKS, "videos", "images", "shards")


def parse_name(name: str) -> tuple[str, str, Path]:
    """`ucf-101/test01:/data/UCF-101` to kind, split ("train" where none is named) and folder."""
    head, colon, folder = name.partition(":")
    kind, slash, split = head.partition("/")
    if not colon or kind not in KINDS:
        return "videos", "all", Path(name)
    return kind, split if slash else "train" if kind in BENCHMARKS else "all", Path(folder)


def open_set(name: str) -> VideoSet:
    """Find the videos of a set; `name` as at the top of this module. No video is opened.

    Raises:
        ValueError: the folder, the split or its lists are not there, or hold no video.
    """
    kind, split, folder = parse_name(name)
    if not folder.is_dir():
        kinds = ", ".join(KINDS)
        raise ValueError(f"`data` must name a folder, alone or after one of {kinds} and a colon, but is {name!r}.")
    found = _FINDERS.get(kind, _find_benchmark)(kind, split, folder)
    found.name = f"{kind}/{split}"
    if not found.videos:
        what = {"images": "pictures", "shards": "tar files with videos"}.get(kind, "video files or folders of frames")
        raise ValueError(f"`data` must be a folder with {what}; {found.folder} has none.")
    if found.missing or found.damaged:
        LOGGER.warning(
            "%s lacks %d of the videos it lists, and %d cannot be read; `ardiff data-check` names them",
            found.name, len(found.missing), len(found.damaged),
        )  # fmt: skip
    return found


def _find_benchmark(kind: str, split: str, folder: Path) -> VideoSet:
    benchmark = BENCHMARKS[kind]
    if split == "all":
        return VideoSet(name=kind, folder=folder, videos=find_videos(folder))
    _check_split(kind, split, benchmark.splits)
    candidates = [folder / part for part in benchmark.splits[split]]
    existing = next((path for path in candidates if path.is_dir()), None)
    if existing is None:
        parts = " or ".join(benchmark.splits[split])
        raise ValueError(
            f"`data` {kind}/{split} must hold a folder {parts} but {folder} has none; "
            f"for a folder that is one split, or all of them, write {kind}/all:{folder}."
        )
    return VideoSet(name=kind, folder=existing, videos=find_videos(existing), published=benchmark.published.get(split))


def _find_ucf(kind: str, split: str, folder: Path) -> VideoSet:
    split = {"train": "train01", "test": "test01"}.get(split, split)
    published = BENCHMARKS[kind].published
    _check_split(kind, split, published)
    # The lists are not of one mind on capitals (v_HandStandPushups, HandstandPushups), and frames have no suffix.
    by_stem = {_stem(video.name): video for video in find_videos(folder)}
    by_stem = {stem: video for stem, video in by_stem.items() if _UCF_STEM.fullmatch(stem)}
    numbered = _list_file(folder, "classInd.txt")
    if numbered is not None:
        class_names = tuple(line.split()[1] for line in numbered)
    else:
        class_names = tuple(sorted({_ucf_class(video) for video in by_stem.values()}))
    number = {name.lower(): index for index, name in enumerate(class_names)}
    wanted, missing = list(by_stem), []
    if split != "all":
        lines = _list_file(folder, f"{split[:-2]}list{split[-2:]}.txt")
        if lines is None:
            raise ValueError(
                f"`data` {kind}/{split} must hold ucfTrainTestlist/{split[:-2]}list{split[-2:]}.txt but {folder} has none."
            )
        names = [line.split()[0] for line in lines]
        wanted = [_stem(name) for name in names if _stem(name) in by_stem]
        missing = [name for name in names if _stem(name) not in by_stem]
    videos, damaged = [], {}
    for stem in wanted:
        name = _UCF_STEM.fullmatch(stem).group(1)
        if name in number:
            videos.append(replace(by_stem[stem], label=number[name]))
        else:
            damaged[by_stem[stem].name] = f"{by_stem[stem].name} is of a class that classInd.txt does not name."
    return VideoSet(
        name=kind, folder=folder, videos=videos, class_names=class_names, missing=missing, damaged=damaged,
        published=published[split],
    )  # fmt: skip


_UCF_STEM = re.compile(r"v_(\w+)_g\d+_c\d+")


def _stem(name: str) -> str:
    return re.sub(r"\.avi$|\.mp4$", "", PurePosixPath(name).name.lower())


def _ucf_class(video: Video) -> str:
    """The class in the folder's name where the video is in one, else in its own."""
    own = re.match(r"v_(\w+)_g\d+_c\d+", PurePosixPath(video.name).name).group(1)
    parent = PurePosixPath(video.name).parent.name
    return parent if parent.lower() == own.lower() else own


def _list_file(folder: Path, name: str) -> list[str] | None:
    """Lines that are not empty of a list in the folder or one below it."""
    for path in (folder / "ucfTrainTestlist" / name, folder / name, *sorted(folder.glob(f"*/{name}"))):
        if path.is_file():
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def _find_generic(kind: str, split: str, folder: Path) -> VideoSet:
    _check_split(kind, split, ())
    if kind == "shards":
        videos, class_names, damaged = find_shards(folder)
        return VideoSet(name=kind, folder=folder, videos=videos, class_names=class_names, damaged=damaged)
    videos, class_names = label_by_folder(find_pictures(folder) if kind == "images" else find_videos(folder))
    return VideoSet(name=kind, folder=folder, videos=videos, class_names=class_names)


def _check_split(kind: str, split: str, splits: object) -> None:
    if split != "all" and split not in splits:
        raise ValueError(f"`data` {kind} has the splits {', '.join(sorted({*splits, 'all'}))} but is {split!r}.")


_FINDERS: dict[str, Callable[[str, str, Path], VideoSet]] = {
    "ucf-101": _find_ucf,
    **dict.fromkeys(("videos", "images", "shards"), _find_generic),
}


# --- check --------------------------------------------------------------------------------------------------------


def check_set(name: str, num_frames: int = 16, stride: int = 1, decode: bool = False) -> dict:
    """Open every video of a set once, and say what is there and what is not; a dict that JSON holds as it is.

    `decode` decodes every frame, so that damage inside a video is found too; otherwise headers are read.

    Raises:
        ValueError: see `open_set`; or `num_frames` or `stride` is less than 1.
    """
    if num_frames < 1 or stride < 1:
        raise ValueError(f"`num_frames` and `stride` must be at least 1 but are {num_frames} and {stride}.")
    found = open_set(name)
    kind = found.name.partition("/")[0]
    window_step = BENCHMARKS[kind].window_step if kind in BENCHMARKS else 1
    span = (num_frames - 1) * stride + 1
    lengths, short, damaged = [], {}, dict(found.damaged)
    for video in found.videos:
        try:
            length = len(video.read(1)) if decode else video.count_frames()
        except ValueError as error:
            damaged[video.name] = str(error)
            continue
        lengths.append(length)
        if length < span:
            short[video.name] = length
    starts = [length - span + 1 for length in lengths if length >= span]
    return {
        "set": found.name,
        "folder": str(found.folder),
        "num_videos": len(found.videos),
        "published": found.published,
        "num_classes": len(found.class_names),
        "classes_without_videos": sorted(
            set(found.class_names) - {found.class_names[video.label] for video in found.videos if video.label >= 0}
        ),
        "num_frames": sum(lengths),
        "shortest": min(lengths, default=0),
        "longest": max(lengths, default=0),
        "clip": {"num_frames": num_frames, "stride": stride},
        "num_clips": sum(starts),
        "window_step": window_step,
        "num_windows": sum((count - 1) // window_step + 1 for count in starts),
        "missing": found.missing,
        "damaged": damaged,
        "too_short": short,
        "decoded": decode,
    }


def format_check(report: dict, num_named: int = 20) -> str:
    """The report of `check_set` as lines of text; of what is wrong at most `num_named` are named."""
    published = f", {report['published']} published" if report["published"] else ""
    clip = report["clip"]
    lines = [
        f"{report['set']} in {report['folder']}",
        f"  {report['num_videos']} videos{published}; {report['num_frames']} frames, "
        f"{report['shortest']} to {report['longest']} a video",
    ]
    if report["num_classes"]:
        lines.append(f"  {report['num_classes']} classes")
    lines.append(
        f"  clips of {clip['num_frames']} frames, stride {clip['stride']}: {report['num_clips']}; "
        f"{report['num_windows']} that start {report['window_step']} frames apart"
    )
    wrong = {
        "listed but missing": report["missing"],
        "damaged": list(report["damaged"].values()),
        "too short for a clip": [f"{name} ({length} frames)" for name, length in report["too_short"].items()],
        "classes without videos": report["classes_without_videos"],
    }
    for what, names in wrong.items():
        if names:
            lines.append(f"  {what}: {len(names)}")
            lines += [f"    {name}" for name in names[:num_named]]
            lines += [f"    ... and {len(names) - num_named} more"] if len(names) > num_named else []
    if not any(wrong.values()):
        lines.append("  nothing is missing" if report["decoded"] else "  nothing is missing (headers were read only)")
    return "\n".join(lines)
