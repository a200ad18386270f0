"""`microdit export`: a run as a folder that diffusers loads, with a model card and a record of where it comes from."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import microdit
from microdit.checkpoint import Checkpoint, default_weights
from microdit.data.manifest import MANIFEST
from microdit.io.files import from_checked_json
from microdit.pipelines.convert import CARD, refuse_infinite_parts, refuse_to_overwrite, to_diffusers, write_folder, write_record
from microdit.pipelines.model_card import card_of_run
from microdit.pipelines.native import Pipeline
from microdit.reports.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "float16": torch.float16}
Dtype = Literal["float32", "float16"]


def export_run(
    run: Path, out: Path, warn: Callable[[str], None], weights: str | None = None, dtype: Dtype = "float32", flops: float | None = None
) -> int:
    """Write the newest whole checkpoint of `run` to the folder `out`. `flops` of the whole training go into the record.

    Returns the folder's bytes. Raises UserError if there is no such checkpoint, if `out` is not empty, or if it cannot be written.
    """
    refuse_to_overwrite(out)
    pipeline, checkpoint = Pipeline.from_run(run, warn, weights)
    record = _record(run, checkpoint, pipeline, weights or default_weights(checkpoint), dtype, flops)
    exported = to_diffusers(pipeline).to(DTYPES[dtype])
    refuse_infinite_parts(exported, f"As {dtype}, the weights", "export with --dtype float32")

    def fill(folder: Path) -> None:
        exported.save_pretrained(folder)
        write_record(folder, record)
        (folder / CARD).write_text(card_of_run(out.name, record), encoding="utf-8")

    write_folder(out, fill)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _record(run: Path, checkpoint: Checkpoint, pipeline: Pipeline, weights: str, dtype: Dtype, flops: float | None) -> dict[str, Any]:
    """All numbers are the run's own; what it has not measured is left out."""
    state, folder = checkpoint.state, RunFolder(run)
    started = folder.starts[-1] if folder.starts else {}
    figures = {
        name: measured
        for name, path in {"emoji": run / "metrics.json", "reference": run / "evaluation" / "metrics.json"}.items()
        if (measured := _measured(path, checkpoint.step))
    }
    return {
        "name": state["recipe"].get("name", run.resolve().name),
        "step": checkpoint.step,
        "weights": weights,
        "dtype": dtype,
        "parameters": sum(weight.numel() for weight in pipeline.model.parameters()),
        **{key: state[key] for key in ("images_seen", "gpu_hours", "dollars") if state.get(key) is not None},
        **({} if flops is None else {"flops": flops}),
        "device": started.get("device"),
        "git_commit": started.get("git_commit"),
        "versions": {"microdit": microdit.__version__, "torch": torch.__version__, "diffusers": version("diffusers")},
        "data": state["data"],
        "sets": {name: _set(one) for name, one in state["sets"].items()},
        "figures": figures,
        "recipe": state["recipe"],
    }


def _set(found: dict[str, Any]) -> dict[str, Any]:
    """Rows and fingerprint of an encoded set; source and licence too, where it still lies."""
    card = _read_object(Path(found["path"]) / MANIFEST)
    return {"rows": found["rows"], "fingerprint": found["fingerprint"], "source": card.get("source"), "license": card.get("license")}


def _measured(path: Path, step: int) -> dict[str, Any]:
    """What `microdit evaluate` has written, if it was of these weights; else nothing."""
    measured = _read_object(path)
    return measured if measured.get("step") == step else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return from_checked_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
