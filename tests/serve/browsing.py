"""Pages in a real browser, and what they say when a test fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.training.processes import HANG

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def opened(browser: "Browser", url: str) -> Iterator["Page"]:
    """Open a page. A request to another host, an error in a script, or something that the page's policy forbids fails the test."""
    page = browser.new_page()
    page.set_default_timeout(1000 * HANG)
    expect.set_options(timeout=1000 * HANG)
    foreign: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith((url, "data:")) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(url)
    yield page
    page.close()
    assert (foreign, errors) == ([], [])


@contextmanager
def quoting(page: "Page", *selectors: str) -> Iterator[None]:
    """Add what these elements of the page say to the error of a failing expectation."""
    try:
        yield
    except AssertionError as error:
        said = {selector: page.locator(selector).text_content() for selector in selectors}
        raise AssertionError(f"{error}\nThe page says: {said}") from error


def set_waits(page: "Page", file: str, name: str, **values: object) -> None:
    """Shorten waits of the page, which are kept in the object `name` of a script."""
    page.evaluate(f"values => import('/{file}').then(script => void Object.assign(script.{name}, values))", values)
