"""The examples of examples/extend: a routing method that trains, a source that is encoded, a metric that measures."""

import re
import runpy
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import microdit
from microdit.config.load import load_recipe
from microdit.data.sources.base import Source
from microdit.errors import UserError
from microdit.evaluation.metrics.frechet import fit_gaussian, frechet_distance
from microdit.evaluation.metrics.registry import METRICS, Sets, choose_metrics, measure, steps_to_measure
from microdit.models.config import Size, resolve
from microdit.models.flops import forward_flops
from microdit.models.routing import METHODS, choose_kept
from tests.conftest import busy_model
from tests.python_examples import own_pictures
from tests.test_start_pages import environment

PROJECT = Path(__file__).parents[1]
EXAMPLES = PROJECT / "examples" / "extend"


@pytest.fixture
def example():
    """Run an example as an import does. The rows that it adds are gone after the test."""
    before = dict(METHODS), dict(METRICS)
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for table, rows in zip((METHODS, METRICS), before, strict=True):
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_fewer_than_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_the_routing_method_trains_and_costs_less(example, encoded_emoji, tmp_path):
    overrides = [
        f"data={{path: {encoded_emoji}, resolution: 16}}",
        "model={dim: 32, depth: 4, head_dim: 16, mixer_dim: 32, mixer_depth: 0, num_experts: 0, round_ffn_to: 8, routing: late}",
        "model.patch_size=4",
        "phases=[{name: all, steps: 3, batch_size: 4, learning_rate: 1e-3, mask_ratio: 0.75}]",
        "record={metrics_every: 1, sample_prompts: []}",
    ]
    with pytest.raises(UserError, match=r"model.routing is late, and must be one of none, naive, deferred"):
        load_recipe("emoji-fast", overrides)
    example("routing")
    run = microdit.train("emoji-fast", tmp_path / "run", overrides=overrides)
    losses = [float(loss) for loss in re.findall(r'"loss": ([\d.]+)', (run / "metrics.jsonl").read_text())]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    assert microdit.sample(run, "red heart", microdit.SamplerSettings(num_inference_steps=2))[0].size == (16, 16)


def test_the_routing_method_drops_behind_two_blocks(example):
    """Counted by hand: two blocks see 16 tokens, two see 4."""
    example("routing")
    size = Size(dim=32, depth=4, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, round_ffn_to=8, routing="late")
    model = busy_model(size)
    kept = choose_kept(torch.rand(2, 16), 0.75)
    assert [tokens for _, _, tokens in model.config.tokens_by_block(16, 4)] == [16, 16, 4, 4]
    caption = model.embed_caption(torch.randn(2, 5, 12, dtype=torch.float64))
    patches = model(torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), caption, keep_ids_BK=kept)
    assert patches.shape[:2] == (2, 4)
    none = resolve(replace(size, routing="none"), caption_channels=12)
    assert forward_flops(model.config, 16, 4, 5) < forward_flops(none, 16, 16, 5)


def test_the_source_is_encoded(example, tmp_path):
    """Ten of each shape, through the real encoders; one is looked at in pixels."""
    made = example("data_source")
    source = made["shapes_source"]()
    parts = [replace(part, records=lambda part=part: iter([*part.records()][:10])) for part in source.parts]
    encoded = microdit.encode_dataset(Source(source.name, parts), tmp_path / "shapes")
    assert (len(encoded), encoded.latent_shape()) == (30, (8, 8, 8))
    records = [record for part in source.parts for record in part.records()]
    assert len({record.key for record in records}) == len(records) == 285
    (tmp_path / "disc.png").write_bytes(made["draw"]("red", "disc", 40))
    pixels = np.asarray(Image.open(tmp_path / "disc.png").convert("RGB"), np.int64)
    assert (pixels == [255, 0, 0]).all(-1).sum() == pytest.approx(np.pi * 20**2, rel=0.02)
    assert {part.fingerprint() for part in source.parts} == {part.fingerprint() for part in made["shapes_source"]().parts}


def test_the_metric_measures(example):
    assert "mean-distance" not in METRICS
    example("metric")
    generator = torch.Generator().manual_seed(0)
    sets = Sets(torch.randn(300, 6, generator=generator), torch.randn(200, 6, generator=generator) + 0.5)
    found = measure(*choose_metrics("mean-distance"), sets, 200)
    naive = ((sets.generated_MD.numpy().astype(np.float64).mean(0) - sets.real_ND.numpy().astype(np.float64).mean(0)) ** 2).sum()
    assert found["value"] == pytest.approx(naive, rel=1e-12)
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] < frechet_distance(fit_gaussian(sets.generated_MD), fit_gaussian(sets.real_ND))  # of which it is the first term
    assert steps_to_measure("mean-distance", sets, 200) == 0


def test_the_code_of_the_page_runs(example, tmp_path, monkeypatch):
    """docs/extending.md: the rows are added, the source is encoded."""
    monkeypatch.chdir(tmp_path)
    own_pictures(tmp_path / "my-pictures", 4)
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", (PROJECT / "docs" / "extending.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert METHODS["late"].dense_blocks == (2, 0)
    assert len(names["encoded"]) == 4
    assert measure("mean-distance", Sets(torch.zeros(2, 3), torch.ones(2, 3)), 2)["value"] == 3


@pytest.mark.slow  # the commands of the docstrings, each in a process of its own: minutes
@pytest.mark.parametrize("name", ["routing", "data_source", "metric"])
def test_the_commands_of_the_docstring_run(name, tmp_path):
    (tmp_path / "examples").symlink_to(PROJECT / "examples")
    before = {  # what the commands presuppose, and few steps in the place of hundreds
        "routing": ["microdit data encode emoji:held_out --out data/emoji", "microdit data encode scenes:40 --out data/scenes"],
        "metric": [
            "microdit data encode emoji:held_out --out data/emoji",
            "microdit data encode scenes:40 --out data/scenes",
            "microdit train emoji-fast phases.0.steps=4 phases.0.batch_size=8 --out runs/emoji",
        ],
    }
    lines = re.findall(r"^    ((?:python|microdit) .+)$", (EXAMPLES / f"{name}.py").read_text(), re.MULTILINE)
    assert lines
    for line in [*before.get(name, []), *lines]:
        short = f"{line} phases.0.steps=4 phases.0.batch_size=8" if " train emoji-fast model.routing" in line else line
        words = shlex.split(short.replace("-n 256", "-n 8"))
        done = subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
