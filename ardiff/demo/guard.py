"""What stands before gradio's own server: health and figures for a host, and bounds on what is sent (plain ASGI)."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

from ardiff.demo.session import Session
from ardiff.serving.metrics import CONTENT_TYPE


log = logging.getLogger(__name__)

REQUEST_BYTES = 16 * 2**20
"""Bytes of a request that is not an upload; the largest is a run with a drawn plan."""

EVENT = re.compile("/call/(?:v2/)?[^/]+/([^/]+)/?$")
OVER = "That event is over, or never was."


class Guard:
    """An ASGI middleware: answers `/healthz` and `/metrics`, bounds what one request may send, makes room for uploads within
    the disk budget, and answers what gradio's own routes break off at.
    """

    def __init__(self, app: Any, session: Session) -> None:
        self.app, self.session = app, session
        limits = session.limits
        # Every file has its own bound (gradio's `max_file_size`); a prompt of several pictures comes as one request.
        self.most = min(limits.upload_bytes * limits.prompt_frames, limits.disk_bytes) + 2**20

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        reading, path = scope["method"] in ("GET", "HEAD"), scope["path"]
        if reading and path == "/healthz":
            status, told = self.session.metrics.health()
            return await respond(send, status, json.dumps(told), "application/json")
        if reading and path == "/metrics":
            return await respond(send, 200, self.session.metrics.text(), CONTENT_TYPE)
        uploading = scope["method"] == "POST" and path.rstrip("/").endswith("/upload")
        most = self.most if uploading else REQUEST_BYTES
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > most:
            return await respond(send, 413, f"A request may have at most {most / 2**20:.0f} MB here.")
        if uploading:
            await asyncio.to_thread(self.session.store.sweep)
        event = EVENT.search(path) if reading else None
        if event and _is_over(scope["app"], event[1]):
            return await respond(send, 404, OVER)
        taken, answering, ended = 0, False, False

        async def bounded() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            # A sender that names no length is cut off where it goes too far, as if it had left.
            return message if taken <= most and not ended else {"type": "http.disconnect"}

        async def answer(message: Any) -> None:
            nonlocal answering, ended
            if ended:
                return
            answering = True
            # Asked for twice at the same moment: gradio would tell the second one that it is alive for ever.
            waiting = event and message.get("body", b"").startswith(b"event: heartbeat")
            if waiting and _is_over(scope["app"], event[1]):
                ended, body = True, f'event: error\ndata: "{OVER}"\n\n'.encode()
                message = {**message, "more_body": False, "body": body}
            await send(message)

        try:
            await self.app(scope, bounded, answer)
        except Exception:
            if answering:
                raise
            log.warning("a request broke off", exc_info=True)
            await respond(send, 400, "The request is not one that this server understands.")


async def respond(send: Any, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
    """A whole answer by ASGI; the connection ends, as not all that was sent may have been read."""
    body = text.encode()
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_over(app: Any, event: str) -> bool:
    """Whether an event of gradio's queue has been told to its end, or never was."""
    queue = app.get_blocks()._queue
    if event in queue.event_ids_to_events:
        return False
    of_session = list(queue.pending_event_ids_session.items())
    session = next((session for session, events in of_session if event in events), event)
    messages = queue.pending_messages_per_session.get(session)
    return messages is None or messages.empty()
