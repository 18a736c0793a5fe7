"""What a studio on the open internet is sent: inputs drawn from a seed, and a visitor who sends them over HTTP.

`draw(kind, rng, media)` gives one input; `KINDS` are the kinds. Everything goes through the server's own endpoints.
"""

import base64
import io
import json
import random
import struct
import time
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import httpx
import numpy as np
from PIL import Image, PngImagePlugin


API = "/gradio_api"
ARGUMENTS = {
    "scene": "no scene", "prompt": None, "num_frames": 4, "ar_step": "1", "num_inference_steps": 5, "guidance_scale": 1,
    "seed": 3, "prompt_start": 0, "prompt_stride": 1, "prompt_count": 2, "model": "",
}  # fmt: skip

NASTY = (
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63, -(2**63),
    10**400, "", " ", "0", "-1", "nan", "1e9", "5,5", "5," * 3000, "[" * 5000, "9" * 5000, "x" * 200_000, "\x00", "\ud83d\ude00" * 50,
    "../../../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "file:///etc/passwd", "http://127.0.0.1:9/x",
    "{{7*7}}", "${jndi:ldap://127.0.0.1/x}", "<img src=x onerror=alert(1)>", "'; DROP TABLE runs; --", "%00%n%s", "\u202egpj.exe",
    [], [[]], [None], [1, 2, 3], {}, {"a": 1}, {"path": "/etc/passwd"}, {"__type__": "update", "value": 1}, [[[[[[[[]]]]]]]],
)  # fmt: skip

NAMES = (
    "a", "\u732b\u306e\u5199\u771f", "\U0001f600" * 20, "n\u0303o\u0308", "a b\tc", "x" * 300, "..", "...", ".hidden", "-rf", "a;b|c&d$(e)`f`",
    "..%2f..%2fetc", "../../escape", "/etc/shadow", "con", "a\u202eb", "'\"<b>", "%s%n", "\u200b",
)  # fmt: skip

SUFFIXES = (
    ".png", ".jpg", ".webp", ".bmp", ".gif", ".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v",
    ".txt", ".svg", ".json", ".pt", ".pkl", ".exe", "", ".mp4.exe", ".PNG", ".m3u8", ".tiff",
)  # fmt: skip

INTERNAL = (
    "Traceback", "NoneType", "object is not", "has no attribute", "unexpected keyword", "positional argument", "Errno",
    "not subscriptable", "codec can't", "invalid literal", "cannot convert", "list index", "KeyError", "TypeError", "site-packages",
)  # fmt: skip
"""Words of a programmer, not of an answer to a visitor."""


@dataclass
class Outcome:
    """`kind`: "refused" with `words`, "result" with `data`, or "left" where the visitor went away."""

    kind: str
    words: str = ""
    status: int = 200
    data: Any = None


@dataclass
class Input:
    """One thing that a visitor does: what it is called, and how."""

    name: str
    act: Any
    valid: dict[str, Any] | None = field(default=None)  # the arguments, where a right result must be of these


class Visitor:
    """Speaks to the server as gradio's clients do, and as others do."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def upload(self, name: str, content: bytes) -> str | Outcome:
        """The path on the server of an uploaded file, or how it was refused."""
        answer = httpx.post(f"{self.url}{API}/upload", files={"files": (name, content)}, timeout=60)
        return answer.json()[0] if answer.status_code == 200 else refused(answer)

    def call(self, api: str, arguments: dict[str, Any], leave_after: int | None = None) -> Outcome:
        body = json.dumps({"data": list(arguments.values())})
        return self.send(api, body, leave_after)

    def send(self, api: str, body: str | bytes, leave_after: int | None = None) -> Outcome:
        headers = {"content-type": "application/json"}
        answer = self.http.post(f"{API}/call/{api}", content=body, headers=headers)
        if answer.status_code != 200:
            return refused(answer)
        if leave_after == 0:
            return Outcome("left")
        return self.listen(f"{API}/call/{api}/{answer.json()['event_id']}", leave_after)

    def listen(self, path: str, leave_after: int | None = None) -> Outcome:
        event, heard, end = "", 0, time.monotonic() + 60
        with self.http.stream("GET", path) as answer:
            if answer.status_code != 200:
                answer.read()
                return refused(answer)
            for line in answer.iter_lines():
                assert time.monotonic() < end, "a stream that does not end"
                if line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    told = json.loads(line[6:])
                    if event == "complete":
                        return Outcome("result", data=told)
                    if event == "error":
                        words = told.get("error") if isinstance(told, dict) else told
                        return Outcome("refused", str(words))
                    heard += 1
                    if heard == leave_after:
                        return Outcome("left")
        return Outcome("refused", "the stream ended without a word")

    def join(self, fn_index: int, data: list[Any], session: str) -> Outcome:
        """A function of the page by its number, as the page's own script asks for it."""
        body = {"data": data, "fn_index": fn_index, "session_hash": session}
        headers, end = {"content-type": "application/json"}, time.monotonic() + 60
        answer = self.http.post(f"{API}/queue/join", content=json.dumps(body), headers=headers)
        if answer.status_code != 200:
            return refused(answer)
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                assert time.monotonic() < end, "a stream that does not end"
                told = json.loads(line[6:]) if line.startswith("data: ") else {}
                if told.get("msg") in ("process_completed", "unexpected_error"):
                    output = told.get("output") or {}
                    if told.get("success"):
                        return Outcome("result", data=output.get("data"))
                    return Outcome("refused", str(output.get("error") or told.get("message")))
        return Outcome("refused", "the stream ended without a word")


