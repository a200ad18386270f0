"""A page of a run: whole without a network, safe with any text, and written whatever the run folder lacks."""

import base64
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.reports.curves import NOISE, draw_curves
from microdit.reports.grids import save_png
from microdit.reports.run_page import PICTURES, report_page, write_report

VOID = {"meta", "link", "img", "br", "hr", "input"}
LOADS = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}


class Page(HTMLParser):
    """Tags are closed in the order in which they were opened, or it is no page."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.titles: list[str] = []  # h1 to h3 and the captions of figures
        self.words = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in LOADS and value]
        self.pictures += [value for name, value in attributes if tag == "img" and name == "src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words += text
        if self.open and self.open[-1] in ("h1", "h2", "h3", "figcaption"):
            self.titles.append(text.strip())


def metrics_line(step: int, **more: object) -> dict[str, object]:
    loss = 1 / (1 + step / 100)
    return {
        "step": step, "phase": "masked" if step <= 500 else "full", "loss": loss, "learning_rate": 2.4e-4, "grad_norm": 0.3,
        "images_per_second": 3000.0, "images_seen": step * 64, "data_wait": 0.01, "mfu": 0.38, "memory_gb": 61.2,
        "loss_by_noise": [loss * level if level != 3 else None for level in range(1, 9)], "mask_ratio": 0.75 if step <= 500 else 0.0,
        "gpu_hours": step / 100, "dollars": step / 50, "skipped": 2, "seconds_left": 60.0, "time": time.time(), **more,
    }  # fmt: skip


FEW = (
    "step",
    "phase",
    "loss",
    "learning_rate",
    "memory_gb",
    "images_seen",
    "gpu_hours",
    "dollars",
    "time",
)  # three curves instead of twelve


def write_run(run: Path, keys: tuple[str, ...] | None = None, **status: object) -> Path:
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: try\nseed: 7\n")
    held_out = {"held_out_loss": 0.5, "held_out_by_noise": [0.1] * 8, "quality_kid": 0.2, "quality_retrieval": 0.3}
    lines = [metrics_line(step, **(held_out if step % 200 == 0 else {})) for step in range(50, 1001, 50)]
    lines = [{key: line[key] for key in keys or line} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "state": "finished", "reason": None, "name": "try", "step": 1000, "total_steps": 1000, "phase": "full", "loss": 0.09,
        "images_per_second": 3000.0, "gpu_hours": 10.0, "dollars": 20.0, "seconds_left": 0, "skipped": 2, "rollbacks": 1,
        "checkpoints_failed": 3, "host": "elsewhere", "pid": 5, "time": time.time(), **status,
    }  # fmt: skip
    (run / "status.json").write_text(json.dumps(content))
    start = {
        "time": 1.8e9, "command": "microdit train x.yaml", "world_size": 8, "device": "NVIDIA H100", "host": "node-1",
        "price_per_hour": 2.0, "from_step": 0, "git_commit": "0123456789abcdef", "versions": {"python": "3.12", "torch": "2.13"},
    }  # fmt: skip
    again = {**start, "price_per_hour": None, "from_step": 500, "git_commit": None}
    data = {"main": {"path": "data/main", "rows": 1234567, "fingerprint": "feedc0de"}}
    (run / "run.json").write_text(json.dumps({"name": "try", "data": data, "starts": [start, again]}))
    write_sample(run, 500)
    write_sample(run, 1000)
    return run


def write_sample(run: Path, step: int, side: int = 32) -> None:
    Image.new("RGB", (side, side), (step % 256, 90, 90)).save(run / "samples" / f"step-{step:08d}.png")


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "run"))


def test_a_page_is_whole_html_that_loads_nothing(path):
    assert path.parts[-2:] == ("run", "report.html")
    page = Page(path)
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert "script" not in page.tags
    text = path.read_text()
    assert re.findall(r"https?://|@import|url\((?!#)", text) == []
    used, defined = re.findall(r'(?:xlink:href="|url\()#([\w-]+)', text), re.findall(r'id="([\w-]+)"', text)
    assert set(used) <= set(defined)


def test_a_page_says_how_things_stand_and_what_they_cost(path):
    page = Page(path)
    assert page.titles[0] == "try"
    for title in ("Curves", "Samples", "Cost", "Origin"):
        assert title in page.titles
    words = " ".join(page.words.split())
    for said in ("finished", "Step 1,000 of 1,000 (100%)", "64,000", "10.00 GPU-hours in all, $20.00", "Steps skipped2", "Rollbacks1"):
        assert said in words
    for said in ("Checkpoints failed3", "NVIDIA H100", "0123456789ab", "data/main", "1,234,567", "feedc0de", "torch 2.13", "seed: 7"):
        assert said in words
    assert "masked from the start, full from step 550." in words


def test_every_series_has_its_curve_in_colours_of_the_page(path):
    titles = {
        "Loss", "Loss by noise level", "Held-out loss by noise level", "Learning rate", "Mask ratio", "Gradient norm", "Speed",
        "Model FLOP utilisation", "Waiting for data", "Peak memory", "Distance from real images", "Recognised images",
    }  # fmt: skip
    page = Page(path)
    assert titles <= set(page.titles)
    assert page.tags.count("svg") == len(titles)
    assert "Lower is better" in page.words
    assert "Higher is better" in page.words
    text = path.read_text()
    for variable in ("ink", "grid", "curve", "second", *(f"noise-{level + 1}" for level in range(len(NOISE)))):
        assert f"var(--{variable})" in text[text.index("</style>") :]
        assert text.count(f"--{variable}:") == 2  # light and dark
    drawn = set(re.findall(r"(?:fill|stroke): (#\w+)", text[text.index("</style>") :]))
    assert drawn <= {"#ffffff"}  # the paper behind, which is transparent


def test_alignment_has_a_curve_where_a_run_has_it():
    lines = [metrics_line(step, **({"alignment": step / 1000} if step <= 300 else {})) for step in range(100, 700, 100)]
    assert "Representation alignment" in [curve.title for curve in draw_curves(lines)]
    assert "Representation alignment" not in [curve.title for curve in draw_curves(lines[3:])]


def test_the_ceiling_of_a_data_set_is_shown_beside_the_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", FEW)
    assert "Ceiling" not in Page(write_report(run)).titles  # sets of earlier versions have no such picture
    figures = {"psnr_db": 18.25, "perceptual_distance": 0.71, "poor": 14, "pictures": 16, "autoencoder": "icon", "side": 64}
    (tmp_path / "data" / "main").mkdir(parents=True)
    picture = tmp_path / "data" / "main" / "reconstructions.png"
    save_png(Image.new("RGB", (300, 200), (0, 90, 200)), picture, {"reconstructions": json.dumps(figures)})
    page = Page(write_report(run))
    assert page.titles[page.titles.index("Samples") :].count("Ceiling") == 1
    assert "main: PSNR 18.2 dB, perceptual distance 0.71, 14 of 16 are poor." in " ".join(page.words.split())
    shown = [decoded(address) for address in page.pictures]
    assert (300, 200) in [image.size for image in shown]
    save_png(Image.new("RGB", (300, 200)), picture, {"reconstructions": '{"psnr_db": "<b>", "perceptual_distance": [], "poor": 0}'})
    assert "main: PSNR – dB." in " ".join(Page(write_report(run)).words.split())
    picture.write_bytes(picture.read_bytes()[:100])
    assert "Ceiling" not in Page(write_report(run)).titles


def test_text_of_recipes_and_names_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    run = write_run(tmp_path / "run", name=hostile, reason=f"Stopped by {hostile}")
    (run / "recipe.yaml").write_text(f"name: '{hostile}'\nprompts: ['</pre><img src=x onerror=alert(1)>']\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(metrics_line(step, phase=f"$x_{step}{hostile}")) + "\n" for step in (1, 2)))
    (run / "run.json").write_text(
        json.dumps({"data": {hostile: {"path": hostile}}, "starts": [{"device": hostile, "versions": {"a": hostile}}]})
    )
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "x" not in page.loads
    assert page.words.count(hostile) > 6


def test_text_of_others_turns_no_reading_direction(tmp_path):
    run = write_run(tmp_path / "run", FEW, name="photo\u202egnp.exe", reason="Stopped: \x1b[2J")
    page = Page(write_report(run))
    assert r"photo\u202egnp.exe" in page.words
    assert r"Stopped: \u001b[2J" in page.words
    assert not {"\u202e", "\x1b"} & set(page.words)
    assert page.tags.count("svg") > 2  # our own drawings are as they were


def test_half_a_line_is_counted_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", FEW)
    assert "could not be read" not in Page(write_report(run)).words
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1050, "lo')
    assert "1 line of metrics.jsonl could not be read" in Page(write_report(run)).words


def test_numbers_that_are_not_finite_are_left_out_of_the_curves():
    hole = {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "loss_by_noise": [float("nan")] * 8, "memory_gb": None}
    curves = {
        curve.title: curve for curve in draw_curves([metrics_line(step, **(hole if step == 20 else {})) for step in range(10, 60, 10)])
    }
    assert "1 of 5 points" in curves["Loss"].note
    assert not any("nan" in curve.svg.lower() for curve in curves.values())
    without = {curve.title for curve in draw_curves([metrics_line(step, **hole) for step in (10, 20)])}
    assert without == {"Learning rate", "Speed", "Waiting for data"}


def test_a_long_run_is_thinned_but_keeps_its_spikes():
    lines = [metrics_line(step, images_per_second=100.0 if step == 7777 else 3000.0) for step in range(20_000)]
    curves = {curve.title: curve.svg for curve in draw_curves(lines)}
    assert sum(map(len, curves.values())) < 1_000_000
    faint = next(line for line in re.findall(r'<path d="([^"]*)"[^>]*opacity: 0.3', curves["Speed"]))
    heights = {float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", faint)}
    assert max(heights) - min(heights) > 50


def test_a_run_that_diverged_shows_its_loss_as_not_finite(tmp_path):
    words = Page(write_report(write_run(tmp_path / "run", FEW, state="failed", reason="The loss exploded.", loss=float("nan")))).words
    assert "not finite" in words
    assert "The loss exploded." in words


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: new\n")
    words = Page(write_report(tmp_path)).words
    for said in ("unknown", "No metrics have been written yet.", "No samples have been generated yet.", "No start of the run is recorded."):
        assert said in words


def test_of_many_samples_some_are_shown_and_the_page_says_so(tmp_path):
    run = write_run(tmp_path / "run", FEW)
    for step in range(2000, 2100):
        write_sample(run, step, side=700)
    page = Page(write_report(run))
    assert len(page.pictures) == PICTURES
    assert f"{PICTURES} of 102 images" in page.words
    assert "Step 2,099, the newest" in page.words
    assert "Step 500" in page.words
    assert decoded(page.pictures[0]).size == (700, 700)
    assert {max(decoded(picture).size) for picture in page.pictures[1:-2]} == {640}


def test_a_damaged_picture_is_counted(tmp_path):
    run = write_run(tmp_path / "run", FEW)
    whole = (run / "samples" / "step-00001000.png").read_bytes()
    (run / "samples" / "step-00001500.png").write_bytes(whole[: len(whole) // 2])
    page = Page(write_report(run))
    assert len(page.pictures) == 2
    assert "Unreadable images: 1." in page.words


def test_phases_in_folders_of_their_own_share_a_page_in_order(tmp_path):
    for name in ("10-last", "2-full", "1-masked"):
        write_run(tmp_path / name, FEW, name=name)
    page = Page(write_report(tmp_path, tmp_path / "all.html"))
    assert not (tmp_path / "report.html").exists()
    headings = [title for title in page.titles if title in ("1-masked", "2-full", "10-last")]
    assert headings == ["1-masked", "2-full", "10-last"]
    assert page.titles[0] == tmp_path.name
    assert "Total192,00030.00$60.00" in "".join(page.words.split())


def test_a_folder_without_a_run_is_refused_by_what_it_lacks(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=re.escape("recipe.yaml")) as error:
            write_report(folder)
        assert str(folder) in str(error.value)


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    run = write_run(tmp_path / "run", FEW)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        write_report(run, tmp_path / "file" / "report.html")


def test_a_page_can_be_called_off_at_every_line_picture_and_curve(tmp_path):
    run = write_run(tmp_path / "run", FEW)
    calls = []
    report_page(run, lambda: calls.append(1))
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    assert len(calls) >= lines + 2  # lines, and at least a picture and a curve
    left = iter([None] * (len(calls) - 1))
    with pytest.raises(StopIteration):  # the last call of all ends it, too
        report_page(run, lambda: next(left))
