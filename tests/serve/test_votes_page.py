"""The vote page in a real browser."""

import json
from pathlib import Path

import pytest

from microdit.evaluation.preference.verdicts import VerdictFile, random_order, read_pairs
from microdit.evaluation.preference.votes import HUMAN, VotingSession
from microdit.serve.votes_api import vote_server
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders
from tests.serve.axe import findings
from tests.serve.browsing import expect, opened
from tests.serve.serving import running

HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""


@pytest.fixture
def page(browser, tmp_path: Path):
    """Open the page for three pairs."""
    a, b = write_folders(tmp_path, 3)
    for folder in (a, b):
        (folder / "prompts.jsonl").write_text((json.dumps({"prompt": HOSTILE}) + "\n") * 3)
    session = VotingSession(VerdictFile(tmp_path / "verdicts.jsonl", random_order(read_pairs(a, b), seed=3), HUMAN))
    with running(vote_server(session)) as url, opened(browser, url) as page:
        yield page


def expect_pair(page, done: int) -> None:
    expect(page.locator("#note")).to_contain_text(f"{done} of 3. Which image follows the prompt better")
    for side in ("first", "second"):
        assert page.locator(f"#{side} img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8


def test_votes_by_mouse_and_keyboard_are_recorded_to_the_last(page, tmp_path):
    expect_pair(page, 0)
    page.click("#second")
    expect_pair(page, 1)
    page.keyboard.press("ArrowLeft")
    expect_pair(page, 2)
    page.keyboard.press("Space")
    expect(page.locator("#prompt")).to_have_text("That was the last one. Thank you!")
    expect(page.locator("#images")).to_be_hidden()
    assert [line["answer"] for line in lines_of(tmp_path / "verdicts.jsonl")] == ["second", "first", "tie"]


def test_the_space_bar_presses_the_button_that_has_the_focus(page, tmp_path):
    expect_pair(page, 0)
    page.locator("#second").focus()
    page.keyboard.press("Space")
    expect_pair(page, 1)
    assert [line["answer"] for line in lines_of(tmp_path / "verdicts.jsonl")] == ["second"]


def test_a_hostile_prompt_is_shown_as_text(page):
    expect(page.locator("#prompt")).to_have_text(HOSTILE)
    assert page.title() == "Which is better?"
    assert page.locator("img").count() == 2


def test_two_voters_share_the_pairs(browser, page, tmp_path):
    expect_pair(page, 0)
    other = browser.new_page()
    other.goto(page.url)
    expect_pair(other, 0)
    other.click("#first")
    expect_pair(other, 1)
    page.click("#second")  # the pair has its vote: the page goes on to the next
    expect_pair(page, 1)
    other.close()
    assert [line["answer"] for line in lines_of(tmp_path / "verdicts.jsonl")] == ["first"]


def test_an_image_that_is_gone_is_said_on_the_page(page, tmp_path):
    expect_pair(page, 0)
    for path in tmp_path.glob("?/*.png"):
        path.unlink()
    page.click("#tie")
    expect(page.locator("#note")).to_have_text("The first image of this pair cannot be loaded. Restore it and reload this page.")


def test_axe_finds_nothing_serious_on_the_vote_page(page):
    expect_pair(page, 0)
    assert findings(page) == []
    for done in (1, 2):
        page.click("#first")
        expect_pair(page, done)
    page.click("#first")
    expect(page.locator("#images")).to_be_hidden()
    assert findings(page) == []
