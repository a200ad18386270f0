"""Take screenshots of the page, with a run or an exported folder: python tests/serve/screenshot.py MODEL OUT.png [--all]

OUT.png is the documentation's. With --all, OUT-TAB-WIDTH-SCHEME.png are every tab at the widths of a phone and a desk, light and dark.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from microdit.pipelines.open_model import open_model
from microdit.serve.endpoints import PageContent, web_app
from microdit.serve.queue import WorkQueue
from tests.serve.serving import served

PROMPTS = ["flag of Japan", "pizza", "green apple", "red heart"]
WAIT = 120_000  # milliseconds


def main(model: str, out: Path, every: bool) -> None:
    name, opened = Path(model).resolve().name, open_model(model, print)
    runs = {name: Path(model)} if (Path(model) / "recipe.yaml").is_file() else {}
    queue = WorkQueue({name: opened.pipeline}, 4)
    chromium = shutil.which("chromium") or sys.exit("There is no chromium on this machine: apt-get install chromium")
    with served(web_app(queue, content=PageContent(runs, {name: opened.sample_prompts}))) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.getuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1160, "height": 800})
        expect.set_options(timeout=WAIT)
        page.goto(url)
        draw(page)
        page.screenshot(path=out)
        if every:
            fill_other_tabs(page)
            for tab in page.get_by_role("tab").all_text_contents():
                page.get_by_role("tab", name=tab).click()
                if tab == "Run":
                    expect(page.locator("#run-updated")).to_contain_text("last updated")
                take_all(page, out, tab.lower())
            page.get_by_role("tab", name="Compare").click()
            page.get_by_label("Over one another").check()
            take_all(page, out, "slider")
        browser.close()


def draw(page: Page) -> None:
    for seed, prompt in enumerate(PROMPTS):
        for field, value in {"prompt": prompt, "seed": str(10 * seed), "n": "4"}.items():
            page.locator(f"#draw-form [name={field}]").fill(value)
        page.click("#generate")
        expect(page.locator("#gallery img")).to_have_count(4 * (seed + 1))


def fill_other_tabs(page: Page) -> None:
    for tab, prompt in (("Compare", PROMPTS[3]), ("Explain", PROMPTS[2]), ("Budget", None)):
        page.get_by_role("tab", name=tab).click()
        if prompt:
            page.locator(f"#{tab.lower()} [name=prompt]").fill(prompt)
        page.locator(f"#{tab.lower()} .main").click()
    expect(page.locator("#overlays figure")).to_have_count(4)
    expect(page.locator("#compare-form .main")).to_be_enabled()
    expect(page.locator("#explain-state")).to_have_text("The explanation is below.")
    expect(page.locator("#estimate")).to_contain_text("What it costs")


def take_all(page: Page, out: Path, name: str) -> None:
    for width in (360, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=out.with_stem(f"{out.stem}-{name}-{width}-{scheme}"), full_page=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--all" in sys.argv)
