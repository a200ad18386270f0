"""Run folders as the trainer leaves them, without its work: the weights are a fresh model's, or whatever a test wants."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.distributed import start_world
from microdit.models.microdit import MicroDiT
from microdit.training.checkpointing import CheckpointWriter
from microdit.training.setup import describe, model_config
from tests.training.processes import RECIPE


def save_untrained(run: Path, encoded: Path, step: int, change: Callable[[Tensor], Tensor] = torch.clone, in_haste: bool = False) -> Path:
    """Add a checkpoint of `step` to `run`. Every weight is what `change` makes of it, and every average the negative of that.

    `in_haste`: as before a machine is taken away, with nothing but the shards.
    """
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded}"]), EncodedDataset(encoded, 16)
    torch.manual_seed(0)
    model = MicroDiT(model_config(recipe, data))
    weights = {name: change(weight.detach()) for name, weight in model.named_parameters()}
    tensors = {f"model/{name}": weight for name, weight in weights.items()} | {f"ema/{name}": -weight for name, weight in weights.items()}
    saver = CheckpointWriter(run, start_world("cpu"), keep=9, keep_every=None, warn=pytest.fail)
    saver.save(step, tensors, describe(recipe, model.config, data, [data]), [] if in_haste else ["model", "ema"])
    assert saver.finish()
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    return run
