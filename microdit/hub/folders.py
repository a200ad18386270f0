"""A pipeline's folder on the disk: written beside and renamed, so that it is there whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microdit.errors import UserError
from microdit.files import aside_of, stale_asides
from microdit.foreign_json import parse_json

RECORD = "record.json"  # where a model comes from: written by us beside what diffusers reads
CARD = "README.md"


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError if there is something at `folder`, other than an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty: name another folder, or delete it first.")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into an empty folder beside `folder`, which then takes its name.

    Raises UserError if the name is taken, or the disk is full.
    """
    refuse_to_overwrite(folder)
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
    """The libraries write where a component was loaded from, which is nobody else's business."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Empty if there is none, or it makes no sense: nothing is drawn by it."""
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
