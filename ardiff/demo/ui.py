"""The studio's page: layout and wiring (gradio), nothing else. What happens is in session.py, what is shown in view.py,
what is drawn in static/.
"""

from __future__ import annotations

import os
import secrets
from abc import ABCMeta
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from gradio.components import Component
from gradio.context import LocalContext
from gradio.data_classes import ListFiles
from gradio.themes.utils.fonts import LocalFont

from ardiff.demo.guard import Guard
from ardiff.demo.models import LOADED_MODELS, LoadedModel, choose_models
from ardiff.demo.presets import (
    GAP,
    GAP_PRESETS,
    GUIDANCE,
    LENGTH,
    NO_SCENE,
    OPENING_SCENE,
    PROMPT_FRAMES,
    SEED_MAX,
    STEPS,
    TEXT,
    Failed,
    GenerationRequest,
    Prompt,
    check_whole,
    controls,
    event_json,
    is_video,
)
from ardiff.demo.session import Session
from ardiff.demo.view import (
    NO_PROMPT,
    READY,
    RunView,
    gap_words,
    idle_value,
    json_list,
    make_request,
    plain,
    prompt_problem,
    prompt_value,
    prompt_words,
    query_controls,
    settings_controls,
    whole,
)
from ardiff.pipelines.loading import load_pipeline
from ardiff.schedulers.ad_schedule import PROFILES
from ardiff.serving.limits import Limits, read_accounts, read_limits
from ardiff.serving.metrics import log_as_json
from ardiff.serving.zero import on_zero_gpu


STATIC = Path(__file__).parent / "static"
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("plan.js", "stage.js", "prompt.js", "page.js")

CONTROLS = ("model", "scene", "order", "length", "gap", "profile", "chunk", "drawn", "steps", "guidance", "seed")
"""The controls that make a request, in the order in which every callback gets them."""

SESSIONS = 500
"""Visitors whose controls gradio remembers, at most: each takes a tenth of a megabyte, and so does every call of a script."""

EXPORTS = (("mp4", "MP4"), ("gif", "GIF"), ("webp", "WebP"), ("zip", "Frames"), ("json", "Settings"))

MOUNT = """
const mount = () => (window.ardiffStudio && window.ardiffStudio.{name}
  ? window.ardiffStudio.{name}(element, props, watch, trigger) : setTimeout(mount, 20));
mount();
"""

# JavaScript that runs in the browser alone: arguments are the controls, in the order given where it is wired.
MOVED_JS = f"""(model, scene, order, length, gap, profile, chunk, drawn, steps, guidance, seed) => {{
  const guided = scene !== '{NO_SCENE}', prompts = order ? JSON.parse(order).length : 0;
  const studio = window.ardiffStudio;
  studio.setDrawn(drawn);
  studio.studio.asked = {{ model, scene: guided ? scene : '', seed, guidance }};
  studio.setControls(length, gap, steps, guidance, prompts, guided, profile, chunk);
}}"""
# The value only where it must change: this comes when the gap may already be another one.
STEPS_JS = (
    "(steps, gap) => gap > steps ? { __type__: 'update', maximum: steps, value: steps }"
    " : { __type__: 'update', maximum: steps }"
)
# For whoever fills in the page by a script: what is typed before this is taken back when the link's settings come.
OPENED_JS = "() => { document.documentElement.dataset.ardiffOpened = 'yes'; }"
# Without a query nothing is asked of the server, and what a quick visitor types while the page loads stays.
QUERY_JS = f"() => {{ if (!location.search) ({OPENED_JS})(); return location.search; }}"
# On a narrow screen the controls lie below the stage: whoever pressed Generate wants to watch.
WATCH_JS = (
    "() => { if (matchMedia('(max-width: 900px)').matches)"
    " document.getElementById('ar-stage').scrollIntoView({ block: 'start' }); }"
)
DICE_JS = "() => [Math.floor(Math.random() * 4294967296), true]"
SAVE_JS = "() => document.querySelector('#ar-file a, #ar-file').click()"
# The visitor drew on the map (a settings file or a link brings its profile itself).
DRAWN_JS = "(drawn, profile) => JSON.stringify(window.ardiffStudio.studio.drawn) === drawn ? 'drawn' : profile"
PROFILE_JS = (
    "(profile) => [{ __type__: 'update', visible: profile === 'chunks' },"
    " { __type__: 'update', visible: profile === 'even' || profile === 'ramp' }]"
)


