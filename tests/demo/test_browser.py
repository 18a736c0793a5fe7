"""The page in a real browser: what a visitor sees and does, from Generate to the MP4."""

import time
import urllib.request

import av
import numpy as np
import pytest
import torch
from PIL import Image
from studio_page import (
    PHASE,
    STAGE,
    clear_files,
    downloaded,
    expected,
    free_port,
    press,
    serve,
    settle,
    shown_frames,
    visit,
    wait_for,
    wait_for_run,
)

import ardiff
from ardiff import ARDiffPipeline
from ardiff.demo.presets import OPENING_SCENE
from ardiff.demo.ui import launch


# Every look of the third tile, taken down in the page whenever its words change.
WATCH_TILE = """() => {
    window.seen = { looks: [], words: [] };
    new MutationObserver(() => {
        const [canvas, , word] = document.querySelectorAll(".ar-tile")[2].children;
        if (word.textContent === window.seen.words.at(-1)) return;
        window.seen.looks.push(canvas.toDataURL());
        window.seen.words.push(word.textContent);
    }).observe(document.querySelector(".ar-strip"), { childList: true, subtree: true });
}"""


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
    scene = [OPENING_SCENE]
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
    scene, site.delay = [OPENING_SCENE], 0.0
    whole = expected(site, num_frames=12, ar_step=10, seed=7, class_labels=scene)
    np.testing.assert_array_equal(frames, whole[: len(frames)])
    site.delay = 0.1
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
    page.locator(".ar-prompt .ar-seen").wait_for()
    page.wait_for_function("window.ardiffStudio.studio.controls.prompts === 1")
    press(page, "Generate")
    wait_for_run(page)
    assert page.locator(".ar-word").all_inner_texts()[:2] == ["P1", "done"]
    scene = [OPENING_SCENE]
    frames = expected(site, ar_step=5, seed=7, class_labels=scene, prompt_frames=[picture])
    np.testing.assert_array_equal(shown_frames(page), frames)
    clear_files(page)


def test_bad_input_is_told_in_a_sentence_and_the_page_goes_on(page, site, tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.mp4").touch()
    settle(page)
    for name, words in (("notes.txt", "neither a picture"), ("empty.mp4", "is empty")):
        page.locator("#ar-files input[type=file]").set_input_files(tmp_path / name)
        page.locator(".ar-caption", has_text=words).wait_for()
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


def test_more_steps_than_the_page_begins_with_allow_as_large_a_gap(page, site):
    site.delay = 0.0
    settle(page, length=4, steps=60, gap=60)
    press(page, "Generate")
    wait_for_run(page)
    assert len(shown_frames(page)) == 4


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
            scene = [OPENING_SCENE]
            frames = expected(site, num_frames=length, ar_step=gap, seed=seed, class_labels=scene)
            np.testing.assert_array_equal(shown_frames(visitor), frames)
        settle(other, length=40, gap=10)
        site.delay = 0.1
        press(other, "Generate")
        other.wait_for_function(f"{PHASE} === 'running'")
    end = time.monotonic() + 10
    while site.session._running:
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
    assert settings["scene"] == OPENING_SCENE
    with pytest.raises(Exception, match="whole number from 0 to 5"):
        client.predict(num_inference_steps=5, ar_step=6, api_name="/generate")
    assert client.predict(api_name="/generate")[1]["num_frames"] == 16


def test_launch_serves_a_model_folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "mine")
    demo, session = launch(
        models=[tmp_path / "mine"], device="cpu", port=free_port(), prevent_thread_lock=True, quiet=True
    )
    try:
        with urllib.request.urlopen(demo.local_url) as answer:
            page = answer.read().decode()
        assert answer.status == 200
        assert "ardiffStudio" in page
        assert session.models.names == ("mine",)
        assert session.first.scenes == tiny_pipeline.class_names
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
        scene = [OPENING_SCENE]
        frames = expected(site, num_frames=4, num_inference_steps=5, ar_step=2, seed=7, class_labels=scene)
        np.testing.assert_array_equal(shown_frames(page), frames)
