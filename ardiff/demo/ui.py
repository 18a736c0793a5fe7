"""The studio's page: layout and wiring (gradio), nothing else. What happens is in session.py, what is drawn in static/.

The page's picture of a run is one JSON value (`RunView.value`): noise levels in [0, 1], one entry per frame, and one
base64 picture per frame that is replaced only when that frame changed, because only changed entries are sent.
"""

from __future__ import annotations

import base64
import io
import os
import re
import secrets
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch
from gradio.themes.utils.fonts import LocalFont
from PIL import Image

from ardiff.demo.presets import (
    GAP_PRESETS,
    LIMITS,
    NO_SCENE,
    PLAN_HTML,
    STAGE_HTML,
    TEXT,
    Event,
    Failed,
    Finished,
    FrameReady,
    GenerationRequest,
    Preview,
    Progress,
    Prompt,
    Queued,
)
from ardiff.demo.session import Session


STATIC = Path(__file__).parent / "static"
EXAMPLES = Path(__file__).parents[2] / "examples"

MOUNT = """
const mount = () => (window.ardiffStudio ? window.ardiffStudio.{name}(element, props, watch) : setTimeout(mount, 20));
mount();
"""

# JavaScript that runs in the browser alone: arguments are the controls, in the order given where it is wired.
MOVED_JS = (
    "(length, gap, steps, guidance, used, scene) => "
    f"{{ window.ardiffStudio.setControls(length, gap, steps, guidance, used, scene !== '{NO_SCENE}'); }}"
)
STEPS_JS = "(steps, gap) => ({ __type__: 'update', maximum: steps, value: Math.min(gap, steps) })"
# On a narrow screen the controls lie below the stage: whoever pressed Generate wants to watch.
WATCH_JS = (
    "() => { if (matchMedia('(max-width: 900px)').matches)"
    " document.getElementById('ar-stage').scrollIntoView({ block: 'start' }); }"
)
DICE_JS = "() => [Math.floor(Math.random() * 4294967296), true]"


