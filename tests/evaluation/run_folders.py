"""Run folders as training and evaluation leave them, without either: the files' own writers, fed with numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from microdit.config.load import load_recipe
from microdit.distributed import start_world
from microdit.models.config import Size, resolve
from microdit.training.checkpointing import CheckpointWriter
from microdit.training.logging import RunRecord
from tests.training.processes import RECIPE

CONFIG = resolve(Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, round_ffn_to=8), caption_channels=12)
MEASURED: dict[str, Any] = {  # as `microdit evaluate` writes it
    "run": "runs/try",
    "step": 60,
    "images_seen": 1920,
    "reference": {"source": "coco2014", "pictures": 40504, "side": 256, "fingerprint": "ab"},
    "pictures": 30000,
    "settings": {"num_inference_steps": 30, "guidance_scale": 1.5, "seed": 0, "weights": None},
    "metrics": {"fid": {"value": 14.2, "low": 14.0, "high": 14.4, "network": "inception-2015-12-05", "fingerprint": "cd", "resize": "x"}},
}


def trained(run: Path) -> Path:
    """Finished after 6 GPU-hours and $7.50."""
    record = RunRecord(run, load_recipe(RECIPE), pytest.fail, forget_after=0)
    record.started({}, {"device": "A100", "world_size": 1})
    record.status("finished", gpu_hours=6.0, dollars=7.5)
    record.close()
    saver = CheckpointWriter(run, start_world("cpu"), keep=1, keep_every=None, warn=pytest.fail)
    state = {"model": asdict(CONFIG), "sets": {"a": {"rows": 40}, "b": {"rows": 2}}, "images_seen": 2048}
    saver.save(64, {"model/w": torch.zeros(1)}, state, ["model"])
    assert saver.finish()
    return run


def evaluated(run: Path, content: dict[str, Any] = MEASURED) -> Path:
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "metrics.json").write_text(json.dumps(content))
    return run
