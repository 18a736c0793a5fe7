"""One studio and one visitor for all browser tests, and a session for those without a browser."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from studio_page import serve, visit

from ardiff.demo.session import Session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gradio and its web server are not ours to silence: what they warn of, also while a later test runs, fails no test here."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"))


@pytest.fixture
def session(tiny_pipeline) -> Iterator[Session]:
    session = Session({"tiny": lambda: tiny_pipeline}, warm_up=False)
    yield session
    session.close()


@pytest.fixture(scope="session")
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def site(browser, opened, tiny_pipeline) -> SimpleNamespace:
    """One server for all tests."""
    if not hasattr(opened, "site"):
        opened.site = opened.enter_context(serve(tiny_pipeline))
    opened.site.delay = 0.03
    return opened.site


@pytest.fixture
def page(browser, opened, site) -> Iterator:
    """One visitor for all tests that need no page of their own: loading a page is what takes the time."""
    if not hasattr(opened, "page"):
        opened.page = opened.enter_context(visit(browser, site))
    yield opened.page
    assert not opened.page.trouble


@pytest.fixture(autouse=True)
def _uploads_of_this_test(monkeypatch):
    """`launch` tells gradio by its environment variable where uploads go; the next test's site must not look there."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
