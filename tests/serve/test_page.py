"""The page in a real browser, served by a real server with the tiny trained model."""

import base64
import io
import re

import httpx
import pytest
from PIL import Image

from microdit.planning.hardware import ASSUMED_UTILISATION, find_machine
from microdit.planning.planner import plan_for_dollars, write_recipes
from microdit.planning.workload import KnownShapes
from microdit.serve.budget_api import DATA
from microdit.serve.endpoints import web_app
from microdit.serve.queue import WorkQueue
from tests.serve.browsing import expect, opened, quoting
from tests.serve.serving import served
from tests.training.processes import HANG


def fill(page, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#draw-form [name={name}]").fill(value)


def test_a_prompt_becomes_an_image_and_stays_in_the_gallery(page):
    fill(page, prompt="red heart", steps="2", n="2", seed="7")
    page.click("#generate")
    expect(page.locator("#state")).to_have_text("Done.")
    images = page.locator("#result img")
    expect(images).to_have_count(2)
    assert images.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    expect(page.locator("#gallery img")).to_have_count(2)
    page.click("#draw-form [title='Random seed']")
    assert page.locator("#draw-form [name=seed]").input_value() != "7"


def test_examples_are_prompts_of_the_run_and_fill_the_field(page):
    expect(page.locator("#draw-form .examples button")).to_have_text(["red heart", "<b>owl</b>"])
    page.locator("#draw-form .examples button").last.click()
    expect(page.locator("#draw-form [name=prompt]")).to_have_value("<b>owl</b>")


def test_a_long_job_shows_previews_and_can_be_cancelled(page, served_page):
    queue, _ = served_page
    fill(page, prompt="red heart", size="256x256", steps="1000", n="8")  # a minute or more, on any machine
    page.click("#generate")
    with quoting(page, "#message", "#state"):
        expect(page.locator("#result.unfinished img")).to_have_count(8)
        expect(page.locator("#state")).to_have_text(re.compile("Generating: "))
        page.click("#cancel")
        expect(page.locator("#state")).to_have_text("Cancelled.")
    expect(page.locator("#generate")).to_be_enabled()
    assert len(queue) == 0
    expect(page.locator("#gallery img")).to_have_count(0)


def test_a_bad_size_is_an_error_in_a_sentence(page):
    fill(page, prompt="red heart", size="65x64")
    page.click("#generate")
    expect(page.locator("#message")).to_have_text(re.compile(r"^width 65 must be a multiple of \d+, such as 64: [^\n]*\.$"))
    expect(page.locator("#generate")).to_be_enabled()


def test_two_settings_are_compared_from_the_same_seed(page):
    page.get_by_role("tab", name="Compare").click()
    sides = page.locator("#compare-form fieldset")
    for side, guidance in ((0, "1"), (1, "9")):
        sides.nth(side).locator("[name=steps]").fill("2")
        sides.nth(side).locator("[name=guidance_scale]").fill(guidance)
    page.locator("#compare-form [name=prompt]").fill("red heart")
    page.locator("#compare-form [name=n]").fill("1")
    page.click("#compare-form .main")
    for name in ("left", "right"):
        expect(page.locator(f"#{name}-state")).to_have_text(re.compile("^Done"))
    left, right = (page.locator(f"#{name} img").get_attribute("src") for name in ("left", "right"))
    assert left != right
    captions = [page.locator(f"#{name} figcaption").first.text_content() for name in ("left", "right")]
    assert captions == ["0 · red heart"] * 2
    page.get_by_label("Over one another").check()
    expect(page.locator("#left img")).to_be_hidden()
    overlaid = page.locator("#overlays img")
    assert [image.get_attribute("src") for image in overlaid.all()] == [left, right]
    slider = page.get_by_role("slider", name="Left and right result of red heart, seed 0")
    slider.focus()
    for key, split in (("ArrowRight", "51%"), ("Home", "0%"), ("End", "100%")):
        page.keyboard.press(key)
        assert overlaid.last.evaluate("image => getComputedStyle(image).clipPath") == f"inset(0px 0px 0px {split})"
    expect(slider).to_have_attribute("aria-valuetext", "left 100%, right 0%")


def test_two_models_are_compared(browser, tiny):
    with served(web_app(WorkQueue({"tiny": tiny, "other": tiny}, 4))) as url, opened(browser, url) as page:
        expect(page.get_by_label("Model").first).to_have_value("tiny")
        page.get_by_role("tab", name="Compare").click()
        for steps in page.locator("#compare-form [name=steps]").all():
            steps.fill("2")
        page.click("#compare-form .main")
        expect(page.locator("#left-state")).to_have_text("Done. tiny, guidance 2, 2 steps of heun")
        expect(page.locator("#right-state")).to_have_text("Done. other, guidance 2, 2 steps of heun")
        left, right = ([image.get_attribute("src") for image in page.locator(f"#{side} img").all()] for side in ("left", "right"))
        assert len(set(left)) == 4
        assert [pixels(address) for address in left] == [pixels(address) for address in right]  # the same weights


def pixels(address: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).tobytes()


def test_the_report_of_the_run_and_the_budget_of_a_recipe(page):
    page.get_by_role("tab", name="Run").click()
    report = page.frame_locator("#run-page")
    expect(report.get_by_role("heading", name="Curves")).to_be_visible()
    assert report.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.get_by_role("tab", name="Budget").click()
    page.locator("#budget [name=recipe]").select_option("microdit-xl")
    page.locator("#budget [name=price]").fill("2.5")
    page.click("#budget .main")
    expect(page.locator("#estimate")).to_contain_text("What it costs")
    expect(page.locator("#estimate")).to_contain_text("$2.50 a GPU-hour")
    expect(page.locator("#estimate")).to_contain_text(f"utilisation {ASSUMED_UTILISATION:.1%} (assumed")
    page.locator("#budget [name=mfu]").fill("0.5")
    page.click("#budget .main")
    expect(page.locator("#estimate")).to_contain_text("utilisation 50.0% (--mfu)")
    page.locator("#budget [name=file]").set_input_files({"name": "my.yaml", "mimeType": "text/yaml", "buffer": b"name: [\n"})
    page.click("#budget .main")
    expect(page.locator("#message")).to_be_visible()


def test_a_budget_becomes_a_plan_and_its_recipes(page):
    page.get_by_role("tab", name="Budget").click()
    for name, value in {"count": "1", "price": "2", "images": "200000", "dollars": "3"}.items():
        page.locator(f"#budget [name={name}]").fill(value)
    page.click("#budget .main")
    expect(page.locator("#estimate")).to_contain_text("encode 200,000 images")
    expect(page.locator("#estimate")).to_contain_text("of $3.00.")
    expect(page.locator("#estimate")).to_contain_text("--- 1-256-falling.yaml")


def test_a_budgets_recipes_are_those_that_the_command_writes(served_page, tmp_path):
    wanted = {"chip": "rtx4090", "count": 1, "price": 0.5, "mfu": 0.3, "dollars": 40, "images": 10_000}
    text = httpx.post(served_page[1] + "/api/budget", json=wanted, timeout=HANG).json()["text"]
    machine = find_machine("rtx4090", 1, 0.5, 0.3, None, tmp_path / "none.json")
    write_recipes(plan_for_dollars(40, machine, KnownShapes(), DATA, 10_000), tmp_path / "out")
    plan, *recipes = text.split("\n--- ")
    assert "$40.00: " in plan
    assert dict(part.split("\n", 1) for part in recipes) == {f.name: f.read_text() for f in sorted((tmp_path / "out").iterdir())}


@pytest.mark.parametrize("name", ["../pyproject.toml", "/etc/passwd", "", "nothing.yaml"])
def test_only_recipes_of_the_folder_are_estimated(served_page, name):
    response = httpx.post(served_page[1] + "/api/budget", json={"recipe": name, "chip": "h100"})
    assert (response.status_code, "no such recipe" in response.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": 0}, "whole number"),
        ({"count": True}, "number of GPUs must be a whole number"),
        ({"price": "x"}, "price"),
        ({"price": 10**400}, "price must be in dollars"),
        ({"chip": "abacus"}, "no chip named abacus"),
        ({"price": -1}, "0 or more"),
        ({"mfu": "x"}, "utilisation must be a share"),
        ({"mfu": 1.5}, "must lie in (0, 1]"),
        ({"mfu": True}, "utilisation must be a share"),
        ({"images": 0}, "number of images must be a whole number"),
        ({"images": 1.5}, "number of images must be a whole number"),
        ({"dollars": "x"}, "budget must be in dollars"),
        ({"dollars": -5}, "must be a sum above 0"),
        ({"dollars": 1e300}, "more than we plan with"),
        ({"dollars": 5, "text": "name: x"}, "not both"),
    ],
)
def test_an_invalid_budget_is_an_error_in_a_sentence(served_page, fields, words):
    response = httpx.post(served_page[1] + "/api/budget", json={"recipe": "emoji.yaml", **fields})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_unknown_jobs_and_runs_are_not_found(served_page):
    assert httpx.get(served_page[1] + "/api/jobs/1").status_code == 404
    assert httpx.get(served_page[1] + "/api/runs/nothing").status_code == 404
