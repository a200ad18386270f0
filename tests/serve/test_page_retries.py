"""The page while its server does not respond for a while, or never again: requests that a real browser drops."""

import re

from tests.serve.browsing import expect, quoting, set_waits
from tests.training.processes import HANG

POLL = re.compile("/api/jobs/[0-9a-f]+$")
HEARD = """() => {
  window.heard = [];
  const state = document.getElementById("state");
  new MutationObserver(() => heard.push(state.textContent)).observe(state, { childList: true });
}"""


def start(page, steps: int) -> None:
    page.evaluate(HEARD)
    for name, value in {"prompt": "red heart", "steps": str(steps), "n": "1"}.items():
        page.locator(f"#draw-form [name={name}]").fill(value)
    page.click("#generate")


def fail_first(page, count: int, fail) -> None:
    """Let `fail(route)` end the first polls of a job, and the server respond to all later ones."""
    left = iter(range(count))
    page.route(POLL, lambda route: route.continue_() if next(left, None) is None else fail(route))


def expect_recovery(page, failures: int) -> None:
    with quoting(page, "#message", "#state"):
        expect(page.locator("#state")).to_have_text("Done.")
        expect(page.locator("#gallery img")).to_have_count(1)
        expect(page.locator("#message")).to_be_hidden()
        expect(page.locator("#announcement")).to_have_text("Done: 1 of red heart.")
    assert sum("does not respond. Trying again in" in sentence for sentence in page.evaluate("heard")) == failures


def test_a_job_outlives_dropped_connections(page):
    set_waits(page, "requests.js", "PATIENCE", waits=[0.01, 0.02, 0.03])
    fail_first(page, 3, lambda route: route.abort("connectionreset"))
    start(page, 2)
    expect_recovery(page, 3)
    assert [sentence for sentence in page.evaluate("heard") if "0.02" in sentence] == [
        "The server does not respond. Trying again in 0.02 seconds."
    ]


def test_a_response_that_is_cut_off_is_asked_for_again(page):
    set_waits(page, "requests.js", "PATIENCE", waits=[0.01, 0.01])
    fail_first(page, 2, lambda route: route.fulfill(status=200, content_type="application/json", body='{"state": "runn'))
    start(page, 2)
    expect_recovery(page, 2)


def test_a_response_that_never_comes_is_asked_for_again(page):
    set_waits(page, "requests.js", "PATIENCE", waits=[0.01, 0.01], answer=0.1)

    def leave(route) -> None:
        set_waits(page, "requests.js", "PATIENCE", answer=HANG)  # so that no later poll is late, on a busy machine

    fail_first(page, 1, leave)
    start(page, 2)
    expect_recovery(page, 1)


def test_a_server_that_never_comes_back_is_given_up_and_the_job_cancelled(page, served_page):
    queue, _ = served_page
    jobs, add = [], queue.add
    queue.add = lambda spec: jobs.append(add(spec)) or jobs[-1]
    try:
        set_waits(page, "requests.js", "PATIENCE", waits=[0.01, 0.01])
        page.route(POLL, lambda route: route.abort() if route.request.method == "GET" else route.continue_())
        start(page, 1000)
        with quoting(page, "#message", "#state"):
            expect(page.locator("#message")).to_have_text("The server does not respond: is microdit app still running?")
            expect(page.locator("#state")).to_have_text("Given up.")
            expect(page.locator("#generate")).to_be_enabled()
        assert jobs[0].ended.wait(HANG)
        assert jobs[0].state == "cancelled"
    finally:
        del queue.add
