"""Take the screenshot of the documentation: python tests/serve/screenshot.py MODEL OUT.png, with a run or an exported folder."""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from microdit.pipelines.open_model import open_model
from microdit.serve.endpoints import web_app
from microdit.serve.queue import WorkQueue
from tests.serve.serving import served

PROMPTS = ["flag of Japan", "pizza", "green apple", "red heart"]


def main(model: str, out: Path) -> None:
    name = Path(model).resolve().name
    runs = {name: Path(model)} if (Path(model) / "recipe.yaml").is_file() else {}
    queue = WorkQueue({name: open_model(model, print).pipeline}, 4)
    chromium = shutil.which("chromium") or sys.exit("There is no chromium on this machine: apt-get install chromium")
    with served(web_app(queue, runs=runs)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.getuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1160, "height": 760})
        page.goto(url)
        for seed, prompt in enumerate(PROMPTS):
            for field, value in {"prompt": prompt, "seed": str(10 * seed), "n": "4"}.items():
                page.locator(f"#draw-form [name={field}]").fill(value)
            page.click("#generate")
            expect(page.locator("#gallery img")).to_have_count(4 * (seed + 1), timeout=120_000)
        page.screenshot(path=out)
        for tab in ("Compare", "Budget", "Run") if "--all" in sys.argv else ():
            page.get_by_role("tab", name=tab).click()
            if tab != "Run":
                page.locator(f"#{tab.lower()} .main").click()
            page.wait_for_timeout(6000)
            page.screenshot(path=out.with_stem(f"{out.stem}-{tab.lower()}"))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
