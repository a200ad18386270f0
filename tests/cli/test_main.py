"""The commands, one after the other, as a person would run them."""

import errno
import json
import os
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from microdit.cli import main as cli
from microdit.errors import UserError
from microdit.io.locks import sole_writer
from tests.commands import microdit
from tests.training.processes import RECIPE


def test_training_writes_into_its_run_folder(workplace):
    run = workplace / "runs" / "tiny"
    assert (run / "recipe.yaml").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    assert [p.name for p in (run / "samples").iterdir()] == ["step-00000006.png"]


def test_sampling_is_the_same_for_the_same_seed_and_not_for_another(workplace):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        result = microdit(
            "sample", "runs/tiny", "red heart", "a green cat", "--steps", 3, "--seed", seed, "--out", f"{name}.png", cwd=workplace
        )
        assert result.returncode == 0, result.output
        assert f"seed {seed}" in result.output
    a, b, c = (Image.open(workplace / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


def test_a_run_is_listed_and_reported(workplace):
    listed = microdit("runs", cwd=workplace)
    assert listed.returncode == 0, listed.output
    assert "tiny" in listed.output
    assert "finished" in listed.output
    reported = microdit("report", "runs/tiny", cwd=workplace)
    assert reported.returncode == 0, reported.output
    page = (workplace / "runs" / "tiny" / "report.html").read_text()
    assert "<svg" in page
    assert "data:image/" in page
    assert "There is no folder nowhere" in microdit("runs", "nowhere", cwd=workplace).output


def test_weights_are_chosen_by_name(workplace):
    for weights in ("model", "ema"):
        drawn = microdit("sample", "runs/tiny", "owl", "--steps", 2, "--weights", weights, "--out", f"{weights}.png", cwd=workplace)
        assert drawn.returncode == 0, drawn.output
    assert Image.open(workplace / "model.png").tobytes() != Image.open(workplace / "ema.png").tobytes()
    assert "no weights named other, only ema, model" in microdit("sample", "runs/tiny", "x", "--weights", "other", cwd=workplace).output


def test_two_runs_pictures_are_drawn_and_judged_in_both_orders(workplace):
    """The judge is a real server that always answers A: with both orders that is no preference."""

    class AlwaysA(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = {"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 7}}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    (workplace / "prompts.txt").write_text("red heart\nowl\npizza\n")
    for seed in (0, 5):
        command = ["draw", "runs/tiny", "prompts.txt", "--steps", 2, "--seed", seed, "--out", f"drawn-{seed}"]
        drawn = microdit(*command, cwd=workplace)
        assert drawn.returncode == 0, drawn.output
    times = {path: path.stat().st_mtime_ns for path in (workplace / "drawn-0").iterdir()}
    assert microdit("draw", "runs/tiny", "prompts.txt", "--steps", 2, "--out", "drawn-0", cwd=workplace).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (workplace / "drawn-0").iterdir()} == times
    other = microdit("draw", "runs/tiny", "prompts.txt", "--steps", 3, "--out", "drawn-0", cwd=workplace)
    assert "generated with another num_inference_steps" in other.output

    server = ThreadingHTTPServer(("127.0.0.1", 0), AlwaysA)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    judged = microdit("prefer", "drawn-0", "drawn-5", "--judge-url", url, "--yes", cwd=workplace)
    server.shutdown()
    assert judged.returncode == 0, judged.output
    assert "6 requests" in judged.output
    assert '"win_rate": 0.5' in judged.output
    assert '"disagreed": 3' in judged.output
    assert "Who judges?" in microdit("prefer", "drawn-0", "drawn-5", cwd=workplace).output


def test_the_emoji_geneval_draws_and_judges(workplace):
    command = ["geneval", "runs/tiny", "--per-task", 1, "--per-prompt", 1, "--steps", 2, "--out", "geneval"]
    done = microdit(*command, cwd=workplace)
    assert done.returncode == 0, done.output
    summary = json.loads((workplace / "geneval" / "summary.json").read_text())
    assert summary["pictures"] == 6
    assert len((workplace / "geneval" / "results.jsonl").read_text().splitlines()) == 6


def test_data_verify(workplace):
    assert "is whole" in microdit("data", "verify", "data/emoji", cwd=workplace).output


@pytest.mark.slow  # 1,807 pictures through EfficientNet; tests/evaluation/test_emoji.py looks among fewer
def test_evaluation_measures_retrieval(workplace):
    result = microdit("evaluate", "runs/tiny", "-n", 8, "--steps", 2, cwd=workplace)
    assert result.returncode == 0, result.output
    metrics = json.loads((workplace / "runs" / "tiny" / "metrics.json").read_text())
    assert metrics["retrieval"]["captions"] == 8
    assert metrics["retrieval_of_reconstructions"]["top_10"] > 0.7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "runs/none", "x"], "There is no folder runs/none"),
        (["sample", "runs/tiny", "x", "--steps", 0], "from 2 to 1000 steps, not 0"),
        (["sample", "runs/tiny", "x", "--steps", 1000000], "from 2 to 1000 steps"),
        (["sample", "runs/tiny", "x", "--guidance", "nan"], "guidance_scale must be a number"),
        (["train", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
        (["report", "[/b]\x1b[2J\u202e"], r"[/b]\u001b[2J\u202e is not a run folder"),
        (["train", RECIPE, "--dtype", "float16"], "float16 needs losses that are scaled"),
        (["train", RECIPE, "--device", "mps"], "PyTorch sees no Apple GPU here"),
        (["bench", "--dtype", "float16", "--device", "cpu"], "take bfloat16, or float32"),
        (["evaluate", "runs/tiny", "--device", "tpu"], "There is no device 'tpu'"),
        (["geneval", "runs/tiny", "--out", "g", "--device", "cpu", "--dtype", "float16"], "float16 is slow and narrow on a CPU"),
        (["app", "--device", "tpu"], "There is no device 'tpu'"),
        (["data", "encode", "emoji", "--out", "data/emoji"], "data/emoji exists already"),
        (["data", "encode", "emoji", "--out", "x", "--autoencoder", "nowhere"], "There is no autoencoder in nowhere"),
        (["data", "verify", "runs"], "There is no encoded data set in runs"),
        (["train", RECIPE, "name=../elsewhere"], "The recipe's name is '../elsewhere', which is no name of a folder in runs"),
        (["train", RECIPE, "name=/tmp/elsewhere"], "choose the run's folder with --out"),
        (["train", RECIPE, "name=.."], "choose the run's folder with --out"),
        (["sample", "runs/tiny", "x", "--seed", "9" * 30], f"The seed is {'9' * 30}, and must be an integer of 64 bits"),
        (["explain", "runs/tiny", "x", "--seed", 1 << 64], "must be an integer of 64 bits"),
        (["grid", "runs/tiny", "x", "--sweep", f"seed=1,{1 << 64}"], "must be an integer of 64 bits"),
        *(([*command, "x" * 5000], "File name too long") for command in (["runs"], ["report"], ["budget"], ["data", "look"], ["compare"])),
    ],
)
def test_mistakes_end_in_one_sentence(workplace, arguments, sentence):
    result = microdit(*arguments, cwd=workplace)
    assert result.returncode == 1
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_help_teaches(tmp_path):
    page = microdit("--help", cwd=tmp_path).output
    assert "data encode" in page
    titles = [f"─ {title} ─" for title in ("Options", "Data", "Train", "Draw", "Measure", "Share", "Plan")]
    places = [page.index(title) for title in titles]
    assert places == sorted(places)  # in the order of use
    assert microdit("--version", cwd=tmp_path).output == f"microdit {version('microdit')}"
    doctor = microdit("doctor", cwd=tmp_path)
    assert doctor.returncode == 0
    assert "torch" in doctor.output
    for command in ("train", "sample"):
        assert "Example: microdit" in microdit(command, "--help", cwd=tmp_path).output


def test_a_folder_of_ones_own_pictures_is_looked_at_encoded_and_trained_on(tmp_path):
    """The page docs/bring-your-own-data.md, in small: two resolutions, a picture that is broken, a second set mixed in by weight."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for n in range(9):
        Image.new("RGB", (40 + n, 30), (25 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a shade of red, number {n}")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "broken.txt").write_text("nothing to see")

    looked = microdit("data", "look", "mine", cwd=tmp_path)
    assert looked.returncode == 0, looked.output
    assert Image.open(tmp_path / "look.png").width > 400
    options = ["--autoencoder", "pixels", "--resolutions", "8", "16", "--workers", "1"]
    encoded = microdit("data", "encode", "mine", "--out", "data/mine", *options, cwd=tmp_path)
    assert encoded.returncode == 0, encoded.output
    assert "9 of 10 records kept at 8, 16 px" in encoded.output
    assert "rejected 1: no picture of a kind that is read" in encoded.output
    assert microdit("data", "encode", "scenes:6", "--out", "data/scenes", *options, cwd=tmp_path).returncode == 0

    mixed = ["data.sets.mine.path=data/mine", "data.sets.scenes.path=data/scenes", "data.path=null", "data.resolution=16"]
    weights = ["phases.0.weights={mine: 0.8, scenes: 0.2}", "phases.0.steps=3", "phases.1.steps=2"]
    trained = microdit("train", RECIPE, *mixed, *weights, cwd=tmp_path)
    assert trained.returncode == 0, trained.output
    assert "9 + 6 samples" in trained.output
    drawn = microdit("sample", "runs/tiny", "a shade of red", "--steps", "2", "--height", "16", "--width", "32", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.output
    refused = microdit("sample", "runs/tiny", "a shade of red", "--height", "15", cwd=tmp_path)
    assert "height 15 must be a multiple of 4" in refused.output


def test_pictures_of_several_shapes_are_trained_on_and_drawn(tmp_path):
    """Aspect-ratio buckets, from the folder to a wide picture."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for n in range(16):
        Image.new("RGB", (400, 210) if n % 2 else (210, 400), (15 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    options = ["--autoencoder", "pixels", "--resolutions", "192", "--buckets", "--workers", "0"]
    encoded = microdit("data", "encode", "mine", "--out", "data", *options, cwd=tmp_path)
    assert encoded.returncode == 0, encoded.output
    settings = ["data.path=data", "model.patch_size=32", "phases.0.steps=4", "phases.1.steps=2", "phases.0.mask_ratio=0.5"]
    trained = microdit("train", RECIPE, *settings, cwd=tmp_path)
    assert trained.returncode == 0, trained.output
    drawn = microdit("sample", "runs/tiny", "picture 3", "--steps", "2", "--height", "128", "--width", "256", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data", "encode", "nowhere", "--out", "x"], "There is no file or folder at nowhere"),
        (["data", "encode", "emoji", "--out", "x", "--autoencoder", "nothing"], "nothing"),
        (["data", "encode", "emoji", "--out", "x", "--resolutions", "60"], "--resolutions 60 must be a multiple of 8"),
        (["data", "encode", "emoji", "--out", "x", "--caption", "a=b"], "write NAME or NAME=WEIGHT"),
        (["data", "encode", "emoji", "--out", "x", "--caption", "alt"], "no caption named alt"),
        (["train", RECIPE, "data.path=data/emoji", "data.autoencoder=sdxl", "--out", "y"], "was encoded with icon"),
        (["train", RECIPE, "data.path=data/emoji", "data.sets.a.path=b", "--out", "y"], "either a path or sets"),
        (["train", RECIPE, "data.path=data/emoji", "phases.0.weights={b: 1}", "--out", "y"], "weights names b"),
    ],
)
def test_bad_input_about_data_ends_in_one_sentence(workplace, arguments, sentence):
    done = microdit(*arguments, cwd=workplace)
    assert done.returncode == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (workplace / "x").exists()


@pytest.mark.parametrize(
    ("found", "refused"), [("2.8.1+cu128", True), ("1.13.0", True), ("2.9.0", False), ("2.11.0+cu130", False), ("3.0", False)]
)
def test_a_torch_that_is_too_old_is_refused_in_one_sentence(monkeypatch, found, refused):
    monkeypatch.setattr(cli, "version", lambda name: found)
    with pytest.raises(UserError, match=r"needs torch 2\.9 or newer, and") if refused else nullcontext():
        cli._check_torch_version()
    assert f"torch>={'.'.join(map(str, cli.OLDEST_TORCH))}" in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_an_autoencoder_is_not_trained_into_a_locked_folder(tmp_path):
    with sole_writer(tmp_path / "ae"):
        done = CliRunner().invoke(cli.app, ["train-autoencoder", "--out", str(tmp_path / "ae"), "--steps", "1"])
    assert isinstance(done.exception, UserError)
    assert f"ae is in use by process {os.getpid()} on" in str(done.exception)
    assert not (tmp_path / "ae").exists()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_is_full_or_read_only_is_a_sentence(monkeypatch, capsys, number, words):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/mnt/runs/a\x1b[2J")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 1
    assert f"Error: {words} (/mnt/runs/a" in printed
    assert "make room there, or choose another place" in printed
    assert "\x1b" not in printed
    assert "Traceback" not in printed


def test_nothing_in_an_options_help_is_taken_for_markup():
    """Rich drops what stands in square brackets, so a default that is written there would never be seen."""
    seen = 0
    commands = [get_command(cli.app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert Text.from_markup(text).plain == text, f"{command.name} {parameter.name}"
            seen += bool(text)
    assert seen > 100
