"""The tabs Run and Explain in a real browser: a run that goes on while it is watched, and what a model does with a prompt."""

import json
import os
import socket
from pathlib import Path

import pytest

from microdit.io.files import from_checked_json, to_checked_json, write_aside
from microdit.serve.endpoints import PageContent, web_app
from microdit.serve.queue import WorkQueue
from tests.reports.test_run_page import FEW, metrics_line, write_run
from tests.serve.browsing import expect, opened, quoting, set_waits
from tests.serve.serving import served

QUIET = 500  # milliseconds in which a page that polls every 20 would poll


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that this process seems to train."""
    return write_run(tmp_path / "run", FEW, state="running", pid=os.getpid(), host=socket.gethostname(), total_steps=2000)


def go_on(run: Path, state: str, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(step)) + "\n")
    status = from_checked_json((run / "status.json").read_bytes())
    write_aside(run / "status.json", to_checked_json(status | {"state": state, "step": step}))


@pytest.fixture
def watched(browser, tiny, run):
    """The page with the tab Run open, and the addresses that it requests."""
    # Two runs whose folders have the same name are named by their paths.
    with served(web_app(WorkQueue({"tiny": tiny}, 4), content=PageContent(runs={"runs/one": run}))) as url, opened(browser, url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.removeprefix(url)))
        expect(page.get_by_label("Model").first).to_have_value("tiny")
        set_waits(page, "reports.js", "LIVE", seconds=0.02, share=1000)
        page.get_by_role("tab", name="Run").click()
        yield page, asked


def test_a_run_that_trains_is_followed_to_its_end(watched, run):
    page, asked = watched
    report, updated = page.frame_locator("#run-page"), page.locator("#run-updated")
    with quoting(page, "#message", "#run-updated"):
        expect(report.get_by_text("Step 1,000 of 2,000")).to_be_visible()
        expect(updated).to_contain_text("Training; last updated at ")
        inside = page.frame(url="**/api/runs/*")
        inside.evaluate("window.kept = true; document.querySelector('details.configuration').open = true; scrollTo(0, 300)")
        go_on(run, "running", 1500)
        expect(report.get_by_text("Step 1,500 of 2,000")).to_be_visible()
        assert inside.evaluate("[window.kept, document.querySelector('details.configuration').open, scrollY]") == [True, True, 300]
        assert inside.evaluate("document.querySelector('.bar div').offsetWidth / document.querySelector('.bar').offsetWidth") == 0.75
        go_on(run, "finished", 2000)
        expect(updated).to_contain_text("Not training (finished); last updated at ")
        expect(report.get_by_text("Step 2,000 of 2,000")).to_be_visible()
        expect(page.locator("#announcement")).to_have_text("The run's state: finished.")
    asked.clear()
    page.wait_for_timeout(QUIET)
    assert asked == []


def test_a_run_is_watched_only_while_its_tab_is_open(watched):
    page, asked = watched
    expect(page.locator("#run-updated")).to_contain_text("Training")
    with page.expect_request("**/api/run-states/*"):
        pass
    page.get_by_role("tab", name="Budget").click()
    page.wait_for_timeout(QUIET)  # for a request that was on its way
    asked.clear()
    page.wait_for_timeout(QUIET)
    assert asked == []


def test_a_run_that_has_ended_is_not_polled(page):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    set_waits(page, "reports.js", "LIVE", seconds=0.02, share=1000)
    page.get_by_role("tab", name="Run").click()
    expect(page.locator("#run-updated")).to_contain_text("Not training (finished)")
    asked.clear()
    page.wait_for_timeout(QUIET)
    assert asked == []


def explain(page, prompt: str) -> None:
    page.get_by_role("tab", name="Explain").click()
    page.locator("#explain-form [name=prompt]").fill(prompt)
    page.click("#explain-form .main")


def test_a_prompt_is_explained(page):
    explain(page, "red <b>heart</b>")
    with quoting(page, "#message", "#explain-state"):
        expect(page.locator("#explain-state")).to_have_text("The explanation is below.")
    page_inside = page.frame_locator("#explain-page")
    expect(page_inside.get_by_role("heading", level=1)).to_have_text("“red <b>heart</b>”")
    images = page_inside.locator("img")
    assert images.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
    expect(page_inside.get_by_role("img", name="Where <b>heart</b> is attended to")).to_be_visible()


def test_what_cannot_be_explained_is_an_error_in_a_sentence(page):
    explain(page, "x" * 2001)
    expect(page.locator("#message")).to_have_text("prompt has 2,001 characters, and may have 2,000.")
    expect(page.locator("#explain-page")).to_be_hidden()


def test_an_explanation_can_be_cancelled(page):
    page.route("**/api/explanations", lambda route: None)  # it takes for ever
    explain(page, "red heart")
    page.click("#explain-form .cancel")
    expect(page.locator("#explain-state")).to_have_text("Cancelled.")
    expect(page.locator("#explain-form .main")).to_be_enabled()
    expect(page.locator("#message")).to_be_hidden()