def data_url(frame: np.ndarray, *, lossless: bool) -> str:
    """A (H, W, 3) uint8 frame as a data URL: PNG for finished frames, a small JPEG for passing guesses."""
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    Image.fromarray(frame).save(buffer, kind, **({} if lossless else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def plain(error: ValueError) -> str:
    """An error's sentence for a person: the controls have names there, not the library's arguments."""
    return re.sub(r" \(`\w+`\)", "", str(error)).replace("`ar_step`", "The timestep gap").replace("`", "")


def idle_value(title: str, message: str, phase: str = "idle") -> dict[str, Any]:
    """What the stage shows when nothing runs: words alone, the frames are drawn from the controls."""
    return {"run": "", "phase": phase, "title": title, "message": message}


READY = idle_value("Ready", "Choose a scene, or give the first frames yourself, and press Generate.")


class RunView:
    """The page's picture of one run, kept up to date event by event."""

    def __init__(self, request: GenerationRequest, session: Session) -> None:
        count = request.num_frames
        self.request, self.session = request, session
        self.run_id = ""
        self.phase, self.title, self.message, self.time = "queued", "Starting", "", ""
        self.iteration = self.finished = 0
        self.levels = [0.0] * request.num_prompt_frames + [1.0] * (count - request.num_prompt_frames)
        self.pics, self.rev = [""] * count, [0] * count
        self.result: Finished | Failed | None = None

    def absorb(self, event: Event) -> bool:
        """Take in one event. True when the page should be drawn: pictures wait for the progress that follows them."""
        self.run_id = event.run_id
        match event:
            case Queued(place=place):
                self.title = "Waiting" if place else "Starting"
                runs = "one run is" if place == 1 else f"{place} runs are"
                self.message = f"The model is busy: {runs} before yours." if place else "The model takes up your run."
            case FrameReady(index=index, frame=frame):
                self.finished = index + 1
                self._picture(index, data_url(frame, lossless=True))
                return False
            case Preview(frames=frames):
                for index, frame in frames:
                    self._picture(index, data_url(frame, lossless=False))
                return False
            case Progress():
                self._progress(event)
            case Finished() | Failed():
                self._conclude(event)
        return True

    def _picture(self, index: int, url: str) -> None:
        self.pics[index] = url
        self.rev[index] += 1

    def _progress(self, event: Progress) -> None:
        self.phase, self.iteration, self.levels = "running", event.iteration, list(event.noise_level)
        self.title = "Clearing up"
        self.time = f"{span(event.time_left)} left"
        ready = "The first new frame is on its way." if self.finished <= self.request.num_prompt_frames else ""
        self.message = ready or "Finished frames already play. Stop keeps them."

    def _conclude(self, event: Finished | Failed) -> None:
        self.result = event
        if isinstance(event, Failed):
            self.phase, self.title, self.message = "failed", "Something went wrong", event.message
            return
        self.phase, self.title, self.time = "done", "Done", span(event.seconds)
        self.message = f"{event.num_frames} frames in {span(event.seconds)}."
        if event.stopped:
            frames = "one finished frame is" if event.num_frames == 1 else f"{event.num_frames} finished frames are"
            self.title = "Stopped"
            self.message = f"The {frames} kept." if event.video else "Stopped before a frame was finished."

    @property
    def value(self) -> dict[str, Any]:
        request = self.request
        return {
            "run": self.run_id,
            "phase": self.phase,
            "title": self.title,
            "message": self.message,
            "time": self.time,
            "frames": request.num_frames,
            "steps": request.num_inference_steps,
            "gap": request.ar_step,
            "prompts": request.num_prompt_frames,
            "seed": request.seed,
            "iteration": self.iteration,
            "finished": self.finished,
            "levels": list(self.levels),
            "pics": list(self.pics),
            "rev": list(self.rev),
            "model": model_facts(self.session),
        }


def model_facts(session: Session) -> dict[str, float]:
    """What the browser needs to judge a plan: the window and the measured seconds per call and per frame evaluation."""
    return {"window": session.window, "call": session.cost.call, "frame": session.cost.frame}


def make_request(
    session: Session, scene: str | None, prompt: Prompt | None, used: float, length: float, gap: float, steps: float,
    guidance: float, seed: float,
) -> GenerationRequest:  # fmt: skip
    """A request from the values of the controls. Raises ValueError with one sentence."""
    if prompt is not None:
        count = int(used) or min(len(prompt.frames), int(LIMITS.prompt_frames.default))
        prompt = Prompt(prompt.frames[:count], prompt.source)
    return GenerationRequest(
        scene=None if scene in (None, "", NO_SCENE) else scene,
        prompt=prompt,
        num_frames=whole(length),
        ar_step=whole(gap),
        num_inference_steps=whole(steps),
        guidance_scale=guidance,
        seed=whole(seed),
    )


def whole(value: Any) -> Any:
    """Browsers send 16.0 for 16; anything that is not a whole number is left for the request to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Studio:
    """The page's callbacks, around one session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def generate(
        self, scene: str, files: list[str] | None, prompt: Prompt | str | None, used: float, length: float, gap: float,
        steps: float, guidance: float, seed: float, keep: bool,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Run and draw.

        Inputs: the controls. Outputs: stage, run id, seed, generate, stop, download, settings.
        """
        seed = whole(seed) if keep else secrets.randbelow(LIMITS.seed_max + 1)
        try:
            if isinstance(prompt, str):
                raise ValueError(prompt)
            prompt = prompt or self.session.read_prompt(files or [])
            request = make_request(self.session, scene, prompt, used, length, gap, steps, guidance, seed)
            events = self.session.run(request)
        except ValueError as error:
            yield self._outputs(idle_value("Please change something", plain(error), "failed"), seed=seed)
            return
        view = RunView(request, self.session)
        try:
            for event in events:
                if view.absorb(event):
                    yield self._outputs(view.value, view=view, seed=seed)
        finally:
            events.close()

    def _outputs(self, value: dict[str, Any], *, seed: int, view: RunView | None = None) -> tuple[Any, ...]:
        if view is not None and view.phase == "running":
            return value, *[gr.skip()] * 6
        if view is None:
            return value, gr.skip(), seed, *[gr.skip()] * 4
        over = view.result is not None
        video = view.result.video if over else None
        return (
            value,
            view.run_id,
            seed,
            gr.update(interactive=over),
            gr.update(interactive=not over),
            gr.update(value=video, visible=video is not None),
            gr.update(value=video and video.with_name("settings.json"), visible=video is not None),
        )

    def api_generate(
        self, scene: str | None, prompt: list[str] | None = None, prompt_frames_used: float = 0, num_frames: float = 16,
        ar_step: float = 5, num_inference_steps: float = 50, guidance_scale: float = 2.0, seed: float = 0,
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        """Generate a video and return its MP4 and the settings that give the same frames again.

        `scene` is a name or "no scene"; `prompt` is a list of pictures or one video; `prompt_frames_used` 0 takes at most
        four of them; `num_frames` counts the prompt frames; `ar_step` is the timestep gap, 0 to `num_inference_steps`.
        """
        try:
            frames = self.session.read_prompt(prompt or [])
            request = make_request(
                self.session, scene, frames, prompt_frames_used, num_frames, ar_step, num_inference_steps,
                guidance_scale, seed,
            )  # fmt: skip
            *_, last = self.session.run(request)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        if isinstance(last, Failed):
            raise gr.Error(last.message)
        return str(last.video), last.settings

    def stop(self, run_id: str) -> None:
        """End the visitor's run; its own generator then draws what was kept. Inputs: run id."""
        self.session.stop(run_id)

    def read_prompt(self, files: list[str] | None) -> tuple[Any, str, Any]:
        """Decode an upload once and show it as the model sees it. Inputs: files. Outputs: prompt, strip, frames used."""
        try:
            prompt = self.session.read_prompt(files or [])
        except ValueError as error:
            return plain(error), f'<p class="ar-bad" role="alert">{escape(plain(error))}</p>', hidden_count()
        if prompt is None:
            return None, "", hidden_count()
        count = len(prompt.frames)
        shown = "".join(
            f'<img src="{data_url(frame, lossless=True)}" alt="Prompt frame {index}, as the model sees it">'
            for index, frame in enumerate(self.session.prompt_preview(prompt), start=1)
        )
        strip = f'<div class="ar-prompt"><div>{shown}</div><p>{TEXT["prompt_caption"]}</p></div>'
        used = min(count, int(LIMITS.prompt_frames.default))
        return prompt, strip, gr.update(minimum=1, maximum=max(count, 2), value=used, visible=count > 1)


def hidden_count() -> dict[str, Any]:
    return gr.update(minimum=0, maximum=int(LIMITS.prompt_frames.high), value=0, visible=False)


def list_examples(session: Session) -> tuple[list[list[Any]], list[str]]:
    """Rows that fill every control (in the order of build_demo's `filled`) and their labels."""
    length, steps, guidance = int(LIMITS.length.default), int(LIMITS.steps.default), LIMITS.guidance.default
    rows, labels = [], []
    for index, scene in enumerate(session.scenes[:3]):
        gap = (5, 10, 0)[index]
        rows.append([scene, None, length, gap, steps, guidance, index + 1, True])
        labels.append(f"{scene.capitalize()}, gap {gap}")
    for path in sorted(EXAMPLES.glob("*.mp4")) + sorted(EXAMPLES.glob("*.png")):
        scene = next((name for name in session.scenes if name in path.stem), NO_SCENE)
        rows.append([scene, [str(path)], length, LIMITS.gap_default, steps, guidance, 1, True])
        labels.append(f"Continue {'a clip' if path.suffix == '.mp4' else 'a picture'}: {path.stem}")
    return rows, labels


def build_demo(session: Session) -> gr.Blocks:
    """The page around `session`. Launch it with `launch_arguments`, which carry its theme, style and script."""
    studio = Studio(session)
    limits = LIMITS
    with gr.Blocks(title=TEXT["title"], analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        run_id, prompt = gr.State(""), gr.State(None)
        gr.HTML(
            f'<header class="ar-header"><h1>ardiff<span>.</span>studio</h1><p>{TEXT["tagline"]}</p>'
            f'<span class="ar-chip">{escape(session.name)} &middot; {session.image_size} px &middot; '
            f"{escape(session.device)}</span></header>",
            apply_default_css=False,
        )
        with gr.Row(elem_id="ar-body"):
            with gr.Column(elem_id="ar-controls"):
                scene = gr.Dropdown(
                    [*session.scenes, NO_SCENE], value=(*session.scenes, NO_SCENE)[0], label=TEXT["scene"],
                    filterable=False, elem_id="ar-scene",
                )  # fmt: skip
                gr.HTML(
                    f'<p class="ar-label">{TEXT["prompt"]} <span>{TEXT["prompt_info"]}</span></p>',
                    apply_default_css=False,
                )
                files = gr.File(
                    file_count="multiple", label=TEXT["prompt"], show_label=False, height=84, elem_id="ar-files"
                )
                strip = gr.HTML("", elem_id="ar-prompt-strip", apply_default_css=False)
                used = gr.Slider(
                    0, int(limits.prompt_frames.high), 0, step=1, label=TEXT["prompt_used"], visible=False,
                    elem_id="ar-used",
                )  # fmt: skip
                length = gr.Slider(
                    limits.length.low, limits.length.high, limits.length.default, step=1, label=TEXT["length"],
                    elem_id="ar-length",
                )  # fmt: skip
                gap = gr.Slider(
                    0, limits.steps.default, limits.gap_default, step=1, label=TEXT["gap"], elem_id="ar-gap"
                )
                with gr.Row(elem_classes="ar-presets"):
                    presets = [gr.Button(preset.name, size="sm") for preset in GAP_PRESETS]
                plan = gr.HTML(
                    plan_value(session), html_template=PLAN_HTML, js_on_load=MOUNT.replace("{name}", "mountPlan"),
                    elem_id="ar-plan", apply_default_css=False,
                )  # fmt: skip
                with gr.Accordion(TEXT["more"], open=False, elem_id="ar-more"):
                    steps = gr.Slider(
                        limits.steps.low, limits.steps.high, limits.steps.default, step=1, label=TEXT["steps"],
                        elem_id="ar-steps",
                    )  # fmt: skip
                    guidance = gr.Slider(
                        limits.guidance.low, limits.guidance.high, limits.guidance.default, step=0.1,
                        label=TEXT["guidance"], info=TEXT["guidance_info"], elem_id="ar-guidance",
                    )  # fmt: skip
                with gr.Row(elem_id="ar-seed-row"):
                    seed = gr.Number(1, label=TEXT["seed"], precision=0, minimum=0, elem_id="ar-seed", min_width=100)
                    dice = gr.Button(TEXT["dice"], size="sm", elem_id="ar-dice", min_width=64)
                    keep = gr.Checkbox(False, label=TEXT["keep"], elem_id="ar-keep", min_width=80)
                with gr.Row(elem_id="ar-go"):
                    go = gr.Button(TEXT["generate"], variant="primary", elem_id="ar-generate")
                    stop = gr.Button(TEXT["stop"], interactive=False, elem_id="ar-stop")
            with gr.Column(elem_id="ar-stage-column"):
                stage = gr.HTML(
                    READY, html_template=STAGE_HTML, js_on_load=MOUNT.replace("{name}", "mountStage"), elem_id="ar-stage",
                    apply_default_css=False,
                )  # fmt: skip
                with gr.Row(elem_id="ar-results"):
                    mp4 = gr.DownloadButton(TEXT["download"], visible=False, elem_id="ar-mp4")
                    settings = gr.DownloadButton(TEXT["settings"], visible=False, elem_id="ar-settings")
                filled = [scene, files, length, gap, steps, guidance, seed, keep]
                rows, labels = list_examples(session)
                if rows:
                    gr.Examples(rows, filled, example_labels=labels, label=TEXT["examples"], elem_id="ar-examples")

        schedule = [length, gap, steps, guidance, used, scene]
        for control in schedule:
            control.change(None, schedule, None, js=MOVED_JS, api_visibility="private", queue=False)
        steps.change(None, [steps, gap], gap, js=STEPS_JS, api_visibility="private", queue=False)
        for preset, button in zip(GAP_PRESETS, presets, strict=True):
            js = "(steps) => steps" if preset.gap is None else f"(steps) => Math.min({preset.gap}, steps)"
            button.click(None, steps, gap, js=js, api_visibility="private", queue=False)
        dice.click(None, None, [seed, keep], js=DICE_JS, api_visibility="private", queue=False)
        files.change(
            studio.read_prompt, files, [prompt, strip, used], api_visibility="private", show_progress="hidden",
            concurrency_limit=4,
        )  # fmt: skip
        go.click(
            studio.generate,
            [scene, files, prompt, used, length, gap, steps, guidance, seed, keep],
            [stage, run_id, seed, go, stop, mp4, settings],
            api_name="generate_on_page",
            api_visibility="private",
            show_progress="hidden",
            concurrency_limit=LIMITS.waiting_visitors,
        )
        go.click(None, None, None, js=WATCH_JS, api_visibility="private", queue=False)
        stop.click(studio.stop, run_id, None, api_visibility="private", queue=False)
        demo.load(lambda: plan_value(session), None, plan, api_visibility="private", queue=False)
        with gr.Column(visible=False):
            api_files, api_settings = gr.File(label="video"), gr.JSON(label="settings")
            gr.Button().click(
                studio.api_generate,
                [scene, files, used, length, gap, steps, guidance, seed],
                [api_files, api_settings],
                api_name="generate",
                concurrency_limit=LIMITS.waiting_visitors,
            )
    return demo


def plan_value(session: Session) -> dict[str, Any]:
    controls = {
        "frames": LIMITS.length.default,
        "gap": LIMITS.gap_default,
        "steps": LIMITS.steps.default,
        "guidance": LIMITS.guidance.default,
        "prompts": 0,
        "guided": bool(session.scenes),
    }
    return {"model": model_facts(session), "controls": controls, "presets": [preset.gap for preset in GAP_PRESETS]}


def launch_arguments() -> dict[str, Any]:
    """What `gr.Blocks.launch` needs for this page, whoever launches it."""
    script = (STATIC / "studio.js").read_text(encoding="utf-8")
    # Fonts that gradio serves itself: nothing is asked of another machine. Colours live in studio.css.
    font = [LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    return {
        "theme": gr.themes.Base(font=font, font_mono=["ui-monospace", "monospace"]),
        "css": (STATIC / "studio.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
        "max_file_size": LIMITS.upload_bytes,
        "run_history": False,
        "ssr_mode": False,
        "footer_links": ["api", "settings"],
        "show_error": True,
    }


def launch(
    *,
    model: str | Path | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int | None = 7860,
    prevent_thread_lock: bool = False,
    **options: Any,
) -> tuple[gr.Blocks, Session]:
    """Load the pipeline, build the page and serve it; returns when the server ends, or at once without thread lock.

    Args:
        model: folder or Hub id of a pipeline. None: the bundled model.
        device: "auto" (cuda, else mps, else cpu) or a torch device.
        host: address to serve on; "0.0.0.0" for every visitor of the network.
        port: port to serve on; None for a free one from 7860.
        options: further arguments of `gr.Blocks.launch`.
    """
    from ardiff import ARDiffPipeline, bundled_model

    path = bundled_model() if model is None else model
    pipeline = ARDiffPipeline.from_pretrained(path, dtype=torch.float32).to(pick_device(device))
    session = Session(pipeline, name=Path(path).name)
    demo = build_demo(session).queue(max_size=LIMITS.waiting_visitors)
    arguments = {**launch_arguments(), "server_name": host, "server_port": port, **options}
    demo.launch(prevent_thread_lock=prevent_thread_lock, **arguments)
    if not prevent_thread_lock:
        session.close()
    return demo, session


def pick_device(device: str) -> str:
    """Resolve "auto" to the best device there is."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
