"""The studio as a host runs it: limits in the page, health, figures, accounts, bounds on what is sent; over HTTP."""

import logging
import os
import socket

import httpx
import numpy as np
import pytest
from hostile import ARGUMENTS, Visitor, file_data
from PIL import Image

from ardiff.data.video import write_video
from ardiff.demo.decoder import Decoder
from ardiff.demo.models import choose_models
from ardiff.demo.ui import build_demo, launch
from ardiff.serving.limits import Limits, read_accounts
from ardiff.serving.metrics import CONTENT_TYPE, JsonFormatter, log_as_json


LIMITS = Limits(
    frames=12, steps=20, prompt_frames=2, samples=2, upload_megabytes=1, disk_megabytes=8, upload_seconds=3
)


@pytest.fixture
def site(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    demo, session = launch(
        models=[tmp_path / "tiny"],
        device="cpu",
        limits=LIMITS,
        accounts="ada:secret\ngrace:other:word\n",
        port=None,
        prevent_thread_lock=True,
        quiet=True,
    )
    session.url, session.demo = demo.local_url, demo
    yield session
    demo.close()
    session.close()


def sign_in(url: str, user: str, password: str) -> Visitor:
    visitor = Visitor(url)
    visitor.signed = visitor.http.post("/login", data={"username": user, "password": password})
    return visitor


def test_a_host_asks_after_it_and_visitors_sign_in(site):
    stranger = Visitor(site.url)
    assert stranger.http.get("/healthz").json()["status"] == "ok"
    assert stranger.call("generate", ARGUMENTS).status == 401
    assert stranger.http.get("/gradio_api/info").status_code == 401
    assert sign_in(site.url, "ada", "wrong").signed.status_code == 400
    visitor = sign_in(site.url, "grace", "other:word")
    assert visitor.call("generate", ARGUMENTS).kind == "result"
    told = visitor.http.get("/metrics")
    assert told.headers["content-type"] == CONTENT_TYPE
    assert 'ardiff_runs_ended_total{outcome="finished"} 1\n' in told.text
    assert "ardiff_model_calls_total 8\n" in told.text
    assert visitor.call("generate", {**ARGUMENTS, "num_frames": 13}).words.endswith("from 4 to 12, got 13.")
    assert visitor.call("generate", {**ARGUMENTS, "num_frames": 4.5}).words.endswith("got 4.5.")
    assert "ardiff_runs_refused_total" in visitor.http.get("/metrics").text


def test_what_is_sent_is_bounded(site):
    visitor = sign_in(site.url, "ada", "secret")
    cookies = dict(visitor.http.cookies)
    address = f"{site.url.rstrip('/')}/gradio_api"
    # Two files of a prompt and 1 MB around them.
    length = 2 * LIMITS.upload_bytes + 2**20 + 1
    port = int(site.url.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as sender:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        sender.sendall(head.encode())
        assert b" 413 " in sender.recv(1000)
    big = {"files": ("a.png", os.urandom(LIMITS.upload_bytes + 1))}
    assert httpx.post(f"{address}/upload", files=big, cookies=cookies).status_code == 413
    body = b'{"data": ["' + b"x" * 17 * 2**20 + b'"]}'
    assert httpx.post(f"{address}/call/generate", content=body, cookies=cookies).status_code == 413
    for _ in range(12):
        fine = {"files": ("a.png", os.urandom(LIMITS.upload_bytes - 1000))}
        assert httpx.post(f"{address}/upload", files=fine, cookies=cookies).status_code == 200
    kept = sum(path.stat().st_size for path in site.store.uploads.rglob("a.png"))
    assert 6 * 2**20 < kept <= LIMITS.disk_bytes + LIMITS.upload_bytes
    assert not visitor.http.get(f"/gradio_api/file={site.store.runs}").is_success


def test_the_page_offers_what_is_allowed(site):
    controls = {block.elem_id: block for block in site.demo.blocks.values() if getattr(block, "elem_id", None)}
    told = {
        name: (controls[f"ar-{name}"].minimum, controls[f"ar-{name}"].maximum)
        for name in ("length", "steps", "samples")
    }
    assert told == {"length": (4, 12), "steps": (5, 20), "samples": (1, 2)}
    assert controls["ar-length"].value == 12
    assert site.demo.delete_cache == (600, 3600)
    assert site.demo.max_file_size == LIMITS.upload_bytes
    assert str(site.store.uploads) == os.environ["GRADIO_TEMP_DIR"]
    assert site.store._of_the_page  # the examples
    assert isinstance(build_demo(site).blocks, dict)


def test_models_beyond_the_first_are_those_that_are_allowed():
    assert choose_models(["/srv/a", "me/b"], Limits(models=("me/*",))) == {"a": "/srv/a", "me/b": "me/b"}
    with pytest.raises(
        ValueError, match=r"what the limits allow \(nothing\), but has b; ARDIFF_LIMIT_MODELS sets that"
    ):
        choose_models(["a", "b"], Limits())
    assert choose_models(None, Limits()) == {"scenes-64": "scenes-64"}
    with pytest.raises(ValueError, match="must name models that differ"):
        choose_models(["/srv/a", "/mnt/a"], Limits(models=("*",)))


def test_accounts_are_read_and_never_told():
    assert read_accounts("ada: x \n\n  grace:a:b\n") == [("ada", " x"), ("grace", "a:b")]
    for text in ("", "hunter2", "ada:\nhunter2", ":hunter2"):
        with pytest.raises(ValueError, match="lines of user:password") as refused:
            read_accounts(text)
        assert "hunter2" not in str(refused.value)


def test_the_log_is_json_when_asked(capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log_as_json()
        assert isinstance(root.handlers[0].formatter, JsonFormatter)
        logging.getLogger("ardiff.demo").info("here", extra={"run": "0123456789"})
        logging.getLogger("httpx").info("not here")
        assert capsys.readouterr().err.count('"run": "01234567"') == 1
    finally:
        root.handlers[:], root.level = before
        logging.getLogger("ardiff").setLevel(logging.NOTSET)


@pytest.fixture
def decoder():
    decoder = Decoder(Limits(upload_seconds=5, pixels=1_000_000))
    yield decoder
    decoder.close()


def picture(path, width=32, height=24):
    Image.new("RGB", (width, height), "red").save(path)
    return path


def test_a_decoding_process_stays_and_is_replaced_when_it_dies(decoder, tmp_path):
    def read():
        return decoder.prompt([picture(tmp_path / "a.png")], 16, start=0, stride=1, count=1).frames

    assert read().shape == (1, 16, 16, 3)
    process = decoder._idle[0]
    np.testing.assert_array_equal(read(), np.full((1, 16, 16, 3), (255, 0, 0)))
    assert decoder._idle == [process]
    process._child.kill()
    process._child.wait()
    assert read().shape == (1, 16, 16, 3)
    assert decoder._idle != [process]


def test_a_file_that_takes_too_long_ends_the_process_and_not_the_server(decoder, tmp_path):
    write_video(np.zeros((20, 64, 64, 3), np.uint8), tmp_path / "long.mp4", fps=8)

    def read(name):
        return decoder.prompt([tmp_path / name], 16, start=0, stride=1, count=1).frames.shape

    picture(tmp_path / "a.png")
    read("a.png")
    decoder._idle[0]._seconds = 1e-4
    with pytest.raises(ValueError, match="more memory or time to read than is allowed"):
        read("long.mp4")
    assert decoder._idle == []
    assert read("long.mp4") == read("a.png") == (1, 16, 16, 3)


def test_the_process_has_no_secrets_and_takes_bounded_memory(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    decoder.prompt([picture(tmp_path / "a.png")], 16, start=0, stride=1, count=1)
    pid = decoder._idle[0]._child.pid
    with open(f"/proc/{pid}/environ", "rb") as environment:
        assert b"hf_secret" not in environment.read()
    with open(f"/proc/{pid}/limits") as limits:
        bounds = {line[:26].strip(): line[26:47].strip() for line in limits}
    assert int(bounds["Max address space"]) < 2**30
    assert bounds["Max file size"] == "0"
    assert int(bounds["Max cpu time"]) <= 14
    with pytest.raises(ValueError, match="must have at most 1 megapixels but has 1.0"):
        decoder.prompt([picture(tmp_path / "b.png", 1001, 1000)], 16, start=0, stride=1, count=1)


def test_only_files_themselves_are_read(decoder, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("link.png", "pipe.png", "folder.png", "missing.png", "nul\x00.png"):
        with pytest.raises(ValueError, match="is not a file"):
            decoder.prompt([tmp_path / name], 16, start=0, stride=1, count=1)
    with pytest.raises(ValueError, match="is not a file"):
        decoder.settings(tmp_path / "link.png")


def test_a_prompt_over_http_is_the_file_itself(site, tmp_path):
    visitor = sign_in(site.url, "ada", "secret")
    picture(tmp_path / "a.png")
    answer = visitor.http.post("/gradio_api/upload", files={"files": ("a.png", (tmp_path / "a.png").read_bytes())})
    outcome = visitor.call("generate", {**ARGUMENTS, "prompt": [file_data(answer.json()[0])]})
    assert outcome.kind == "result"
    assert len(outcome.data[1]["prompt"]["frames"]) == 1
