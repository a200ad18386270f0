"""The tiny trained model, a server of it, and a browser."""

import os
import shutil
from pathlib import Path

import pytest

from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings

LONG = SamplerSettings(num_inference_steps=1000)  # long enough to be cancelled on any machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_pycollect_makemodule() -> None:
    """Skip the folder where the extra `app` is not installed."""
    pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def tiny_run(workplace: Path) -> Path:
    return workplace / "runs/tiny"


@pytest.fixture(scope="session")
def tiny(tiny_run: Path) -> MicroDiTPipeline:
    return MicroDiTPipeline.from_pretrained(tiny_run)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served_page(tiny, tiny_run):
    """Return the queue and the address of the page of the tiny run."""
    from microdit.serve.endpoints import PageContent, web_app  # needs the extra `app`
    from microdit.serve.queue import WorkQueue
    from tests.serve.serving import served

    queue = WorkQueue({"tiny": tiny}, 4)
    content = PageContent(runs={"tiny": tiny_run}, prompts={"tiny": ["red heart", "<b>owl</b>"]})
    with served(web_app(queue, content=content)) as url:
        yield queue, url


@pytest.fixture
def page(browser, served_page):
    """Open the page, and wait until its fields are there."""
    from tests.serve.browsing import expect, opened

    with opened(browser, served_page[1]) as page:
        expect(page.get_by_label("Model").first).to_have_value("tiny")
        yield page
