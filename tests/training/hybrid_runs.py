"""What each of the processes does in `test_hybrid.py`: short runs, one after the other, with all that must know of sharding."""

import shutil
from pathlib import Path

import pytest

from microdit.cli.terminal import reporter
from microdit.config.load import load_recipe
from microdit.distributed import start_world, stop_world
from microdit.training.multi_phase import RunSettings, train_one
from tests.training.processes import RECIPE

SHORT = (
    *("phases.0.steps=1", "phases.1.steps=1", "phases.0.batch_size=8", "phases.1.batch_size=8", "phases.0.learning_rate=1e-3"),
    *("record.keep_checkpoints=9", "record.metrics_every=1", "record.held_out_every=1"),
    *("optimizer.eps=0.1", "ema=[{decay: 0.9}, {decay: 0.5, start: 1}]"),  # so large an eps that AdamW does not magnify rounding
)
WAYS = {
    "adamw": ["record.checkpoint_every=1"],
    "roomless": [],
    "muon": ["optimizer.method=muon"],
    "int8": ["optimizer.moments=int8", "engine.averages_on_cpu=true"],
}


def train_all(folder: Path, data: Path, first: Path) -> None:
    """Train by each of `WAYS`, from the weights of the run `first`. Several are hybrid, and go on in a copy of one run by FSDP."""
    world = start_world("cpu")
    settings = [*SHORT, f"data.path={data}", f"data.held_out={data}", f"init_from={first}"]
    engine = ["engine.sharding=hybrid", "engine.micro_batch=1"] if world.size > 1 else []
    for way, more in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            if way == "roomless":
                patch.setattr("microdit.training.gradients.spare", lambda wanted, device: False)
            train_one(load_recipe(RECIPE, [*settings, *engine, *more]), folder / way, RunSettings(), reporter, world)
    if world.size > 1:
        copy = folder / "resumed"
        if world.is_main:
            shutil.copytree(folder / "adamw", copy)
            shutil.rmtree(copy / "checkpoints" / "step-00000002")
        world.wait_for_all()
        train_one(load_recipe(RECIPE, [*settings, "engine.sharding=fsdp"]), copy, RunSettings(resume=True), reporter, world)
    stop_world()
