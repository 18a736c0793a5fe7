"""The page in a real browser: what a visitor sees and does, from Generate to the MP4."""

import base64
import io
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import ardiff
from ardiff import ARDiffPipeline
from ardiff.demo.session import Session
from ardiff.demo.ui import build_demo, launch, launch_arguments


# Gradio and its web server are not ours to silence: their own deprecations are no failure of the page.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

PHASE = "document.documentElement.dataset.ardiffPhase"
STAGE = "window.ardiffStudio.studio.stage"
# Every look of the third tile, taken down in the page whenever its words change.
WATCH_TILE = """() => {
    const tile = document.querySelectorAll(".ar-tile")[2], [canvas, , word] = tile.children;
    window.seen = { looks: [], words: [] };
    new MutationObserver(() => {
        window.seen.looks.push(canvas.toDataURL());
        window.seen.words.push(word.textContent);
    }).observe(word, { childList: true });
}"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(pipeline) -> Iterator[SimpleNamespace]:
    """The page on a free port; every iteration takes `site.delay` seconds longer, so that there is something to watch."""
    stream = pipeline.stream
    site = SimpleNamespace(pipeline=pipeline, delay=0.0)

    def slowly(*args, **arguments):
        for step in stream(*args, **arguments):
            time.sleep(site.delay)
            yield step

    pipeline.stream = slowly
    session = Session(pipeline, name="tiny", warm_up=False)
    demo = build_demo(session).queue(max_size=20)
    port = free_port()
    demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **launch_arguments())
    try:
        site.url, site.session = f"http://127.0.0.1:{port}/", session
        yield site
    finally:
        demo.close()
        session.close()
        pipeline.stream = stream


@pytest.fixture(scope="module")
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def site(browser, opened, tiny_pipeline) -> SimpleNamespace:
    """One server for all tests of this file."""
    if not hasattr(opened, "site"):
        opened.site = opened.enter_context(serve(tiny_pipeline))
    opened.site.delay = 0.03
    return opened.site


@pytest.fixture
def page(browser, opened, site) -> Iterator:
    """One visitor for all tests of this file that need no page of their own: loading a page is what takes the time."""
    if not hasattr(opened, "page"):
        opened.page = opened.enter_context(visit(browser, site))
    yield opened.page
    assert not opened.page.trouble


@contextmanager
def visit(browser, site, **options) -> Iterator:
    """A visitor's page. Anything on the console, any crash and any request off the machine fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(f"crash: {error}"))
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    allowed = (site.url, "data:", "blob:")
    page.on("request", lambda asked: None if asked.url.startswith(allowed) else trouble.append(asked.url))
    page.goto(site.url)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    page.wait_for_function(f"window.ardiffStudio && {STAGE} && {PHASE} === 'idle'")
    page.trouble = trouble
    yield page
    context.close()
    assert not trouble


def settle(page, *, length=6, steps=10, gap=5, seed=7) -> None:
    """Fill the controls and wait until the page has taken them up."""
    if not page.locator("#ar-steps").is_visible():
        page.get_by_role("button", name="Steps and guidance").click()
    for name, value in (("steps", steps), ("length", length), ("gap", gap)):
        field = page.locator(f"#ar-{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")
    page.locator("#ar-seed input").fill(str(seed))
    if not page.get_by_label("Keep").is_checked():
        page.get_by_label("Keep").check()
    page.wait_for_function(
        "([frames, steps, gap]) => { const c = window.ardiffStudio.studio.controls;"
        " return c.frames === frames && c.steps === steps && c.gap === gap; }",
        arg=[length, steps, gap],
    )


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
    page.locator("#ar-prompt-strip p").wait_for(state="detached")
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