def refused(answer: httpx.Response) -> Outcome:
    return Outcome("refused", answer.text[:2000], answer.status_code)


def file_data(path: Any, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


# Media ----------------------------------------------------------------------------------------------------------------


def encoded_picture(kind: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:
    rng = np.random.default_rng(size[0])
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    image = Image.new("I;16", size, 40_000) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded_video(
    suffix: str = "mp4", codec: str = "libx264", pix_fmt: str = "yuv420p", frames: int = 6, size: tuple[int, int] = (32, 32),
    rate: int = 8, seconds_each: int | None = None,
) -> bytes:  # fmt: skip
    rng, buffer = np.random.default_rng(frames), io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if seconds_each:
            stream.codec_context.time_base = Fraction(1, 1)
        for index in range(frames):
            picture = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            if seconds_each:
                frame.pts, frame.time_base = index * seconds_each, Fraction(1, 1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes, *, depth: int = 8, colour: int = 0, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    """Small files that ask for much memory."""
    zeros = zlib.compress(bytes(2**26), 9)
    text = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(2**27), 9))
    profile = chunk(b"iCCP", b"x\x00\x00" + zeros)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;"
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 58, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    return {
        "claims.png": png(2**31 - 1, 2**31 - 1, zeros),
        "wide.png": png(60_000, 60_000, zeros),
        "black.png": png(20_000, 20_000, zlib.compress(bytes(2501 * 20_000), 9), depth=1),
        "text.png": png(1, 1, zlib.compress(b"\x00\x00"), more=text),
        "profile.png": png(1, 1, zlib.compress(b"\x00\x00"), more=profile),
        "inflates.png": png(2, 2, zeros),
        "canvas.gif": gif,
        "header.bmp": bmp + bytes(4),
        "legal.png": png(6300, 6300, zlib.compress(bytes(6301 * 6300), 9)),
    }


def make_media() -> dict[str, bytes]:
    """Files by name. Those that start with `good-` must give a result, those with `bad-` must be refused.

    Unpickling `bad-pickle.png` would write a file called `executed` where the server runs.
    """
    made = {
        "good-rgb.png": encoded_picture("PNG", "RGB", (40, 30)),
        "good-rgba.png": encoded_picture("PNG", "RGBA", (33, 57)),
        "good-palette.png": encoded_picture("PNG", "P", (40, 30), transparency=3),
        "good-grey-alpha.png": encoded_picture("PNG", "LA", (7, 5)),
        "good-sixteen.png": encoded_picture("PNG", "I;16", (40, 30)),
        "good-one-bit.png": encoded_picture("PNG", "1", (40, 30)),
        "good-cmyk.jpg": encoded_picture("JPEG", "CMYK", (40, 30)),
        "good-grey.jpg": encoded_picture("JPEG", "L", (41, 31), progressive=True),
        "good-lossless.webp": encoded_picture("WEBP", "RGBA", (40, 30), lossless=True),
        "good-small.bmp": encoded_picture("BMP", "RGB", (1, 1)),
        "good-line.png": encoded_picture("PNG", "RGB", (1, 4000)),
        "good-row.png": encoded_picture("PNG", "RGB", (4000, 1)),
        "good-plain.mp4": encoded_video(),
        "good-444.mp4": encoded_video(pix_fmt="yuv444p"),
        "good-ten-bit.mp4": encoded_video(pix_fmt="yuv420p10le"),
        "good-lossless.mkv": encoded_video("mkv", "ffv1", "bgr0", size=(33, 17)),
        "good-sixteen.mkv": encoded_video("mkv", "ffv1", "gray16le", size=(31, 19)),
        "good-jpeg.avi": encoded_video("avi", "mjpeg", "yuvj422p"),
        "good-odd.mp4": encoded_video(pix_fmt="yuv444p", size=(35, 17)),
        "good-two.mov": encoded_video("mov", frames=2),
        "bad-hour.mp4": encoded_video(frames=4, seconds_each=1200),
        "bad-empty.png": b"",
        "bad-empty.mp4": b"",
        "bad-text.png": b"hello",
        "bad-text.mp4": b"hello" * 100,
        "bad-playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n",
        "bad-concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "bad-pickle.png": b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
        "bad-svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "bad-zip.webp": b"PK\x03\x04" + bytes(100),
    }
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "<?php system('id'); ?>" * 100)
    made["good-php.png"] = encoded_picture("PNG", "RGB", (20, 20), pnginfo=info)
    made["good-and-zip.png"] = made["good-rgb.png"] + b"PK\x05\x06" + bytes(18)
    made["good-and-html.jpg"] = made["good-grey.jpg"] + b"<script>alert(1)</script>"
    made["any-picture-in.mp4"] = made["good-rgb.png"]
    made["any-video-in.png"] = made["good-plain.mp4"]
    made["any-one-frame.mp4"] = encoded_video(frames=1)
    where = made["good-plain.mp4"].index(b"mvhd") + 4 + 16
    lying = bytearray(made["good-plain.mp4"])
    lying[where : where + 4] = struct.pack(">I", 2**31)
    made["any-lying-duration.mp4"] = bytes(lying)
    return made


