"""What those who run a studio may know about it: figures for Prometheus, an answer to "are you well", lines for a log.

None of it says who visited or what was asked for. Nothing but the standard library is imported here: a dozen figures do
not earn every Space a dependency, and the text format for them is a page long.
Format: Prometheus text exposition 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `Metrics.text`, for the HTTP header."""

OUTCOMES = ("finished", "stopped", "failed")


class Metrics:
    """Counts since the server started. Every method may be called from any thread.

    Args:
        queue_length: gives the number of runs that wait, when asked; called without a lock held.
        clock: seconds that never go back.
    """

    def __init__(
        self, queue_length: Callable[[], int] = lambda: 0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queue_length = queue_length
        self._clock = clock
        self._lock = threading.Lock()
        self._started_at = self._moved_at = clock()
        self._started = self._refused = self._calls = 0
        self._call_seconds = self._run_seconds = 0.0
        self._ended = dict.fromkeys(OUTCOMES, 0)

    def run_started(self) -> None:
        """A run got the model."""
        with self._lock:
            self._started += 1
            self._moved_at = self._clock()

    def model_called(self, seconds: float, calls: int = 1) -> None:
        """The network was called `calls` times, which took `seconds` in all."""
        _check(seconds=seconds, calls=calls)
        with self._lock:
            self._calls += calls
            self._call_seconds += seconds
            self._moved_at = self._clock()

    def run_ended(self, outcome: str, seconds: float) -> None:
        """A run gave the model back after `seconds`: "finished", "stopped" (by its visitor or a limit) or "failed"."""
        if outcome not in OUTCOMES:
            raise ValueError(f"`outcome` must be one of {', '.join(OUTCOMES)} but is {outcome!r}.")
        _check(seconds=seconds)
        with self._lock:
            self._ended[outcome] += 1
            self._run_seconds += seconds
            self._moved_at = self._clock()

    def run_refused(self) -> None:
        """A run was asked for and not taken: a limit, a full queue, a wrong value."""
        with self._lock:
            self._refused += 1

    def text(self) -> str:
        """All figures, for GET /metrics."""
        queue = self._queue_length()
        with self._lock:
            ended = {f'{{outcome="{outcome}"}}': count for outcome, count in self._ended.items()}
            families = [
                ("runs_started_total", "counter", "Runs that got the model.", {"": self._started}),
                ("runs_ended_total", "counter", "Runs that gave the model back, by how.", ended),
                ("runs_refused_total", "counter", "Runs that were asked for and not taken.", {"": self._refused}),
                ("runs_under_way", "gauge", "Runs that have the model now.", {"": self._under_way()}),
                ("queue_length", "gauge", "Runs that wait for the model.", {"": queue}),
                ("model_calls_total", "counter", "Calls of the network.", {"": self._calls}),
                (
                    "model_seconds_total",
                    "counter",
                    "Seconds that calls of the network took.",
                    {"": self._call_seconds},
                ),
                ("run_seconds_total", "counter", "Seconds that ended runs had the model.", {"": self._run_seconds}),
                ("up_seconds", "gauge", "Seconds since the server started.", {"": self._clock() - self._started_at}),
            ]
        lines = []
        for name, kind, text, samples in families:
            lines += [f"# HELP ardiff_{name} {text}", f"# TYPE ardiff_{name} {kind}"]
            lines += [f"ardiff_{name}{labels} {value}" for labels, value in samples.items()]
        return "\n".join(lines) + "\n"

    def health(self, stall_seconds: float = 300.0) -> tuple[int, dict[str, Any]]:
        """HTTP status and JSON for GET /healthz: 200, or 503 when a run has the model and nothing moved for `stall_seconds`."""
        queue = self._queue_length()
        with self._lock:
            under_way, now = self._under_way(), self._clock()
            stalled = under_way > 0 and now - self._moved_at > stall_seconds
            up = round(now - self._started_at, 1)
        told = {
            "status": "stalled" if stalled else "ok",
            "up_seconds": up,
            "runs_under_way": under_way,
            "queue": queue,
        }
        return (503 if stalled else 200), told

    def _under_way(self) -> int:
        return self._started - sum(self._ended.values())


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:  # a counter that goes down reads as a restart, and nan stays for good
            raise ValueError(f"`{name}` must be at least 0 but is {value}.")


LOG_FIELDS = ("event", "run", "outcome", "seconds", "calls", "frames", "steps", "queue", "status", "model", "version")
"""Fields of a log line that may be added with `extra=`; every other is left out."""


class JsonFormatter(logging.Formatter):
    """Log records as one JSON object a line, without what a visitor could be known by.

    Text that was put together from values may hold an address, a file's name or a prompt, so values are never written:
    of `log.info("%s uploaded %s", ...)` the line has the words between them, of a message without values it has the
    message if it is ours (`ardiff...`), of an exception its type and where it was raised. Numbers and short names come
    in through `extra=`, as LOG_FIELDS. A run is named by the first eight digits of its id: enough to follow it through
    a log, too few to fetch its frames.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        if record.args or record.name.split(".")[0] == "ardiff":
            line["message"] = str(record.msg)
        for name in LOG_FIELDS:
            value = getattr(record, name, None)
            if isinstance(value, bool | int | float) or (
                isinstance(value, str) and re.fullmatch(r"[\w./:+-]{1,64}", value, flags=re.ASCII)
            ):
                line[name] = value[:8] if name == "run" and isinstance(value, str) else value
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            line["exception"] = kind.__name__
            line["raised"] = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(trace)][-8:]
        return json.dumps(line)


def log_as_json(stream: TextIO | None = None) -> None:
    """Write every log line of this process as JSON, to standard error unless told: ours from INFO on, others' warnings."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("ardiff").setLevel(logging.INFO)
