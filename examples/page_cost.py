"""What the page itself costs: first paint, updates drawn of updates sent, bytes per run, and time over the bare pipeline.

    python -m pip install -e ".[dev]"        # brings playwright; Chromium is the system's
    python examples/page_cost.py --threads 2

Serves the studio, visits it with Chromium, and runs the same clip by turns in the page and through `pipe.stream`, with
the same weights and seed. Prints medians with the smallest and largest round, and one JSON line last.
"""

import argparse
import json
import os
import statistics
import time

import torch
from playwright.sync_api import Page, sync_playwright

from ardiff.demo.ui import launch


STATS = "window.ardiffStudio.studio.stage.stats"
RUN = "window.ardiffStudio.studio.stage.run"
PHASE = "document.documentElement.dataset.ardiffPhase"


def bare_seconds(pipe, session, request) -> float:
    """The run without the page, on the thread that owns the model, as in the page."""

    def run() -> float:
        start = time.perf_counter()
        for _ in pipe.stream(**session.arguments(request)):
            pass
        return time.perf_counter() - start

    return session._on_worker(run)


def page_run(page: Page, received: list[int]) -> dict[str, float]:
    """Press Generate and wait for the end: seconds, what was drawn, and what came over the wire."""
    before, start = sum(received), time.perf_counter()
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function(f"{PHASE} === 'running'")
    page.wait_for_function(f"{PHASE} === 'done'", timeout=600_000)
    seconds = time.perf_counter() - start
    page.wait_for_timeout(500)
    return {"page_s": seconds, "kilobytes": (sum(received) - before) / 1000, **page.evaluate(STATS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder (default: the bundled model)")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    demo, session = launch(
        models=args.model and [args.model], device="cpu", port=None, prevent_thread_lock=True, quiet=True
    )
    rounds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        page = browser.new_page()
        received: list[int] = []
        network = page.context.new_cdp_session(page)
        network.send("Network.enable")
        network.on("Network.dataReceived", lambda event: received.append(event["dataLength"]))
        page.goto(demo.local_url)
        page.wait_for_function(
            "window.ardiffStudio && window.ardiffStudio.studio.stage && window.ardiffStudio.studio.controls"
        )
        first_paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
        ready = page.evaluate("performance.now() / 1000")
        page.get_by_label("Keep").check()
        for _ in range(args.rounds):
            measured = page_run(page, received)
            request = session.store.recover(page.evaluate(RUN)).request
            measured["bare_s"] = bare_seconds(session.first.pipeline, session, request)
            rounds.append(measured)
        browser.close()
    demo.close()
    session.close()

    report = {"first_paint_s": first_paint, "ready_s": ready}
    for name in rounds[0]:
        values = [measured[name] for measured in rounds]
        report[name] = statistics.median(values)
        print(f"{name:12s} {report[name]:8.2f} ({min(values):.2f}..{max(values):.2f})")
    report["time_over_bare"] = statistics.median(measured["page_s"] / measured["bare_s"] for measured in rounds)
    print(f"first paint after {first_paint:.2f} s, ready to use after {ready:.2f} s")
    print(f"time in the page over the bare pipeline: {report['time_over_bare']:.3f}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
