"""A Hub on 127.0.0.1 that speaks as much of the real one's HTTP as the client needs for a Space, and a folder to deploy.

Large files go the way they go in earnest, through the client's Xet library; it stores into a local folder instead of a server.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, SpaceHardware, constants

from ardiff.serving import space


ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_token-of-the-tests"
LARGE = 64 * 1024
"""Bytes from which on this Hub stores a file by its SHA-256 (the real one: 10 MB, and all safetensors)."""


@dataclass
class Space:
    """A Space as the Hub keeps it."""

    sdk: str
    visibility: str
    hardware: str
    sleep: int | None
    variables: dict[str, str]
    secrets: dict[str, str]
    volumes: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, tuple[str, int]] = field(default_factory=dict)
    commits: int = 1
    stages: list[str] = field(default_factory=lambda: ["NO_APP_FILE"])
    running: str | None = None

    @property
    def head(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def runtime(self) -> dict[str, Any]:
        return {
            "stage": self.stages[0],
            "hardware": {"current": self.hardware, "requested": self.hardware},
            "gcTimeout": self.sleep,
            "volumes": self.volumes,
            "sha": self.running,
        }


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class FakeHub(ThreadingHTTPServer):
    """`spaces` is its state, `writes` every request so far that changed something, `requests` every request."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cas = folder / "cas"
        self.cas.mkdir()
        self.spaces: dict[str, Space] = {}
        self.role = "write"
        self.script = ["BUILDING", "APP_STARTING", "RUNNING"]
        self.logs = {"build": [], "run": []}
        self.requests: list[str] = []
        self.writes: list[str] = []
        self.failures: list[tuple[str, Refusal]] = []
        self.lost: list[str] = []
        self.before_commit = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, request: str, status: int, message: str) -> None:
        """Refuse the next request that starts so, as "POST /api/repos/create", before it does anything."""
        self.failures.append((request, Refusal(status, message)))

    def lose_answer(self, request: str) -> None:
        """Do what the next such request asks for, then close the line without an answer."""
        self.lost.append(request)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for each other's acknowledgement, 40 ms a request
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        hub = self.server
        hub.requests.append(request)
        try:
            for failure in hub.failures:
                if request.startswith(failure[0]):
                    hub.failures.remove(failure)
                    raise failure[1]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials in Authorization header")
            matches = [(re.fullmatch(route, path), call) for method, route, call in ROUTES if method == self.command]
            match, call = next(((match, call) for match, call in matches if match), (None, None))
            if match is None:
                raise Refusal(501, f"this Hub knows no {request}")
            groups = match.groupdict()
            if "id" in groups and groups["id"] not in hub.spaces:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            content = body if call is commit else json.loads(body or "null")
            space = hub.spaces.get(groups.pop("id", ""))
            told = call(hub, space, content, **groups)
            if call in WRITERS:
                hub.writes.append(request)
                if space is not None and call in REBUILDERS:
                    space.stages = [space.stages[-1], *hub.script]
            if request in hub.lost:
                hub.lost.remove(request)
                self.close_connection = True
                return
            self.reply(200, told)
        except Refusal as refusal:
            self.reply(refusal.status, {"error": refusal.message}, refusal)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def reply(self, status: int, told: Any, refusal: Refusal | None = None) -> None:
        lines = isinstance(told, str)
        data = told.encode() if lines else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if lines else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if refusal is not None:
            self.send_header("X-Error-Message", refusal.message)
            if refusal.code:
                self.send_header("X-Error-Code", refusal.code)
        self.end_headers()
        self.wfile.write(data)


def whoami(hub, space, content):
    return {"name": "me", "orgs": [], "auth": {"accessToken": {"role": hub.role}}}


def create(hub, space, content):
    repo_id = f"{content['organization']}/{content['name']}"
    if repo_id in hub.spaces:
        raise Refusal(409, "You already created this space repo")
    check_hardware(content["hardware"])
    hub.spaces[repo_id] = Space(
        sdk=content["sdk"],
        visibility=content["visibility"],
        hardware=content["hardware"],
        sleep=content.get("sleepTimeSeconds"),
        variables={entry["key"]: entry["value"] for entry in content.get("variables", [])},
        secrets={entry["key"]: entry["value"] for entry in content.get("secrets", [])},
        volumes=content.get("volumes", []),
        files={".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"---\ntitle: new\n---\n"},
    )
    return {"url": f"{hub.url}/spaces/{repo_id}", "name": repo_id}


def info(hub, space, content):
    return {"id": "me/ardiff", "sha": space.head, "private": space.visibility != "public", "sdk": space.sdk}


def tree(hub, space, content, revision):
    if revision != space.head:
        raise Refusal(404, "Invalid rev id", "RevisionNotFound")
    files = [
        {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)} for path, data in space.files.items()
    ]
    folders = sorted({path.split("/")[0] for path in space.files if "/" in path})
    large = [
        {
            "type": "file",
            "path": path,
            "size": size,
            "oid": "0" * 40,
            "lfs": {"oid": oid, "size": size, "pointerSize": 134},
        }
        for path, (oid, size) in space.large.items()
    ]
    return [*({"type": "directory", "path": path, "oid": "1" * 40} for path in folders), *files, *large]


def runtime(hub, space, content):
    told = space.runtime()
    if len(space.stages) > 1:
        space.stages.pop(0)
        space.running = space.head if len(space.stages) == 1 else space.running
    return told


def variables(hub, space, content):
    return {key: {"value": value} for key, value in space.variables.items()}


