"""The studio beyond one run, in a real browser: drawn plans, prompts, rows, going on, keeping, links and coming back."""

import io
import json
import shlex
import zipfile

import av
import numpy as np
import pytest
from PIL import Image
from studio_page import (
    CONTROLS,
    PHASE,
    STAGE,
    clear_files,
    command,
    expected,
    open_share,
    press,
    settle,
    shown_frames,
    visit,
    wait_for,
    wait_for_run,
)

from ardiff.cli import build_parser
from ardiff.data.video import write_video
from ardiff.demo.presets import OPENING_SCENE


def choose(page, name: str, option: str) -> None:
    page.locator(f"#ar-{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def gaps(page) -> int | list[int]:
    return page.evaluate(f"{CONTROLS}.gaps")


def even(page) -> None:
    """Back to one gap for all frames."""
    press(page, "Together")
    page.wait_for_function(f"{CONTROLS}.profile === 'even'")


def give(page, *paths) -> None:
    page.locator("#ar-files input[type=file]").set_input_files(paths)


def pictures(tmp_path, count: int) -> list[np.ndarray]:
    made = list(np.random.default_rng(count).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8))
    for index, picture in enumerate(made):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    return made


def saved(page, button: str) -> bytes:
    with page.expect_download() as caught:
        page.locator(button).click()
    return caught.value.path().read_bytes()


def test_chunks_are_run_as_planned(page, site):
    settle(page, length=7)
    site.delay = 0.0
    choose(page, "profile", "chunk by chunk")
    page.wait_for_function(f"{CONTROLS}.profile === 'chunks'")
    assert gaps(page) == [0, 0, 0, 10, 0, 0]
    press(page, "Generate")
    wait_for_run(page)
    scene = [OPENING_SCENE]
    frames = expected(site, num_frames=7, ar_step=[0, 0, 0, 10, 0, 0], seed=7, class_labels=scene)
    np.testing.assert_array_equal(shown_frames(page), frames)
    even(page)


def test_a_plan_is_drawn_by_mouse_and_by_keys(page, site):
    settle(page, length=6, gap=2)
    site.delay = 0.0
    page.wait_for_timeout(300)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    canvas = page.locator(".ar-plan canvas")
    canvas.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "PageDown"):
        canvas.press(key)
    assert gaps(page) == [2, 9, 2, 2, 2]
    for _ in range(2):
        canvas.press("ArrowDown")
    assert gaps(page) == [2, 10, 2, 2, 2]
    assert "The largest gap is the number of steps, 10" in page.locator(".ar-sentence").inner_text()
    box = canvas.bounding_box()
    column = box["width"] / 6
    page.mouse.move(box["x"] + 4.5 * column, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 4.5 * column, box["y"] + 60, steps=4)
    page.mouse.up()
    drawn = gaps(page)
    assert drawn[:3] == [2, 10, 2]
    assert drawn[3] > 2
    for _ in range(drawn[3] + 1):
        canvas.press("ArrowUp")
    assert gaps(page) == [2, 10, 2, 0, 2]
    assert "cannot be ahead" in page.locator(".ar-sentence").inner_text()
    page.wait_for_function("document.querySelector('#ar-profile input').value === 'drawn on the map'")
    assert not asked
    press(page, "Generate")
    wait_for_run(page)
    scene = [OPENING_SCENE]
    frames = expected(site, ar_step=[2, 10, 2, 0, 2], seed=7, class_labels=scene)
    np.testing.assert_array_equal(shown_frames(page), frames)
    even(page)


def test_a_plan_that_overflows_the_window_cannot_be_drawn(page, site):
    window = site.session.first.window
    settle(page, length=window + 1, gap=1)
    canvas = page.locator(".ar-plan canvas")
    canvas.focus()
    for _ in range(window):
        canvas.press("ArrowLeft")
    for _ in range(window):
        canvas.press("ArrowUp")
        canvas.press("ArrowRight")
    # Ten steps: with 9 or less between the first frame and the last, all of them would be in flight at once.
    assert sorted(gaps(page)) == [0] * (window - 10) + [1] * 10
    canvas.press("ArrowUp")
    words = page.locator(".ar-sentence").inner_text()
    assert words == f"This puts {window + 1} frames in flight and the model sees {window}: larger gaps are needed."
    even(page)


