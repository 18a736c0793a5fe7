"""Hostile use of the studio over HTTP: every input gets a clear refusal or a right result, and nothing is left behind."""

import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import av
import httpx
import numpy as np
import psutil
import pytest
from hostile import ARGUMENTS, INTERNAL, KINDS, Input, Outcome, Visitor, bombs, make_media, prompted
from PIL import Image

from ardiff.demo import decoder
from ardiff.demo.presets import GenerationRequest
from ardiff.demo.ui import launch
from ardiff.serving.limits import Limits


LIMITS = Limits(upload_megabytes=1, disk_megabytes=16, upload_seconds=30, queue=8, run_seconds=20, runs_per_visitor=4)
SHARES = {
    "values": 30, "files": 25, "paths": 15, "page": 15, "settings": 8, "bodies": 8, "order": 8, "leaving": 6, "bomb": 3,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """Every file that this process opens while it is on: (path, written)."""

    def __init__(self) -> None:
        self.on, self.opened = False, set()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.on and event == "open" and isinstance(args[0], str | bytes):
            self.opened.add((os.fsdecode(args[0]), bool((args[2] or 0) & WRITES)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Folders of the test: where the server's temporary files go, and what lies outside."""
    folder = tmp_path_factory.mktemp("hostile")
    inside, outside = folder / "inside", folder / "outside"
    inside.mkdir()
    outside.mkdir()
    before = tempfile.tempdir
    tempfile.tempdir = str(inside)
    yield SimpleNamespace(inside=inside, outside=outside)
    tempfile.tempdir = before


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def site(home, watch, tiny_pipeline, monkeypatch) -> Iterator[SimpleNamespace]:
    """A served studio, with secrets beside it and a machine of its own network that must not be asked for anything."""
    monkeypatch.chdir(home.outside)
    tiny_pipeline.save_pretrained(home.outside / "tiny")
    Image.new("RGB", (32, 32), "red").save(home.outside / "secret.png")
    (home.outside / "secret.txt").write_text("SECRET")
    asked = []

    class Spy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    spy = ThreadingHTTPServer(("127.0.0.1", 0), Spy)
    threading.Thread(target=spy.serve_forever, daemon=True).start()
    demo, session = launch(
        models=[home.outside / "tiny"], device="cpu", limits=LIMITS, port=None, prevent_thread_lock=True, quiet=True
    )
    link = session.store.uploads / "link.png"
    link.symlink_to(home.outside / "secret.png")
    functions = [
        SimpleNamespace(index=index, inputs=len(function.inputs), name=function.name)
        for index, function in demo.fns.items()
        if function.fn is not None
    ]
    named = {function.name: function.index for function in functions}
    controls = [session.models.names[0], "no scene", "", 4, 1, "even", 4, "", 5, 1, 3]
    site = SimpleNamespace(
        session=session, url=demo.local_url, limits=LIMITS, uploads=session.store.uploads, link=link, functions=functions,
        secrets=[home.outside / "secret.png", home.outside / "secret.txt"], spy=f"http://127.0.0.1:{spy.server_port}",
        asked=asked, media=make_media(), bombs=bombs(), settings=json.dumps(GenerationRequest(num_frames=5).settings()),
        recorded={
            function.index: [None, None, None, True, 1, *controls]
            for function in functions
            if function.inputs == 5 + len(controls)
        },
        model=session.models.names[0], reader=named["read_files"], stopper=named["stop"], recoverer=named["recover"],
    )  # fmt: skip
    assert len(site.recorded) == 3
    watch.opened.clear()
    watch.on = True
    yield site
    watch.on = False
    demo.close()
    session.close()
    spy.shutdown()
    spy.server_close()


def idle(site: SimpleNamespace) -> bool:
    return not site.session._live and not site.session._waiting and not site.session._running


def until_idle(site: SimpleNamespace) -> None:
    end = time.monotonic() + 30
    while not idle(site):
        assert time.monotonic() < end, "a run that nobody waits for goes on"
        time.sleep(0.02)


def check(given: Input, outcome: Outcome) -> None:
    """A clear refusal, or a right result."""
    if outcome.kind == "refused":
        assert outcome.status < 500, (given.name, outcome)
        # A path that is not in its plainest form is sent on to that form, without a word.
        assert outcome.status // 100 == 3 or outcome.words.strip() not in ("", "None", "null"), (given.name, outcome)
        # gradio's example loader names what it expected and what came, and below that the error.
        words = outcome.words.split("Original error:")[0]
        assert not [word for word in INTERNAL if word in words], (given.name, outcome)
    if outcome.kind == "result" and given.valid is not None:
        file, told = outcome.data
        asked = given.valid
        for name in ("num_frames", "num_inference_steps", "seed", "guidance_scale"):
            assert told[name] == asked[name], (given.name, told)
        with av.open(file["path"]) as container:
            assert sum(1 for _ in container.decode(video=0)) == told["num_frames"] == told["finished_frames"]


def right(site: SimpleNamespace, visitor: Visitor) -> None:
    """The server still gives the pipeline's very frames."""
    file, told = visitor.call("generate", {**ARGUMENTS, "num_frames": 6, "seed": 11}).data
    run_id = next(
        path for path in site.session.store.runs.iterdir() if '"seed": 11' in (path / "settings.json").read_text()
    )
    request = GenerationRequest(num_frames=6, ar_step=1, num_inference_steps=5, guidance_scale=1.0, seed=11)
    arguments = site.session.arguments(request)
    video = site.session._on_worker(lambda: site.session.first.pipeline(**arguments, output_type="np").frames[0])
    kept = np.stack([np.asarray(Image.open(path)) for path in sorted(run_id.glob("frame-*.png"))])
    np.testing.assert_array_equal(kept, np.rint(255 * video).astype(np.uint8))


def attack(site: SimpleNamespace, count: int, seed: int) -> Counter:
    """Send `count` inputs drawn from `seed`; what became of them, by kind."""
    rng, visitor, became, wrong = random.Random(seed), Visitor(site.url), Counter(), []
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    for kind in kinds:
        given = KINDS[kind](rng, site)
        try:
            outcome = given.act(visitor)
            check(given, outcome)
        except (AssertionError, httpx.HTTPError) as error:
            wrong.append(f"{given.name}: {error!r:.600}")
            continue
        became[kind, outcome.kind] += 1
        if outcome.kind != "left":
            continue
        until_idle(site)
    assert not wrong, "\n".join(wrong)
    return became


def holds(site: SimpleNamespace, home: SimpleNamespace, watch: Watch) -> None:
    """What must be so after an attack."""
    visitor = Visitor(site.url)
    until_idle(site)
    assert visitor.http.get("/healthz").json()["status"] == "ok"
    right(site, visitor)
    assert prompted(visitor, "pickle.png", site.media["bad-pickle.png"]).kind == "refused"
    assert {path.name for path in home.outside.iterdir()} == {"tiny", "secret.png", "secret.txt"}
    assert site.asked == []
    assert len(site.session.decoder._idle) <= decoder.PROCESSES
    watch.on = False
    written = {path for path, write in watch.opened if write and not path.startswith((str(home.inside), "/dev/null"))}
    assert written == set()
    assert not [path for path, _ in watch.opened if "secret" in path]
    used = sum(path.lstat().st_size for path in home.inside.rglob("*") if path.is_file())
    assert used < 1.25 * site.limits.disk_bytes


def test_a_sample_of_what_is_sent(site, home, watch):
    became = attack(site, 60, seed=1)
    assert sum(count for (_, outcome), count in became.items() if outcome == "refused") > 20
    assert sum(count for (_, outcome), count in became.items() if outcome == "result") > 2
    holds(site, home, watch)


@pytest.mark.slow
def test_everything_that_is_sent(site, home, watch, capsys):
    attack(site, 100, seed=2)
    gc.collect()
    process, begun = psutil.Process(), time.monotonic()
    threads, memory, files = process.num_threads(), process.memory_info().rss, process.num_fds()
    became = attack(site, 1000, seed=3)
    holds(site, home, watch)
    gc.collect()
    grown = process.memory_info().rss - memory
    used = sum(path.lstat().st_size for path in home.inside.rglob("*") if path.is_file())
    with capsys.disabled():
        sys.stdout.write(f"\n{sum(became.values())} inputs in {time.monotonic() - begun:.0f} s: {dict(became)}\n")
        sys.stdout.write(
            f"memory {grown / 2**20:+.1f} MB, disk {used / 2**20:.1f} MB, threads {threads} to {process.num_threads()}\n"
        )
    assert {kind for kind, _ in became} == set(KINDS)
    assert grown < 100 * 2**20
    assert process.num_threads() <= threads + 10
    assert process.num_fds() <= files + 20
