"""`microdit export`: a run as a folder that diffusers loads, with a model card and a record of where it comes from."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import microdit
from microdit.checkpoint import Checkpoint, check_finite, default_weights
from microdit.data.manifest import MANIFEST
from microdit.errors import UserError
from microdit.io.files import aside_of, from_checked_json, read_regular, stale_asides
from microdit.io.untrusted_text import parse_json
from microdit.pipelines.model_card import card_of_run
from microdit.pipelines.pipeline import MicroDiTPipeline, newest_checkpoint
from microdit.reports.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "float16": torch.float16}
Dtype = Literal["float32", "float16"]
RECORD = "record.json"  # where a model comes from: written beside what diffusers reads
CARD = "README.md"


def export_run(
    run: Path, out: Path, warn: Callable[[str], None], weights: str | None = None, dtype: Dtype = "float32", flops: float | None = None
) -> int:
    """Write the newest intact checkpoint of `run` to the folder `out`. `flops` of the whole training go into the record.

    Returns the folder's size in bytes. Raises UserError if there is no such checkpoint, if `out` is not empty, or if it cannot be written.
    """
    check_is_free(out)
    checkpoint = newest_checkpoint(run, warn, weights)
    pipeline = MicroDiTPipeline.from_checkpoint(checkpoint, weights)
    record = _record(run, checkpoint, pipeline, weights or default_weights(checkpoint), dtype, flops)
    convert_parts(pipeline, dtype, f"As {dtype}, the weights", "export with --dtype float32")
    save_pipeline(pipeline, out, record, card_of_run(out.name, record))
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def convert_parts(pipeline: MicroDiTPipeline, dtype: Dtype, what: str, fix: str) -> None:
    """Convert all weights of all components to `dtype`, for the disk.

    Raises UserError if a component then has weights that are not finite, as those too large for 16 bits are. `what` begins the sentence.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to(DTYPES[dtype])
            check_finite(dict(part.named_parameters()), f"{what} ({name})", fix)


def save_pipeline(pipeline: MicroDiTPipeline, out: Path, record: dict[str, Any], card: str) -> None:
    """Write a pipeline's folder with its record and model card. Raises UserError as `write_folder`."""

    def fill(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")

    write_folder(out, fill)


def check_is_free(folder: Path) -> None:
    """Raise UserError if there is something at `folder`, other than an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name another folder, or delete it first.")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into an empty folder beside `folder`, and then give it that name: it is there whole or not at all.

    Raises UserError if the name is taken, or the disk is full.
    """
    check_is_free(folder)
    folder = folder.resolve()
    aside = aside_of(folder)
    try:
        for left in (aside, *stale_asides(folder.parent, folder.name)):
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        for path in aside.glob("*/config.json"):
            _forget_this_machine(path)
        for path in aside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the libraries write weights for their owner alone
        if folder.is_dir():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _forget_this_machine(config: Path) -> None:
    """Remove from a config.json where its component was loaded from, which the libraries write."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a pipeline's folder; empty if there is none or it is damaged, since sampling does not depend on it."""
    try:
        record = parse_json(read_regular(folder / RECORD))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _record(
    run: Path, checkpoint: Checkpoint, pipeline: MicroDiTPipeline, weights: str, dtype: Dtype, flops: float | None
) -> dict[str, Any]:
    """Return what the run says of itself; what it has not measured is left out."""
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
    """Return rows and fingerprint of an encoded set, with its source and licence if it is still there."""
    card = _read_object(Path(found["path"]) / MANIFEST)
    return {"rows": found["rows"], "fingerprint": found["fingerprint"], "source": card.get("source"), "license": card.get("license")}


def _measured(path: Path, step: int) -> dict[str, Any]:
    """Return what `microdit evaluate` has written, if it was about these weights; else nothing."""
    measured = _read_object(path)
    return measured if measured.get("step") == step else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return from_checked_json(read_regular(path))
    except (OSError, ValueError):
        return {}