def test_prompt_frames_are_put_in_order_and_removed(page, site, tmp_path):
    made = pictures(tmp_path, 4)
    settle(page)
    site.delay = 0.0
    give(page, *(tmp_path / f"{index}.png" for index in range(4)))
    page.wait_for_function(f"{CONTROLS}.prompts === 4")
    crop = page.locator(".ar-source i").first.evaluate("(crop) => crop.style.left + ' ' + crop.style.width")
    assert crop == "16.67% 66.66%"
    tiles = page.locator(".ar-given-tile")
    tiles.nth(0).focus()
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Delete")
    page.wait_for_function(f"{CONTROLS}.prompts === 3")
    tiles.nth(2).click()
    page.get_by_role("button", name="Move left").click()
    tiles.nth(0).drag_to(tiles.nth(1))
    page.wait_for_function("document.querySelector('#ar-order textarea, #ar-order input').value === '[3,1,0]'")
    assert command(page).endswith("--prompt 3.png --prompt 1.png --prompt 0.png")
    press(page, "Generate")
    wait_for_run(page)
    scene = [OPENING_SCENE]
    frames = expected(site, ar_step=5, seed=7, class_labels=scene, prompt_frames=[made[3], made[1], made[0]])
    np.testing.assert_array_equal(shown_frames(page), frames)
    clear_files(page)


def test_a_video_is_trimmed(page, site, tmp_path):
    clip = np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    write_video(clip, tmp_path / "clip.mp4")
    give(page, tmp_path / "clip.mp4")
    page.wait_for_function(f"{CONTROLS}.prompts === 4")
    before = page.locator(".ar-source img").nth(1).get_attribute("src")
    open_share(page)
    field = page.get_by_label("Every nth")
    field.fill("3")
    field.press("Tab")
    page.wait_for_function("(before) => document.querySelectorAll('.ar-source img')[1].src !== before", arg=before)
    page.wait_for_function(
        "document.querySelector('.ar-command').value.endsWith('--prompt clip.mp4 --prompt-stride 3')"
    )
    field = page.get_by_label("From frame")
    field.fill("12")
    field.press("Tab")
    page.locator(".ar-caption", has_text="must be less than the 12 frames").wait_for()
    field.fill("0")
    field.press("Tab")
    page.wait_for_function(f"{CONTROLS}.prompts === 4")
    clear_files(page)


def test_gaps_are_compared_from_the_same_noise(page, site):
    settle(page, gap=0)
    site.delay = 0.0
    press(page, "Generate")
    wait_for_run(page)
    press(page, "One by one")
    page.wait_for_function(f"{CONTROLS}.gaps === 10")
    press(page, "Run again as a row")
    wait_for_run(page)
    row = page.locator(".ar-rows li")
    assert row.count() == 1
    assert row.locator("h3").inner_text() == "gap 0"
    assert row.locator("p").inner_text().startswith("10 calls, 6 frames,")
    assert page.locator(".ar-row-name").inner_text().startswith("gap 10: 60 calls, 6 frames,")
    scene = [OPENING_SCENE]
    np.testing.assert_array_equal(shown_frames(page), expected(site, ar_step=10, seed=7, class_labels=scene))
    # One clock: stepping the player steps the row.
    page.locator(".ar-forth").click()
    page.wait_for_function(f"{STAGE}.rows[0].frame === {STAGE}.position")
    page.get_by_role("button", name="Remove this row").click()
    assert row.count() == 0


def test_seeds_are_rows(page, site):
    settle(page, seed=20)
    site.delay = 0.0
    field = page.locator("#ar-samples input[type=number]")
    field.fill("3")
    field.press("Tab")
    press(page, "Generate")
    page.wait_for_function(f"{PHASE} === 'done' && {STAGE}.rows.length === 2 && {STAGE}.value.seed === 22")
    assert page.locator(".ar-rows h3").all_inner_texts() == ["seed 20", "seed 21"]
    scene = [OPENING_SCENE]
    np.testing.assert_array_equal(shown_frames(page), expected(site, ar_step=5, seed=22, class_labels=scene))
    field.fill("1")
    field.press("Tab")
    press(page, "Generate")
    wait_for_run(page)
    assert page.locator(".ar-rows li").count() == 0


