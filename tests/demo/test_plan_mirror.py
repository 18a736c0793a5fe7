"""The browser's plan is the library's plan: plan.js against ad_schedule, over a grid of settings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ardiff.demo
from ardiff.demo.models import LoadedModel
from ardiff.schedulers.ad_schedule import ad_schedule, check_window, plan_counts, profile_gaps, smallest_gap


SCRIPT = Path(ardiff.demo.__file__).parent / "static" / "plan.js"
GRID = [
    (frames, steps, gap, prompts)
    for steps in (5, 6, 16, 50)
    for gap in sorted({0, 1, 2, 5, steps // 2, steps})
    for frames in (4, 9, 17)
    for prompts in (0, 1, 3)
]
GENERATOR = torch.Generator().manual_seed(0)
GRID += [
    (frames, steps, torch.randint(steps + 1, (frames - prompts - 1,), generator=GENERATOR).tolist(), prompts)
    for steps in (5, 50)
    for frames in (4, 9, 17)
    for prompts in (0, 1, 3)
]
ALL_ROWS = """(grid) => grid.map(([frames, steps, gap, prompts]) => {
    const s = window.ardiffStudio, plan = s.makePlan(frames, steps, gap, prompts);
    const rows = [];
    for (let row = 1; row <= plan.calls; row++) {
        rows.push(Array.from({ length: frames }, (_, frame) => s.stepIndex(plan, row, frame)));
    }
    return rows;
})"""
ALL_COUNTS = """(grid) => grid.map(([frames, steps, gap, prompts]) => {
    const s = window.ardiffStudio;
    const c = s.planCounts(s.makePlan(frames, steps, gap, prompts));
    return [c.iterations, c.frameEvaluations, c.commits, c.firstFrameIteration, c.maxInFlight];
})"""
SENTENCE = """([frames, steps, gap, prompts]) => {
    const s = window.ardiffStudio;
    return s.planSentence(s.makePlan(frames, steps, gap, prompts), true, { window: 16, call: 0.1, frame: 0.001, measured: true });
}"""


@pytest.fixture(scope="module")
def page(browser) -> Iterator:
    page = browser.new_page()
    page.add_script_tag(content=SCRIPT.read_text(encoding="utf-8"))
    yield page
    page.close()


def schedule(frames, steps, gap, prompts):
    return ad_schedule(frames, steps, gap, num_prompt_frames=prompts)


def test_every_row_of_every_plan(page):
    for settings, rows in zip(GRID, page.evaluate(ALL_ROWS, GRID), strict=True):
        assert rows == schedule(*settings).tolist(), settings


def test_counts(page):
    for settings, found in zip(GRID, page.evaluate(ALL_COUNTS, GRID), strict=True):
        counts = plan_counts(schedule(*settings), num_prompt_frames=settings[3])
        expected = [counts.iterations, counts.frame_evaluations, counts.commits]
        assert found == [*expected, counts.first_frame_iteration, counts.max_in_flight], settings


def test_the_sentence_refuses_what_the_library_refuses(page):
    for settings in [(40, 50, gap, prompts) for gap in (0, 1, 3, 4, 50) for prompts in (0, 8)] + [(16, 50, 0, 0)]:
        try:
            check_window(schedule(*settings), 16, num_prompt_frames=settings[3])
            possible = True
        except ValueError:
            possible = False
        told = page.evaluate(SENTENCE, settings)
        assert told["ok"] == possible, (settings, told)
        if not possible:
            assert f"at least {smallest_gap(16, 50)}" in told["text"]


def test_the_sentence_in_words(page):
    assert page.evaluate(SENTENCE, [16, 50, 5, 0])["text"] == (
        "125 model calls, first new frame after call 50, at most 10 frames in flight, about 14 s."
    )
    unmeasured = page.evaluate(SENTENCE.replace("measured: true", "measured: false"), [16, 50, 5, 0])
    assert unmeasured["text"].endswith("at most 10 frames in flight; how long is not measured yet.")
    assert "one frame in flight" in page.evaluate(SENTENCE, [16, 50, 50, 0])["text"]
    assert not page.evaluate(SENTENCE, [4, 50, 5, 4])["ok"]


def test_memory(page, tiny_pipeline):
    script = """([grid, guided, model]) => grid.map((settings) =>
        window.ardiffStudio.runMemory(window.ardiffStudio.makePlan(...settings), guided, model))"""
    model = LoadedModel("tiny", tiny_pipeline)
    for guided in (False, True):
        found = page.evaluate(script, [GRID, guided, model.facts()])
        for settings, needed in zip(GRID, found, strict=True):
            assert needed == model.run_memory(schedule(*settings).numpy(), settings[3], guided), settings
    words = page.evaluate(
        SENTENCE.replace("measured: true", "measured: true, memory: { packed: 0, cache: 2e9, frame: 0, decoded: 0 }"),
        [16, 50, 5, 0],
    )
    assert words["text"].endswith("in flight, about 3.7 GB of memory, about 14 s.")


def test_profiles(page):
    grid = [
        (profile, gap, chunk, fresh, steps)
        for profile in ("even", "chunks", "ramp")
        for steps in (5, 50)
        for gap in (0, 1, 3, steps)
        for chunk in (1, 3, 4)
        for fresh in (1, 2, 3, 8, 17, 64)
    ]
    found = page.evaluate("(grid) => grid.map((each) => window.ardiffStudio.profileGaps(...each))", grid)
    for (profile, gap, chunk, fresh, steps), gaps in zip(grid, found, strict=True):
        expected = profile_gaps(profile, gap=gap, chunk=chunk, num_new_frames=fresh, num_inference_steps=steps)
        assert gaps == (expected if profile == "even" else list(expected)), (profile, gap, chunk, fresh, steps)


def test_a_list_of_gaps_that_overflows_the_window_is_told(page):
    told = page.evaluate(SENTENCE, [40, 50, [1] * 39, 0])
    assert not told["ok"]
    assert told["text"] == "This puts 40 frames in flight and the model sees 16: larger gaps are needed."
