"""Videos inside tar files, for sets that are too large or too many files for a disk: the layout of webdataset.

A folder of uncompressed `*.tar`; members with one key (the path up to the first dot of its last part) are one sample: a
video or a picture, and, where there are classes, `key.cls` with the class's number or name. Numbers are named by the
lines of `classes.txt` beside the tar files. Members of other kinds (captions, JSON) are left alone.
Headers are read once; then a video is one read at a known place of a file, so steps are as repeatable as with files.
"""

import io
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ardiff.data.clips import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Video


class _Member(io.BytesIO):
    """The bytes of a member of a tar file, with the name that messages give it."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


@dataclass(frozen=True, kw_only=True)
class TarVideo(Video):
    """A video or picture at bytes `start` to `start` + `num_bytes` of the tar file `path`."""

    start: int
    num_bytes: int

    def open(self) -> _Member:
        with open(self.path, "rb") as tar:
            tar.seek(self.start)
            data = tar.read(self.num_bytes)
        if len(data) < self.num_bytes:
            raise ValueError(
                f"{self.name} must have {self.num_bytes} bytes but {self.path.name} ends after {len(data)}."
            )
        return _Member(data, self.name)


def find_shards(folder: Path) -> tuple[list[Video], tuple[str, ...], dict[str, str]]:
    """Videos of all tar files below a folder, the names of their classes, and what is damaged (name to reason)."""
    videos, classes, damaged = [], {}, {}
    for path in sorted(folder.rglob("*.tar")):
        shard = path.relative_to(folder).as_posix()
        try:
            _read_headers(path, shard, videos, classes)
        except (tarfile.TarError, EOFError) as error:
            damaged[shard] = f"{shard} cannot be read to its end as a tar file: {error}."
    listed = folder / "classes.txt"
    if listed.is_file():
        names = tuple(listed.read_text(encoding="utf-8").split("\n")[:-1])
    elif all(label.isdigit() for label in classes.values()):
        names = tuple(str(number) for number in range(max(map(int, classes.values()), default=-1) + 1))
    else:
        names = tuple(sorted(set(classes.values())))
    numbers = {name: number for number, name in enumerate(names)} | {
        str(number): number for number in range(len(names))
    }
    labelled = []
    for video in videos:
        label = classes.get(_key(video.name))
        if label is None or label in numbers:
            labelled.append(replace(video, label=-1 if label is None else numbers[label]))
        else:
            damaged[video.name] = (
                f"{video.name} has the class {label!r}, which is none of the {len(names)} of the set."
            )
    return labelled, names, damaged


def _read_headers(path: Path, shard: str, videos: list[Video], classes: dict[str, str]) -> None:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            suffix = PurePosixPath(member.name).suffix.lower()
            name = f"{shard}/{member.name}"
            if not member.isfile():
                continue
            if suffix == ".cls":
                classes[_key(name)] = tar.extractfile(member).read().decode().strip()
            elif suffix in VIDEO_SUFFIXES + PICTURE_SUFFIXES:
                videos.append(TarVideo(name=name, path=path, start=member.offset_data, num_bytes=member.size))


def _key(name: str) -> str:
    """`a.tar/b/c.d.mp4` and `a.tar/b/c.cls` are of the sample `a.tar/b/c`."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