class Studio:
    """The page's callbacks, around one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.controls = controls(session.limits)

    def generate(
        self, mode: str, files: list[str] | None, prompt: Prompt | str | None, run_id: str, keep: bool, samples: float,
        *given: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Run and draw. `mode`: "new", "row" (beside what is there, from the same noise) or "continue" (from its frames).

        Outputs: stage, run id, seed, generate, stop, results.
        """
        values = dict(zip(CONTROLS, given, strict=True))
        if mode == "new" and not keep:
            values["seed"] = secrets.randbelow(SEED_MAX + 1)
        seed = values["seed"]
        try:
            requests = self._requests(mode, files, prompt, run_id, whole(samples), values)
            runs = [self.session.run(requests[0][1], visitor())]
        except ValueError as error:
            yield self._outputs(idle_value("Please change something", plain(error), "failed"), seed=seed)
            return
        facts = self.session.models.get(requests[0][1].model).facts
        for row, (name, request) in enumerate(requests):
            events = runs.pop() if runs else self.session.run(request, visitor())
            last = row == len(requests) - 1
            view = RunView(request, facts, row=name, keep_rows=mode == "row" or row > 0)
            try:
                for event in events:
                    if view.absorb(event):
                        yield self._outputs(view.value, view=view, seed=seed, last=last)
            finally:
                events.close()
            if isinstance(view.result, Failed) or (view.result is not None and view.result.stopped):
                if not last:
                    yield self._outputs(view.value, view=view, seed=seed, last=True)
                return

    def _requests(
        self, mode: str, files: list[str] | None, prompt: Prompt | str | None, run_id: str, samples: int,
        values: dict[str, Any],
    ) -> list[tuple[str, GenerationRequest]]:  # fmt: skip
        """The runs that were asked for, each with the name of its row. Raises ValueError with one sentence."""
        check_whole("The number of samples", samples, 1, self.controls.samples.high)
        if isinstance(prompt, str):
            raise ValueError(prompt)
        if mode == "continue":
            request = self.session.continuation(run_id, make_request({**values, "order": ""}, None))
        else:
            if prompt is None and files:
                # Generate came before the upload was read.
                prompt = self.session.read_prompt(files, model=values["model"])
                values = {**values, "order": str(list(range(len(prompt.frames))))}
            request = make_request(values, prompt)
        if samples == 1:
            return [(gap_words(request.ar_step), request)]
        seeds = [(request.seed + row) % (SEED_MAX + 1) for row in range(samples)]
        return [(f"seed {seed}", replace(request, seed=seed)) for seed in seeds]

    def _outputs(
        self, value: dict[str, Any], *, seed: int, view: RunView | None = None, last: bool = True
    ) -> tuple[Any, ...]:
        if view is not None and view.phase == "running":
            # The buttons again: two messages that reach the browser at once are merged before the first one is drawn.
            buttons = gr.update(interactive=False), gr.update(interactive=True), gr.update(visible=False)
            return value, gr.skip(), gr.skip(), *buttons
        if view is None:
            return value, gr.skip(), seed, *[gr.skip()] * 3
        over = view.result is not None and last
        kept = view.result is not None and view.result.video is not None
        return (
            value,
            view.run_id,
            seed,
            gr.update(interactive=over),
            gr.update(interactive=not over),
            gr.update(visible=over and kept),
        )

    def about(self, model: LoadedModel) -> tuple[str, dict[str, Any]]:
        """What the page says of a model. Outputs: head, plan."""
        plan = {"model": model.facts(), "presets": [preset.gap for preset in GAP_PRESETS]}
        return header(self.session, model), plan

    def choose_model(
        self, name: str, scene: str, files: list[str] | None, start: float, stride: float, count: float
    ) -> tuple[Any, ...]:
        """Load a model of the menu, fit the controls to it and the prompt to its size.

        Inputs: model, scene, files, start, stride, count. Outputs: head, plan, scene, prompt, strip, order, stage.
        """
        try:
            model = self.session.models.get(name)
        except ValueError as error:
            return *[gr.skip()] * 6, idle_value("Please choose another model", plain(error), "failed")
        known = scene_choices(model)
        scenes = gr.update(choices=known, value=scene if scene in known else opening_scene(model))
        if not files or is_settings(files):
            # The prompt of a settings file keeps its frames; the pipeline fits them to the model's size.
            return *self.about(model), scenes, *[gr.skip()] * 4
        prompt, strip, order = self._read_prompt(name, files, start, stride, count)
        return *self.about(model), scenes, prompt, strip, order, gr.skip()

    def stop(self, run_id: str) -> None:
        """End the visitor's run; its own generator then draws what was kept. Inputs: run id."""
        self.session.stop(run_id)

    def export(self, run_id: str, kind: str) -> str:
        """A file of a run. Inputs: run id. Outputs: the hidden download button."""
        try:
            return str(self.session.store.export(run_id, kind))
        except ValueError as error:
            raise gr.Error(plain(error), print_exception=False) from error

    def recover(self, run_id: str) -> tuple[Any, ...]:
        """Show the finished frames of an earlier run. Inputs: run id. Outputs: stage, run id, results."""
        try:
            recovered = self.session.store.recover(run_id)
        except ValueError as error:
            return idle_value("That run is gone", plain(error), "failed"), gr.skip(), gr.skip()
        facts = self.session.models.get(recovered.request.model).facts
        view = RunView(recovered.request, facts, row=gap_words(recovered.request.ar_step))
        view.run_id = run_id
        view.show_again(recovered.frames)
        return view.value, run_id, gr.update(visible=len(recovered.frames) > 0)

    def recover_selected(self, event: gr.EventData) -> tuple[Any, ...]:
        """Show a run of this visit's list again. Outputs as `recover`."""
        chosen = event._data if isinstance(event._data, dict) else {}
        return self.recover(str(chosen.get("run")))

    def offer_recovery(self, last_run: str | None) -> Any:
        """Outputs: the button, seen when the run that this browser remembers can still be fetched. Inputs: that run's id."""
        try:
            return gr.update(visible=bool(last_run) and len(self.session.store.recover(last_run).frames) > 0)
        except ValueError:
            return gr.update(visible=False)

    def greet(self) -> str:
        """Outputs: head, made anew for every visitor."""
        return header(self.session, self.session.first)

    def open_link(self, request: gr.Request) -> tuple[Any, ...]:
        """Fill the controls from the link's query. Outputs: head, plan, stage, keep, the controls."""
        query, model = dict(request.query_params), self.session.first
        try:
            if "model" in query:
                model = self.session.models.get(query["model"])
            found, message = query_controls(query, model.scenes), gr.skip()
        except ValueError as error:
            found, message = {}, idle_value("Please check the link", plain(error), "failed")
        return *self.about(model), message, found.get("keep", gr.skip()), *self._fill(model, found)

    def _fill(self, model: LoadedModel, found: Mapping[str, Any]) -> list[Any]:
        """Outputs for the controls: the model and its scenes, and what was found for the others."""
        filled = {name: found.get(name, gr.skip()) for name in CONTROLS}
        known = scene_choices(model)
        filled |= {
            "model": model.name,
            "scene": gr.update(choices=known, value=found.get("scene", opening_scene(model))),
        }
        return list(filled.values())

    def read_files(
        self, name: str, files: list[str] | None, start: float, stride: float, count: float
    ) -> tuple[Any, ...]:
        """Decode an upload and show its crop and how the model sees it; a settings file fills every control.

        Inputs: model, files, start, stride, count. Outputs: prompt, strip, trim, keep, head, plan, the controls.
        """
        untouched = [gr.skip()] * 3
        if files and is_settings(files):
            try:
                request = self.session.read_settings(files[0])
                model = self.session.models.get(request.model)
                found = settings_controls(request)
                strip = prompt_value(request.prompt, self._seen(request.prompt, model.name))
            except ValueError as error:
                return plain(error), prompt_problem(error), gr.update(visible=False), *untouched, *self._order("")
            hidden = gr.update(visible=False)
            return request.prompt, strip, hidden, True, *self.about(model), *self._fill(model, found)
        prompt, strip, order = self._read_prompt(name, files or [], start, stride, count)
        video = gr.update(visible=bool(files) and is_video(files[0]))
        return prompt, strip, video, *untouched, *self._order(order)

    def _order(self, order: str) -> list[Any]:
        """Outputs for the controls when the order of the prompt frames alone is new."""
        return [order if name == "order" else gr.skip() for name in CONTROLS]

    def _read_prompt(
        self, model: str, files: list[str], start: float, stride: float, count: float
    ) -> tuple[Prompt | str | None, dict[str, Any], str]:
        """The prompt (or the sentence that says why there is none), what its strip draws, and its order."""
        trimmed = {"start": whole(start), "stride": whole(stride), "count": whole(count)}
        try:
            prompt = self.session.read_prompt(files, model=model, **trimmed)
            strip = prompt_value(prompt, self._seen(prompt, model), prompt_words(files, **trimmed))
        except ValueError as error:
            return plain(error), prompt_problem(error), ""
        return prompt, strip, "" if prompt is None else str(strip["order"])

    def _seen(self, prompt: Prompt | None, model: str) -> list[Any]:
        return [] if prompt is None else self.session.prompt_preview(prompt, model)

    def api_generate(
        self, scene: str | None, prompt: list[str] | None = None, num_frames: float = LENGTH, ar_step: str = str(GAP),
        num_inference_steps: float = STEPS, guidance_scale: float = GUIDANCE.default, seed: float = 0, prompt_start: float = 0,
        prompt_stride: float = 1, prompt_count: float = PROMPT_FRAMES, model: str = "",
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        """Generate a video and return its MP4 and the settings that give the same frames again.

        `scene` is a name or "no scene"; `prompt` is a list of pictures or one video, of which every `prompt_stride`-th frame
        from `prompt_start` on is taken, `prompt_count` in all; `num_frames` counts the prompt frames; `ar_step` is the
        timestep gap, 0 to `num_inference_steps`, or one gap per new frame after the first between commas; `model` is a name
        of the page's menu, "" its first.
        """
        *_, last = self._api_events(
            scene, prompt, num_frames, ar_step, num_inference_steps, guidance_scale, seed, prompt_start, prompt_stride,
            prompt_count, model,
        )  # fmt: skip
        if isinstance(last, Failed):
            raise gr.Error(last.message)
        return str(last.video), last.settings

    def api_stream(
        self, scene: str | None, prompt: list[str] | None = None, num_frames: float = LENGTH, ar_step: str = str(GAP),
        num_inference_steps: float = STEPS, guidance_scale: float = GUIDANCE.default, seed: float = 0, prompt_start: float = 0,
        prompt_stride: float = 1, prompt_count: float = PROMPT_FRAMES, model: str = "",
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Give the events of a run as they come: Queued, FrameReady, Preview, Progress, then Finished or Failed.

        Arguments as of `/generate`. Pictures are data URLs, those of finished frames lossless.
        """
        for event in self._api_events(
            scene, prompt, num_frames, ar_step, num_inference_steps, guidance_scale, seed, prompt_start, prompt_stride,
            prompt_count, model,
        ):  # fmt: skip
            yield event_json(event)

    def _api_events(
        self, scene: str | None, prompt: list[str] | None, num_frames: float, ar_step: str, num_inference_steps: float,
        guidance_scale: float, seed: float, start: float, stride: float, count: float, model: str,
    ) -> Iterator[Any]:  # fmt: skip
        try:
            frames = self.session.read_prompt(
                prompt or [], model=model or None, start=whole(start), stride=whole(stride), count=whole(count)
            )
            gaps = json_list("ar_step", f"[{ar_step}]")
            request = GenerationRequest(
                model=model or None,
                scene=None if scene in (None, "", NO_SCENE) else scene,
                prompt=frames,
                num_frames=whole(num_frames),
                ar_step=gaps[0] if len(gaps) == 1 else tuple(gaps),
                num_inference_steps=whole(num_inference_steps),
                guidance_scale=guidance_scale,
                seed=whole(seed),
            )
            yield from self.session.run(request, visitor())
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error


def visitor() -> str:
    """What tells the visitor of this call from others: the name of who signed in, else the address.

    On a Space every connection comes from the Hub's proxy, which names the visitor's address in a header.
    """
    request = LocalContext.request.get(None)
    if request is None:
        return ""
    if getattr(request, "username", None):
        return f"name {request.username}"
    headers = getattr(request, "headers", {})
    forwarded = headers.get("x-forwarded-for", "").split(",")[0].strip() if "SPACE_ID" in os.environ else ""
    return forwarded or getattr(getattr(request, "client", None), "host", "") or ""


def is_settings(files: list[str]) -> bool:
    """Whether an upload is one settings file rather than a prompt, by its name."""
    return len(files) == 1 and Path(files[0]).suffix.lower() == ".json"


def scene_choices(model: LoadedModel) -> list[str]:
    return [*model.scenes, NO_SCENE]


def opening_scene(model: LoadedModel) -> str:
    """What a visitor sees first."""
    return OPENING_SCENE if OPENING_SCENE in model.scenes else scene_choices(model)[0]


def list_examples(model: LoadedModel, limits: Limits) -> tuple[list[list[Any]], list[str]]:
    """Rows that fill every control (in the order of build_demo's `filled`) and their labels."""
    usual = controls(limits)
    length, steps, guidance = int(usual.length.default), int(usual.steps.default), GUIDANCE.default
    trim = [0, 1, int(usual.prompt_frames.default)]
    rows, labels = [], []
    for index, scene in enumerate(scene_choices(model)[:3]):
        gap = (5, 10, 0)[index]
        rows.append([model.name, scene, None, *trim, length, "even", gap, steps, guidance, index + 1, True, 1])
        labels.append(f"{scene.capitalize()}, gap {gap}")
    for path in sorted(EXAMPLES.glob("*.mp4")) + sorted(EXAMPLES.glob("*.png")):
        scene = next((name for name in model.scenes if name in path.stem), NO_SCENE)
        gap = GAP
        rows.append([model.name, scene, [str(path)], *trim, length, "even", gap, steps, guidance, 1, True, 1])
        labels.append(f"Continue {'a clip' if path.suffix == '.mp4' else 'a picture'}: {path.stem}")
    return rows, labels


def template(name: str) -> str:
    return (STATIC / f"{name}.html").read_text(encoding="utf-8")


def drawn_html(name: str, mount: str, value: Any = None, **options: Any) -> gr.HTML:
    """A part of the page that is drawn by static/*.js: its template never changes, its value is JSON."""
    return gr.HTML(
        value, html_template=template(name), js_on_load=MOUNT.replace("{name}", mount), elem_id=f"ar-{name}",
        apply_default_css=False, **options,
    )  # fmt: skip


def as_sent(kind: type[Component]) -> type[Component]:
    """A kind of control whose values reach us as they were sent: what is wrong with them is said by the request that is made
    of them, where gradio would round them or break off, at a slider's first end for one, whatever its end is by now.

    It is the class that differs, as gradio makes a control anew where it is updated. The class is made past gradio's own
    metaclass, which would write a stub file beside this one.
    """
    return _changed(kind, preprocess=lambda self, value: value)


def _changed(kind: type[Component], **members: Any) -> type[Component]:
    return ABCMeta.__new__(
        type(kind), kind.__name__, (kind,), {**members, "is_template": True, "__module__": kind.__module__}
    )


class SentFiles(ListFiles):
    """Uploads as gradio names them; what is something else is refused in a sentence."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> ListFiles:
        try:
            return super().model_validate(obj, **options)
        except ValueError as error:
            raise gr.Error("A prompt must be a list of uploaded files.", print_exception=False) from error


@wraps(gr.File.__init__)  # gradio reads its signature
def _take_files(self: gr.File, *arguments: Any, **options: Any) -> None:
    gr.File.__init__(self, *arguments, **options)
    self.data_model = SentFiles


Number, Slider, Files = as_sent(gr.Number), as_sent(gr.Slider), _changed(gr.File, __init__=_take_files)


def number(value: float, **options: Any) -> gr.Number:
    return Number(value, precision=0, **options)


def slider(name: str, low: float, high: float, value: float, label: str, step: float = 1, **options: Any) -> gr.Slider:
    return Slider(low, high, value, step=step, label=label, elem_id=f"ar-{name}", **options)


def header(session: Session, model: LoadedModel) -> str:
    """The page's head, made anew for every visitor: memory comes and goes."""
    note = " &middot; no frame cache" if model.whole_window else ""
    return (
        f'<header class="ar-header"><h1>ardiff<span>.</span>studio</h1><p>{TEXT["tagline"]}</p>'
        f'<span class="ar-chip">{escape(model.name)} &middot; {model.image_size} px{note} &middot; '
        f"{escape(model.device)}, {session.memory(model)}</span></header>"
    )


def build_demo(session: Session) -> gr.Blocks:
    """The page around `session`. Launch it with `launch_arguments`, which carry its theme, style and script."""
    studio, limits, first = Studio(session), session.limits, session.first
    between = studio.controls
    about, plan_first = studio.about(first)
    steps_end = int(between.steps.default)
    with gr.Blocks(title=TEXT["title"], analytics_enabled=False, delete_cache=cache_times(limits)) as demo:
        run_id, prompt, remembered = gr.State(""), gr.State(None), gr.BrowserState("", storage_key="ardiff-last-run")
        head = gr.HTML(about, apply_default_css=False)
        with gr.Row(elem_id="ar-body"):
            with gr.Column(elem_id="ar-controls"):
                names = session.models.names
                model = gr.Dropdown(
                    list(names), value=names[0], label=TEXT["model"], filterable=False, visible=len(names) > 1,
                    elem_id="ar-model",
                )  # fmt: skip
                scene = gr.Dropdown(
                    scene_choices(first), value=opening_scene(first), label=TEXT["scene"], filterable=False,
                    elem_id="ar-scene",
                )  # fmt: skip
                gr.HTML(
                    f'<p class="ar-label">{TEXT["prompt"]} <span>{TEXT["prompt_info"]}</span></p>',
                    apply_default_css=False,
                )
                files = Files(
                    file_count="multiple", label=TEXT["prompt"], show_label=False, height=84, elem_id="ar-files"
                )
                strip = drawn_html("prompt", "mountPrompt", NO_PROMPT)
                with gr.Row(visible=False, elem_id="ar-trim") as trim:
                    start = number(0, label=TEXT["trim_start"], minimum=0, min_width=60)
                    stride = number(1, label=TEXT["trim_stride"], minimum=1, min_width=60)
                    count = number(
                        between.prompt_frames.default, label=TEXT["trim_count"], minimum=1,
                        maximum=between.prompt_frames.high, min_width=60,
                    )  # fmt: skip
                length = slider("length", *vars(between.length).values(), TEXT["length"])
                profile = gr.Dropdown(
                    [(TEXT[f"profile_{name}"], name) for name in (*PROFILES, "drawn")], value="even", label=TEXT["profile"],
                    filterable=False, elem_id="ar-profile",
                )  # fmt: skip
                gap = slider("gap", 0, steps_end, min(GAP, steps_end), TEXT["gap"])
                chunk = slider("chunk", 1, 16, 4, TEXT["chunk"], visible=False)
                with gr.Row(elem_classes="ar-presets"):
                    presets = [gr.Button(preset.name, size="sm") for preset in GAP_PRESETS]
                plan = drawn_html("plan", "mountPlan", plan_first)
                with gr.Accordion(TEXT["more"], open=False, elem_id="ar-more"):
                    steps = slider("steps", *vars(between.steps).values(), TEXT["steps"])
                    guidance = slider(
                        "guidance", *vars(GUIDANCE).values(), TEXT["guidance"], 0.1, info=TEXT["guidance_info"]
                    )
                    samples = slider(
                        "samples", *vars(between.samples).values(), TEXT["samples"], info=TEXT["samples_info"],
                        visible=between.samples.high > 1,
                    )  # fmt: skip
                with gr.Row(elem_id="ar-seed-row"):
                    seed = number(1, label=TEXT["seed"], minimum=0, elem_id="ar-seed", min_width=100)
                    dice = gr.Button(TEXT["dice"], size="sm", elem_id="ar-dice", min_width=64)
                    keep = gr.Checkbox(False, label=TEXT["keep"], elem_id="ar-keep", min_width=80)
                # What the page's script writes and every callback reads: which prompt frames, and the drawn gaps.
                order = gr.Textbox("", visible="hidden", elem_id="ar-order")
                drawn = gr.Textbox("", visible="hidden", elem_id="ar-drawn")
                wanted, link = gr.Textbox("", visible="hidden"), gr.Textbox("", visible="hidden")
                with gr.Row(elem_id="ar-go"):
                    go = gr.Button(TEXT["generate"], variant="primary", elem_id="ar-generate")
                    stop = gr.Button(TEXT["stop"], interactive=False, elem_id="ar-stop")
            with gr.Column(elem_id="ar-stage-column"):
                recover = gr.Button(TEXT["recover"], visible=False, size="sm", elem_id="ar-recover")
                stage = drawn_html("stage", "mountStage", READY)
                with gr.Row(visible=False, elem_id="ar-results") as results:
                    again = gr.Button(TEXT["row"], size="sm", elem_id="ar-row")
                    go_on = gr.Button(TEXT["continue"], size="sm", elem_id="ar-continue")
                    exports = [gr.Button(label, size="sm", elem_id=f"ar-{kind}") for kind, label in EXPORTS]
                file = gr.DownloadButton("file", visible="hidden", elem_id="ar-file")
                history = drawn_html("history", "mountHistory")
                with gr.Accordion(TEXT["share"], open=False, elem_id="ar-sharing"):
                    drawn_html("share", "mountShare")
                filled = [model, scene, files, start, stride, count, length, profile, gap, steps, guidance, seed, keep]
                rows, labels = list_examples(first, limits)
                examples = gr.Examples(
                    rows, [*filled, samples], example_labels=labels, label=TEXT["examples"], elem_id="ar-examples"
                )

        quiet = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        controls = [model, scene, order, length, gap, profile, chunk, drawn, steps, guidance, seed]
        # A dropdown that is set by another event tells nobody: whatever sets one calls this too.
        moved = {"fn": None, "inputs": controls, "js": MOVED_JS, **quiet}
        for control in controls:
            control.change(**moved)
        steps.change(None, [steps, gap], gap, js=STEPS_JS, **quiet)
        profile.change(None, profile, [chunk, gap], js=PROFILE_JS, **quiet)
        for preset, button in zip(GAP_PRESETS, presets, strict=True):
            chosen = "steps" if preset.gap is None else f"Math.min({preset.gap}, steps)"
            button.click(None, steps, [gap, profile], js=f"(steps) => [{chosen}, 'even']", **quiet).then(**moved)
        drawn.change(None, [drawn, profile], profile, js=DRAWN_JS, **quiet).then(**moved)
        dice.click(None, None, [seed, keep], js=DICE_JS, **quiet)
        upload = partial(gr.on, fn=studio.read_files, show_progress="hidden", api_visibility="private")
        upload(
            [files.change, start.change, stride.change, count.change], inputs=[model, files, start, stride, count],
            outputs=[prompt, strip, trim, keep, head, plan, *controls], concurrency_limit=4,
        ).then(**moved)  # fmt: skip
        # The scene goes by a field of its own: the dropdown's may not be one that the chosen model knows.
        for chosen in (model.input, examples.load_input_event.then):
            chosen(None, scene, wanted, js="(scene) => scene", **quiet).then(
                studio.choose_model, [model, wanted, files, start, stride, count],
                [head, plan, scene, prompt, strip, order, stage], api_visibility="private", show_progress="hidden",
            ).then(**moved)  # fmt: skip
        running = [stage, run_id, seed, go, stop, results]
        for button, mode in ((go, "new"), (again, "row"), (go_on, "continue")):
            button.click(
                partial(studio.generate, mode), [files, prompt, run_id, keep, samples, *controls], running,
                api_visibility="private", show_progress="hidden", concurrency_limit=limits.queue,
            )  # fmt: skip
            button.click(None, None, None, js=WATCH_JS, **quiet)
        run_id.change(lambda run_id: run_id, run_id, remembered, **quiet)
        stop.click(studio.stop, run_id, None, **quiet)
        for (kind, _), button in zip(EXPORTS, exports, strict=True):
            button.click(
                partial(studio.export, kind=kind), run_id, file, api_visibility="private", show_progress="hidden",
                concurrency_limit=4,
            ).success(None, None, None, js=SAVE_JS, **quiet)  # fmt: skip
        recovered = [stage, run_id, results]
        recover.click(studio.recover, remembered, recovered, **quiet).then(
            lambda: gr.update(visible=False), None, recover, **quiet
        )
        history.select(studio.recover_selected, None, recovered, **quiet)
        demo.load(studio.greet, None, head, **quiet)
        demo.load(**moved)
        demo.load(None, None, link, js=QUERY_JS, **quiet)
        link.change(studio.open_link, None, [head, plan, stage, keep, *controls], **quiet).then(**moved).then(
            None, None, None, js=OPENED_JS, **quiet
        )
        demo.load(studio.offer_recovery, remembered, recover, **quiet)
        build_endpoints(studio, files, length, steps, guidance, seed)
    return demo


def build_endpoints(studio: Studio, *shared: Any) -> None:
    """`/generate` and `/stream`, with the same arguments."""
    files, length, steps, guidance, seed = shared
    with gr.Column(visible=False):
        scene = gr.Textbox(opening_scene(studio.session.first), label="scene")
        gaps = gr.Textbox("5", label="ar_step")
        trim = 0, 1, studio.controls.prompt_frames.default
        start, stride, count = (number(value) for value in trim)
        model = gr.Textbox("", label="model")
        inputs = [scene, files, length, gaps, steps, guidance, seed, start, stride, count, model]
        limit = {"concurrency_limit": studio.session.limits.queue}
        outputs = [gr.File(label="video"), gr.JSON(label="settings")]
        gr.Button().click(studio.api_generate, inputs, outputs, api_name="generate", **limit)
        gr.Button().click(studio.api_stream, inputs, gr.JSON(label="event"), api_name="stream", **limit)


def cache_times(limits: Limits) -> tuple[int, int]:
    """How often gradio looks for old files of its own, and how old they are, in seconds."""
    return int(min(limits.keep_seconds, 600)), int(limits.keep_seconds)


def launch_arguments(session: Session) -> dict[str, Any]:
    """What `gr.Blocks.launch` needs for this page, whoever launches it."""
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # Fonts that gradio serves itself: nothing is asked of another machine. Colours live in studio.css.
    font = [LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    return {
        "theme": gr.themes.Base(font=font, font_mono=["ui-monospace", "monospace"]),
        "css": (STATIC / "studio.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
        "max_file_size": session.limits.upload_bytes,
        "state_session_capacity": SESSIONS,
        "app_kwargs": {"middleware": [(Guard, (), {"session": session})]},
        "run_history": False,
        "ssr_mode": False,
        "footer_links": ["api", "settings"],
        "show_error": True,
    }


def build_served(session: Session) -> gr.Blocks:
    """The page with its queue, and gradio's own files where the session's disk budget sees them."""
    # Where gradio keeps uploads and copies, for as long as it lives.
    os.environ["GRADIO_TEMP_DIR"] = str(session.store.uploads)
    demo = build_demo(session).queue(max_size=session.limits.queue)
    session.store.keep_page_files()
    return demo


def mounted(session: Session, accounts: Sequence[tuple[str, str]] | None = None) -> Any:
    """The page around `session` as an ASGI application, for another server than gradio's own."""
    demo, arguments = build_served(session), launch_arguments(session)
    demo.state_session_capacity = arguments.pop("state_session_capacity")
    auth = None if accounts is None else list(accounts)
    return gr.mount_gradio_app(gr.routes.FastAPI(openapi_url=None), demo, "/", auth=auth, **arguments)


def launch(
    *,
    models: Sequence[str | Path] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offload: bool = False,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    limits: Limits | None = None,
    accounts: str | None = None,
    json_log: bool = False,
    prevent_thread_lock: bool = False,
    **options: Any,
) -> tuple[gr.Blocks, Session]:
    """Load the first model, build the page and serve it; returns when the server ends, or at once without thread lock.

    Args:
        models: what the menu offers: folders, Hub ids or names of bundled models. None: the bundled models.
        device: "auto" (cuda, else mps, else cpu) or a torch device.
        dtype: number format of the models, a name of torch's.
        offload: models come to the device when they are needed, as `load_pipeline` says.
        host: address to serve on; "0.0.0.0" for every visitor of the network.
        port: port to serve on; None for a free one from 7860.
        limits: what visitors may do; None reads them from the environment, as serving/limits.py says.
        accounts: lines of `user:password`, for who may sign in. None: everyone.
        json_log: write the log as JSON lines without personal data.
        options: further arguments of `gr.Blocks.launch`.
    """
    limits = read_limits() if limits is None else limits
    models = choose_models(models, limits)
    auth = {} if accounts is None else {"auth": read_accounts(accounts)}
    if json_log:
        log_as_json()
    load = partial(load_pipeline, device=device, dtype=getattr(torch, dtype), offload=offload)
    session = Session({name: partial(load, model) for name, model in models.items()}, limits=limits)
    if on_zero_gpu():
        for name in list(models)[:LOADED_MODELS]:  # they must be there when a process is forked for the GPU
            session.models.get(name)
    demo = build_served(session)
    arguments = {**launch_arguments(session), "server_name": host, "server_port": port, **auth, **options}
    demo.launch(prevent_thread_lock=prevent_thread_lock, **arguments)
    if not prevent_thread_lock:
        session.close()
    return demo, session
