"""The menu of models: what the operator allows and nothing else, each loaded when it is asked for."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from studio_page import CONTROLS, clear_files, command, press, settle, shown_frames, visit, wait_for_run
from studio_page import serve as serve_page
from tiny_original import WINDOW, build

from ardiff import ADScheduler, ARDiffPipeline, ARDiffTransformerModel, AutoencoderARVAE, ad_schedule
from ardiff.demo.models import LOADED_MODELS, ModelMenu
from ardiff.demo.presets import Failed, Finished, FrameReady, GenerationRequest, read_settings
from ardiff.demo.session import Session


SMALL = {"num_frames": 5, "num_inference_steps": 6, "ar_step": 2}


@pytest.fixture
def other_pipeline() -> ARDiffPipeline:
    """A model of other frames, other scenes and a smaller window than the tiny one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = AutoencoderARVAE(
            image_size=16, latent_channels=4, stem_channels=[8, 8, 8], width=16, num_encoder_layers=1,
            num_decoder_layers=1, num_heads=2, temporal_window=2,
        )  # fmt: skip
        transformer = ARDiffTransformerModel(
            num_tokens=vae.num_tokens, in_channels=4, width=32, depth=1, num_heads=2, window=8, class_names=["rings"]
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    pipeline = ARDiffPipeline(vae=vae.eval(), transformer=transformer.eval(), scheduler=ADScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def finish(session: Session, request: GenerationRequest) -> tuple[Finished | Failed, np.ndarray]:
    events = list(session.run(request))
    return events[-1], np.stack([event.frame for event in events if isinstance(event, FrameReady)])


def frames_of(pipeline: ARDiffPipeline, **arguments) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
    return np.rint(255 * pipeline(**arguments, generator=generator, output_type="np").frames[0]).astype(np.uint8)


def test_models_are_loaded_once_when_asked_for_and_few_are_kept():
    loaded: list[str] = []

    def source(name: str):
        def load():
            time.sleep(0.02)
            loaded.append(name)
            return SimpleNamespace(name=name)

        return load

    measured = []
    names = [f"m{index}" for index in range(LOADED_MODELS + 1)]
    menu = ModelMenu({name: source(name) for name in names}, measured.append)
    assert not loaded
    together = [threading.Thread(target=menu.get, args=["m0"]) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert loaded == ["m0"]
    assert menu.get() is menu.get("m0")
    for name in names[1:]:
        menu.get("m0").cost.call = 7.0
        menu.get(name)
    # Asked for in between, m0 stayed; the one that was asked for longest ago went.
    assert loaded == names
    menu.get("m0")
    assert loaded == names
    menu.get("m1")
    menu.get(names[-1])
    assert menu.get("m0").cost.call == 7.0
    assert loaded.count("m0") == 2
    assert [model.name for model in measured] == names


def test_only_names_of_the_menu_are_models():
    def broken():
        raise OSError("no such\n repository")

    menu = ModelMenu({"good": lambda: SimpleNamespace(), "broken": broken}, lambda model: None)
    for name, words in (
        ("../etc", r"must be one of good, broken, got '../etc'\."),
        ("broken", r"The model broken could not be loaded: no such repository"),
    ):
        with pytest.raises(ValueError, match=words):
            menu.get(name)
    with pytest.raises(ValueError, match="at least one model"):
        ModelMenu({}, lambda model: None)


def test_a_run_uses_the_model_it_asks_for(tiny_pipeline, other_pipeline):
    session = Session({"tiny": lambda: tiny_pipeline, "other": lambda: other_pipeline}, warm_up=False)
    request = GenerationRequest(model="other", scene="rings", seed=4, **SMALL)
    last, frames = finish(session, request)
    np.testing.assert_array_equal(
        frames, frames_of(other_pipeline, class_labels=["rings"], guidance_scale=2.0, seed=4, **SMALL)
    )
    stored = session.store.export(last.run_id, "json").read_text()
    assert json.loads(stored)["model"] == "other"
    np.testing.assert_array_equal(finish(session, read_settings(stored))[1], frames)
    assert (
        json.loads(session.store.export(finish(session, GenerationRequest(**SMALL))[0].run_id, "json").read_text())[
            "model"
        ]
        == "tiny"
    )
    for wrong, words in (
        ({"model": "third"}, "must be one of tiny, other, got 'third'"),
        ({"model": "other", "scene": "balls"}, "must be one of rings, got 'balls'"),
        ({"model": "other", "num_frames": 9, "ar_step": 0}, "window|at least"),
    ):
        with pytest.raises(ValueError, match=words):
            session.run(GenerationRequest(**{**SMALL, **wrong}))
    with pytest.raises(ValueError, match="have 16 px and this model makes 32 px; choose the model other"):
        session.continuation(last.run_id, GenerationRequest(**SMALL))
    again = session.continuation(last.run_id, GenerationRequest(model="other", **SMALL))
    assert isinstance(finish(session, again)[0], Finished)
    session.close()


def test_a_model_without_a_frame_cache_says_so_and_what_it_costs(browser, tiny_pipeline):
    pipeline = build(class_names=["ApplyEyeMakeup", "YoYo"])
    with serve_page(pipeline, cached=tiny_pipeline) as site, visit(browser, site, query="?scene=YoYo&seed=7") as page:
        assert "8 px · no frame cache" in page.locator("header").inner_text()
        settle(page, length=4, steps=10, gap=10, seed=7)
        first = site.session.first
        plan = ad_schedule(4, 10, 10).numpy()
        assert first.evaluations(plan).sum() == 40 * WINDOW
        assert site.session.models.get("cached").evaluations(plan).sum() == 40
        page.locator(".ar-sentence", has_text="how long is not measured yet").wait_for()
        # The page's estimate is the session's.
        first.cost.record(0.0, 60 * 7 / (40 * WINDOW * 2))
        page.reload()
        settle(page, length=4, steps=10, gap=10, seed=7)
        page.locator(".ar-sentence", has_text="about 7 min on this device").wait_for()
        request = GenerationRequest(scene="YoYo", num_frames=4, num_inference_steps=10, ar_step=10)
        assert site.session._seconds_ahead(request, first)[0] == pytest.approx(60 * 7)
        press(page, "Generate")
        wait_for_run(page)
        frames = frames_of(
            pipeline,
            class_labels=["YoYo"],
            num_frames=4,
            ar_step=10,
            num_inference_steps=10,
            guidance_scale=2.0,
            seed=7,
        )
        np.testing.assert_array_equal(shown_frames(page), frames)
        # The run took seconds and not minutes, and the page has heard of it.
        page.wait_for_function("document.querySelector('.ar-sentence').textContent.endsWith('about 3 min.')")


def test_a_video_shorter_than_the_window_is_refused_where_it_must_be():
    pipeline = build()
    pipeline.transformer.register_to_config(window=6)
    session = Session({"published": lambda: pipeline}, warm_up=False)
    with pytest.raises(ValueError, match="must be at least 6 with this model, got 5"):
        session.run(GenerationRequest(**SMALL))
    # Without classes, guidance leads away from an empty context: every call counts twice.
    request = GenerationRequest(num_frames=6, num_inference_steps=6, ar_step=6)
    session.first.cost.call, session.first.cost.frame = 0.0, 1.0
    assert session._seconds_ahead(request, session.first)[0] == 36 * 6 * 2
    session.close()


def test_speed_of_a_model_without_a_frame_cache_is_measured():
    session = Session({"published": build})
    begun = time.monotonic()
    while session.first.cost.call:
        assert time.monotonic() < begun + 20
        time.sleep(0.01)
    assert 0 < session.first.cost.frame < 1
    session.close()


def test_a_model_is_chosen_in_the_page(browser, tiny_pipeline, other_pipeline, tmp_path):
    with serve_page(tiny_pipeline, other=other_pipeline) as site:
        with visit(browser, site) as page:
            settle(page, length=5, gap=4)
            page.locator("#ar-model input").click()
            page.get_by_role("option", name="other", exact=True).click()
            page.locator("header", has_text="other · 16 px").wait_for()
            page.wait_for_function("document.querySelector('#ar-scene input').value === 'rings'")
            page.wait_for_function("window.ardiffStudio.studio.model.window === 8")
            picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "a.png")
            page.locator("#ar-files input[type=file]").set_input_files(tmp_path / "a.png")
            page.wait_for_function(f"{CONTROLS}.prompts === 1")
            press(page, "Generate")
            wait_for_run(page)
            frames = frames_of(
                other_pipeline, class_labels=["rings"], num_frames=5, ar_step=4, num_inference_steps=10, guidance_scale=2.0,
                prompt_frames=[picture], seed=7,
            )  # fmt: skip
            np.testing.assert_array_equal(shown_frames(page), frames)
            with page.expect_download() as caught:
                page.locator("#ar-json").click()
            settings = caught.value.path().read_bytes()
            assert command(page).startswith("ardiff generate --model other --scene rings")
            # An example is of the first model: it brings that model back, with its scenes.
            clear_files(page)
            page.get_by_role("button", name="Balls, gap 5").click()
            page.locator("header", has_text="tiny · 32 px").wait_for()
            page.wait_for_function("document.querySelector('#ar-model input').value === 'tiny'")
            page.wait_for_function("document.querySelector('#ar-scene input').value === 'balls'")
            page.wait_for_function("window.ardiffStudio.studio.model.window === 16")
            # The settings bring the other one.
            (tmp_path / "settings.json").write_bytes(settings)
            page.locator("#ar-files input[type=file]").set_input_files(tmp_path / "settings.json")
            page.wait_for_function(f"{CONTROLS}.prompts === 1 && window.ardiffStudio.studio.model.window === 8")
            page.wait_for_function("document.querySelector('#ar-model input').value === 'other'")
            press(page, "Generate")
            wait_for_run(page)
            np.testing.assert_array_equal(shown_frames(page), frames)
        with visit(browser, site, query="?model=other&seed=5") as page:
            page.wait_for_function("document.querySelector('#ar-model input').value === 'other'")
            page.wait_for_function("document.querySelector('#ar-scene input').value === 'rings'")
        client = pytest.importorskip("gradio_client").Client(site.url, verbose=False)
        asked = {"scene": "rings", "num_frames": 4, "num_inference_steps": 5, "model": "other"}
        assert client.predict(**asked, api_name="/generate")[1]["model"] == "other"
        assert client.submit(**asked, api_name="/stream").result()["event"] == "Finished"
        with visit(browser, site, query="?model=/etc/passwd") as page:
            page.locator(".ar-message", has_text="must be one of tiny, other").wait_for()
