"""The page in the engines of Firefox and Safari: a run from the controls to the same frames, drawn and played."""

import base64
import io
import os

import numpy as np
import pytest
from engines import ENGINES, missing, until
from PIL import Image
from studio_page import CONTROLS, PHASE, STAGE, expected

from ardiff.demo.presets import OPENING_SCENE


BLANK = """(() => {
    const canvas = document.querySelector("%s"), pen = canvas.getContext("2d");
    const pixels = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return pixels.length < 100 || pixels.every((pixel) => pixel === pixels[0]);
})()"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_in_another_engine(site, engine, tmp_path):
    refuse = pytest.fail if os.environ.get("ARDIFF_REQUIRE_BROWSER") == "1" else pytest.skip
    if missing(engine):
        refuse(f"not installed: {', '.join(missing(engine))}")
    with ENGINES[engine](tmp_path) as page:
        page.open(site.url)
        page.evaluate("""(() => {
            window.trouble = [];
            const complain = console.error;
            console.error = (...words) => { window.trouble.push(words.join(" ")); complain(...words); };
            addEventListener("error", (event) => window.trouble.push(event.message));
            addEventListener("unhandledrejection", (event) => window.trouble.push(String(event.reason)));
        })()""")
        until(lambda: page.evaluate(f"Boolean(window.ardiffStudio && {STAGE} && {CONTROLS} && {PHASE})"))
        for name, value in (("length", 6), ("gap", 3), ("seed", 7)):
            page.evaluate(f"""(() => {{
                const field = document.querySelector("#ar-{name} input[type=number]");
                field.focus();
                Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(field, "{value}");
                for (const kind of ["input", "change", "blur"]) field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
            }})()""")
        page.evaluate("document.querySelector('#ar-keep input').click()")
        until(lambda: page.evaluate(f"{CONTROLS}.frames === 6 && {CONTROLS}.gap === 3"))
        assert not page.evaluate(BLANK % ".ar-plan canvas")
        site.delay = 0.01
        page.evaluate("document.querySelector('#ar-generate').click()")
        until(lambda: page.evaluate(f"{PHASE} === 'done' && {STAGE}.finished === 6"))
        pictures = page.evaluate(f"{STAGE}.value.pics")
        frames = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(p.split(",")[1])))) for p in pictures])
        scene = [OPENING_SCENE]
        np.testing.assert_array_equal(
            frames, expected(site, ar_step=3, seed=7, class_labels=scene, num_inference_steps=50)
        )
        for canvas in (".ar-screen", ".ar-map", ".ar-tile canvas"):
            until(lambda canvas=canvas: not page.evaluate(BLANK % canvas))
        position = page.evaluate(f"{STAGE}.position")
        until(lambda: page.evaluate(f"{STAGE}.position") != position)
        stats = page.evaluate(f"{STAGE}.stats")
        assert stats["drawn"] == stats["received"] > 1
        assert stats["blank"] == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("window.trouble") == []
