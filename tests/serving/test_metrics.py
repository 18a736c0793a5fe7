"""Figures in Prometheus' text format, health, and log lines that say nothing about a visitor."""

import json
import logging
import re
import sys
import threading
import time

import pytest

from ardiff.serving.metrics import OUTCOMES, JsonFormatter, Metrics


SAMPLE = re.compile(r'([a-z_]+)(?:\{([a-z]+)="([a-z]+)"\})? (\d+(?:\.\d+)?(?:e[+-]\d+)?)')


def parse(text):
    """Families of the text format: {name: (type, {label value or None: number})}. Refuses what the format forbids."""
    assert text.endswith("\n")
    assert "\n\n" not in text
    families, name = {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in families, "a family is told once"
            assert len(line.split(maxsplit=3)) == 4
            families[name] = (None, {})
        elif line.startswith("# TYPE "):
            _, _, told, kind = line.split()
            assert told == name
            assert kind in {"counter", "gauge"}
            assert (kind == "counter") == name.endswith("_total")
            families[name] = (kind, {})
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert sample[1] == name
            assert sample[3] not in families[name][1]
            families[name][1][sample[3]] = float(sample[4])
    return {name.removeprefix("ardiff_"): samples for name, (_, samples) in families.items()}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_figures():
    clock = Clock()
    metrics = Metrics(lambda: 3, clock=clock)
    for _ in range(4):
        metrics.run_started()
    metrics.model_called(0.25)
    metrics.model_called(1.5, calls=7)
    metrics.run_ended("finished", 2.0)
    metrics.run_ended("stopped", 1.0)
    metrics.run_ended("failed", 0.5)
    metrics.run_refused()
    clock.now += 60
    told = parse(metrics.text())
    assert told == {
        "runs_started_total": {None: 4},
        "runs_ended_total": {"finished": 1, "stopped": 1, "failed": 1},
        "runs_refused_total": {None: 1},
        "runs_under_way": {None: 1},
        "queue_length": {None: 3},
        "model_calls_total": {None: 8},
        "model_seconds_total": {None: 1.75},
        "run_seconds_total": {None: 3.5},
        "up_seconds": {None: 60},
    }


def test_a_new_server_tells_every_figure():
    told = parse(Metrics().text())
    assert told["runs_ended_total"] == dict.fromkeys(OUTCOMES, 0)
    assert told["model_calls_total"] == {None: 0}


class Slow(float):
    """A number that lets other threads run in the middle of being added."""

    def __radd__(self, other):
        time.sleep(0)
        return float(other) + float(self)


def test_no_update_is_lost_between_threads():
    metrics, count, threads = Metrics(), 200, 8
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work():
        for _ in range(count):
            metrics.run_started()
            metrics.model_called(Slow(0.5))
            metrics.run_ended("finished", Slow(1.0))
            metrics.run_refused()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            told = parse(metrics.text())
            assert 0 <= told["runs_under_way"][None] <= threads
    finally:
        sys.setswitchinterval(interval)
        for worker in workers:
            worker.join()
    told = parse(metrics.text())
    assert told["runs_started_total"][None] == told["runs_ended_total"]["finished"] == count * threads
    assert told["model_seconds_total"][None] == count * threads / 2
    assert told["run_seconds_total"][None] == count * threads
    assert told["runs_refused_total"][None] == count * threads


def test_health_is_that_of_a_model_that_moves():
    clock = Clock()
    metrics = Metrics(lambda: 2, clock=clock)
    clock.now += 1000
    assert metrics.health() == (200, {"status": "ok", "up_seconds": 1000.0, "runs_under_way": 0, "queue": 2})
    metrics.run_started()
    clock.now += 299
    assert metrics.health()[0] == 200
    metrics.model_called(299.0)
    clock.now += 299
    assert metrics.health()[0] == 200
    clock.now += 2
    status, told = metrics.health()
    assert (status, told["status"], told["runs_under_way"]) == (503, "stalled", 1)
    metrics.run_ended("failed", 600.0)
    assert metrics.health()[0] == 200


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_what_would_break_a_counter_is_refused(seconds):
    metrics = Metrics()
    with pytest.raises(ValueError, match="`seconds` must be at least 0"):
        metrics.model_called(seconds)
    with pytest.raises(ValueError, match="`seconds` must be at least 0"):
        metrics.run_ended("finished", seconds)
    with pytest.raises(ValueError, match="`outcome` must be one of finished, stopped, failed but is 'lost'"):
        metrics.run_ended("lost", 1.0)
    assert parse(metrics.text()) | {"up_seconds": 0} == parse(Metrics().text()) | {"up_seconds": 0}


# --- log lines --------------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    """Log lines as they are written, from any logger."""
    written = []

    class Keep(logging.Handler):
        def emit(self, record):
            written.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_has_what_helps_and_not_who(lines):
    run = "0123456789abcdef0123456789abcdef"
    logging.getLogger("ardiff.demo").info(
        "a run ended", extra={"event": "run_ended", "run": run, "seconds": 1.5, "frames": 16, "address": "10.1.2.3"}
    )
    told = json.loads(lines[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told.pop("time"))
    assert told == {
        "level": "INFO", "logger": "ardiff.demo", "message": "a run ended",
        "event": "run_ended", "run": "01234567", "seconds": 1.5, "frames": 16,
    }  # fmt: skip


def test_no_value_of_a_message_is_written(lines, monkeypatch, caplog):
    for name in ("uvicorn", "uvicorn.access", "httpx"):  # a server of another test may have quietened them
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.INFO, name)
    logging.getLogger("uvicorn.access").info('%s - "%s %s"', "10.1.2.3:5000", "GET", "/?seed=1&name=Ada")
    logging.getLogger("httpx").info("fetched for ada@example.org")
    logging.getLogger("ardiff").warning(
        "refused %s", "holiday.mp4", extra={"model": "my secret\nmodel", "event": ["x"]}
    )
    try:
        open("/nowhere/ada's film.mp4")
    except OSError:
        logging.getLogger("ardiff").exception("a run failed")
    text = "\n".join(lines)
    for private in ("10.1.2.3", "Ada", "ada", "holiday", "film", "secret"):
        assert private not in text, private
    access, fetched, refused, failed = map(json.loads, lines)
    assert access["message"] == '%s - "%s %s"'
    assert "message" not in fetched
    assert refused["message"] == "refused %s"
    assert failed["exception"] == "FileNotFoundError"
    assert re.fullmatch(r"test_no_value_of_a_message_is_written:\d+", failed["raised"][-1])
