"""microdit: train text-to-image diffusion transformers from scratch on a micro-budget.

The names below are imported from their modules when they are first used, so `import microdit` itself loads no library.
docs/python.md shows how they are used together.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microdit.api import encode_dataset, evaluate, sample, train
    from microdit.config.load import load_recipe
    from microdit.config.schema import Recipe
    from microdit.data.dataset import EncodedDataset
    from microdit.data.sources.open import open_source
    from microdit.diffusion.edm import EDM, edm_loss
    from microdit.diffusion.flow import Flow
    from microdit.diffusion.objective import denoising_loss
    from microdit.errors import UserError
    from microdit.models.config import create_model, list_models
    from microdit.models.microdit import MicroDiT, ModelConfig
    from microdit.pipelines.pipeline import MicroDiTPipeline
    from microdit.pipelines.settings import SamplerSettings

__version__ = "0.2.0"

_EXPORTS = {
    "EDM": "microdit.diffusion.edm",
    "EncodedDataset": "microdit.data.dataset",
    "Flow": "microdit.diffusion.flow",
    "MicroDiT": "microdit.models.microdit",
    "MicroDiTPipeline": "microdit.pipelines.pipeline",
    "ModelConfig": "microdit.models.microdit",
    "Recipe": "microdit.config.schema",
    "SamplerSettings": "microdit.pipelines.settings",
    "UserError": "microdit.errors",
    "create_model": "microdit.models.config",
    "denoising_loss": "microdit.diffusion.objective",
    "edm_loss": "microdit.diffusion.edm",
    "encode_dataset": "microdit.api",
    "evaluate": "microdit.api",
    "list_models": "microdit.models.config",
    "load_recipe": "microdit.config.load",
    "open_source": "microdit.data.sources.open",
    "sample": "microdit.api",
    "train": "microdit.api",
}

__all__ = [
    "EDM",
    "EncodedDataset",
    "Flow",
    "MicroDiT",
    "MicroDiTPipeline",
    "ModelConfig",
    "Recipe",
    "SamplerSettings",
    "UserError",
    "__version__",
    "create_model",
    "denoising_loss",
    "edm_loss",
    "encode_dataset",
    "evaluate",
    "list_models",
    "load_recipe",
    "open_source",
    "sample",
    "train",
]

# Before PyTorch is imported: how long its OpenMP threads spin while they wait for each other. By libgomp's default, training beside other
# programs is almost twice as slow, since a thread spins for one that does not run (benchmarks/spinning.py).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Before diffusers is imported, wherever that is: it warns of its own configuration keys, and of packages that are not needed.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'microdit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