def add_variable(hub, space, content):
    space.variables[content["key"]] = content["value"]
    return variables(hub, space, content)


def delete_variable(hub, space, content):
    del space.variables[content["key"]]
    return variables(hub, space, content)


def secrets(hub, space, content):
    return {key: {"updatedAt": "2026-01-01T00:00:00.000Z"} for key in space.secrets}


def add_secret(hub, space, content):
    space.secrets[content["key"]] = content["value"]
    return {}


def delete_secret(hub, space, content):
    del space.secrets[content["key"]]
    return {}


def set_volumes(hub, space, content):
    # as the Hub does: what was left out is filled in
    space.volumes = [{"revision": "main", "readOnly": False, **volume} for volume in content["volumes"]]
    return {}


def delete_volumes(hub, space, content):
    if not space.volumes:
        raise Refusal(400, "No volumes attached")
    space.volumes = []
    return {}


def set_hardware(hub, space, content):
    check_hardware(content["flavor"])
    space.hardware = content["flavor"]
    space.sleep = content.get("sleepTimeSeconds", space.sleep)
    return space.runtime()


def set_sleep(hub, space, content):
    space.sleep = content["seconds"]
    return space.runtime()


def set_settings(hub, space, content):
    space.visibility = content["visibility"]
    return {}


def validate(hub, space, content):
    assert content["repoType"] == "space"
    if not content["content"].startswith("---\n"):
        raise Refusal(400, "Invalid metadata")
    return {"warnings": [], "errors": []}


def preupload(hub, space, content):
    modes = {True: "lfs", False: "regular"}
    return {
        "files": [
            {"path": file["path"], "uploadMode": modes[file["size"] >= LARGE], "shouldIgnore": False}
            for file in content["files"]
        ]
    }


def xet_token(hub, space, content):
    return {"casUrl": f"local://{hub.cas}", "exp": int(time.time()) + 3600, "accessToken": "xet"}


def commit(hub, space, content):
    lines = [json.loads(line) for line in content.splitlines()]
    if hub.before_commit is not None:
        hub.before_commit(space)
    parent = lines[0]["value"].get("parentCommit")
    if parent not in (None, space.head):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "deletedFile":
            if not (space.files.pop(value["path"], None) or space.large.pop(value["path"], None)):
                raise Refusal(404, "A file with this name doesn't exist")
        elif line["key"] == "lfsFile":
            space.files.pop(value["path"], None)
            space.large[value["path"]] = (value["oid"], value["size"])
        else:
            space.large.pop(value["path"], None)
            space.files[value["path"]] = base64.b64decode(value["content"])
    space.commits += 1
    return {"commitUrl": f"{hub.url}/spaces/me/ardiff/commit/{space.head}", "commitOid": space.head}


def logs(hub, space, content, kind):
    events = [json.dumps({"data": line, "timestamp": "2026-01-01T00:00:00.000Z"}) for line in hub.logs[kind]]
    return "".join(f"data: {event}\n\n" for event in events)


def check_hardware(name: str) -> None:
    if name not in [flavour.value for flavour in SpaceHardware]:
        raise Refusal(400, f"unknown hardware {name}")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


SPACE = r"/api/spaces/(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", SPACE, info),
    ("GET", f"{SPACE}/tree/(?P<revision>[^/]+)", tree),
    ("GET", f"{SPACE}/runtime", runtime),
    ("GET", f"{SPACE}/variables", variables),
    ("POST", f"{SPACE}/variables", add_variable),
    ("DELETE", f"{SPACE}/variables", delete_variable),
    ("GET", f"{SPACE}/secrets", secrets),
    ("POST", f"{SPACE}/secrets", add_secret),
    ("DELETE", f"{SPACE}/secrets", delete_secret),
    ("PUT", f"{SPACE}/volumes", set_volumes),
    ("DELETE", f"{SPACE}/volumes", delete_volumes),
    ("POST", f"{SPACE}/hardware", set_hardware),
    ("POST", f"{SPACE}/sleeptime", set_sleep),
    ("PUT", f"{SPACE}/settings", set_settings),
    ("POST", f"{SPACE}/preupload/main", preupload),
    ("GET", f"{SPACE}/xet-write-token/main", xet_token),
    ("POST", f"{SPACE}/commit/main", commit),
    ("GET", f"{SPACE}/logs/(?P<kind>build|run)", logs),
]
REBUILDERS = [
    add_variable, delete_variable, add_secret, delete_secret, set_volumes, delete_volumes, set_hardware, commit,
]  # fmt: skip
WRITERS = [*REBUILDERS, create, set_sleep, set_settings]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running Hub without a Space, where `me` may write with TOKEN; nobody is signed in outside of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setattr(space, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(space, "SETTLE_SECONDS", 0.05)
    hub = FakeHub(tmp_path)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


@pytest.fixture
def api(hub: FakeHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small repository: the real spaces.yaml, README.md and requirements.txt, a package, one large file, and things to leave."""
    folder = tmp_path / "repository"
    for name in ("spaces.yaml", "README.md", "requirements.txt", "app.py", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    contents = {
        "ardiff/__init__.py": b"",
        "ardiff/models/part.py": b"PART = 1\n",
        "ardiff/__pycache__/part.pyc": b"compiled",
        "ardiff/.secret": b"hidden",
        "assets/weights.safetensors": hashlib.shake_128().digest(2 * LARGE),
        "examples/clip.mp4": b"\x00\x01",
        "runs/big.bin": b"not for the Space",
        "tests/test_part.py": b"",
    }
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("private")
    return folder
