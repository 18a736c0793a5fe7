"""What the browser tests share: a served studio, a visitor, and what a visitor does and sees."""

import base64
import io
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image

from ardiff.demo.session import Session
from ardiff.demo.ui import build_demo, launch_arguments


PHASE = "document.documentElement.dataset.ardiffPhase"
STAGE, CONTROLS = "window.ardiffStudio.studio.stage", "window.ardiffStudio.studio.controls"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(pipeline, **others) -> Iterator[SimpleNamespace]:
    """The page on a free port; every iteration takes `site.delay` seconds longer, so that there is something to watch.

    `others`: further pipelines of the menu by name.
    """
    stream = pipeline.stream
    site = SimpleNamespace(pipeline=pipeline, delay=0.0)

    def slowly(*args, **arguments):
        for step in stream(*args, **arguments):
            time.sleep(site.delay)
            yield step

    pipeline.stream = slowly
    session = Session({"tiny": lambda: pipeline, **{name: lambda p=p: p for name, p in others.items()}}, warm_up=False)
    demo = build_demo(session).queue(max_size=20)
    port = free_port()
    demo.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **launch_arguments(session)
    )
    try:
        site.url, site.session = f"http://127.0.0.1:{port}/", session
        yield site
    finally:
        demo.close()
        session.close()
        pipeline.stream = stream


@contextmanager
def visit(browser, site, query: str = "", **options) -> Iterator:
    """A visitor's page. Anything on the console, any crash and any request off the machine fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(f"crash: {error}"))
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    allowed = (site.url, "data:", "blob:")
    page.on("request", lambda asked: None if asked.url.startswith(allowed) else trouble.append(asked.url))
    page.goto(site.url + query)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    # Until the page has been told what its link says, gradio takes back what is typed.
    page.wait_for_function(f"document.documentElement.dataset.ardiffOpened && {STAGE} && {PHASE} && {CONTROLS}")
    page.trouble = trouble
    yield page
    context.close()
    assert not trouble, trouble


def settle(page, *, length=6, steps=10, gap=5, seed=7) -> None:
    """Fill the controls until the page has taken them up: a field can lose what is typed in the moment that it appears."""
    from playwright.sync_api import TimeoutError as TakesTooLong

    if not page.locator("#ar-steps").is_visible():
        page.get_by_role("button", name="Steps and guidance").click()
    taken = "([frames, steps, gap]) => { const c = window.ardiffStudio.studio.controls; return c.frames === frames && c.steps === steps && c.gap === gap; }"
    end = time.monotonic() + 30
    while True:
        for name, value in (("steps", steps), ("length", length), ("gap", gap)):
            field = page.locator(f"#ar-{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
        page.locator("#ar-seed input").fill(str(seed))
        page.get_by_label("Keep").check()
        try:
            page.wait_for_function(taken, arg=[length, steps, gap], timeout=3_000)
            return
        except TakesTooLong:
            if time.monotonic() > end:
                raise


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def wait_for(page, phase: str) -> None:
    page.wait_for_function(f"{PHASE} === '{phase}'", timeout=30_000)


def wait_for_run(page) -> None:
    """Until a run that was just asked for is over: the result of the run before is not taken for it."""
    page.wait_for_function(f"{PHASE} !== 'done'")
    wait_for(page, "done")


def clear_files(page) -> None:
    page.locator("#ar-files").get_by_role("button", name="Clear").click()
    page.wait_for_function(
        "!document.querySelector('.ar-given li') && !document.querySelector('.ar-caption').textContent"
    )
    page.wait_for_function("window.ardiffStudio.studio.controls.prompts === 0")


def shown_frames(page) -> np.ndarray:
    """Finished frames as the page has them: lossless, so they can be compared bit by bit."""
    pictures = page.evaluate(f"{STAGE}.value.pics.slice(0, {STAGE}.value.finished)")
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in pictures])


def expected(site, **arguments) -> np.ndarray:
    seed = arguments.pop("seed")
    generator = torch.Generator("cpu").manual_seed(seed)
    arguments = {"num_frames": 6, "num_inference_steps": 10, "guidance_scale": 2.0} | arguments
    video = site.pipeline(**arguments, generator=generator, output_type="np").frames[0]
    return np.rint(255 * video).astype(np.uint8)


def downloaded(page) -> tuple[str, str, int]:
    with page.expect_download() as caught:
        page.locator("#ar-mp4").click()
    with av.open(str(caught.value.path())) as container:
        context = container.streams.video[0].codec_context
        return context.name, context.pix_fmt, sum(1 for _ in container.decode(video=0))


def command(page) -> str:
    open_share(page)
    return page.locator(".ar-command").input_value()


def open_share(page) -> None:
    if not page.locator(".ar-command").is_visible():
        page.get_by_role("button", name="Link and command").click()
        page.locator(".ar-command").wait_for()
