"""Shared fixtures: real components at a tiny size with seeded weights, and a headless Chromium for the page.

The tiny pipeline works on 32 x 32 frames of four tokens with four channels; a call takes milliseconds.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# One thread: tiny models gain nothing from more, and two pools on two cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ardiff import ADScheduler, ARDiffPipeline, ARDiffTransformerModel, AutoencoderARVAE


PAGE_TESTS = {
    f"tests/{name}.py"
    for name in (
        "demo/test_access", "demo/test_browser", "demo/test_engines", "demo/test_models", "demo/test_plan_mirror",
        "demo/test_studio", "serving/test_cluster",
    )
}  # fmt: skip
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file's tests run in one process, and all that open the page in the same one: two browsers at once wait for each other."""
    from xdist.scheduler import LoadFileScheduling

    # Else files with few tests come last, and the longest of them are among these: one process would wait for the other.
    config.option.loadscopereorder = False

    class PageTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "the page" if scope in PAGE_TESTS else scope

    return PageTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A new file whose tests open the page would otherwise run beside another browser, unseen."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) and item.nodeid.partition("::")[0] not in PAGE_TESTS:
            raise pytest.UsageError(
                f"{item.nodeid} opens the page: its file must be in PAGE_TESTS of tests/conftest.py."
            )


def seeded(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A model in eval mode whose weights depend on `seed` alone.

    What starts at zero (the last layer of a residual branch) gets values too: at zero, a test of what flows through that
    branch could not fail.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


@pytest.fixture
def tiny_vae() -> AutoencoderARVAE:
    return seeded(
        lambda: AutoencoderARVAE(
            image_size=32,
            latent_channels=4,
            stem_channels=[8, 8, 16],
            width=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            temporal_window=3,
        ),
        seed=1,
    )


@pytest.fixture
def tiny_transformer() -> ARDiffTransformerModel:
    return seeded(
        lambda: ARDiffTransformerModel(
            num_tokens=4,
            in_channels=4,
            width=32,
            depth=2,
            num_heads=2,
            window=16,
            class_names=["balls", "clouds", "sunset"],
        ),
        seed=2,
    )


@pytest.fixture
def tiny_pipeline(tiny_vae: AutoencoderARVAE, tiny_transformer: ARDiffTransformerModel) -> ARDiffPipeline:
    pipe = ARDiffPipeline(vae=tiny_vae, transformer=tiny_transformer, scheduler=ADScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium; without one its tests skip, or fail where ARDIFF_REQUIRE_BROWSER=1 says that there must be one."""
    refuse = pytest.fail if os.environ.get("ARDIFF_REQUIRE_BROWSER") == "1" else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        refuse("playwright is not installed")
    executable = shutil.which("chromium", path=os.pathsep.join(["/usr/bin", os.environ.get("PATH", "")]))
    if executable is None:
        refuse("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=CHROMIUM_ARGS)
        yield browser
        browser.close()