@pytest.mark.parametrize("gap", [0, 5, 10])
def test_generate(page, site, gap):
    settle(page, gap=gap)
    site.delay = 1.5 / (10 + 5 * gap)
    page.evaluate(WATCH_TILE)
    press(page, "Generate")
    wait_for_run(page)
    seen = page.evaluate("window.seen")
    assert len(set(seen["looks"])) >= 3, seen["words"]
    assert len({word for word in seen["words"] if word.endswith("%")}) >= 2, seen["words"]
    assert page.locator(".ar-word").all_inner_texts() == ["done"] * 6
    scene = [site.session.scenes[0]]
    np.testing.assert_array_equal(shown_frames(page), expected(site, ar_step=gap, seed=7, class_labels=scene))
    assert downloaded(page) == ("h264", "yuv420p", 6)
    assert page.locator(".ar-bar").get_attribute("aria-valuenow") == "100"
    assert page.locator(".ar-f-seed").inner_text() == page.locator("#ar-seed input").input_value() == "7"


def test_stop_keeps_what_is_finished_and_the_page_goes_on(page, site):
    settle(page, length=12, gap=10)
    site.delay = 0.1
    press(page, "Generate")
    page.wait_for_function(f"{PHASE} === 'running' && {STAGE}.finished >= 3")
    press(page, "Stop and keep")
    wait_for(page, "done")
    frames = shown_frames(page)
    assert 3 <= len(frames) < 12
    scene = [site.session.scenes[0]]
    whole = expected(site, num_frames=12, ar_step=10, seed=7, class_labels=scene)
    np.testing.assert_array_equal(frames, whole[: len(frames)])
    assert downloaded(page) == ("h264", "yuv420p", len(frames))
    page.get_by_label("Keep").uncheck()
    press(page, "Generate")
    page.wait_for_function("document.querySelector('#ar-seed input').value !== '7'")
    press(page, "Stop and keep")
    wait_for(page, "done")
    assert page.locator("#ar-seed input").input_value() == page.locator(".ar-f-seed").inner_text()


