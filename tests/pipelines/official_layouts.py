"""The authors' checkpoints in every layout, made of the weights that their own code made for the fixture."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD_DIM = 16  # of the fixture's model


def official_weights(fixture: Path) -> dict[str, Tensor]:
    return {name.removeprefix("state."): tensor for name, tensor in load_file(fixture).items() if name.startswith("state.")}


def save_bare(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)


def save_whole_model(weights: dict[str, Tensor], path: Path) -> None:
    """A latent diffusion model's state dict, compiled, with a bit of its autoencoder."""
    torch.save(
        {**{f"dit._orig_mod.{name}": tensor for name, tensor in weights.items()}, "vae.decoder.conv_in.weight": torch.zeros(2)}, path
    )


def save_training_state(weights: dict[str, Tensor], path: Path) -> None:
    """Composer's: the model, its optimizer, times, and the state of every random generator."""
    moments = {f"dit.{name}": {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(tensor)} for name, tensor in weights.items()}
    state: dict[str, Any] = {
        "model": {**{f"dit.{name}": tensor for name, tensor in weights.items()}, "text_encoder.encoder.logit_scale": torch.zeros(())},
        "optimizers": {"AdamW": {"state": moments, "param_groups": [{"lr": 8e-5, "betas": [0.9, 0.999]}]}},
        "timestamp": {"Timestamp": {"batch": 5000, "total_wct": datetime.timedelta(hours=3)}},
        "run_name": "MicroDiTXL_mask_0_res_512_finetune",
    }
    rng = [{"python": (3, (1, 2, 3), None), "numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}]
    torch.save({"state": state, "rng": rng}, path)


def save_flat_training_state(weights: dict[str, Tensor], path: Path) -> None:
    """The same with one name for each tensor, as safetensors."""
    save_file({f"state.model.dit.{name}": tensor for name, tensor in weights.items()} | {"state.step": torch.zeros(1)}, path)


LAYOUTS = {
    "bare.pt": save_bare,
    "model.pt": save_whole_model,
    "training.pt": save_training_state,
    "training.safetensors": save_flat_training_state,
}
