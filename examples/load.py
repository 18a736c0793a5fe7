"""Many visitors at once, through real HTTP: mixed frames, leaks, the queue's order, and how fast the page answers meanwhile.

    python examples/load.py --minutes 10 --visitors 20 --threads 2
    python examples/load.py --minutes 10 --serve "ardiff serve --replicas 2 --min-replicas 2 --cpus 1 --device cpu"

Starts the studio in a process of its own and lets every visitor ask `/stream` for one video after the other. Each finished
frame is compared, bit by bit, with the same seed run alone by `pipe.stream` in this process with as many threads. Meanwhile
memory and threads of the studio's processes are written down every second, and an idle visitor loads the page, its
configuration and what the page asks when it opens. Prints one JSON line last; exit code 1 when frames were mixed or runs failed.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from ardiff.pipelines.loading import load_pipeline


ROOT = Path(__file__).resolve().parents[1]
GAPS = (0, 2, 5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(command: Sequence[str], log: Path, threads: int, start_seconds: float = 120.0) -> Iterator[Any]:
    """A studio in a process group of its own, as (process, url), from when its page answers; SIGTERM ends it."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + start_seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/config", trust_env=False, timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the studio did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def request(
    seed: int, *, model: str = "", scene: str = "no scene", frames: int = 8, gap: int = 2, steps: int = 5
) -> list:
    """The arguments of `/stream`."""
    return [scene, None, frames, str(gap), steps, 2.0, seed, 0, 1, 4, model]


def events(url: str, data: list) -> Iterator[dict[str, Any]]:
    """A run through `/gradio_api/call/stream`: its events as they come. An error of the studio is a RuntimeError."""
    call = f"{url}/gradio_api/call/stream"
    with httpx.Client(trust_env=False, timeout=httpx.Timeout(30, read=600)) as client:
        answer = client.post(call, json={"data": data}).raise_for_status()
        kind = ""
        with client.stream("GET", f"{call}/{answer.json()['event_id']}") as lines:
            for line in lines.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: ") and kind == "error":
                    raise RuntimeError(line.removeprefix("data: "))
                elif line.startswith("data: ") and kind == "generating":
                    yield json.loads(line.removeprefix("data: "))[0]


def picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))))


def digest(frame: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()


def alone(model: str | None, data: list, pipe: Any = None) -> list[str]:
    """Digests of the frames of a run by itself, here."""
    pipe = pipe or load_pipeline(model, device="cpu")
    steps = pipe.stream(
        class_labels=None if data[0] == "no scene" else [data[0]], num_frames=data[2], ar_step=int(data[3]),
        num_inference_steps=data[4], guidance_scale=data[5], generator=torch.Generator("cpu").manual_seed(data[6]),
    )  # fmt: skip
    return [digest(frame) for step in steps for _, frame in step.finished]


@dataclass
class Figures:
    """What the visitors saw; every list is appended to by several threads."""

    runs: dict[int, int] = field(default_factory=dict)  # finished ones, by visitor
    mixed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)  # the places that each run was told, in order
    waits: list[float] = field(default_factory=list)  # seconds from asking to the first step
    answers: dict[str, list[float]] = field(default_factory=dict)  # seconds, by what was asked for
    samples: list[tuple[float, float, int]] = field(default_factory=list)  # seconds, MiB, threads


def visit(url: str, number: int, until: float, wanted: Sequence[tuple[list, list[str]]], figures: Figures) -> None:
    """One visitor: a video after the other, each compared with the seed run alone."""
    turn = number
    figures.runs[number] = 0
    while time.monotonic() < until:
        data, expected = wanted[turn % len(wanted)]
        turn += 1
        asked, started, places, got = time.monotonic(), None, [], []
        try:
            for event in events(url, data):
                if event["event"] == "Queued":
                    places.append(event["place"])
                    continue
                started = started or time.monotonic()
                if event["event"] == "FrameReady":
                    got.append(digest(picture(event["frame"])))
                elif event["event"] == "Failed":
                    figures.failed.append(event["message"])
        except RuntimeError as error:
            figures.refused.append(str(error))
            time.sleep(0.5)
            continue
        except httpx.HTTPError as error:
            figures.failed.append(repr(error))
            continue
        figures.runs[number] += 1
        figures.places.append(places)
        figures.waits.append((started or time.monotonic()) - asked)
        if got != expected:
            figures.mixed.append(f"visitor {number}, seed {data[6]}: {len(got)} frames, not those of the seed alone")