def damaged(rng: random.Random, media: dict[str, bytes]) -> tuple[str, bytes]:
    """A file that was cut off, or in which bytes are wrong, doubled or missing."""
    name = rng.choice([name for name in media if name.startswith("good-")])
    content = bytearray(media[name])
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(max(len(content), 1))
        match rng.randrange(5):
            case 0:
                del content[at:]
            case 1:
                del content[at : at + rng.randrange(64)]
            case 2:
                content[at:at] = rng.randbytes(rng.randrange(64))
            case 3:
                content[at : at + 1] = rng.randbytes(1)
            case 4:
                content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"))
    return name.removeprefix("good-"), bytes(content)


# Inputs ---------------------------------------------------------------------------------------------------------------


def values(rng: random.Random, site: Any) -> Input:
    """Arguments of wrong type, range, size and number."""
    arguments = dict(ARGUMENTS)
    for name in rng.sample(sorted(arguments), rng.choice((1, 1, 1, 2, 4))):
        arguments[name] = rng.choice(NASTY)
    return Input(f"values {arguments!r:.300}", lambda visitor: visitor.call("generate", arguments), arguments)


def bodies(rng: random.Random, site: Any) -> Input:
    """Requests that are not what the endpoint reads."""
    usual = json.dumps({"data": list(ARGUMENTS.values())})
    body = rng.choice(
        (
            "", "null", "[]", "{", '"x"', "{}", '{"data": 1}', '{"data": {}}', '{"data": null}', '{"data": []}', "[" * 20_000,
            '{"data": ' + "[" * 900 + "]" * 900 + "}", '{"data": [' + "0," * 500 + "0]}", b"\xff\xfe\x00", usual[: rng.randrange(len(usual))],
            usual.replace("data", "date"), usual.replace("}", ', "fn_index": 99999}'), usual.replace("}", ', "session_hash": "../x"}'),
            usual.replace("}", ', "simple_format": true}'), usual.replace("}", ', "event_data": {"run": "../../x"}}'), "x" * 1_000_000,
        )
    )  # fmt: skip
    api = rng.choice(("generate", "generate", "stream", "nothing", "..%2f..%2fetc", "lambda", "generate%00"))
    return Input(f"body {api} {body!r:.120}", lambda visitor: visitor.send(api, body))