def test_prompt_from_a_picture(page, site, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    settle(page)
    page.locator("#ar-files input[type=file]").set_input_files(tmp_path / "first.png")
    page.locator(".ar-prompt img").wait_for()
    page.wait_for_function("window.ardiffStudio.studio.controls.prompts === 1")
    press(page, "Generate")
    wait_for_run(page)
    assert page.locator(".ar-word").all_inner_texts()[:2] == ["P1", "done"]
    scene = [site.session.scenes[0]]
    frames = expected(site, ar_step=5, seed=7, class_labels=scene, prompt_frames=[picture])
    np.testing.assert_array_equal(shown_frames(page), frames)
    clear_files(page)


def test_bad_input_is_told_in_a_sentence_and_the_page_goes_on(page, site, tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.mp4").touch()
    settle(page)
    for name, words in (("notes.txt", "neither a picture"), ("empty.mp4", "is empty")):
        page.locator("#ar-files input[type=file]").set_input_files(tmp_path / name)
        page.locator("#ar-prompt-strip p", has_text=words).wait_for()
        press(page, "Generate")
        page.locator(".ar-message", has_text=words).wait_for()
        clear_files(page)
    press(page, "Generate")
    wait_for_run(page)
    assert len(shown_frames(page)) == 6


def test_fewer_steps_lower_the_gap_and_its_end(page):
    settle(page, steps=20, gap=20)
    page.locator("#ar-steps input[type=range]").fill("10")
    page.wait_for_function("window.ardiffStudio.studio.controls.gap === 10")
    page.wait_for_function("document.querySelector('#ar-gap input[type=range]').max === '10'")
    assert page.locator(".ar-high").inner_text() == "10: one after another"


def test_the_plan_is_drawn_without_a_request(page):
    settle(page, steps=50)
    page.wait_for_timeout(500)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    drawn = set()
    for gap in (0, 3, 20, 50):
        page.locator("#ar-gap input[type=range]").fill(str(gap))
        page.wait_for_function(f"window.ardiffStudio.studio.controls.gap === {gap}")
        drawn.add(page.evaluate("document.querySelector('.ar-plan canvas').toDataURL()"))
    page.locator("#ar-length input[type=range]").fill("64")
    press(page, "Together")
    page.locator(".ar-sentence", has_text="a gap of at least 4").wait_for()
    assert len(drawn) == 4
    assert not asked


def test_two_visitors_never_see_each_other_and_leaving_frees_the_model(page, browser, site):
    # Long enough for the second page to load meanwhile.
    settle(page, length=24, gap=10, seed=1)
    site.delay = 0.08
    press(page, "Generate")
    page.wait_for_function(f"{PHASE} === 'running' && {STAGE}.finished >= 1")
    with visit(browser, site) as other:
        settle(other, length=6, seed=2)
        press(other, "Generate")
        other.locator(".ar-message", has_text="one run is before yours").wait_for()
        site.delay = 0.0
        for visitor, length, gap, seed in ((page, 24, 10, 1), (other, 6, 5, 2)):
            wait_for(visitor, "done")
            scene = [site.session.scenes[0]]
            frames = expected(site, num_frames=length, ar_step=gap, seed=seed, class_labels=scene)
            np.testing.assert_array_equal(shown_frames(visitor), frames)
        settle(other, length=40, gap=10)
        site.delay = 0.1
        press(other, "Generate")
        other.wait_for_function(f"{PHASE} === 'running'")
    end = time.monotonic() + 10
    while site.session._running is not None:
        assert time.monotonic() < end, "the run goes on for nobody"
        time.sleep(0.05)


def test_phone(browser, site):
    size = {"width": 390, "height": 844}
    with visit(browser, site, viewport=size, color_scheme="dark", reduced_motion="reduce") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("Generate", "Stop and keep"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert 0 <= box["y"]
            assert box["y"] + box["height"] <= 844
            assert box["height"] >= 44
        assert page.locator(".ar-play").get_attribute("aria-label") == "Play"
        settle(page, length=4)
        page.locator("#ar-seed").scroll_into_view_if_needed()
        assert page.locator("#ar-stage").bounding_box()["y"] < -100
        press(page, "Generate")
        page.wait_for_function("Math.abs(document.getElementById('ar-stage').getBoundingClientRect().top) < 40")
        wait_for(page, "done")


def test_endpoint(site):
    client = pytest.importorskip("gradio_client").Client(site.url, verbose=False)
    video, settings = client.predict(num_frames=4, num_inference_steps=5, ar_step=1, seed=9, api_name="/generate")
    with av.open(video) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4
    assert settings["seed"] == 9
    assert settings["scene"] == site.session.scenes[0]
    with pytest.raises(Exception, match="whole number from 0 to 5"):
        client.predict(num_inference_steps=5, ar_step=6, api_name="/generate")
    assert client.predict(api_name="/generate")[1]["num_frames"] == 16


def test_launch_serves_a_model_folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "mine")
    demo, session = launch(
        model=tmp_path / "mine", device="cpu", port=free_port(), prevent_thread_lock=True, quiet=True
    )
    try:
        with urllib.request.urlopen(demo.local_url) as answer:
            page = answer.read().decode()
        assert answer.status == 200
        assert "ardiffStudio" in page
        assert session.name == "mine"
        assert session.scenes == tiny_pipeline.class_names
    finally:
        demo.close()
        session.close()


def test_bundled_model(browser):
    try:
        folder = ardiff.bundled_model()
    except ValueError:
        pytest.skip("there is no bundled model yet")
    pipeline = ARDiffPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with serve(pipeline) as site, visit(browser, site) as page:
        settle(page, length=4, steps=5, gap=2)
        press(page, "Generate")
        wait_for_run(page)
        scene = [site.session.scenes[0]]
        frames = expected(site, num_frames=4, num_inference_steps=5, ar_step=2, seed=7, class_labels=scene)
        np.testing.assert_array_equal(shown_frames(page), frames)