def browse(url: str, until: float, figures: Figures) -> None:
    """One visitor who only looks: loads the page, its configuration, and what it asks for when it opens."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        functions = client.get(url + "/config").json()["dependencies"]
        opened = next(function["id"] for function in functions if function["api_name"] == "greet")
        body = {"data": [], "fn_index": opened, "session_hash": "looks"}
        asks = {
            "page": lambda: client.get(url + "/"),
            "config": lambda: client.get(url + "/config"),
            "event": lambda: client.post(url + "/gradio_api/run/predict", json=body),
        }
        while time.monotonic() < until:
            for name, ask in asks.items():
                begun = time.monotonic()
                ask().raise_for_status()
                figures.answers.setdefault(name, []).append(time.monotonic() - begun)
                time.sleep(0.2)


def watch(process: subprocess.Popen, until: float, figures: Figures) -> None:
    """Memory and threads of the studio's processes, every second."""
    root, begun = psutil.Process(process.pid), time.monotonic()
    while time.monotonic() < until:
        memory = threads = 0
        for member in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                memory, threads = memory + member.memory_info().rss, threads + member.num_threads()
        figures.samples.append((time.monotonic() - begun, memory / 2**20, threads))
        time.sleep(1.0)


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope per minute over the second half: the first warms up."""
    late = np.array(samples[len(samples) // 2 :])
    return float(np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0]) if len(late) > 2 else 0.0


def measure(
    process: subprocess.Popen, url: str, seconds: float, visitors: int, wanted: Sequence[tuple[list, list[str]]]
) -> Figures:
    """Let them all in for `seconds`; what is under way then is still finished."""
    figures, until = Figures(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=visit, args=(url, number, until, wanted, figures)) for number in range(visitors)
    ]
    threads += [threading.Thread(target=browse, args=(url, until, figures))]
    threads += [threading.Thread(target=watch, args=(process, until, figures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return figures


def summary(figures: Figures) -> dict[str, Any]:
    runs, answers = figures.runs.values(), [second for seconds in figures.answers.values() for second in seconds]
    memory, threads = ([(sample[0], sample[column]) for sample in figures.samples] for column in (1, 2))
    return {
        "runs": sum(runs),
        "runs_of_a_visitor": [min(runs), max(runs)],
        "mixed": len(figures.mixed),
        "failed": len(figures.failed),
        "refused": len(figures.refused),
        "runs_that_saw_a_place": sum(max(places) > 0 for places in figures.places),
        "places_that_went_up": sum(places != sorted(places, reverse=True) for places in figures.places),
        "wait_s": [round(float(np.percentile(figures.waits, q)), 2) for q in (0, 50, 100)] if figures.waits else None,
        "answers": len(answers),
        "p95_ms": {name: round(1000 * float(np.percentile(seconds, 95)), 1) for name, seconds in figures.answers.items()}
        | {"all": round(1000 * float(np.percentile(answers, 95)), 1)},
        "memory_mib": [round(memory[0][1]), round(max(value for _, value in memory)), round(memory[-1][1])],
        "memory_mib_per_minute": round(slope(memory), 2),
        "threads": [threads[0][1], max(value for _, value in threads), threads[-1][1]],
        "threads_per_minute": round(slope(threads), 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--model", default="scenes-64", help="folder or bundled model; default: scenes-64")
    parser.add_argument("--frames", type=int, default=8, help="of a video; default: 8")
    parser.add_argument("--steps", type=int, default=5, help="denoising steps; default: 5")
    parser.add_argument("--seeds", type=int, default=12, help="different videos; default: 12")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the model")
    parser.add_argument(
        "--serve", default=f"{sys.executable} app.py --device cpu", help="what serves; --model and --port are added"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pipe = load_pipeline(args.model, device="cpu")
    scenes = [*pipe.class_names, "no scene"]
    shape = {"frames": args.frames, "steps": args.steps}
    asked = [
        request(seed, scene=scenes[seed % len(scenes)], gap=GAPS[seed % len(GAPS)], **shape)
        for seed in range(args.seeds)
    ]
    wanted = [(data, alone(None, data, pipe)) for data in asked]
    log = Path(tempfile.mkdtemp()) / "studio.log"
    with served([*shlex.split(args.serve), "--model", args.model], log, args.threads) as (process, url):
        figures = measure(process, url, 60 * args.minutes, args.visitors, wanted)
    told = summary(figures)
    for name, value in told.items():
        print(f"{name:24s} {value}")
    for line in [*figures.mixed, *figures.failed, *figures.refused][:10]:
        print(line)
    print(json.dumps(told))
    return int(bool(figures.mixed or figures.failed or not told["runs"]))


if __name__ == "__main__":
    sys.exit(main())
