"""The tiny trained model, as the app holds it."""

from pathlib import Path

import pytest

from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings

LONG = SamplerSettings(num_inference_steps=1000)  # long enough to be called off on any machine


def pytest_pycollect_makemodule() -> None:
    """Skip the folder where the extra `app` is not installed."""
    pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def tiny_run(workplace: Path) -> Path:
    return workplace / "runs/tiny"


@pytest.fixture(scope="session")
def tiny(tiny_run: Path) -> MicroDiTPipeline:
    return MicroDiTPipeline.from_pretrained(tiny_run)