def test_continue_keep_and_restore(page, site, tmp_path):
    settle(page, length=5, gap=3, seed=9)
    site.delay = 0.0
    press(page, "Generate")
    wait_for_run(page)
    begun = shown_frames(page)
    page.locator("#ar-continue").click()
    wait_for_run(page)
    assert page.locator(".ar-word").all_inner_texts() == ["P1", "P2", "P3", "P4", "P5", *["done"] * 5]
    with zipfile.ZipFile(io.BytesIO(saved(page, "#ar-zip"))) as archive:
        kept = np.stack([np.asarray(Image.open(archive.open(name))) for name in sorted(archive.namelist())])
    np.testing.assert_array_equal(kept[:5], begun)
    np.testing.assert_array_equal(kept[5:], shown_frames(page)[5:])
    (tmp_path / "clip.mp4").write_bytes(saved(page, "#ar-mp4"))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    assert saved(page, "#ar-gif").startswith(b"GIF8")
    assert saved(page, "#ar-webp")[8:12] == b"WEBP"
    settings = saved(page, "#ar-json")
    frames = shown_frames(page)
    (tmp_path / "settings.json").write_bytes(settings)
    settle(page, length=12, steps=20, gap=1, seed=3)
    page.get_by_label("Keep").uncheck()
    give(page, tmp_path / "settings.json")
    page.wait_for_function(f"{CONTROLS}.frames === 10 && {CONTROLS}.prompts === 5 && {CONTROLS}.steps === 10")
    page.wait_for_function(f"{CONTROLS}.gap === 3 && {CONTROLS}.gaps === 3")
    assert page.locator("#ar-seed input").input_value() == "9"
    assert page.get_by_label("Keep").is_checked()
    press(page, "Generate")
    wait_for_run(page)
    np.testing.assert_array_equal(shown_frames(page), frames)
    assert json.loads(settings)["prompt"]["frames"]
    clear_files(page)


def test_a_tile_tells_its_history(page, site):
    settle(page)
    site.delay = 0.06
    press(page, "Generate")
    wait_for_run(page)
    page.locator(".ar-tile").nth(3).focus()
    page.keyboard.press("Enter")
    words = page.locator(".ar-looks span").all_inner_texts()
    assert page.locator(".ar-past h3").inner_text() == "Frame 4 over the run"
    assert len(words) >= 3
    assert words[-1].endswith("done")
    calls = [int(word.split()[1].rstrip(",")) for word in words]
    assert calls == sorted(calls)
    page.locator(".ar-past-close").click()
    assert page.locator(".ar-past").is_hidden()
    stats = page.evaluate(f"{STAGE}.stats")
    assert stats["drawn"] == stats["received"] > 5
    assert stats["blank"] == 0


def test_the_player_shows_guesses_noise_and_everything(page, site):
    settle(page, length=16, gap=5)
    site.delay = 0.15
    press(page, "Generate")
    page.wait_for_function(f"{PHASE} === 'running' && {STAGE}.finished >= 2")
    page.locator(".ar-play").click()
    assert page.evaluate(f"{STAGE}.playable") < 16
    page.get_by_label("everything").check()
    assert page.evaluate(f"{STAGE}.playable") == 16
    page.evaluate(f"{STAGE}.seek({STAGE}.finished + 1)")
    page.locator(".ar-badge", has_text="the model's guess").wait_for()
    page.get_by_label("with noise").check()
    page.locator(".ar-badge", has_text="drawn as grain").wait_for()
    page.get_by_label("finished", exact=True).check()
    page.get_by_label("guess", exact=True).check()
    page.locator(".ar-play").click()
    press(page, "Stop and keep")
    wait_for(page, "done")