def files(rng: random.Random, site: Any) -> Input:
    """Uploads: every kind of file, whole, damaged and disguised, with every kind of name."""
    name = rng.choice(sorted(site.media))
    content, expected = site.media[name], name.split("-")[0]
    if rng.random() < 0.5:
        (name, content), expected = damaged(rng, site.media), "any"
    name = name.split("-", 1)[-1]
    if rng.random() < 0.3:
        name, expected = rng.choice(NAMES) + rng.choice(SUFFIXES), "any"
    arguments = dict(ARGUMENTS, num_frames=5)
    if rng.random() < 0.3:
        trim = rng.choice(("prompt_start", "prompt_stride", "prompt_count"))
        arguments[trim], expected = rng.choice((0, 1, 2, 3, 8, 2**31, -1, 2.5)), "any"

    def act(visitor: Visitor) -> Outcome:
        path = visitor.upload(name, content)
        if isinstance(path, Outcome):
            return path
        outcome = visitor.call("generate", {**arguments, "prompt": [file_data(path)]})
        wrong = {"good": "refused", "bad": "result"}.get(expected)
        assert outcome.kind != wrong, (name, outcome)
        return outcome

    return Input(f"file {name!r:.60} of {len(content)} bytes, {expected}, {arguments}", act, arguments)


def bomb(rng: random.Random, site: Any) -> Input:
    """Small files that grow."""
    name = rng.choice(sorted(site.bombs))
    return Input(f"bomb {name}", lambda visitor: prompted(visitor, name, site.bombs[name]), dict(ARGUMENTS))


def prompted(visitor: Visitor, name: str, content: bytes) -> Outcome:
    path = visitor.upload(name, content)
    if isinstance(path, Outcome):
        return path
    return visitor.call("generate", {**ARGUMENTS, "prompt": [file_data(path)]})


def paths(rng: random.Random, site: Any) -> Input:
    """Files of others: by their path as a prompt, or fetched. None may be read."""
    secret = rng.choice(site.secrets)
    path = rng.choice(
        (
            str(secret), f"file://{secret}", f"{site.uploads}/../..{secret}", f"{site.uploads}/x/../../../../../..{secret}",
            str(secret).replace("/", "%2f"), f"/proc/self/root{secret}", f"{secret}\x00.png", f"{site.spy}/secret.png",
            "/proc/self/environ", "/dev/zero", "/dev/stdin", str(site.link), ".", "/", "", "app.py", "//etc/passwd", "\\\\host\\share\\x.png",
        )
    )  # fmt: skip
    if rng.random() < 0.4:
        route = rng.choice(("file=", "file/", "proxy=", "stream/a/b/", "upload_progress?upload_id=", "deep_link="))

        def fetch(visitor: Visitor) -> Outcome:
            answer = visitor.http.get(f"{API}/{route}{path}".replace("\x00", "%00"))
            assert b"SECRET" not in answer.content
            assert b"root:" not in answer.content
            return Outcome("refused", answer.text[:2000], answer.status_code)

        return Input(f"fetch {route}{path!r}", fetch)
    prompt = rng.choice(
        (
            [file_data(path)],
            [file_data(path, url=f"{site.spy}/x.png")],
            [path],
            path,
            file_data(path),
            [{"path": path}],
        )
    )
    arguments = dict(ARGUMENTS, prompt=prompt)

    def act(visitor: Visitor) -> Outcome:
        outcome = visitor.call("generate", arguments)
        assert outcome.kind == "refused", outcome
        return outcome

    return Input(f"path {prompt!r}", act)


def page(rng: random.Random, site: Any) -> Input:
    """The page's own functions, by number, with anything for arguments."""
    function = rng.choice(site.functions)
    data = [rng.choice(NASTY) for _ in range(function.inputs)]
    if rng.random() < 0.5 and site.recorded.get(function.index):
        data = list(site.recorded[function.index])
        data[rng.randrange(len(data))] = rng.choice(NASTY)
    session = f"{rng.getrandbits(60):x}"
    return Input(f"page {function} {data!r:.200}", lambda visitor: visitor.join(function.index, data, session))


