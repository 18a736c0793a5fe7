"""The cache gives the tokens and clips that encoding gives, survives an interruption, and tells when it is damaged."""

import json
import time

import pytest
import torch

from ardiff import AutoencoderARVAE, cli
from ardiff.data.benchmarks import open_set
from ardiff.data.clips import VideoClips
from ardiff.data.latents import INDEX, LatentClips, cache_latents, check_autoencoder, read_index, verify_cache
from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import render
from ardiff.data.video import write_video


LENGTHS = {"balls/a.gif": 7, "balls/b.gif": 5, "clouds/c.gif": 6}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for seed, (name, length) in enumerate(LENGTHS.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(render(name.split("/")[0], length, 32, seed), folder / name)
    (folder / "clouds" / "empty.mp4").touch()
    return folder


def make(videos, vae, out, **arguments):
    return cache_latents(str(videos), vae, out, progress=False, batch_size=4, **arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_clips_of_the_cache_are_the_encoded_clips_of_the_videos(videos, tiny_vae, tmp_path, dtype, tolerance):
    index = make(videos, tiny_vae, tmp_path / "cache", dtype=dtype)
    assert {video["name"]: video["num_frames"] for video in index["videos"]} == LENGTHS
    assert list(index["left_out"]) == ["clouds/empty.mp4"]
    (videos / "clouds" / "empty.mp4").unlink()  # the same videos in both, so the same draws
    found = open_set(str(videos))
    plain = VideoClips(found.videos, found.class_names, 3, num_frames=2, size=32, seed=4, stride=2)
    cached = LatentClips(tmp_path / "cache", 3, num_frames=2, seed=4, stride=2)
    assert cached.class_names == ("balls", "clouds")
    for step in range(4):
        (frames, labels), (latents, cached_labels) = plain[step], cached[step]
        with torch.no_grad():
            expected = tiny_vae.encode(to_pixels(frames)).mode()
        torch.testing.assert_close(latents, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(labels, cached_labels)


def test_an_interrupted_cache_goes_on_and_ends_the_same(videos, tiny_vae, tmp_path, monkeypatch):
    whole = make(videos, tiny_vae, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr("ardiff.data.latents.os.replace", stopping_after(3))  # probe, first shard, its index
    with pytest.raises(KeyboardInterrupt):
        make_small_shards(videos, tiny_vae, tmp_path / "cache", monkeypatch)
    monkeypatch.undo()
    begun = read_index(tmp_path / "cache")
    assert ([video["name"] for video in begun["videos"]], begun["complete"]) == (["balls/a.gif"], False)
    assert verify_cache(tmp_path / "cache") == [
        f"{tmp_path / 'cache'} is not complete: run the same `ardiff cache-latents` again."
    ]
    with pytest.raises(ValueError, match="must be a complete cache"):
        LatentClips(tmp_path / "cache", 1, 2, seed=0)
    before = (tmp_path / "cache" / "latents-00000.safetensors").stat().st_mtime_ns
    time.sleep(0.01)
    make_small_shards(videos, tiny_vae, tmp_path / "cache", monkeypatch)
    assert (tmp_path / "cache" / "latents-00000.safetensors").stat().st_mtime_ns == before  # not made again
    ended = read_index(tmp_path / "cache")
    assert len(ended["shards"]) == 3
    assert [(v["name"], v["crc32"]) for v in ended["videos"]] == [(v["name"], v["crc32"]) for v in whole["videos"]]
    assert verify_cache(tmp_path / "cache") == []
    first, second = (LatentClips(tmp_path / name, 4, 3, seed=1)[0][0] for name in ("whole", "cache"))
    assert torch.equal(first, second)


def stopping_after(count):
    """os.replace, which is interrupted instead of done the time after `count`."""
    import os

    replace, done = os.replace, []

    def stop(source, target):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    return stop


def make_small_shards(videos, vae, out, monkeypatch):
    """Every video gets a shard of its own."""
    with monkeypatch.context() as patch:
        patch.setattr("ardiff.data.latents.MB", 1)
        return make(videos, vae, out, dtype="float32", shard_mb=1)


def test_damage_is_found_by_verify_and_by_training(videos, tiny_vae, tmp_path, capsys):
    cache = tmp_path / "cache"
    make(videos, tiny_vae, cache)
    assert cli.main(["cache-latents", "--verify", "--out", str(cache)]) == 0
    assert "3 videos in 1 files, all intact" in capsys.readouterr().out
    shard = cache / "latents-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert cli.main(["cache-latents", "--verify", "--out", str(cache)]) == 1
    assert "latents-00000.safetensors does not have the checksum" in capsys.readouterr().out
    clips = LatentClips(cache, 20, 3, seed=0)
    with pytest.raises(RuntimeError, match="is damaged at clouds/c.gif; make the cache again"):
        _ = clips[0]


def test_another_autoencoder_or_set_is_refused(videos, tiny_vae, tmp_path):
    make(videos, tiny_vae, tmp_path / "cache")
    check_autoencoder(tmp_path / "cache", tiny_vae.half().float())  # as it is exported
    with torch.no_grad():
        tiny_vae.to_moments.weight.mul_(1.1)
    with pytest.raises(ValueError, match="`vae` must be the autoencoder that .* was made with"):
        check_autoencoder(tmp_path / "cache", tiny_vae)
    with pytest.raises(ValueError, match="`vae` must be the autoencoder"):
        make(videos, tiny_vae, tmp_path / "cache")
    with pytest.raises(ValueError, match="has another `dtype`: float16, not float32"):
        make(videos, tiny_vae, tmp_path / "cache", dtype="float32")
    write_video(render("balls", 3, 32, 0), videos / "balls" / "new.gif")
    with pytest.raises(ValueError, match="has another `names_sha256`"):
        make(videos, tiny_vae, tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be one of float16, float32 but is 'int8'"),
        ({"shard_mb": 0}, "`shard_mb` must be at least 1 but is 0"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(videos, tiny_vae, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(videos, tiny_vae, tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="must be a folder that `ardiff cache-latents` wrote"):
        read_index(tmp_path)


def test_training_from_the_cache_is_training_from_the_videos(videos, tiny_vae, tmp_path):
    (videos / "clouds" / "empty.mp4").unlink()
    tiny_vae.save_pretrained(tmp_path / "vae")
    cache = ["cache-latents", str(videos), "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "cache")]
    assert cli.main([*cache, "--dtype", "float32", "--device", "cpu"]) == 0
    sizes = "--image-size 32 --width 32 --depth 1 --num-heads 2 --num-frames 4 --batch-size 2 --num-steps 3"
    others = "--log-every 1 --num-workers 0 --mixed-precision no --device cpu --sample-every 3"
    losses = []
    for data in (str(videos), f"latents:{tmp_path / 'cache'}"):
        out = tmp_path / f"run{len(losses)}"
        train = ["train", "--vae", str(tmp_path / "vae"), "--data", data, "--out", str(out)]
        assert cli.main([*train, *sizes.split(), *others.split()]) == 0
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
        assert AutoencoderARVAE.from_pretrained(out / "pipeline", subfolder="vae").num_tokens == 4
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (tmp_path / "cache" / INDEX).is_file()
