"""The page for everybody: axe-core's rules on every tab, and tabs by the keyboard."""

from tests.serve.axe import findings
from tests.serve.browsing import expect, opened

TABS = ["Draw", "Compare", "Run", "Explain", "Budget"]


def fill_all_tabs(page) -> None:
    """Let every tab show its results."""
    page.locator("#draw-form [name=steps]").fill("2")
    page.click("#generate")
    expect(page.locator("#gallery img")).to_have_count(4)
    page.get_by_role("tab", name="Compare").click()
    for steps in page.locator("#compare-form [name=steps]").all():
        steps.fill("2")
    page.click("#compare-form .main")
    expect(page.locator("#overlays figure")).to_have_count(4)
    expect(page.locator("#compare-form .main")).to_be_enabled()
    page.get_by_role("tab", name="Explain").click()
    page.click("#explain-form .main")
    expect(page.locator("#explain-page")).to_be_visible()
    page.get_by_role("tab", name="Budget").click()
    page.click("#budget .main")
    expect(page.locator("#estimate")).to_contain_text("What it costs")


def test_axe_finds_nothing_serious_on_any_tab(page):
    fill_all_tabs(page)
    assert page.get_by_role("tab").all_text_contents() == TABS
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        if name == "Run":
            expect(page.locator("#run-updated")).to_contain_text("last updated")
        assert findings(page) == [], name
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Over one another").check()
    page.locator("#compare-form [name=size]").fill("65x64")
    page.click("#compare-form .main")
    expect(page.locator("#message")).to_be_visible()
    assert findings(page) == []


def test_axe_finds_nothing_serious_in_the_frames(page, browser, served_page):
    explained = page.request.post(served_page[1] + "/api/explanations", data={"prompt": "red heart"}).json()["id"]
    for address in ("/api/runs/tiny", f"/api/explanations/{explained}"):
        with opened(browser, served_page[1] + address) as framed:
            assert findings(framed) == [], address


def test_axe_reads_the_page_and_would_find_something(page):
    page.evaluate("document.getElementById('state').style.color = 'rgb(200, 200, 200)'")
    page.evaluate("document.querySelector('#draw-form [name=steps]').labels[0].remove()")
    found = findings(page)
    assert [line for line in found if "360 light color-contrast" in line] != []
    assert [line for line in found if "1440 dark label" in line] != []


def expect_tab(page, name: str) -> None:
    """Expect the tab to be chosen, to have the focus, and to be the only one that Tab reaches; its panel is all that is shown."""
    tab = page.get_by_role("tab", name=name)
    expect(tab).to_be_focused()
    assert page.get_by_role("tab", selected=True).all_text_contents() == [name]
    assert page.locator("[role=tab][tabindex='0']").all_text_contents() == [name]
    assert page.get_by_role("tabpanel").count() == 1
    expect(page.get_by_role("tabpanel", name=name)).to_be_visible()


def test_tabs_are_chosen_by_arrow_keys(page):
    page.get_by_role("tab", name="Draw").focus()
    for key, name in (("ArrowRight", "Compare"), ("ArrowLeft", "Draw"), ("ArrowLeft", "Budget"), ("ArrowRight", "Draw"), ("End", "Budget")):
        page.keyboard.press(key)
        expect_tab(page, name)
    page.keyboard.press("Tab")
    expect(page.locator("#budget [name=recipe]")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    expect_tab(page, "Draw")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