def test_the_window_slides_over_the_live_map(page, site):
    window, length = site.session.first.window, site.session.first.window + 4
    settle(page, length=length, steps=5, gap=5)
    site.delay = 0.01
    page.evaluate("""() => {
        const draw = CanvasRenderingContext2D.prototype.strokeRect;
        window.boxes = [];
        CanvasRenderingContext2D.prototype.strokeRect = function (x, y, width, height) {
            if (this.canvas.matches(".ar-map")) window.boxes.push([x, width]);
            return draw.call(this, x, y, width, height);
        };
    }""")
    press(page, "Generate")
    wait_for_run(page)
    tiles = page.evaluate("[...document.querySelectorAll('.ar-tile')].map((tile) => tile.offsetLeft)")
    column = tiles[1] - tiles[0]
    boxes = page.evaluate("window.boxes")
    firsts = [round((x - 1) / column) for x, _ in boxes]
    assert firsts == sorted(firsts)
    assert (firsts[0], firsts[-1]) == (0, length - window)
    # The box holds as many frames as the model sees, the latest started one included; fewer at the beginning.
    sizes = [round(width / column) for _, width in boxes]
    assert max(sizes) == sizes[-1] == window
    assert min(sizes) < window


def test_the_map_is_saved(page):
    svg = saved(page, ".ar-svg").decode()
    assert svg.startswith("<svg")
    assert (
        page.evaluate("(text) => new DOMParser().parseFromString(text, 'image/svg+xml').documentElement.nodeName", svg)
        == "svg"
    )
    width, height = Image.open(io.BytesIO(saved(page, ".ar-png"))).size
    assert width > 200
    assert height > 200


def test_a_link_fills_the_controls(browser, site):
    query = (
        "?model=tiny&scene=" + site.session.first.scenes[1] + "&length=5&steps=10&gap=0,10,3,0&guidance=1.5&seed=77"
    )
    with visit(browser, site, query=query) as page:
        page.wait_for_function(f"{CONTROLS} && {CONTROLS}.profile === 'drawn'")
        assert gaps(page) == [0, 10, 3, 0]
        assert page.locator("#ar-seed input").input_value() == "77"
        open_share(page)
        page.wait_for_function("document.querySelector('.ar-command').value.includes('--seed 77')")
        words = command(page)
        assert words == (
            f"ardiff generate --model tiny --scene {site.session.first.scenes[1]} --num-frames 5 --ar-step 0,10,3,0 --steps 10 --guidance 1.5"
            " --seed 77"
        )
        assert page.locator(".ar-link").input_value() == site.url + query
        args = build_parser(["generate"]).parse_args(shlex.split(words)[1:])
        assert (args.ar_step, args.steps, args.guidance, args.seed) == ([0, 10, 3, 0], 10, 1.5, 77)
    with visit(browser, site, query="?length=many") as page:
        page.locator(".ar-message", has_text="length must be a number").wait_for()


def test_the_last_run_is_fetched_after_the_page_was_lost(browser, site):
    with visit(browser, site) as lost:
        settle(lost, length=8, gap=10, seed=5)
        site.delay = 0.05
        press(lost, "Generate")
        lost.wait_for_function(f"{PHASE} === 'running' && {STAGE}.finished >= 3")
        seen = shown_frames(lost)
        page = lost.context.new_page()
        lost.close()
        page.goto(site.url)
        page.get_by_role("button", name="Show the last run of this browser again").click()
        page.wait_for_function(f"{PHASE} === 'done'")
        kept = shown_frames(page)
        assert len(seen) <= len(kept) < 8
        np.testing.assert_array_equal(kept[: len(seen)], seen)
        assert page.locator("#ar-mp4").is_visible()
        settle(page, length=4, seed=6)
        site.delay = 0.0
        press(page, "Generate")
        wait_for_run(page)
        assert page.locator(".ar-visits button").all_inner_texts() == [
            "4 frames, gap 5, seed 6",
            f"{len(kept)} frames, gap 10, seed 5",
        ]
        page.locator(".ar-visits button").last.click()
        page.wait_for_function(f"{STAGE}.value.title === 'Recovered' && {STAGE}.finished === {len(kept)}")


def test_the_stream_endpoint_gives_every_event(site):
    client = pytest.importorskip("gradio_client").Client(site.url, verbose=False)
    site.delay = 0.0
    job = client.submit(num_frames=4, num_inference_steps=5, ar_step="5,0,1", seed=9, api_name="/stream")
    job.result()
    kinds = [event["event"] for event in job.outputs()]
    assert kinds[0] == "Queued"
    assert kinds[-1] == "Finished"
    assert kinds.count("FrameReady") == 4
    assert "Progress" in kinds
