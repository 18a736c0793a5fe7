"""The studio for everyone: keyboard alone, a narrow screen, reduced motion, what is spoken, and axe's rules."""

from pathlib import Path

from studio_page import PHASE, STAGE, press, settle, visit, wait_for, wait_for_run


AXE = """async () => {
    const found = await axe.run(document, { resultTypes: ["violations"] });
    if (found.passes.length < 20) throw new Error("axe looked at next to nothing");
    return found.violations.filter((rule) => ["serious", "critical"].includes(rule.impact)).map((rule) =>
        rule.id + ": " + rule.nodes.map((node) => node.target.join(" ") + " " + node.html.slice(0, 160)).join(" | "));
}"""


def add_axe(page) -> None:
    import axe_playwright_python  # comes with the browser tests

    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))


def test_axe_finds_nothing_serious(browser, site):
    with visit(browser, site, color_scheme="dark") as page:
        add_axe(page)

        def judge() -> None:
            """Both colour schemes, beginning and ending with the dark one; colours take a moment to change."""
            for _ in range(2):
                page.wait_for_timeout(700)
                dark = page.evaluate("document.body.classList.contains('dark')")
                assert page.evaluate(AXE) == [], "dark" if dark else "light"
                page.evaluate("document.body.classList.toggle('dark')")

        assert page.evaluate("document.body.classList.contains('dark')")
        judge()
        settle(page)
        site.delay = 0.0
        for button in ("Generate", "Run again as a row"):
            press(page, button)
            wait_for_run(page)
        page.locator(".ar-tile").nth(2).click()
        page.get_by_role("button", name="Link and command").click()
        judge()


def test_a_run_by_keyboard_alone(browser, site):
    with visit(browser, site) as page:
        settle(page, gap=10)
        # Time enough to tab from Generate to Stop on a busy machine.
        site.delay = 0.2

        def tab_to(selector: str) -> None:
            for _ in range(80):
                page.keyboard.press("Tab")
                if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(f"{selector} is not reached by Tab")

        tab_to("#ar-generate")
        page.keyboard.press("Enter")
        page.wait_for_function(f"{PHASE} === 'running' && {STAGE}.finished >= 1")
        tab_to("#ar-stop")
        page.keyboard.press("Enter")
        wait_for(page, "done")
        assert 1 <= page.evaluate(f"{STAGE}.finished") < 6
        tab_to(".ar-tile")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.locator(".ar-past h3").inner_text() == "Frame 2 over the run"
        # Nobody presses Enter in a number field to start a run.
        page.locator("#ar-seed input").press("Enter")
        page.wait_for_timeout(200)
        assert page.evaluate(PHASE) == "done"


def test_what_is_spoken_changes_with_phases_and_frames_alone(page, site):
    settle(page)
    site.delay = 0.05
    page.evaluate("""() => {
        window.spoken = [];
        new MutationObserver(() => window.spoken.push(document.querySelector(".ar-spoken").textContent))
            .observe(document.querySelector(".ar-spoken"), { childList: true, characterData: true, subtree: true });
    }""")
    press(page, "Generate")
    wait_for_run(page)
    spoken = page.evaluate("window.spoken")
    assert len(spoken) == len(set(spoken))
    assert len(spoken) <= 6 + 3
    assert spoken[-1] == "Done. 6 of 6 frames finished."


def test_a_phone_with_rows_never_scrolls_sideways(browser, site):
    size = {"width": 390, "height": 844}
    with visit(browser, site, viewport=size, has_touch=True, is_mobile=True) as page:
        settle(page, length=16)
        site.delay = 0.0
        for button in ("Generate", "Run again as a row"):
            press(page, button)
            wait_for_run(page)
        page.locator(".ar-tile").nth(1).click()
        page.get_by_role("button", name="Link and command").click()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = page.evaluate("""() => [...document.querySelectorAll("#ar-results button, .ar-rows button, .ar-play, .ar-past-close")]
            .filter((button) => button.offsetHeight && button.offsetHeight < 43.5).map((button) => button.textContent)""")
        assert small == []


def test_no_figure_is_cut_off(browser, site):
    with visit(browser, site) as page:
        settle(page, length=16, steps=20, seed=4294967295)
        site.delay = 0.0
        press(page, "Generate")
        wait_for_run(page)
        cut = """() => [...document.querySelectorAll(".ar-facts dd")]
            .filter((figure) => figure.scrollWidth > figure.clientWidth).map((figure) => figure.textContent)"""
        for calls in (None, "1234 of 4444"):
            if calls:
                page.evaluate(f"document.querySelector('.ar-f-calls').textContent = '{calls}'")
            for width in (390, 960, 1024, 1366):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate(cut) == [], width


def test_under_reduced_motion_noise_changes_three_times_a_second_at_most(page, site, monkeypatch):
    """Also where it is asked for while the page is open. Sampled at every animation frame: how often a second the picture of a tile that is nearly noise became another one."""
    # A new guess of every frame, ten times a second.
    monkeypatch.setattr("ardiff.demo.session.PREVIEW_SHARE", 10.0)
    settle(page, gap=0, steps=30)
    site.delay = 0.15
    page.evaluate("""() => {
        window.changed = [];
        let before = "";
        (function look() {
            requestAnimationFrame(look);
            const tile = document.querySelectorAll(".ar-tile")[3];
            if (!tile) return;
            const [canvas, , word] = tile.children;
            const now = canvas.toDataURL(), level = parseInt(word.textContent);
            if (now !== before && level >= 62) window.changed.push(performance.now());
            before = now;
        })();
    }""")
    changes = {}
    for motion in ("no-preference", "reduce"):
        page.emulate_media(reduced_motion=motion)
        page.evaluate("window.changed = []")
        press(page, "Generate")
        page.wait_for_function(f"{PHASE} === 'running' && {STAGE}.value.iteration >= 13")
        press(page, "Stop and keep")
        wait_for(page, "done")
        times = page.evaluate("window.changed")
        changes[motion] = (len(times) - 1) / (times[-1] - times[0]) * 1000
    assert changes["reduce"] <= 3 < changes["no-preference"]