def settings(rng: random.Random, site: Any) -> Input:
    """Settings files for the page: damaged, wrong and greedy."""
    asked = json.loads(site.settings)
    match rng.randrange(4):
        case 0:
            text = site.settings[: rng.randrange(len(site.settings))]
        case 1:
            asked[rng.choice(sorted(asked))] = rng.choice(NASTY)
            text = json.dumps(asked)
        case 2:
            big = png(rng.choice((6000, 60_000)), 6000, zlib.compress(bytes(1000)))
            url = "data:image/png;base64," + base64.b64encode(big).decode()
            asked["prompt"] = {"source": "x", "frames": [url] * rng.choice((1, 9, 70))}
            text = json.dumps(asked)
        case _:
            text = rng.choice(("[" * 100_000, "1" * 5000, "{}", "\x00", '{"model": "' + "x" * 10**6 + '"}', "NaN"))
    session = f"{rng.getrandbits(60):x}"

    def act(visitor: Visitor) -> Outcome:
        path = visitor.upload("settings.json", text.encode("utf-8", "surrogatepass"))
        if isinstance(path, Outcome):
            return path
        return visitor.join(site.reader, [site.model, [file_data(path)], 0, 1, 4], session)

    return Input(f"settings {text!r:.120}", act)


def order(rng: random.Random, site: Any) -> Input:
    """Requests that come twice, too late, too early or to an end that nobody waits for."""
    event, session = f"{rng.getrandbits(128):032x}", f"{rng.getrandbits(40):x}"
    headers = {"content-type": "application/json"}

    def again(visitor: Visitor) -> Outcome:
        answer = visitor.http.post(f"{API}/call/generate", json={"data": list(ARGUMENTS.values())})
        path = f"{API}/call/generate/{answer.json()['event_id']}"
        first, second = visitor.listen(path), visitor.listen(path)
        assert first.kind == "result"
        assert second.words == "That event is over, or never was."
        return second

    def reset(visitor: Visitor) -> Outcome:
        body = {"data": list(ARGUMENTS.values()), "session_hash": session}
        event = visitor.http.post(f"{API}/call/stream", json=body).json()["event_id"]
        for path, told in (
            ("cancel", {"session_hash": session, "fn_index": 0, "event_id": event}),
            ("reset", {"event_id": event}),
        ):
            visitor.http.post(f"{API}/{path}", content=json.dumps(told), headers=headers)
        return Outcome("left")

    acts = {
        "an event that never was": lambda visitor: visitor.listen(f"{API}/call/generate/{event}"),
        "the same event twice": again,
        "cancelled by its name": reset,
        "somebody else's event cancelled": lambda visitor: refused(
            visitor.http.post(f"{API}/cancel", json={"session_hash": session, "fn_index": 1, "event_id": event})
        ),
        "a run that never was, stopped": lambda visitor: visitor.join(site.stopper, [event], session),
        "a run that never was, recovered": lambda visitor: visitor.join(site.recoverer, [event], session),
        "a wrong method": lambda visitor: refused(visitor.http.request("DELETE", f"{API}/call/generate")),
        "an upload of nothing": lambda visitor: refused(visitor.http.post(f"{API}/upload", content=b"", headers=headers)),
        "an upload without an end": lambda visitor: refused(
            visitor.http.post(
                f"{API}/upload",
                content=b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(1000),
                headers={"content-type": "multipart/form-data; boundary=x"},
            )
        ),
        "an upload beyond the limit": lambda visitor: refused(
            visitor.http.post(f"{API}/upload", files={"files": ("a.png", bytes(site.limits.upload_bytes + 2**20))})
        ),
    }  # fmt: skip
    name = rng.choice(sorted(acts))
    return Input(name, acts[name])


def leaving(rng: random.Random, site: Any) -> Input:
    """A visitor who goes away before, during or after a run."""
    arguments = dict(ARGUMENTS, num_frames=rng.choice((4, 8)), num_inference_steps=rng.choice((5, 40)), ar_step="5")
    after = rng.randrange(12)
    return Input(f"leaves after {after} events", lambda visitor: visitor.call("stream", arguments, after))


KINDS = {
    "values": values, "files": files, "paths": paths, "page": page, "settings": settings, "bodies": bodies, "order": order,
    "leaving": leaving, "bomb": bomb,
}  # fmt: skip
